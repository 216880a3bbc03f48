"""What is asked of torch and of its libraries so that results repeat, and that it is given back."""

import os
from types import SimpleNamespace

import pytest
import torch
from fitting import Problem
from pretended_device import NAME, PretendedDevice

from espalier.cluster.shard_actor import ShardWorker
from espalier.stages import devices
from espalier.stages.masks import keep_mask
from espalier.stages.statistics import InputStatistics


def test_algorithms_are_deterministic_within_the_fit_alone(tmp_path) -> None:
    seen = set()

    def watched(*_) -> None:
        asked = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        seen.add((torch.is_grad_enabled(), *asked))

    problem = Problem(tmp_path, samples=4)
    problem.pruned.parts[1].register_forward_hook(watched)
    problem.fit()
    assert seen == {(True, True, False), (False, False, False)}, "in training, and not where errors are measured"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_mode_that_was_set_is_set_again_after_an_error() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(KeyError), devices.deterministic():
            raise KeyError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_shard_asks_for_fixed_workspaces_and_full_float32(monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    ShardWorker(SimpleNamespace(index=0), 1, None)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("units", "inside"), [(True, "tf32"), (False, "ieee")])
def test_tf32_is_for_bfloat16_factors_alone(monkeypatch, units, inside) -> None:
    monkeypatch.setattr(devices, "has_units", lambda dtype, device: units)
    setting = torch.backends.cuda.matmul
    setting.fp32_precision = "ieee"
    for exact in (True, False):
        with devices.bfloat16_factors("cuda", exact):
            assert setting.fp32_precision == (inside if exact else "ieee")
        assert setting.fp32_precision == "ieee"


def test_without_units_the_gram_of_bfloat16_is_that_of_float32(monkeypatch) -> None:
    monkeypatch.setattr(devices, "has_units", lambda dtype, device: False)
    x = torch.randn(2, 40, 24).bfloat16()
    stored, widened = InputStatistics(24, hessian=True), InputStatistics(24, hessian=True)
    stored.update(x)
    widened.update(x.float())
    assert torch.equal(stored.gram, widened.gram)


def test_a_whole_matrix_is_sorted_and_its_mask_stays(monkeypatch) -> None:
    scores = torch.randint(-4, 4, (30, 40)).float()  # many ties
    expected = keep_mask(scores, 0.4, scope="matrix")
    monkeypatch.setattr(torch.Tensor, "kthvalue", None, raising=False)  # nobody is to call it
    with PretendedDevice():
        assert torch.equal(keep_mask(scores.to(NAME), 0.4, scope="matrix").cpu(), expected)
