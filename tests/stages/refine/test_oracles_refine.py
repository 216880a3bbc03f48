"""DSnoT against what the reference implementation gave, where the fixtures are at hand (shared/oracles)."""

import pytest
import torch
from reference_masks import ALLOWED, LINEARS, PATTERNS, part_of, reference_keep
from safetensors.torch import load_file

from espalier.stages.criteria.scoring import score
from espalier.stages.masks import keep_mask
from espalier.stages.refine.grow_and_prune import dsnot


@pytest.fixture(scope="module")
def oracle(shared_folder) -> dict[str, torch.Tensor]:
    return load_file(shared_folder("oracles", "reference_masks.safetensors"))


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("threshold", [0.1, 0.0])
@pytest.mark.parametrize("start", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dsnot_masks_are_the_reference_implementations(oracle, pattern, start, threshold, linear) -> None:
    weight, statistics = part_of(oracle, linear)
    scores = score(start, weight, statistics)
    keep = keep_mask(scores, **PATTERNS[pattern])
    reference = reference_keep(oracle, f"dsnot_{start}_t{threshold}", pattern, linear)
    assert int((keep != reference).sum()) > 1e-2 * weight.numel()  # the start is far from it
    for given in ({"start": start}, {"scores": scores}):
        refined = dsnot(weight, keep, statistics, PATTERNS[pattern].get("pattern"), threshold=threshold, **given)
        assert int((refined != reference).sum()) <= ALLOWED * weight.numel()
