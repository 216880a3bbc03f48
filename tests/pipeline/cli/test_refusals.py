"""What cannot work is refused: exit code 2, one line that names the thing and the remedy, nothing left behind."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_runs import LENGTH, MICROBATCH, SAMPLES, add_tokenizer, journal_of

from espalier.pipeline.cli.main import main

pytestmark = pytest.mark.usefixtures("recorded")
Refused = Callable[..., str]


@pytest.fixture
def refused(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(*more options, model=, output=) -> the one line that `espalier prune` says, having left nothing."""

    def run(*more: object, model: object = model, output: Path = tmp_path / "out", calibration: Path = text) -> str:
        before = sorted(output.rglob("*")) if output.is_dir() else output.exists()
        usual = ["prune", model, "--output", output, "--calibration", calibration]
        sizes = ["--samples", SAMPLES, "--length", LENGTH, "--microbatch", MICROBATCH, "--shards", 1]
        line = refusal_of(capsys, *usual, *sizes, *more)
        assert (sorted(output.rglob("*")) if output.is_dir() else output.exists()) == before
        return line

    return run


def refusal_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The refusal of a whole command line; fails unless stderr is that one line, and the exit code is 2."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("espalier: ")]
    assert len(said) == 1 and err.endswith(said[0] + "\n") and "Traceback" not in err and not out
    return said[0]


# -- the model ---------------------------------------------------------------------------------------------------------


def test_no_such_model(refused: Refused, tmp_path: Path) -> None:
    line = refused(model=tmp_path / "nowhere")
    assert "nowhere" in line and "no such model directory" in line


def test_a_pickle_only_checkpoint(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    line = refused()
    assert "pytorch_model.bin" in line and "convert it to safetensors" in line


def test_a_missing_shard_file(refused: Refused, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model(sharded=True), tmp_path / "sharded"))
    (missing := sorted(model.glob("model-*.safetensors"))[1]).unlink()
    line = refused(model=model)
    assert missing.name in line and "missing" in line and "fetch" in line


def test_a_truncated_shard_file(refused: Refused, model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    line = refused()
    assert "model.safetensors" in line and "truncated" in line


@pytest.mark.parametrize(
    ("family", "why"),
    [("mamba", "recurrent models are not pruned here"), ("bert", "an encoder"), ("llama9", "does not know it")],
)
def test_what_is_no_transformer_that_predicts_the_next_token(
    refused: Refused, model: Path, family: str, why: str
) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace('"llama"', f'"{family}"'))
    line = refused()
    assert f"'{family}' is not supported" in line and why in line


def spoil(model: Path, name: str, value: float = float("nan")) -> None:
    weights = load_file(model / "model.safetensors")
    weights[name].view(-1)[7] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.ray
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight"], ids=["embedding", "deep in a block"]
)
def test_a_nan_in_a_weight_names_it(refused: Refused, model: Path, one_cluster: None, name: str) -> None:
    spoil(model, name)
    line = refused("--shards", 2) if "layers" in name else refused()
    assert name in line and "1 of" in line and "NaN" in line


# -- the request -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["-0.1", "1.0", "nan"])
def test_a_ratio_outside_zero_to_one(refused: Refused, ratio: str) -> None:
    line = refused(f"--sparsity={ratio}")
    assert f"sparsity {ratio}" in line


def test_a_pattern_that_does_not_fill_a_layer_names_the_layer(refused: Refused, model: Path) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 54'))
    weights = load_file(model / "model.safetensors")
    for name in (name for name in weights if ".mlp." in name):
        wider = (0, 6, 0, 0) if "down_proj" in name else (0, 0, 0, 6)
        weights[name] = torch.nn.functional.pad(weights[name], wider).contiguous()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    line = refused("--pattern", "2:4")
    assert "block 0, mlp.down_proj" in line and "54" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--reconstruct", "window:9"], "reconstruct window:9: the model has 4 blocks"),
        (["--reconstruct", "window:4", "--shards", 2], "shards 2: 4 blocks make 1 windows of 4"),
        (["--sweeps", 1, "--inputs", "pruned"], "sweeps 1 with inputs pruned"),
        (["--criterion", "wandar"], "did you mean wanda"),
        (["--criterion", "ria", "--criterion-option", "alpha=-1"], "alpha = -1 must be at least 0"),
        (["--criterion", "ria", "--criterion-option", "alfa=1"], "did you mean alpha"),
        (["--criterion", "nowhere.score"], "cannot be imported"),
        (["--refine", "dsnott"], "refine = 'dsnott'"),
    ],
)
def test_recipes_that_cannot_be(refused: Refused, options: list[object], said: str) -> None:
    assert said in refused(*options)


