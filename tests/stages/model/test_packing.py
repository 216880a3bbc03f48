"""What blocks hand on beside hidden states: found, packed into one tensor, and taken apart again bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import family_checkpoint
from streaming import same_bits
from torch import Tensor, nn

from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import Skeleton, read_config
from espalier.stages.model.anatomy import Anatomy, trace
from espalier.stages.model.calls import Call
from espalier.stages.model.hooks import activation_hooks
from espalier.stages.model.packing import Packing, Part, found_passages
from espalier.stages.storage.hf_checkpoint import Checkpoint

LENGTH = 9
SLIDING, FULL = (
    [("shared_kv_states", f"{kind}_attention", number) for number in range(2)] for kind in ("sliding", "full")
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks: one with sliding and one with full attention leave keys and values, two more read them."""
    return family_checkpoint(tmp_path_factory.mktemp("families"))("gemma3n_text", "float32")


def opened(directory: Path, index: int) -> tuple[Skeleton, nn.Module, Call, Anatomy]:
    checkpoint = Checkpoint(directory)
    skeleton = Skeleton(read_config(directory), torch.float32, checkpoint=checkpoint)
    block, call = skeleton.load_block(index, checkpoint), skeleton.calls(1, LENGTH)[index]
    nothing = torch.zeros(1, LENGTH, skeleton.columns(index))
    return skeleton, block, call, trace(block, lambda: call.run(block, nothing), skeleton.layout)


def places(packing: Packing) -> list[Any]:
    """Where each part is; a block's own argument by the block's number."""
    return [part.layer if len(part.place) == 1 else part.place for part in packing.parts]


def test_what_travels_is_what_later_blocks_still_need(gemma: Path) -> None:
    passages = opened(gemma, 0)[0].passages
    assert [places(passage.before) for passage in passages] == [
        [(), 0, 1, 2, 3],
        [(), *SLIDING, 1, 2, 3],
        [(), *SLIDING, *FULL, 2, 3],
        [(), *FULL, 3],
    ]
    assert places(passages[-1].after) == [()]
    assert [[len(passage.reads), len(passage.leaves)] for passage in passages] == [[0, 2], [0, 2], [2, 0], [2, 0]]


def test_a_part_comes_back_in_its_bits_and_as_it_lay_in_memory() -> None:
    keys = torch.randn(2, LENGTH, 3, 4).transpose(1, 2)  # (samples, heads, length, width), as attention makes them
    streams = torch.randn(3, 2, LENGTH, 4)
    parts = Part((), 0, (1, 2, 0, 3), (0, 1, 2, 3), (3, 4)), Part(("kv", 0, 0), 0, (0, 2, 1, 3), (0, 2, 1, 3), (3, 4))
    packing = Packing(parts)
    packed = packing.pack(dict(zip(parts, (streams, keys), strict=True)))
    assert packed.shape == (2, LENGTH, packing.columns)
    for part, tensor in zip(parts, (streams, keys), strict=True):
        back = packing.unpack(packed)[part]
        assert same_bits(back, tensor) and back.stride() == tensor.stride()


@pytest.mark.parametrize("index", [1, 3])
def test_an_attention_is_fitted_on_the_keys_and_values_that_it_reads(gemma: Path, index: int) -> None:
    """What is kept as its input is all that it was given: run on that alone, it gives the same."""
    skeleton, block, call, anatomy = opened(gemma, index)
    hidden = torch.randn(3, LENGTH, skeleton.columns(index), generator=torch.Generator().manual_seed(2))
    kept: list[Tensor] = []
    gave: list[Tensor] = []
    hooks = activation_hooks(block, anatomy, None, {"self_attn": [kept.append]}, {"self_attn": [gave.append]})
    with torch.no_grad(), hooks:
        whole = call.run(block, hidden)
    width = skeleton.hidden_size
    assert kept[0].shape[-1] == (width if index == 1 else width + 2 * 2 * 8)
    with torch.no_grad():
        assert same_bits(anatomy.calls["self_attn"].run(block.self_attn, kept[0]), gave[0])
        assert same_bits(call.run(block, hidden), whole)
        if index == 3:
            kept[0][..., width:] = 0
            assert not torch.equal(anatomy.calls["self_attn"].run(block.self_attn, kept[0]), gave[0])


def test_what_is_kept_of_a_block_s_output_is_its_hidden_states(gemma: Path) -> None:
    skeleton, block, call, anatomy = opened(gemma, 0)
    gave: list[Tensor] = []
    with torch.no_grad(), activation_hooks(block, anatomy, None, {}, {"": [gave.append]}):
        whole = call.run(block, torch.randn(2, LENGTH, skeleton.columns(0)))
    assert anatomy.hidden == 3 * skeleton.hidden_size < whole.shape[-1]
    assert same_bits(gave[0], whole[..., : anatomy.hidden])


def passages_of(**arguments: Callable[[int, int], Any]) -> list[Any]:
    """What is found of two layers that are called with those arguments beside hidden states."""

    def calls(samples: int, length: int) -> list[tuple[Call, Tensor]]:
        given = {name: make(samples, length) for name, make in arguments.items()}
        return [(Call((), given, None), torch.zeros(samples, length, 4)) for _ in range(2)]

    return found_passages([nn.Identity(), nn.Identity()], calls, torch.float32)


def test_what_does_not_hang_on_the_tokens_stays_in_the_call() -> None:
    assert passages_of(mask=lambda samples, length: torch.zeros(samples, 1, length, length)) == []
    found = passages_of(row=lambda samples, length: torch.zeros(samples, length, 3, requires_grad=True))
    assert [passage.before.columns for passage in found] == [10, 7] and found[1].after.columns == 4


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda samples, length: torch.zeros(samples, 8, requires_grad=True), r"row, \(2, 8\) .* no row a token"),
        (lambda samples, length: torch.zeros(samples, length, requires_grad=True), "no row a token"),
        (
            lambda samples, length: torch.zeros(samples, length, 3, dtype=torch.float64, requires_grad=True),
            "row travels between the blocks in torch.float64, not in torch.float32; use --compute fp32",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(made: Callable[[int, int], Tensor], why: str) -> None:
    with pytest.raises(Refusal, match=why):
        passages_of(row=made)
