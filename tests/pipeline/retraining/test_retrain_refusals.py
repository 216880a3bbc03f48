"""What `espalier retrain` does not do: exit code 2, one line that names the thing, nothing under the output."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from whole_runs import write_text

from espalier.pipeline.cli.main import main
from espalier.pipeline.planning.hardware import cores


@pytest.fixture
def refused(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(*flags) -> the one line that `espalier retrain` says."""

    def run(*flags: object, start: Path = model, output: str = "out") -> str:
        arguments = ["retrain", start, "--output", tmp_path / output, "--data", text, "--length", 32, *flags]
        capsys.readouterr()  # what making the models printed
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.strip().splitlines()) == 1 and "Traceback" not in err
        return err

    return run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--zero-stage", 4], "zero-stage 4: ZeRO has stages 0, 1, 2 and 3"),
        (["--zero-stage", -1], "zero-stage -1"),
        (["--device", "cpu", "--dtype", "float16"], "dtype float16 on a CPU"),
        (["--offload", "--zero-stage", 1], "offload with zero-stage 1: needs stage 2 or 3"),
        (["--device", "cpu", "--ranks", 4 * cores()], f"ranks {4 * cores()}: this machine has"),
        (["--steps", 3, "--epochs", 2], "steps 3 and epochs 2.0: give one"),
        (["--device", "cpu", "--ranks", 1, "--batch", 8, "--microbatch", 3], "microbatch 3: 1 ranks x 3"),
        (["--shadow", "--shadow-decay", 1], "shadow decay 1.0: must be above 0 and below 1"),
        (["--lenght", 5], "No such option"),
        (["--schedule", "sine"], "option schedule = 'sine'"),
        (["--mask", "nowhere"], "nowhere: no such model directory"),
    ],
)
def test_options_that_cannot_be(flags: list[object], said: str, refused: Callable[..., str], tmp_path: Path) -> None:
    assert said in refused(*flags)
    assert not (tmp_path / "out").exists()


def test_a_mask_of_another_shape(
    refused: Callable[..., str], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    said = refused("--mask", tiny_checkpoint(hidden=64))
    assert "q_proj.weight is (64, 64), the model's is (32, 32)" in said
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_empty(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    write_text(tmp_path / "full" / "letter.txt", 10, seed=0)
    assert "full: not empty" in refused(output="full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_a_model_without_weights_is_begun_at_random_but_a_pickle_is_not_read(
    refused: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    pickled = Path(shutil.copytree(model, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "only pickled weights" in refused(start=pickled)
