"""What lies beside a model's weights comes along, and config.json says what the output's weights are."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer
from whole_runs import add_tokenizer

from espalier.pipeline.run.export import copy_companions
from espalier.pipeline.run.inputs import load_tokenizer

BESIDE = {
    "chat_template.jinja": "{{ messages }}",
    "tokenizer.model": "\0\1",
    "generation_config.json": "{}",
    "merges.txt": "#",
    "qwen.tiktoken": "",
    "modeling_own.py": "x = 1",
    "LICENSE": "free",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}
WEIGHTS = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "consolidated.00.pth",
    "original/params.json",
    "onnx/config.json",
    ".cache/huggingface/x.json",
)


def put(directory: Path, name: str, text: str = "") -> None:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_all_that_loads_the_model_comes_along_and_no_weights(model: Path, output: Path) -> None:
    for name, text in BESIDE.items():
        put(model, name, text)
    for name in WEIGHTS:
        put(model, name)
    copy_companions(model, output, "float32")
    copied = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert copied == {*BESIDE, "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert all((output / name).read_text() == text for name, text in BESIDE.items())


def test_links_and_files_that_nobody_may_write_become_plain_files(model: Path, output: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(model.iterdir())):
        path.chmod(0o400)
        path.rename(tmp_path / str(number))
        path.symlink_to(Path("..") / str(number))
    before = os.umask(0o022)
    try:
        copy_companions(model, output, "bfloat16")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o644}
    assert not any(path.is_symlink() for path in output.iterdir())


@pytest.mark.parametrize(
    ("values", "key", "said"),
    [
        ({"dtype": "float32"}, "dtype", "bfloat16"),
        ({"torch_dtype": "torch.bfloat16"}, "torch_dtype", "bfloat16"),
        ({"dtype": "auto"}, "dtype", None),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights", None),
    ],
)
def test_the_config_says_what_the_output_is(
    model: Path, output: Path, values: dict[str, Any], key: str, said: Any
) -> None:
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype")
    (model / "config.json").write_text(json.dumps(config | values))
    copy_companions(model, output, "bfloat16")
    written = json.loads((output / "config.json").read_text())
    assert written.get(key) == said
    assert {name: value for name, value in written.items() if name != key} == config
    assert AutoConfig.from_pretrained(output).hidden_size == 32  # as it is, and no dtype that it stumbles over


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "auto", "bfloat16"])
def test_a_dtype_that_transformers_stumbles_over_does_not_hide_the_tokenizer(model: Path, dtype: str) -> None:
    wanted = AutoTokenizer.from_pretrained(model)
    add_tokenizer(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    found = load_tokenizer(str(model))
    assert type(found) is type(wanted) and found("abc") == wanted("abc")
