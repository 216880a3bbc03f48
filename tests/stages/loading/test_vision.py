"""The vision tower: its blocks see what the whole model's see, bit for bit; they alone are pruned."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import VISION_LAYERS, config_of
from image_models import SEEING, image_folder, seeing_checkpoint
from PIL import Image
from safetensors.torch import load_file
from streaming import GENTLE, Images, begin, make_shards, prune, same_bits, stream
from torch import Tensor
from transformers import AutoModelForImageTextToText, PixtralVisionConfig

from espalier.pipeline.planning.model_info import model_facts
from espalier.stages.data.captions import find_images
from espalier.stages.data.image_samples import load_processor
from espalier.stages.data.image_table import ImageTable
from espalier.stages.data.pixel_table import build_pixel_table
from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import read_config
from espalier.stages.loading.vision import VisionSkeleton
from espalier.stages.masks import keep_mask
from espalier.stages.model.families import FAMILIES, vision_of
from espalier.stages.recipe import Recipe
from espalier.stages.shadow.spec import ShadowSpec
from espalier.stages.shadow.store import write_shadow
from espalier.stages.shard.shard import Shard
from espalier.stages.shard.spec import block_file
from espalier.stages.storage.hf_checkpoint import Checkpoint

SAMPLES, LENGTH = 6, 40
TOGETHER = {"llava": 2, "gemma3": 2, "qwen2_vl": 1}  # images a microbatch
TOWER = {name: vision_of(name).blocks for name in SEEING}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    home = tmp_path_factory.mktemp("seeing")
    return cache(lambda name, dtype="float32": seeing_checkpoint(home / f"{name}-{dtype}", name, getattr(torch, dtype)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, without captions."""
    made = image_folder(tmp_path_factory.mktemp("images") / "bare", SAMPLES, words=1, seed=2)
    (made / "captions.jsonl").unlink()
    return made


@pytest.fixture(scope="module")
def table(seeing, folder, tmp_path_factory) -> Callable[[str], ImageTable]:
    home = tmp_path_factory.mktemp("tables")
    return cache(lambda name: table_of(seeing(name), folder, home / f"{name}.arrow"))


def table_of(directory: Path, folder: Path, path: Path, samples: int = SAMPLES, length: int = LENGTH) -> ImageTable:
    model = VisionSkeleton(read_config(directory), torch.float32)
    processor = load_processor(directory)
    return build_pixel_table(folder, processor, model, length=length, samples=samples, seed=0, path=path)


def towers(directory: Path, home: Path, count: int, **options: Any) -> list[Shard]:
    return make_shards(directory, home, count, LENGTH, blocks=VISION_LAYERS, tower="vision", **options)


