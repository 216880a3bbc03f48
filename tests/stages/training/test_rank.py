"""What a ZeRO rank is made of, without ranks: order, schedule, masks, slices on disk, the model to begin from."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from espalier.stages.data.token_table import build_token_table
from espalier.stages.data.training_batches import (
    Order,
    SourceSpec,
    TokenWindows,
    microbatches_of,
    open_source,
    predicted_tokens,
)
from espalier.stages.errors import Refusal
from espalier.stages.training.arriving import Arriving, hollow_model
from espalier.stages.training.checkpoint import (
    MASTER,
    StoredSlices,
    directory_of,
    finish,
    latest,
    read_state,
    write_slices,
)
from espalier.stages.training.lr_schedule import FLOOR, rate_at
from espalier.stages.training.model import Mask, check_mask, checkpoint_activations, hold_zeros, load_model
from espalier.stages.training.partition import PartitionSlice, share_of


def test_each_pass_sees_every_example_once_whatever_the_batch() -> None:
    for batch in (1, 3, 7, 16):
        order = Order(7, batch, seed=3)
        seen = [example for step in range(21) for example in order.step(step)][:21]
        assert [sorted(seen[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
        assert seen == [example for step in range(21) for example in Order(7, 1, seed=3).step(step)]
        assert seen[:7] != seen[7:14]


def test_an_order_can_be_entered_at_any_step() -> None:
    assert Order(10, 4, seed=1).step(6) == [Order(10, 4, seed=1).step(step) for step in range(7)][6]
    assert Order(10, 4, seed=1).step(0) != Order(10, 4, seed=2).step(0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_how_a_step_is_cut_into_microbatches_does_not_depend_on_the_ranks(ranks: int) -> None:
    step = list(range(100, 116))
    shares = [microbatches_of(step, 2, rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {8 // ranks}
    assert sorted(microbatch for share in shares for microbatch in share) == microbatches_of(step, 2, 0, 1)


def test_the_rate_climbs_to_the_peak_and_falls_to_a_tenth() -> None:
    def rates(schedule: Any) -> list[float]:
        return [rate_at(step, peak=2.0, schedule=schedule, warmup=4, steps=20) for step in range(20)]

    for schedule in ("cosine", "linear", "constant"):
        assert rates(schedule)[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates("constant")[4:] == [2.0] * 16
    for schedule in ("cosine", "linear"):
        falling = rates(schedule)[4:]
        assert falling[0] == 2.0 and falling[-1] == pytest.approx(2.0 * FLOOR)
        assert all(later < earlier for earlier, later in pairwise(falling))
    assert rates("cosine")[8] > rates("linear")[8]


def test_windows_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    rows = [[row * 10 + column for column in range(4)] for row in range(5)]
    table = build_token_table(
        rows, None, length=4, samples=None, seed=0, path=tmp_path / "tokens.arrow", vocab_size=100
    )
    source = open_source(
        SourceSpec(factory="espalier.stages.data.training_batches:TokenWindows", options={"path": str(table.path)})
    )
    assert isinstance(source, TokenWindows) and len(source) == 5
    batch = source.batch([3, 0])
    assert batch["input_ids"].tolist() == [rows[3], rows[0]] and batch["labels"].dtype == torch.int64
    assert predicted_tokens(batch["labels"]) == 6
    batch["labels"][0, 1:] = -100
    assert predicted_tokens(batch["labels"]) == 3


def test_zeros_stay_exactly_zero_under_adam_and_the_rest_moves_as_if_they_were_not_there() -> None:
    torch.manual_seed(0)
    masked, plain = nn.Linear(8, 6), nn.Linear(8, 6)
    keep = torch.rand(6, 8) > 0.5
    with torch.no_grad():
        masked.weight.mul_(keep)
        masked.bias.zero_()
        plain.load_state_dict(masked.state_dict())
    hold_zeros(masked)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW(module.parameters(), **settings) for module in (masked, plain)]
    for step in range(5):
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        for module, optimizer in zip((masked, plain), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.linear(inputs, module.weight, module.bias).square().sum().backward()
            if module is plain:
                plain.weight.grad.mul_(keep)
            optimizer.step()
    assert (masked.weight[~keep] == 0).all() and (masked.weight[keep] != 0).all()
    assert masked.bias.abs().min() > 0  # vectors that begin at zero are trained
    torch.testing.assert_close(masked.weight, plain.weight, rtol=0, atol=0)


# -- slices on disk ------------------------------------------------------------------------------------------------


def test_shares_cover_every_element_once() -> None:
    for elements in (1, 5, 8, 13):
        for ranks in (1, 2, 3, 8):
            shares = [share_of(elements, rank, ranks) for rank in range(ranks)]
            assert [at for first, last in shares for at in range(first, last)] == list(range(elements))


def test_a_part_of_a_slice_is_the_same_memory() -> None:
    home = torch.arange(20.0)
    slice_ = PartitionSlice("w", 4, home[10:18], home, 10)
    part = slice_.part(6, 9)
    assert part.master.tolist() == [12.0, 13.0, 14.0] and part.start == 6
    assert part.moment({"exp_avg": home * 2}, "exp_avg").tolist() == [24.0, 26.0, 28.0]
    part.master.zero_()
    assert home[12:15].eq(0).all()


@pytest.fixture
def cut_in_three(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A tensor of ten elements that three ranks wrote, the last one nothing of it."""
    whole = torch.randn(10)
    for rank, (first, last) in enumerate([(0, 4), (4, 10)]):
        write_slices(tmp_path, MASTER, [("w", first, whole[first:last])], rank, 3)
    write_slices(tmp_path, MASTER, [("v", 0, torch.ones(2))], 2, 3)
    return tmp_path, whole


