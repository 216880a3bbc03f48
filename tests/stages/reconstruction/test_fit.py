"""The fit against plain AdamW on masked float32 parameters, and what it must never do to a pruned weight."""

import copy
import math

import pytest
import torch
from fitting import CALLS, HIDDEN, LENGTH, Problem
from streaming import bits, same_bits
from torch import Tensor, nn

from espalier.stages.reconstruction import fit as reconstruct
from espalier.stages.reconstruction.fit import (
    FitSettings,
    learning_rate_at,
    rate_unit,
    relative_error,
    split_samples,
    weight_rms,
)
from espalier.stages.reconstruction.target import Target
from espalier.stages.storage.spool import Spool, SpoolBudget


@pytest.fixture(params=["float32", "bfloat16"])
def either_path(request, monkeypatch) -> None:
    monkeypatch.setattr(Problem, "fitted_in", getattr(torch, request.param))


def plainly(problem: Problem, settings: FitSettings) -> dict[str, Tensor]:
    """AdamW as PyTorch has it, on float32 parameters multiplied by their masks in the forward pass."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in problem.pruned.named().items()}
    fitted, _ = split_samples(len(problem.x))
    steps = settings.epochs * -(-len(fitted) // settings.batch)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, weight_decay=0.0, fused=False, foreach=False)
    generator = torch.Generator().manual_seed(settings.seed)
    step = 0
    for _ in range(settings.epochs):
        order = [fitted[i] for i in torch.randperm(len(fitted), generator=generator).tolist()]
        for start in range(0, len(order), settings.batch):
            batch = order[start : start + settings.batch]
            w = {name: p * problem.keep[name] if name in problem.keep else p for name, p in parameters.items()}
            x = problem.x[batch]
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w["0.norm.weight"]
            inner = nn.functional.silu(normed @ w["0.mlp.up.weight"].T + w["0.mlp.up.bias"])
            loss = (inner @ w["0.mlp.down.weight"].T - problem.y[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, steps, settings.learning_rate * problem.rms)
            optimizer.step()
            step += 1
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize(
    ("samples", "epochs", "batch"), [(2, 1, 2), (10, 1, 2), (10, 3, 4), (1, 2, 2)], ids=["one step", "5", "9", "alone"]
)
def test_the_fit_is_plain_adamw_on_masked_parameters(tmp_path, monkeypatch, samples, epochs, batch) -> None:
    monkeypatch.setattr(reconstruct, "SHARES", (1.0,))
    problem = Problem(tmp_path, samples)
    settings = {"epochs": epochs, "batch": batch, "learning_rate": 0.01, "seed": 7}
    parameters, report = problem.fit(**settings)
    assert report.improved
    expected = plainly(problem, FitSettings(**settings))
    assert (
        set(parameters)
        == set(expected)
        == {f"0.{name}" for name in ("norm.weight", "mlp.up.weight", "mlp.up.bias", "mlp.down.weight")}
    )
    moved = 0.0
    for name, tensor in parameters.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
        moved = max(moved, float((tensor - problem.pruned.named()[name]).abs().max()))
    assert moved > 1e-3, "the agreement would mean little if nothing had moved"
    fitted, held = map(len, split_samples(samples))
    assert report.steps == epochs * -(-fitted // batch)
    assert report.learning_rate == pytest.approx(0.01 * problem.rms)
    forward = 2 * (2 * HIDDEN * 12) * LENGTH  # two matrices, a multiplication and an addition a weight and token
    assert report.flops == forward * (3 * fitted * epochs + 2 * held)


def test_steps_taken_a_stretch_at_a_time_are_the_same(tmp_path, either_path, monkeypatch) -> None:
    whole = Problem(tmp_path).fit(epochs=2)[0]
    monkeypatch.setattr(reconstruct, "STEPPED_AT_A_TIME", 56)
    pieces = Problem(tmp_path).fit(epochs=2)[0]
    for name, tensor in pieces.items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learning_rate", [0.01, 0.5])
def test_a_pruned_weight_stays_plus_zero(tmp_path, either_path, dtype, learning_rate) -> None:
    problem = Problem(tmp_path, dtype=dtype)
    parameters, _ = problem.fit(epochs=4, learning_rate=learning_rate)
    for name, keep in problem.keep.items():
        assert parameters[name].dtype == dtype
        assert not any(bits(parameters[name][~keep])), f"{name} holds a pruned weight that is not +0.0"
        assert (parameters[name][keep] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_gains_biases_and_kept_weights_move_and_the_error_falls(tmp_path, either_path, dtype) -> None:
    problem = Problem(tmp_path, samples=32, dtype=dtype)
    parameters, report = problem.fit(epochs=5, learning_rate=0.03)
    assert report.improved
    assert report.error_after < 0.8 * report.error_before
    for name, tensor in parameters.items():
        before = problem.pruned.named()[name]
        kept = problem.keep.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert float((tensor != before)[kept].float().mean()) > 0.5, f"{name} did not move"


def test_the_reported_errors_are_those_of_the_held_out_samples(tmp_path, either_path) -> None:
    problem = Problem(tmp_path, samples=17)
    parameters, report = problem.fit(epochs=2, learning_rate=0.02)
    held = [7, 15]
    fitted = copy.deepcopy(problem.pruned)
    for name, parameter in fitted.named().items():
        parameter.data.copy_(parameters[name])
    target = problem.y[held].double()
    for unit, reported in ((problem.pruned, report.error_before), (fitted, report.error_after)):
        difference = unit(problem.x[held], CALLS).double() - target
        assert reported == pytest.approx(float(difference.square().sum() / target.square().sum()), rel=1e-4)
    assert relative_error(problem.dense, CALLS, problem.inputs, Target(problem.targets), held) < 1e-12


@pytest.mark.parametrize("learning_rate", [1e4, 1e36], ids=["worse", "overflows"])
def test_a_unit_that_did_not_improve_is_put_back(tmp_path, either_path, learning_rate) -> None:
    problem = Problem(tmp_path)
    before = {name: parameter.clone() for name, parameter in problem.pruned.named().items()}
    parameters, report = problem.fit(learning_rate=learning_rate)
    assert not report.improved
    assert report.error_after == report.error_before > 0
    for name, tensor in parameters.items():
        assert same_bits(tensor, before[name]), name


def test_a_weight_that_outgrows_float16_puts_the_unit_back(tmp_path, monkeypatch) -> None:
    """Written back it would be infinite. The error does not show it: no held-out sample reaches it, like an expert that
    none is routed to."""
    problem = Problem(tmp_path, samples=16, dtype=torch.float16)
    problem.pruned.parts[1].up.weight.data[0, 0] = 65504.0  # the largest there is
    problem.keep["0.mlp.up.weight"][0, 0] = True

    def beyond(weights: list[Tensor], *_: object, **__: object) -> None:
        weights[0][weights[0] == 65504.0] = 65600.0

    monkeypatch.setattr(reconstruct, "adamw", beyond)
    errors = iter([0.5, 0.1, 0.1, 0.1])
    monkeypatch.setattr(reconstruct, "relative_error", lambda *arguments: next(errors))
    parameters, report = problem.fit()
    assert not report.improved and report.error_after == report.error_before == 0.5 and report.share == 0
    for name, parameter in problem.pruned.named().items():
        assert parameters[name].dtype == torch.float16 and torch.equal(parameters[name], parameter)


def test_a_unit_within_the_tolerance_is_left_as_it_is(tmp_path) -> None:
    problem = Problem(tmp_path)
    _, report = problem.fit()
    assert report.improved and report.steps
    parameters, report = problem.fit(tolerance=report.error_before)
    assert (report.improved, report.share, report.steps) == (False, 0, 0)
    assert report.error_after == report.error_before > 0 and report.flops > 0
    assert all(torch.equal(parameters[name], parameter) for name, parameter in problem.pruned.named().items())


@pytest.mark.parametrize(
    ("errors", "share"),
    [
        ((0.5, 0.3, 0.4), 1.0),
        ((0.5, 0.3, 0.2, 0.25), 0.5),
        ((0.5, 0.6, 0.4, 0.2), 0.25),
        ((0.5, math.nan, 0.4, 0.45), 0.5),
    ],
)
def test_the_unit_goes_back_on_its_way_while_that_helps(tmp_path, monkeypatch, errors, share) -> None:
    monkeypatch.setattr(reconstruct, "SHARES", (1.0,))
    problem = Problem(tmp_path)
    ended, report = problem.fit(epochs=2)
    assert report.improved and report.share == 1
    given = iter(errors)
    monkeypatch.setattr(reconstruct, "SHARES", (1.0, 0.5, 0.25))
    monkeypatch.setattr(reconstruct, "relative_error", lambda *arguments: next(given))
    parameters, report = problem.fit(epochs=2)
    assert (report.share, report.error_after) == (share, min(error for error in errors if error == error))
    assert next(given, None) is None, "no more was tried"
    for name, parameter in problem.pruned.named().items():
        there = parameter.detach() + share * (ended[name] - parameter.detach())
        torch.testing.assert_close(parameters[name], there, rtol=0, atol=1e-6)


def test_the_unit_that_came_in_is_left_as_it_was(tmp_path, either_path) -> None:
    problem = Problem(tmp_path)
    before = {name: parameter.clone() for name, parameter in problem.pruned.named().items()}
    _, report = problem.fit()
    assert report.improved
    for name, parameter in problem.pruned.named().items():
        assert same_bits(parameter, before[name]), name
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order(tmp_path, either_path) -> None:
    fits = [Problem(tmp_path).fit(seed=seed)[0] for seed in (4, 4, 5)]
    assert all(same_bits(fits[0][name], fits[1][name]) for name in fits[0])
    assert not torch.equal(fits[0]["0.mlp.up.weight"], fits[2]["0.mlp.up.weight"])


def test_the_global_random_state_plays_no_part(tmp_path) -> None:
    first = Problem(tmp_path).fit()[0]
    torch.rand(3)
    state = torch.get_rng_state()
    second = Problem(tmp_path).fit()[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 57, 1000])
def test_the_learning_rate_warms_up_and_decays(steps) -> None:
    rates = [learning_rate_at(step, steps, 2.0) for step in range(steps)]
    warm = max(1, round(steps / 10))
    assert rates[0] == pytest.approx(2.0 / warm)
    assert max(rates) == rates[warm - 1] == 2.0
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert min(rates) > 0
    if steps > warm:
        assert rates[-1] == pytest.approx(2.0 / (steps - warm))
        assert learning_rate_at(steps, steps, 2.0) == 0


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 16, 128])
def test_an_eighth_of_the_samples_is_held_out(samples) -> None:
    fitted, held = split_samples(samples)
    assert len(held) == max(1, samples // 8)
    assert sorted({*fitted, *held}) == list(range(samples))
    assert fitted == sorted(fitted)
    if samples > 1:
        assert not set(fitted) & set(held)
    else:
        assert fitted == held == [0]


def test_the_rms_is_over_all_weights_together() -> None:
    weights = [torch.full((2, 3), 3.0), torch.full((1, 2), -1.0, dtype=torch.bfloat16)]
    assert [weight_rms(weight) for weight in weights] == [3.0, 1.0]
    assert weight_rms(torch.zeros(3)) == 0
    assert rate_unit([(3.0, 6), (1.0, 2)], 16) == pytest.approx(((6 * 9 + 2 * 1) / 8) ** 0.5 / 4)


def test_a_target_takes_back_a_share_of_the_error_in_its_input(tmp_path) -> None:
    values = {name: torch.randn(3, LENGTH, HIDDEN) for name in ("outputs", "dense", "given")}
    spools = {name: Spool(tmp_path / f"{name}.arrow", SpoolBudget(1 << 20)) for name in values}
    for name, spool in spools.items():
        spool.append(values[name])
    y, x, given = (values[name][[2, 0]] for name in ("outputs", "dense", "given"))
    assert torch.equal(Target(spools["outputs"]).batch([2, 0]), y)
    for shift in (0.3, 1.0, -0.7):
        shifted = Target(spools["outputs"], spools["dense"], spools["given"], shift).batch([2, 0])
        torch.testing.assert_close(shifted, y + shift * (x - given))
    with pytest.raises(ValueError, match="needs the dense inputs"):
        Target(spools["outputs"], shift=0.5)