def whole(directory: Path, name: str, folder: Path, together: int) -> list[tuple[Tensor, Tensor]]:
    """What the first block of transformers' own model reads, and what its last one gives, for images as they come from
    the processor."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto").eval()
    processor, seen = load_processor(directory), []
    blocks = model.get_submodule(TOWER[name])
    blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    blocks[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    images = [Image.open(pair.path).convert("RGB") for pair in find_images(folder)]
    for start in range(0, len(images), together):
        given = processor.image_processor(images=images[start : start + together], return_tensors="pt")
        given.pop("num_crops", None)
        with torch.no_grad():
            model.get_image_features(**given)
    return list(zip(seen[::2], seen[1::2], strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SEEING)
def test_images_stream_through_the_tower_as_the_whole_model_sees_them(seeing, folder, table, tmp_path, name, dtype):
    directory, together = seeing(name, dtype), TOGETHER[name]
    expected = whole(directory, name, folder, together)
    images = Images(table(name), together)
    assert len(expected) == SAMPLES // together
    for count, resident in ((1, "all"), (2, "all"), (3, "all"), (1, "one")):
        shards = towers(directory, tmp_path, count, resident=resident)
        begin(shards, images)
        for part, (entered, _) in zip(images.parts, expected, strict=True):
            assert same_bits(shards[0].embed(part).view(entered.shape), entered)
        for hidden, (_, left) in zip(stream(shards, images), expected, strict=True):
            assert same_bits(hidden.view(left.shape), left), f"{count} shards, resident {resident}"


def pruned(directory: Path, home: Path, name: str, table: ImageTable, recipe: Recipe, shards: int = 1) -> list[Any]:
    made = towers(directory, home, shards, recipe=recipe)
    reports = prune(made, Images(table, TOGETHER[name]))
    made[0].copy_ends()
    return reports


RECIPES = {
    "component": Recipe(learning_rate=GENTLE),
    "swaps, sweeps": Recipe(refine="swaps", learning_rate=GENTLE, sweeps=2),
    "block, pruned inputs": Recipe(reconstruct="block", inputs="pruned", learning_rate=GENTLE),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SEEING)
def test_the_tower_alone_is_pruned_exactly_and_reconstructed(seeing, table, tmp_path, name, recipe) -> None:
    directory = seeing(name)
    reports = pruned(directory, tmp_path, name, table(name), RECIPES[recipe])
    assert [report["sparsity"] for report in reports] == [0.5] * VISION_LAYERS
    errors = [(unit["error_before"], unit["error_after"]) for report in reports for unit in report["units"]]
    assert all(0 < after <= before for before, after in errors) and any(after < before for before, after in errors)
    dense = load_file(directory / "model.safetensors")
    files = (tmp_path / "output").glob("*.safetensors")
    result = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert set(result) == set(dense)
    inside = {key for key in dense if (".layers." in key and "vision" in key) or ".blocks." in key}
    assert len(inside) % VISION_LAYERS == 0 and len(inside) > VISION_LAYERS * 8
    for key, tensor in result.items():
        if key not in inside:
            assert same_bits(tensor, dense[key]), f"{key} was touched"
        else:
            assert tensor.dim() == 1 or (tensor == 0).sum() * 2 == tensor.numel(), key


@pytest.mark.parametrize("recipe", [{}, {"reconstruct": "block"}, {"refine": "swaps", "inputs": "pruned"}])
def test_images_of_several_sizes_are_run_as_the_model_runs_them(seeing, table, tmp_path, recipe) -> None:
    """With nothing pruned a unit gives what it gave in the stream, unless it is called as for another image."""
    reports = pruned(seeing("qwen2_vl"), tmp_path, "qwen2_vl", table("qwen2_vl"), Recipe(sparsity=0.0, **recipe))
    assert all(unit["error_before"] < 1e-11 for report in reports for unit in report["units"]), reports


@pytest.mark.parametrize("name", SEEING)
def test_three_shards_prune_the_tower_as_one(seeing, table, tmp_path, name) -> None:
    for count in (1, 2, 3):
        pruned(seeing(name), tmp_path / str(count), name, table(name), RECIPES["component"], shards=count)
    for index in range(VISION_LAYERS):
        one, *others = ((tmp_path / str(n) / "output" / block_file(index)).read_bytes() for n in (1, 2, 3))
        assert all(other == one for other in others)


@pytest.mark.parametrize("name", SEEING)
def test_what_lies_behind_the_blocks_or_beside_the_tower_is_never_loaded(seeing, table, tmp_path, name) -> None:
    (shard,) = towers(seeing(name), tmp_path, 1)
    assert not any(word in key for key in shard.skeleton.vision for word in ("post", "merger", "language", "projector"))
    images = Images(table(name), TOGETHER[name])
    begin([shard], images)

    def held() -> set[str]:
        parameters = shard.skeleton.model.named_parameters()
        return {key for key, values in parameters if values.numel() > 1 and values.untyped_storage().nbytes() > 4}

    assert not held()
    shard.embed(images.parts[0])
    assert held() == shard.skeleton.vision and held()
    for number, part in enumerate(images.parts):
        shard.forward(number, shard.embed(part))
    assert not held()


def test_width_and_positions_come_from_the_model(seeing) -> None:
    sizes = {name: VisionSkeleton(read_config(seeing(name)), torch.float32) for name in SEEING}
    assert {
        name: (model.hidden_size, model.positions(1, {})) for name, model in sizes.items() if name != "qwen2_vl"
    } == {
        "llava": (16, 5),  # four patches and the class token
        "gemma3": (16, 4),
    }
    assert sizes["qwen2_vl"].hidden_size == 16
    assert sizes["qwen2_vl"].positions(1, {"image_grid_thw": torch.tensor([[1, 4, 6]])}) == 24


@pytest.mark.parametrize("name", SEEING)
def test_sizes_are_those_of_the_tower_and_of_what_is_copied(seeing, name) -> None:
    config, dense = read_config(seeing(name)), load_file(seeing(name) / "model.safetensors")
    facts = model_facts(config, name, checkpoint=Checkpoint(seeing(name)), tower="vision")
    assert (facts.blocks, facts.hidden, facts.packed) == (VISION_LAYERS, 16, name == "qwen2_vl")
    assert facts.total_bytes == sum(tensor.nbytes for tensor in dense.values()) == 4 * facts.parameters
    assert {dense[stored].shape for stored, _, _ in facts.linears} == set(facts.stored)
    assert 0 < facts.ends_bytes < facts.copied_bytes == facts.copied_at_once


def test_a_shadow_scores_the_tower_by_what_it_holds_of_it(seeing, table, tmp_path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(seeing("llava"))
    generator = torch.Generator().manual_seed(0)
    held = {name: torch.rand(values.shape, generator=generator) for name, values in model.named_parameters()}
    write_shadow(tmp_path / "shadow", model.config, held, ShadowSpec(), updates=1)
    recipe = Recipe(criterion="temporal", shadow=str(tmp_path / "shadow"), reconstruct="none")
    pruned(seeing("llava"), tmp_path, "llava", table("llava"), recipe)
    written = load_file(tmp_path / "output" / block_file(1))
    (weight,) = (values for key, values in written.items() if key.endswith("mlp.fc1.weight"))
    assert torch.equal(weight != 0, keep_mask(held[f"{TOWER['llava']}.1.mlp.fc1.weight"], 0.5))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_family_that_reads_text_only_has_no_vision_tower() -> None:
    for name in (*FAMILIES.keys() - set(SEEING), "llama"):
        with pytest.raises(Refusal, match=f"tower vision: {name} reads text only; .* gemma3, llava, qwen2_vl"):
            vision_of(name)


def test_a_tower_of_another_kind_is_refused() -> None:
    config = config_of("llava")
    config.vision_config = PixtralVisionConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    with pytest.raises(Refusal, match=r"this llava has no model\.vision_tower\.encoder\.layers"):
        VisionSkeleton(config, torch.float32)


def test_an_image_of_more_patches_than_asked_for_is_refused(seeing, folder, tmp_path) -> None:
    with pytest.raises(Refusal, match=r"001\.jpg: makes 24 patches, more than length 20; give --length 24"):
        table_of(seeing("qwen2_vl"), folder, tmp_path / "images.arrow", length=20)


def test_the_processor_of_another_model_is_refused(seeing, folder, tmp_path) -> None:
    shutil.copytree(seeing("gemma3"), tmp_path / "model")
    for file in (tmp_path / "model").glob("*processor_config.json"):
        file.write_text(file.read_text().replace('"height": 16', '"height": 24'))
    with pytest.raises(Refusal, match=r"the processor makes it \(3, 24, 16\), the vision tower takes \(3, 16, 16\)"):
        table_of(tmp_path / "model", folder, tmp_path / "images.arrow")