def test_slices_are_read_back_in_any_cut(cut_in_three: tuple[Path, torch.Tensor]) -> None:
    directory, whole = cut_in_three
    stored = StoredSlices(directory, MASTER)
    for first in range(10):
        for last in range(first + 1, 11):
            assert torch.equal(stored.read("w", first, last - first), whole[first:last])
    module = nn.Linear(5, 2, bias=False)
    module.register_parameter("w", nn.Parameter(torch.zeros(2, 5)))
    before = module.weight.detach().clone()
    stored.fill(module)
    assert torch.equal(module.get_parameter("w"), whole.view(2, 5)) and torch.equal(module.weight, before)


def test_a_missing_rank_file_is_refused(cut_in_three: tuple[Path, torch.Tensor]) -> None:
    directory, _ = cut_in_three
    (directory / f"{MASTER}-0-of-3.safetensors").unlink()
    with pytest.raises(Refusal, match="w is not whole in it"):
        StoredSlices(directory, MASTER).read("w", 0, 10)


def test_only_a_whole_checkpoint_counts_and_the_newest_alone_is_kept(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    for step in (5, 10):
        directory_of(tmp_path, step).mkdir()
        assert latest(tmp_path) == (None if step == 5 else tmp_path / "checkpoint-00000005")
        finish(tmp_path, step, {"step": step})
    newest = latest(tmp_path)
    assert newest is not None and read_state(newest) == {"step": 10}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000010"]


# -- the model to begin from ---------------------------------------------------------------------------------------


def test_a_config_alone_begins_as_transformers_does_and_from_the_seed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copy(tiny_checkpoint() / "config.json", tmp_path)
    model = load_model(tmp_path, torch.float32, seed=1)
    deviation = json.loads((tmp_path / "config.json").read_text())["initializer_range"]
    assert float(model.get_input_embeddings().weight.detach().std()) == pytest.approx(deviation, rel=0.1)
    assert model.training
    again, other = load_model(tmp_path, torch.bfloat16, seed=1), load_model(tmp_path, torch.float32, seed=2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again.get_parameter(name), model.get_parameter(name).bfloat16())
    assert not torch.equal(other.get_parameter(name), model.get_parameter(name))


def test_weights_are_read_as_transformers_reads_them_and_what_is_missing_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))
    expected = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(
        directory, torch.float32, seed=0
    ).state_dict().items())  # fmt: skip
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "up_proj" not in n}, directory / "model.safetensors")
    with pytest.raises(Refusal, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(directory, torch.float32, seed=0)


def test_a_mask_comes_from_another_checkpoint_of_the_same_shapes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    directory, pruned = tiny_checkpoint(), Path(shutil.copytree(tiny_checkpoint(seed=5), tmp_path / "pruned"))
    tensors = load_file(pruned / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][np.arange(4), np.arange(4)] = 0
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    model = load_model(directory, torch.float32, seed=0)
    dense = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    Mask(directory, pruned).fill(model)
    for key, tensor in model.state_dict().items():
        wanted = dense[key].masked_fill(tensors[key] == 0, 0) if key == name else dense[key]
        assert torch.equal(tensor, wanted), key
    with pytest.raises(Refusal, match=r"mask .*q_proj\.weight is \(64, 64\), the model's is \(32, 32\)"):
        check_mask(directory, tiny_checkpoint(hidden=64))
    with pytest.raises(Refusal, match=r"mask .*: no tensor model\.layers\.2"):
        check_mask(directory, tiny_checkpoint(blocks=2))


@pytest.mark.parametrize(("asked", "passes"), [(False, 1), (True, 2)])
def test_checkpointed_activations_are_computed_again_on_the_way_back(
    asked: bool, passes: int, tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., torch.Tensor]
) -> None:
    model = load_model(tiny_checkpoint(blocks=2), torch.float32, seed=0)
    if asked:
        checkpoint_activations(model)
    seen: list[int] = []
    model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: seen.append(1))
    ids = tiny_tokens(2, 16).long()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(seen) == passes


def test_a_family_that_cannot_checkpoint_activations_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    model = load_model(tiny_checkpoint(blocks=2), torch.float32, seed=0)
    model.supports_gradient_checkpointing = False
    with pytest.raises(Refusal, match="activation-checkpointing: transformers' LlamaForCausalLM"):
        checkpoint_activations(model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_hollow_model_gets_its_weights_one_at_a_time_and_they_are_those_of_the_whole_one(
    tied: bool, tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., torch.Tensor]
) -> None:
    directory = tiny_checkpoint(family="qwen3", dtype="bfloat16", tied=tied)
    whole = load_model(directory, torch.bfloat16, seed=0)
    made = hollow_model(directory, torch.bfloat16)
    assert made is not None
    model, values = made
    expected = dict(whole.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(expected)
    assert all(parameter.untyped_storage().nbytes() <= 8 for parameter in model.parameters())
    taken = []
    for name, parameter in zip(expected, Arriving(model, values).parameters(), strict=True):
        assert torch.equal(parameter, expected[name]), name
        taken.append(parameter)
        held = sum(other.untyped_storage().nbytes() > 8 for other in model.parameters())
        assert held == len(taken)
    ids = tiny_tokens(2, 16).long()
    assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == {
        name: buffer.dtype for name, buffer in whole.named_buffers()
    }


def test_a_model_that_begins_at_random_is_made_whole(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    shutil.copy(tiny_checkpoint() / "config.json", tmp_path)
    assert hollow_model(tmp_path, torch.float32) is None
