"""Scores against float64 arithmetic, their options, and what may go wrong with them."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from espalier.stages.criteria import equations as criteria
from espalier.stages.criteria.equations import CRITERIA
from espalier.stages.criteria.scoring import check_criterion, check_options, find_criterion, score, score_rows
from espalier.stages.errors import Refusal
from espalier.stages.masks import keep_mask
from espalier.stages.statistics import InputStatistics

BY_WEIGHT = [name for name, criterion in CRITERIA.items() if not criterion.from_shadow]  # the others: test_temporal


def statistics_of(x: torch.Tensor) -> InputStatistics:
    """Of x (samples, tokens, channels), with everything that any criterion needs."""
    statistics = InputStatistics(x.shape[-1], hessian=True)
    statistics.update(x)
    return statistics


def relative(weight: Tensor, p: float) -> Tensor:
    """|W| over its column's ℓp norm and over its row's, element by element."""
    result = torch.zeros_like(weight)
    for i, j in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        for line in (weight[i], weight[:, j]):
            size = line.norm(p=p)
            result[i, j] += weight[i, j].abs() / size if size > 0 else 0.0
    return result


def brute_force(name: str, weight: Tensor, x: Tensor, alpha: float = 0.5, p: float = 1.0) -> Tensor:
    """The formulas of methods §2 in float64, from the inputs themselves. x (samples, tokens, channels)."""
    samples = len(x)
    weight, x = weight.double(), x.double().reshape(-1, x.shape[-1])
    inputs, outputs = x.norm(dim=0), (x @ weight.T).norm(dim=0)[:, None]
    if name == "sparsegpt":
        hessian = 2 / samples * x.T @ x
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = 1.0
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
        upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        return (weight * ~dead).square() / upper.diagonal().square()
    if name in ("ria", "lp-ria"):
        return relative(weight, p) * (inputs / samples**0.5) ** alpha
    return (
        weight.abs()
        * {"magnitude": 1.0, "wanda": inputs, "alps": inputs, "owanda": outputs, "symwanda": inputs + outputs}[name]
    )


def example(dtype: torch.dtype = torch.float32, rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator).to(dtype), torch.randn(3, 5, 8, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in BY_WEIGHT if name != "stochria"])
def test_scores_equal_the_formulas_in_float64(name, dtype) -> None:
    weight, x = example(dtype)
    scores = score(name, weight, statistics_of(x))
    assert scores.dtype == torch.float32
    tolerance = 2e-4 if name == "sparsegpt" else 2e-6  # a float32 factorisation; one of a few roundings
    torch.testing.assert_close(scores.double(), brute_force(name, weight, x), rtol=tolerance, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_relative_importance_under_every_norm_and_exponent(p, alpha) -> None:
    weight, x = example(seed=1)
    expected = brute_force("lp-ria", weight, x, alpha, p)
    torch.testing.assert_close(
        score("lp-ria", weight, statistics_of(x), alpha=alpha, p=p).double(), expected, rtol=2e-6, atol=0
    )
    if p == 1:
        assert torch.equal(
            score("ria", weight, statistics_of(x), alpha=alpha), score("lp-ria", weight, statistics_of(x), alpha=alpha)
        )


def test_wanda_equals_magnitude_on_isotropic_inputs() -> None:
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    statistics = statistics_of(torch.eye(8).repeat(4, 1)[None])  # every channel has the norm 2
    for choice in ({"sparsity": 0.5}, {"pattern": (2, 4)}, {"sparsity": 0.3, "scope": "matrix"}):
        wanda, magnitude = (keep_mask(score(name, weight, statistics), **choice) for name in ("wanda", "magnitude"))
        assert torch.equal(wanda, magnitude)


def test_wanda_follows_the_inputs() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    statistics = statistics_of(torch.tensor([[[9.0, 1.0, 1.0, 0.0]]]))
    assert keep_mask(score("wanda", weight, statistics), 0.5).tolist() == [[True, False, True, False]]
    assert keep_mask(score("magnitude", weight, statistics), 0.5).tolist() == [[False, False, True, True]]


def test_relative_importance_spares_a_row_that_is_small_as_a_whole() -> None:
    weight = torch.tensor([[4.0, 5.0, 6.0, 4.0]] * 8 + [[0.1, 0.2, 0.3, 0.4]])
    keep = {
        name: keep_mask(score(name, weight, statistics_of(torch.eye(4)[None])), 0.5, scope="matrix")
        for name in ("magnitude", "ria")
    }
    assert not keep["magnitude"][8].any()
    assert keep["ria"][8].any()


# Rows a few at a time


@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("name", BY_WEIGHT)
def test_scoring_a_few_rows_at_a_time_changes_no_mask(name, layout, monkeypatch) -> None:
    weight, x = example(torch.bfloat16, rows=11)
    if layout == "transposed":
        weight = weight.T.contiguous().T
    statistics = statistics_of(x)
    whole = score(name, weight, statistics)
    for weights in (1, 20, 1000):
        monkeypatch.setattr(criteria, "CPU_WEIGHTS", weights)
        parts = list(score_rows(name, weight, statistics))
        assert [len(scores) for _, scores in parts] == [len(weight[rows]) for rows, _ in parts]
        assert len(parts) == (11 if weights == 1 else 6 if weights == 20 else 1)
        together = torch.cat([scores for _, scores in parts])
        torch.testing.assert_close(together, whole, rtol=1e-6, atol=0)
        assert torch.equal(keep_mask(together, 0.5), keep_mask(whole, 0.5))


def test_no_criterion_makes_a_float32_copy_of_a_bf16_layer() -> None:
    weight = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    statistics = statistics_of(torch.randn(1, 4, 2048, generator=torch.Generator().manual_seed(1)))
    for name in set(BY_WEIGHT) - {"sparsegpt", "owanda", "symwanda"}:  # these hold an (I, I) matrix anyway
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            for _ in score_rows(name, weight, statistics):
                pass
        largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
        assert 0 < largest < weight.numel() * 2, name


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_the_weight_is_left_as_it_was(name) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = example(dtype)
        before = weight.clone()
        score(name, weight, statistics_of(x))
        assert torch.equal(weight, before)


# Degenerate layers


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_rows_and_columns_of_zeros_score_zero_and_go_first(name) -> None:
    weight, x = example(rows=8)
    weight[3], weight[:, 5] = 0.0, 0.0
    scores = score(name, weight, statistics_of(x))
    assert scores.isfinite().all()
    assert (scores[3] == 0).all() and (scores[:, 5] == 0).all()
    assert not keep_mask(scores, 0.5)[[0, 1, 2, 4, 5, 6, 7], 5].any()


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_a_layer_of_zeros_and_a_dead_channel_give_finite_scores(name) -> None:
    weight, x = example()
    x[..., 2] = 0.0
    scores = score(name, weight, statistics_of(x))
    assert scores.isfinite().all() and (scores >= 0).all()
    if name not in ("magnitude", "owanda", "symwanda"):
        assert (scores[:, 2] == 0).all()
    assert (score(name, torch.zeros(6, 8), statistics_of(x)) == 0).all()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_weights_at_the_edge_of_float32_keep_their_relative_importance(p) -> None:
    weight, x = example()
    for size in (1e-25, 1e25):
        torch.testing.assert_close(
            score("lp-ria", weight * size, statistics_of(x), p=p), score("lp-ria", weight, statistics_of(x), p=p)
        )
    tiny = weight.clone()
    tiny[2] *= 1e-44  # subnormal
    assert score("lp-ria", tiny, statistics_of(x), p=p).isfinite().all()


def test_fewer_tokens_than_channels_still_give_a_sparsegpt_score() -> None:
    weight, _ = example()
    x = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(3))
    assert (score("sparsegpt", weight, statistics_of(x)) > 0).all()


# stochRIA's draws


def test_stochria_repeats_with_its_seed_and_changes_with_another() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 96, generator=generator), torch.randn(2, 9, 96, generator=generator)
    statistics = statistics_of(x)
    state = torch.random.get_rng_state()
    first, again, other = (score("stochria", weight, statistics, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_stochria_of_all_entries_is_ria_and_of_a_tenth_is_near_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(256, 384, generator=generator), torch.randn(2, 9, 384, generator=generator)
    statistics = statistics_of(x)
    exact = score("ria", weight, statistics)
    torch.testing.assert_close(score("stochria", weight, statistics, ratio=1.0), exact)
    estimated = score("stochria", weight, statistics)  # a mean of 26 terms |N(0,1)| is off by 0.76 / √26 = 15 %
    assert 0.02 < ((estimated - exact) / exact).square().mean().sqrt() < 0.3
    assert abs((estimated / exact).mean() - 1) < 0.05
    assert (keep_mask(estimated, 0.5) == keep_mask(exact, 0.5)).float().mean() > 0.9


def test_a_sample_of_nothing_but_zeros_is_summed_in_full() -> None:
    weight, statistics = torch.zeros(20, 20), statistics_of(torch.eye(20)[None])
    weight.fill_diagonal_(2.0)
    for seed in range(5):
        scores = score("stochria", weight, statistics, seed=seed)
        assert scores.isfinite().all()
        assert (scores.diagonal() > 0).all()
        assert scores.max() <= 2 * scores.diagonal().median()


# Options


def test_options_come_as_text_or_as_values_and_leave_with_their_types() -> None:
    assert check_options("ria", {"alpha": "1"}) == {"alpha": 1.0}
    assert check_options("ria", {"alpha": 1}) == {"alpha": 1.0}
    assert check_options("lp-ria", {"p": "inf", "alpha": "0"}) == {"p": float("inf"), "alpha": 0.0}
    assert check_options("stochria", {"ratio": "0.5"}) == {"ratio": 0.5}
    assert check_options("wanda", {}) == {}
    assert [name for name, criterion in CRITERIA.items() if criterion.seeded] == ["stochria"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ria", {"alpha": "-1"}, "criterion ria: option alpha = -1 must be at least 0"),
        ("ria", {"alpha": "nan"}, "option alpha = nan must be at least 0 and finite"),
        ("ria", {"alpha": "half"}, "option alpha = 'half' is not of the type float"),
        ("ria", {"alpha": True}, "option alpha = True is not of the type float"),
        ("ria", {"alpa": "1"}, r"option 'alpa' is unknown; did you mean alpha\? it takes: alpha"),
        ("stochria", {"ratio": "0"}, "option ratio = 0 must be above 0 and at most 1"),
        ("stochria", {"ratio": 1.5}, "option ratio = 1.5 must be above 0"),
        ("stochria", {"seed": "3"}, "option 'seed' is not yours to set"),
        ("lp-ria", {"p": "4"}, "option p = 4 must be 1, 2, 3 or inf"),
        ("sparsegpt", {"damping": 0}, "option damping = 0 must be above 0"),
        ("wanda", {"alpha": "1"}, "criterion wanda: option 'alpha' is unknown; it takes: none"),
    ],
)
def test_an_option_that_a_criterion_does_not_take_is_refused(name, options, message) -> None:
    with pytest.raises(Refusal, match=message):
        check_options(name, options)
    if "seed" not in options:
        weight, x = example()
        with pytest.raises(Refusal, match=message):
            score(name, weight, statistics_of(x), **options)


# A user's own


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is the current directory, with the module `mine` in it."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "count = 3\n"
        "def squared(weight, statistics, power: float = 2.0, invert: bool = False):\n"
        "    scores = (weight.float().abs() * statistics.norm) ** power\n"
        "    return 1 / scores if invert else scores\n"
        "def by_row(weight, statistics):\n"
        "    assert len(weight) == 1\n"
        "    return weight.abs().float()\n"
        "by_row.row_wise = True\n"
        "def curved(weight, statistics):\n"
        "    return weight.float().square() * statistics.gram.diagonal()\n"
        "curved.needs = {'hessian'}\n"
        "def needy(weight, statistics):\n"
        "    return weight\n"
        "needy.needs = {'moon'}\n"
        "def flat(weight, statistics):\n"
        "    return weight.abs().sum(0)\n"
        "def listed(weight, statistics):\n"
        "    return weight.tolist()\n"
        "def spoiling(weight, statistics):\n"
        "    return weight.abs_()\n"
        "def three(weight, statistics, model):\n"
        "    return weight\n"
        "def odd(weight, statistics, sizes: tuple = ()):\n"
        "    return weight\n"
        "def drawn(weight, statistics, seed: int = 0):\n"
        "    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


def test_a_criterion_of_the_users_own_is_found_by_its_dotted_name(own_module) -> None:
    weight, x = example()
    statistics = statistics_of(x)
    for name in ("mine.squared", "mine:squared"):
        assert check_criterion(name) == name
        torch.testing.assert_close(score(name, weight, statistics), score("wanda", weight, statistics) ** 2)
    options = check_options("mine.squared", {"power": "1", "invert": "yes"})
    assert options == {"power": 1.0, "invert": True}
    torch.testing.assert_close(
        score("mine.squared", weight, statistics, **options), 1 / score("wanda", weight, statistics)
    )


def test_its_attributes_say_what_it_needs_and_whether_rows_stand_alone(own_module, monkeypatch) -> None:
    weight, x = example()
    monkeypatch.setattr(criteria, "CPU_WEIGHTS", 1)
    assert len(list(score_rows("mine.squared", weight, statistics_of(x)))) == 1  # whole, to be safe
    assert len(list(score_rows("mine.by_row", weight, statistics_of(x)))) == 6
    assert find_criterion("mine.curved").needs == {"hessian"}
    assert find_criterion("mine.squared").needs == frozenset()
    assert find_criterion("mine.drawn").seeded
    assert not find_criterion("mine.squared").seeded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.absent", "mine.absent: cannot be imported .*absent.*in the current directory or on PYTHONPATH"),
        ("absent.score", "cannot be imported .*No module named 'absent'"),
        ("broken.score", "cannot be imported .*nothing_of_this_name"),
        ("mine.count", "mine.count: is a int, not a function"),
        ("mine.three", "cannot be called as .*weight, statistics"),
        ("mine.needy", r"needs \['moon'\]; statistics can hold: hessian, outputs, importance"),
        ("mine.odd", "option sizes is a tuple; float, int, str and bool can be set"),
        (".", "cannot be imported"),
        ("mine:", "cannot be imported"),
    ],
)
def test_a_criterion_that_cannot_be_had_is_refused(own_module, name, message) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        check_criterion(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.flat", r"mine.flat: scores are \(8,\), the weight \(6, 8\)"),
        ("mine.listed", "mine.listed: scores are list"),
        ("mine.spoiling", "mine.spoiling: changes the weight in place"),
    ],
)
def test_a_criterion_that_returns_something_else_is_refused(own_module, name, message) -> None:
    weight, x = example()
    with pytest.raises(Refusal, match=message):
        score(name, weight, statistics_of(x))


def test_an_unknown_criterion_is_refused_with_the_nearest() -> None:
    with pytest.raises(Refusal, match=r"'wander' is unknown; did you mean wanda\? there are: .*magnitude"):
        check_criterion("wander")
    with pytest.raises(Refusal, match=r"'xyz' is unknown; there are: .*wanda"):
        check_criterion("xyz")
    with pytest.raises(Refusal, match="did you mean magnitude"):
        score("magnitud", torch.ones(1, 1), InputStatistics(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad) -> None:
    weight, x = example()
    weight[2, 3] = bad
    for name in ("magnitude", "wanda", "ria", "lp-ria"):
        with pytest.raises(Refusal, match=f"criterion {name}: scores are not finite"):
            score(name, weight, statistics_of(x))
