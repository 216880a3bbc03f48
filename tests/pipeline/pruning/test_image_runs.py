"""Whole runs on images: a plain checkpoint that sees, its vision tower untouched, the same bytes on two shards."""

from pathlib import Path

import pytest
import torch
from family_models import VISION_LAYERS
from image_models import image_folder, seeing_checkpoint
from safetensors import safe_open
from whole_runs import weights_of

from espalier.pipeline.config.options import build_config
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.pruning.prune import prune
from espalier.stages.errors import Refusal
from espalier.stages.model.families import vision_of

IMAGES, LENGTH = 16, 32
WAYS = {  # a whole run takes seconds: what is the same for both models is run for one
    "llava": {"one": {}, "text": {}},
    "qwen2_vl": {"one": {}, "two": {"shards": 2, "resident": "one"}, "order": {"inputs": "pruned", "shards": 2}},
}
VISION_WAYS = {"llava": {"one": {}}, "qwen2_vl": {"one": {}, "two": {"shards": 2, "resident": "one"}}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "folder", IMAGES, words=4)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("one_cluster", "recorded")
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_model_that_sees_is_pruned_on_images(request_for, images, text, tmp_path, name) -> None:
    from transformers import AutoModelForImageTextToText

    model = seeing_checkpoint(tmp_path / "model", name, torch.float32)
    wanted = {"model": model, "calibration": str(images), "samples": IMAGES, "length": LENGTH, "learning_rate": 0.04}
    blocks = {}
    for way, options in WAYS[name].items():
        source = {"calibration": str(text)} if way == "text" else {}
        result = prune(request_for(**wanted | options | source, output=str(tmp_path / way)))
        assert result.sparsity == 0.5
        assert not (tmp_path / way / "espalier" / "images-calibration.arrow").exists()
        blocks[way] = {file: digest for file, digest in weights_of(tmp_path / way).items() if "block" in file}
    assert blocks.get("two", blocks["one"]) == blocks["one"]
    for other in ("text", "order"):
        assert not set(blocks["one"].values()) & set(blocks.get(other, {}).values())
    pruned, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (pruned.model.language_model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
    with safe_open(model / "model.safetensors", framework="pt") as dense:
        for part in pruned.state_dict().keys() & dense.keys():
            if "vision" in part or "visual" in part or "projector" in part:
                assert torch.equal(pruned.state_dict()[part], dense.get_tensor(part)), part
    assert (tmp_path / "one" / "tokenizer.json").exists() and list((tmp_path / "one").glob("*processor_config.json"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("one_cluster", "recorded")
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_the_vision_tower_alone_is_pruned_on_images(request_for, images, tmp_path, name) -> None:
    from transformers import AutoModelForImageTextToText

    model = seeing_checkpoint(tmp_path / "model", name, torch.float32)
    wanted = {"model": model, "calibration": str(images), "samples": IMAGES, "learning_rate": 0.04, "tower": "vision"}
    wanted |= {"length": "auto", "microbatch": "auto"}
    blocks = {}
    for way, options in VISION_WAYS[name].items():
        result = prune(request_for(**wanted | options, output=str(tmp_path / way)))
        assert result.sparsity == 0.5 and result.perplexity is None
        blocks[way] = {file: digest for file, digest in weights_of(tmp_path / way).items() if "block" in file}
    assert blocks.get("two", blocks["one"]) == blocks["one"] and len(blocks["one"]) == VISION_LAYERS
    pruned, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tower = vision_of(name).blocks
    for part, dense in AutoModelForImageTextToText.from_pretrained(model).state_dict().items():
        values = pruned.state_dict()[part]
        if part.startswith(tower) and values.ndim > 1:
            assert (values == 0).sum() * 2 == values.numel(), part
        elif not part.startswith(tower):
            assert torch.equal(values, dense), part
    written = (tmp_path / "one" / "espalier" / "report.md").read_text()
    assert written.startswith(f"# The vision tower of {name} pruned to 50.00 % zeros")
    assert "AutoModelForImageTextToText.from_pretrained" in written and "tower: vision" in written


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("one_cluster", "recorded")
def test_sweeps_over_images_lower_the_error_of_the_language_tower(request_for, images, tmp_path) -> None:
    model = seeing_checkpoint(tmp_path / "model", "qwen2_vl", torch.float32)
    wanted = {"model": model, "calibration": str(images), "samples": IMAGES, "length": LENGTH, "learning_rate": 0.04}
    result = prune(request_for(**wanted, criterion="wanda", refine="none", sweeps=2, shards=2))
    assert result.sparsity == 0.5
    units = [unit for block in result.run["blocks"] for unit in block["units"]]
    assert all(block["sweep"] == 2 for block in result.run["blocks"])
    assert all(unit["error_after"] <= unit["error_before"] for unit in units) and any(u["improved"] for u in units)


def test_images_for_a_model_that_reads_text_only_are_refused(request_for, images, tmp_path) -> None:
    with pytest.raises(Refusal, match=r"a folder of images, and .* \(llama\) reads text only"):
        prune(request_for(calibration=str(images)))
    assert not (tmp_path / "out").exists()


def test_images_without_the_models_processor_are_refused(request_for, images, tmp_path) -> None:
    model = seeing_checkpoint(tmp_path / "model", "llava", torch.float32)
    (model / "processor_config.json").unlink()
    with pytest.raises(Refusal, match="image processor"):
        prune(request_for(model=model, calibration=str(images)))
    assert not (tmp_path / "out").exists()


REFUSED = {
    "text": ({}, r"text\.txt with tower vision: no folder of images, and it sees no text; give one"),
    "a length": ({"images": True, "length": 32}, r"length 32 with tower vision: .* takes 5 positions; leave --length"),
    "several images of many sizes": (
        {"images": True, "name": "qwen2_vl", "microbatch": 2},
        "microbatch 2 with tower vision: .* pass one at a time; leave --microbatch out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_vision_tower_cannot_do_is_refused(request_for, images, tmp_path, case) -> None:
    options, message = REFUSED[case]
    options = {"length": "auto", "microbatch": "auto"} | options
    model = seeing_checkpoint(tmp_path / "model", options.pop("name", "llava"), torch.float32)
    if options.pop("images", False):
        options["calibration"] = str(images)
    with pytest.raises(Refusal, match=message):
        prune(request_for(model=model, tower="vision", **options))
    assert not (tmp_path / "out").exists()


def test_the_vision_tower_of_a_model_that_reads_text_only_is_refused(request_for, images, tmp_path) -> None:
    with pytest.raises(Refusal, match="tower vision: llama reads text only; leave --tower out, or give a model"):
        prune(request_for(calibration=str(images), tower="vision"))
    assert not (tmp_path / "out").exists()


def test_a_vision_tower_is_not_measured_on_text() -> None:
    asked = {"model": "m", "output": "o", "calibration": "pictures", "tower": "vision", "eval": "text.txt"}
    with pytest.raises(Refusal, match=r"eval text\.txt with tower vision: text does not pass .* leave --eval out"):
        build_config(asked, PruneConfig)
