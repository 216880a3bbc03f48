"""Calibration on images: what the stream sees is what the whole model sees, bit for bit; masks come from it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import LAYERS
from image_models import SEEING, image_folder, seeing_checkpoint
from PIL import Image
from safetensors.torch import load_file
from streaming import BATCH, GENTLE, Images, make_shards, prune, same_bits, stream, worked
from torch import Tensor
from transformers import AutoModelForImageTextToText

from espalier.stages.data.captions import holds_images, read_pairs
from espalier.stages.data.image_samples import load_processor
from espalier.stages.data.image_table import ImageTable, build_image_table
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import Skeleton, read_config
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.shard.hidden_states import Pass
from espalier.stages.shard.shard import Shard
from espalier.stages.shard.spec import block_file

LENGTH, SAMPLES = 40, 6
Inputs = dict[str, Tensor]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    home = tmp_path_factory.mktemp("seeing")
    return cache(lambda name, dtype="float32": seeing_checkpoint(home / f"{name}-{dtype}", name, getattr(torch, dtype)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions longer than a sample: nothing follows them."""
    return image_folder(tmp_path_factory.mktemp("images") / "long", SAMPLES, words=20)


def table_of(directory: Path, folder: Path, path: Path, samples: int = SAMPLES, length: int = LENGTH) -> ImageTable:
    skeleton = Skeleton(read_config(directory), torch.float32)
    processor = load_processor(directory)
    return build_image_table(folder, processor, skeleton, length=length, samples=samples, seed=0, path=path)


def from_the_processor(directory: Path, folder: Path) -> list[Inputs]:
    """The same microbatches made by transformers alone, cut to LENGTH."""
    processor, pairs, batches = load_processor(directory), read_pairs(folder), []
    for start in range(0, SAMPLES, BATCH):
        made = []
        for pair in pairs[start : start + BATCH]:
            prompt = f"{processor.image_token}\n{pair.text}"
            if processor.chat_template:
                content = [{"type": "image"}, {"type": "text", "text": pair.text}]
                prompt = processor.apply_chat_template([{"role": "user", "content": content}])
            made.append(processor(images=[Image.open(pair.path)], text=[prompt], return_tensors="pt"))
        by_token = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
        batches.append(
            {name: torch.cat([m[name][:, :LENGTH] if name in by_token else m[name] for m in made]) for name in made[0]}
        )
    return batches


