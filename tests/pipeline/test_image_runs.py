"""Whole runs on images: a plain checkpoint that sees, its vision tower untouched, the same bytes on two shards."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from whole_runs import weights_of

from pipeline.driver import prune
from stages.errors import Refusal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
from image_models import image_folder, seeing_checkpoint

IMAGES, LENGTH = 16, 32
WAYS = {  # a whole run takes seconds: what is the same for both models is run for one
    "llava": {"one": {}, "text": {}},
    "qwen2_vl": {"one": {}, "two": {"shards": 2, "resident": "one"}, "order": {"inputs": "pruned", "shards": 2}},
}


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
