"""Masks against what the reference implementations gave, where the fixtures are at hand (shared/oracles)."""

import pytest
import torch
from reference_masks import ALLOWED, LINEARS, PATTERNS, part_of, reference_keep
from safetensors.torch import load_file

from espalier.stages.criteria.scoring import score
from espalier.stages.masks import keep_mask


@pytest.fixture(scope="module")
def oracle(shared_folder) -> dict[str, torch.Tensor]:
    return load_file(shared_folder("oracles", "reference_masks.safetensors"))


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_masks_are_the_reference_implementations(oracle, pattern, linear) -> None:
    weight, statistics = part_of(oracle, linear)
    keep = keep_mask(score("wanda", weight, statistics), **PATTERNS[pattern])
    reference = reference_keep(oracle, "wanda", pattern, linear)
    assert int((keep != reference).sum()) <= ALLOWED * weight.numel()
    assert torch.equal(keep.sum(-1), reference.sum(-1))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ria_masks_are_the_reference_implementations(oracle, pattern, linear, alpha) -> None:
    weight, statistics = part_of(oracle, linear)
    keep = keep_mask(score("ria", weight, statistics, alpha=alpha), **PATTERNS[pattern])
    reference = reference_keep(oracle, f"ria_a{alpha}", pattern, linear)
    assert int((keep != reference).sum()) <= ALLOWED * weight.numel()
    assert torch.equal(keep.sum(-1), reference.sum(-1))


@pytest.mark.parametrize("linear", LINEARS)
def test_magnitude_masks_are_those_of_a_full_sort(oracle, linear) -> None:
    weight, statistics = part_of(oracle, linear)
    scores = score("magnitude", weight, statistics)
    flat = weight.double().abs().flatten().sort(stable=True).indices
    expected = torch.ones(weight.numel(), dtype=torch.bool)
    expected[flat[: weight.numel() // 2]] = False
    assert torch.equal(keep_mask(scores, 0.5, scope="matrix").flatten(), expected)
    order = weight.double().abs().sort(dim=-1, stable=True).indices
    rows = torch.ones_like(weight, dtype=torch.bool).scatter_(-1, order[:, : int(weight.shape[-1] * 0.6)], False)
    assert torch.equal(keep_mask(scores, 0.6), rows)