def whole(directory: Path, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What transformers' own model puts into its first layer, and its logits."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto").eval()
    entered: list[Tensor] = []
    first = model.model.language_model.layers[0]
    first.register_forward_pre_hook(lambda _, args, kwargs: entered.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return entered[0], logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SEEING)
def test_images_stream_as_the_whole_model_sees_them(seeing, folder, tmp_path, name, dtype) -> None:
    directory = seeing(name, dtype)
    table = table_of(directory, folder, tmp_path / "images.arrow")
    expected = [whole(directory, batch) for batch in from_the_processor(directory, folder)]
    for count, resident in ((1, "all"), (2, "all"), (1, "one")):
        shards = make_shards(directory, tmp_path, count, LENGTH, blocks=LAYERS, resident=resident)
        shards[0].begin(Pass(microbatches=len(expected)))
        for part, (entered, _) in zip(Images(table).parts, expected, strict=True):
            assert same_bits(shards[0].embed(part), entered)
        for hidden, (_, logits) in zip(stream(shards, Images(table)), expected, strict=True):
            assert same_bits(shards[-1].logits(hidden), logits), f"{count} shards, resident {resident}"


def test_only_a_model_with_image_positions_or_masks_varies_by_sample(seeing, folder, tmp_path) -> None:
    varying = {name: table_of(seeing(name), folder, tmp_path / f"{name}.arrow").varying for name in SEEING}
    assert {name: set(values) for name, values in varying.items()} == {
        "llava": set(),
        "qwen2_vl": {"position_ids"},
        "gemma3": {"token_type_ids"},
    }
    positions = varying["qwen2_vl"]["position_ids"]
    assert positions.shape == (SAMPLES, 3, LENGTH)
    assert len({sample.tobytes() for sample in positions}) == 4  # images of four shapes


def test_the_tower_is_in_memory_only_while_images_are_embedded(seeing, folder, tmp_path) -> None:
    directory = seeing("llava")
    table = table_of(directory, folder, tmp_path / "images.arrow")
    first, second = make_shards(directory, tmp_path, 2, LENGTH, blocks=LAYERS)

    def held(shard: Shard) -> int:
        parameters = dict(shard.skeleton.model.named_parameters())
        return sum(parameters[name].untyped_storage().nbytes() for name in shard.skeleton.vision)

    assert held(first) < 1000
    first.begin(Pass(microbatches=2))
    hidden = first.embed(Images(table).parts[0])
    assert held(first) > 10_000 and held(second) < 1000
    first.forward(0, hidden)
    first.forward(1, first.embed(Images(table).parts[1]))
    assert held(first) < 1000


def pruned(directory: Path, home: Path, table: ImageTable, recipe: Recipe, shards: int = 1) -> list[dict[str, Any]]:
    made = make_shards(directory, home, shards, LENGTH, blocks=LAYERS, recipe=recipe)
    reports = prune(made, Images(table))
    made[0].copy_ends()
    return reports


def tensors_of(output: Path) -> dict[str, Tensor]:
    return {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}


RECIPES = {
    "component": Recipe(learning_rate=GENTLE),
    "block, swaps": Recipe(refine="swaps", reconstruct="block", learning_rate=GENTLE),
    "pruned inputs": Recipe(inputs="pruned", learning_rate=GENTLE),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SEEING)
def test_a_model_is_pruned_exactly_on_images_and_reconstructed(seeing, folder, tmp_path, name, recipe) -> None:
    directory = seeing(name)
    table = table_of(directory, folder, tmp_path / "images.arrow")
    reports = pruned(directory, tmp_path, table, RECIPES[recipe])
    assert [report["sparsity"] for report in reports] == [0.5] * LAYERS
    errors = [(unit["error_before"], unit["error_after"]) for report in reports for unit in report["units"]]
    assert all(0 < after <= before for before, after in errors)  # a unit that did not improve is put back,
    assert any(after < before for before, after in errors)  # as one may be that swaps have left little to gain
    dense, result = load_file(directory / "model.safetensors"), tensors_of(tmp_path / "output")
    assert set(result) == set(dense)
    for key, tensor in result.items():
        if "language_model.layers" in key or "model.layers" in key:
            assert tensor.dim() == 1 or (tensor == 0).sum() * 2 == tensor.numel(), key
        else:
            assert torch.equal(tensor, dense[key]), f"{key} was touched"


@pytest.mark.parametrize(
    "recipe", [{}, {"reconstruct": "block"}, {"reconstruct": "window", "blocks_per_unit": 2}, {"inputs": "pruned"}]
)
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_units_are_run_on_each_sample_as_the_model_runs_them(seeing, folder, tmp_path, name, recipe) -> None:
    """With nothing pruned a unit gives what it gave in the stream, unless it is called as for another sample."""
    table = table_of(seeing(name), folder, tmp_path / "images.arrow")
    reports = pruned(seeing(name), tmp_path, table, Recipe(sparsity=0.0, **recipe))
    assert all(unit["error_before"] < 1e-11 for report in reports for unit in report["units"]), reports


def test_statistics_gathered_anew_are_those_of_the_stream(seeing, folder, tmp_path) -> None:
    """In the first block the pruned model's inputs are the dense one's, but a later pass over them counts."""
    table = table_of(seeing("qwen2_vl"), folder, tmp_path / "images.arrow")
    for inputs in ("dense", "pruned"):
        pruned(
            seeing("qwen2_vl"), tmp_path / inputs, table, Recipe(reconstruct="block", inputs=inputs, learning_rate=1e-9)
        )
    streamed, again = (load_file(tmp_path / inputs / "output" / block_file(0)) for inputs in ("dense", "pruned"))
    assert all(torch.equal(streamed[key] == 0, again[key] == 0) for key in streamed)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_two_shards_prune_as_one(seeing, folder, tmp_path, name) -> None:
    directory = seeing(name)
    table = table_of(directory, folder, tmp_path / "images.arrow")
    for count in (1, 2):
        pruned(directory, tmp_path / str(count), table, RECIPES["component"], shards=count)
    for index in range(LAYERS):
        one, two = (load_file(tmp_path / count / "output" / block_file(index)) for count in "12")
        assert all(same_bits(one[key], two[key]) for key in one)


def test_images_give_other_masks_than_their_captions_alone(seeing, folder, tmp_path) -> None:
    directory = seeing("llava")
    table = table_of(directory, folder, tmp_path / "images.arrow")
    pruned(directory, tmp_path / "images", table, Recipe(reconstruct="none"))
    (shard,) = make_shards(directory, tmp_path / "text", 1, LENGTH, blocks=LAYERS, recipe=Recipe(reconstruct="none"))
    tokens = [part["input_ids"] for part in Images(table).parts]
    shard.begin(Pass(microbatches=len(tokens), keeps=0))
    for number, part in enumerate(tokens):
        shard.forward(number, shard.embed(part))
    for piece in shard.spec.block_windows:
        worked(shard, BlockTask(blocks=piece))
    seen, read = (load_file(tmp_path / kind / "output" / block_file(0)) for kind in ("images", "text"))
    differing = {key: ((seen[key] == 0) != (read[key] == 0)).float().mean().item() for key in seen}
    assert max(differing.values()) > 0.01, differing


# --- samples ----------------------------------------------------------------------------------------------------------


def test_what_is_short_goes_on_with_the_next_captions(seeing, tmp_path) -> None:
    directory, folder = seeing("llava"), image_folder(tmp_path / "short", 3, words=1)
    table = table_of(directory, folder, tmp_path / "images.arrow", samples=3)
    texts = [pair.text for pair in read_pairs(folder)]
    for index in range(3):
        ids = table.sample(index)["input_ids"][0]
        assert len(ids) == LENGTH and (ids == 127).sum() == 4
        said = "".join(map(chr, ids[ids != 127]))
        following = [texts[(index + step) % 3] for step in range(9)]
        assert said == ("\n" + "\2".join(following))[: len(said)]


def test_fewer_samples_are_chosen_by_the_seed_in_order(seeing, folder, tmp_path) -> None:
    table = table_of(seeing("llava"), folder, tmp_path / "some.arrow", samples=3)
    everything = table_of(seeing("llava"), folder, tmp_path / "all.arrow")
    pixels = [everything.sample(index)["pixel_values"].tobytes() for index in range(SAMPLES)]
    places = [pixels.index(table.sample(index)["pixel_values"].tobytes()) for index in range(3)]
    assert places == sorted(set(places)) and len(places) == 3


def test_folders_of_images_are_told_from_folders_of_text(folder, tmp_path) -> None:
    assert holds_images(str(folder)) and not holds_images(["a text"]) and not holds_images(str(folder / "000.png"))
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "logo.png").write_bytes((folder / "000.png").read_bytes())
    assert not holds_images(tmp_path)  # an illustrated text
    (tmp_path / "notes.md").unlink()
    assert holds_images(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_captions_are_read_as_data_sets_have_them(folder, tmp_path, name) -> None:
    (tmp_path / "a.png").write_bytes((folder / "000.png").read_bytes())
    csv, line = 'file_name,text\na.png,"one, two"\n', json.dumps({"file_name": "a.png", "text": "one, two"})
    (tmp_path / name).write_text(csv if name.endswith("csv") else line)
    assert [(pair.path.name, pair.text) for pair in read_pairs(tmp_path)] == [("a.png", "one, two")]


REFUSED = {
    "no caption file": (None, "images without captions; add captions.jsonl"),
    "no caption": ('{"file": "a.png", "text": " "}', r"line 1: no caption for a\.png"),
    "image not named": ('{"file": "a.png", "text": "x"}', r"b\.png: no caption in captions\.jsonl"),
    "no such image": ('{"file": "c.png", "text": "x"}', r"line 1: no such image .*c\.png"),
    "no file named": ('{"text": "x"}', "line 1: names no image"),
    "not JSON": ("{", r"captions\.jsonl: cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_will_not_do_is_refused(folder, tmp_path, case) -> None:
    lines, message = REFUSED[case]
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((folder / "000.png").read_bytes())
    if lines is not None:
        (tmp_path / "captions.jsonl").write_text(lines)
    with pytest.raises(Refusal, match=message):
        read_pairs(tmp_path)


def test_an_image_that_cannot_be_read_is_refused(seeing, tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "text": "x"}')
    with pytest.raises(Refusal, match=r"a\.png: not an image that can be read"):
        table_of(seeing("llava"), tmp_path, tmp_path / "images.arrow", samples=1)
    assert not list(tmp_path.glob("*.arrow")) and not list(tmp_path.glob(".*.tmp"))


def test_an_image_longer_than_a_sample_is_refused(seeing, folder, tmp_path) -> None:
    with pytest.raises(Refusal, match="take 4 tokens, more than length 3; give --length 4 or more"):
        table_of(seeing("llava"), folder, tmp_path / "images.arrow", length=3)


def test_too_few_images_are_refused(seeing, folder, tmp_path) -> None:
    with pytest.raises(Refusal, match=r"6 images with captions, fewer than the 7 samples asked for; .* --samples 6"):
        table_of(seeing("llava"), folder, tmp_path / "images.arrow", samples=7)


def test_a_caption_that_holds_the_image_token_is_refused(seeing, folder, tmp_path) -> None:
    (tmp_path / "a.png").write_bytes((folder / "000.png").read_bytes())
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "text": "an <image>"}')
    with pytest.raises(Refusal, match="its caption holds <image>"):
        table_of(seeing("llava"), tmp_path, tmp_path / "images.arrow", samples=1)


def test_a_checkpoint_without_its_processor_is_refused(seeing, tmp_path) -> None:
    with pytest.raises(Refusal, match="image processor"):
        load_processor(tmp_path)
    for file in seeing("llava").glob("tokenizer*"):  # a tokenizer alone does not see
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes((seeing("llava") / "config.json").read_bytes())
    with pytest.raises(Refusal, match="image processor"):
        load_processor(tmp_path)


def test_a_table_that_is_cut_short_is_refused(seeing, folder, tmp_path) -> None:
    table_of(seeing("llava"), folder, tmp_path / "images.arrow")
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "images.arrow").read_bytes()[:-100])
    with pytest.raises(Refusal, match="not whole"):
        ImageTable.open(tmp_path / "cut.arrow")