def test_an_override_that_matches_no_layer_names_the_nearest(refused: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('overrides:\n  - match: "0.mlp.down_prj"\n    sparsity: 0\n')
    line = refused("--config", recipe)
    assert "override '0.mlp.down_prj' matches no layer" in line and "0.mlp.down_proj" in line


@pytest.mark.parametrize("pattern", ["4:2", "2", "2:4:8", "a:b", "0:4"])
def test_a_pattern_that_is_none(refused: Refused, pattern: str) -> None:
    assert pattern in refused("--pattern", pattern)


def test_both_targets(refused: Refused) -> None:
    line = refused("--sparsity", "0.5", "--pattern", "2:4")
    assert "give one of the two" in line


def test_more_shards_than_blocks(refused: Refused) -> None:
    line = refused("--shards", 5)
    assert "shards 5" in line and "at most 4" in line


def test_a_window_beyond_the_context(refused: Refused) -> None:
    line = refused("--length", 257)
    assert "257" in line and "--length 256" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_gpu_that_is_not_there(refused: Refused) -> None:
    assert "no CUDA device" in refused("--device", "cuda")


def test_an_unknown_flag(refused: Refused) -> None:
    assert "--sparcity" in refused("--sparcity", "0.5")


def test_an_unknown_yaml_option_names_the_nearest(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("sparcity: 0.5\n")
    line = refused("--config", tmp_path / "run.yaml")
    assert "'sparcity'" in line and "did you mean sparsity?" in line


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", ""])
def test_a_yaml_file_that_holds_no_options(refused: Refused, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert "run.yaml" in refused("--config", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", "0"), ("epochs", "many"), ("learning-rate", "-1"), ("scope", "column"), ("criterion", "magic")],
)
def test_a_value_that_an_option_cannot_have(refused: Refused, option: str, value: str) -> None:
    line = refused(f"--{option}", value)
    assert option.replace("-", "_") in line and value in line


def test_a_missing_option_or_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--calibration" in refusal_of(capsys, "prune", tmp_path, "--output", tmp_path / "out")
    assert "MODEL" in refusal_of(capsys, "prune", "--output", tmp_path / "out", "--calibration", tmp_path)


# -- the text ----------------------------------------------------------------------------------------------------------


def test_text_that_is_too_short_says_how_much_there_is(refused: Refused) -> None:
    line = refused("--samples", 1000)
    assert "4 000 tokens = 125 windows of 32" in line and "--samples 125" in line


def test_a_held_out_text_that_is_too_short(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    line = refused("--eval", tmp_path / "short.txt")
    assert "evaluation text" in line and "3 tokens" in line


def test_a_text_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.txt" in refused(calibration=tmp_path / "nowhere.txt")


def test_a_token_beyond_the_vocabulary(refused: Refused, model: Path, tmp_path: Path) -> None:
    add_tokenizer(model, {"Z": 500})
    (tmp_path / "zeds.txt").write_text("abc Z" * 400)
    line = refused(calibration=tmp_path / "zeds.txt")
    assert "token id 500" in line and "vocabulary of 128" in line


def test_a_model_without_a_tokenizer(refused: Refused, model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused()


# -- where it goes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    (tmp_path / "taken").mkdir()
    return tmp_path / "taken"


def record(directory: Path, status: str) -> None:
    (directory / "espalier").mkdir()
    (directory / "espalier" / "run.json").write_text(f'{{"status": "{status}", "config": {{}}, "fingerprint": "f"}}')


def test_an_output_that_is_not_empty(refused: Refused, taken: Path) -> None:
    (taken / "thesis.tex").write_text("years of work")
    line = refused(output=taken)
    assert str(taken) in line and "not empty" in line


def test_an_output_that_holds_a_finished_run(refused: Refused, taken: Path) -> None:
    record(taken, "finished")
    assert "finished run" in refused(output=taken)


def test_an_output_that_belongs_to_an_unfinished_run_says_how_to_resume_it(refused: Refused, taken: Path) -> None:
    record(taken, "running")
    assert f"`espalier resume {taken}`" in refused(output=taken)


def test_an_output_that_is_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "a file" in refused(output=tmp_path / "file")


def test_an_output_that_cannot_be_made(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(output=tmp_path / "file" / "out")


def test_an_empty_directory_of_the_user_s_stays_after_a_refusal(refused: Refused, taken: Path) -> None:
    refused("--samples", 1000, output=taken)
    assert list(taken.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """mount(kilobytes) -> a directory on a disk of its own of that size."""
    directory = tmp_path / "disk"
    directory.mkdir()

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(directory)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a tmpfs")
        return directory

    yield mount
    if os.path.ismount(directory):
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_disk_that_cannot_hold_the_model_at_all(refused: Refused, small_disk: Callable[[int], Path]) -> None:
    line = refused(output=small_disk(40) / "out")
    assert "the pruned model takes" in line and "larger one" in line


@pytest.mark.ray
def test_a_disk_that_fills_up_in_the_middle_keeps_what_is_whole_and_says_how_to_go_on(
    model: Path,
    text: Path,
    small_disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    one_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from espalier.pipeline.run.directory import RunDirectory

    disk = small_disk(1024)
    output, note = disk / "out", RunDirectory.note

    def note_and_fill(directory: RunDirectory, event: str, **fields: object) -> None:
        note(directory, event, **fields)
        if event == "block":
            with open(disk / "somebody else's", "wb") as file, pytest.raises(OSError):
                while True:
                    file.write(b"x" * 4096)
                    file.flush()

    monkeypatch.setattr(RunDirectory, "note", note_and_fill)
    usual = ["prune", model, "--output", output, "--calibration", text, "--samples", SAMPLES, "--length", LENGTH]
    line = refusal_of(capsys, *usual, "--shards", 1)
    assert "disk full" in line and "espalier resume" in line
    whole = {entry["file"] for entry in journal_of(output)}
    assert {path.name for path in output.glob("*.safetensors*")} == whole and len(whole) == 1
    (disk / "somebody else's").unlink()
    monkeypatch.setattr(RunDirectory, "note", note)
    assert main(["resume", str(output), "--json"]) == 0
    assert len(list(output.glob("model-block-*.safetensors"))) == 4
