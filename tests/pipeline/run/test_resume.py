"""Runs that are killed, interrupted or lose a shard: what comes out in the end are the bytes of a run left in peace."""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file
from warm import WarmShardGroup
from whole_runs import LENGTH, MICROBATCH, SAMPLES, Command, Listener, journal_of, prune_without_ray, weights_of

from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.pruning import prune as driver
from espalier.pipeline.pruning import run as prune_run
from espalier.pipeline.pruning.prune import prune, resume
from espalier.pipeline.run.directory import RunDirectory, check_free
from espalier.stages.errors import Refusal

MADE_OF = {"criterion": "wanda", "reconstruct": "component"}  # as `request_for` has it
EPOCHS = 3  # so that a block takes long enough to be interrupted
moments = random.Random(20261122)


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of what every run here makes, from a plain Shard in this process."""
    return prune_without_ray(
        PruneConfig(
            model=str(tiny_model()),
            output=str(tmp_path_factory.mktemp("expected") / "out"),
            calibration=str(text),
            samples=SAMPLES,
            length=LENGTH,
            microbatch=MICROBATCH,
            epochs=EPOCHS,
            **MADE_OF,
        )
    )


@pytest.fixture
def command(
    tiny_model: Callable[..., Path], text: Path, database: str, tmp_path: Path
) -> Iterator[Callable[..., Command]]:
    """start(*more options) -> the running command, with the output in tmp_path/"out"; killed after the test."""
    started: list[Command] = []

    def start(*more: object) -> Command:
        usual = ("prune", tiny_model(), "--output", tmp_path / "out", "--calibration", text, "--epochs", EPOCHS)
        sizes = ("--samples", SAMPLES, "--length", LENGTH, "--microbatch", MICROBATCH)
        made_of = [part for name, value in MADE_OF.items() for part in (f"--{name}", value)]
        started.append(Command([*usual, *sizes, *made_of, *more], {"MLFLOW_TRACKING_URI": database}, tmp_path))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


@pytest.mark.ray
@pytest.mark.slow
def test_killed_in_the_stream_a_run_leaves_no_process_and_resumes_to_the_same_bytes(
    command: Callable[..., Command], expected: dict[str, str], tmp_path: Path, one_cluster: None, recorded: str
) -> None:
    run = command("--shards", 1)
    run.until(rf"stream +{2 * moments.randint(1, 2)}/8 ")
    assert run.kill() == [], "gcs, raylet and shard went with the driver"
    assert not (tmp_path / "out" / "espalier" / "journal.jsonl").exists(), "no block was finished"
    assert weights_of(resume(tmp_path / "out").output) == expected


@pytest.mark.ray
@pytest.mark.slow
def test_killed_at_work_a_run_resumes_with_other_shards_to_the_same_bytes(
    command: Callable[..., Command], expected: dict[str, str], tmp_path: Path, one_cluster: None, recorded: str
) -> None:
    run = command("--shards", 1)
    for _ in range(moments.randint(1, 2)):
        run.until(r"^block \d .* \d/4 blocks")
    assert run.kill() == []
    finished = {line["block"] for line in journal_of(tmp_path / "out")}
    assert 1 <= len(finished) < 4
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()

    damaged = Path(shutil.copytree(tmp_path / "out", tmp_path / "damaged"))
    result = resume(tmp_path / "out", shards=2)
    assert weights_of(result.output) == expected
    assert len(journal_of(tmp_path / "out")) == 4, "a finished block is not made again"
    assert [block["block"] for block in result.run["blocks"]] == [0, 1, 2, 3]

    (torn := damaged / "espalier" / "journal.jsonl").write_bytes(torn.read_bytes() + b'{"event": "block", "blo')
    broken = min(finished)
    file = damaged / f"model-block-{broken:05d}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert weights_of(resume(damaged, shards=3).output) == expected
    made = [line["block"] for line in journal_of(damaged)]
    assert sorted(made) == sorted([0, 1, 2, 3, broken]), "only the corrupt block is made twice"


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_at_work_ends_in_one_line_that_says_how_to_resume_and_resumes(
    command: Callable[..., Command], expected: dict[str, str], tmp_path: Path, one_cluster: None, recorded: str
) -> None:
    run = command("--shards", 1)
    run.until(r"^block \d .* \d/4 blocks")
    family = run.family()
    run.interrupt()
    code, _ = run.finish()
    assert code == 130
    assert run.lines[-1] == f"espalier: interrupted; `espalier resume {tmp_path / 'out'}` goes on"
    assert not any("Traceback" in line for line in run.lines)
    assert psutil.wait_procs(family, timeout=60)[1] == [], "shards and Ray go with the driver"
    assert weights_of(resume(tmp_path / "out").output) == expected


class Watched(WarmShardGroup):
    """A group of shards that tells its shards' process ids."""

    pids: list[int]

    def open(self) -> Any:
        facts = super().open()
        type(self).pids = [fact.pid for fact in facts]
        return facts


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setattr(prune_run, "ShardGroup", Watched)
    return Watched


def kill_once(group: type[Watched], shard: int) -> Callable[[int], None]:
    killed: list[int] = []

    def kill(_: int) -> None:
        if not killed:
            killed.append(group.pids[shard])
            os.kill(killed[0], signal.SIGKILL)

    return kill


@pytest.mark.ray
@pytest.mark.slow
def test_a_shard_killed_in_the_stream_and_one_at_work_cost_a_warning_each_and_no_finished_block(
    request_for: Any, watched: type[Watched], expected: dict[str, str], one_cluster: None, recorded: str
) -> None:
    killer = Listener(on_step=kill_once(watched, 1), on_block=kill_once(watched, 0))
    result = prune(request_for(epochs=EPOCHS, shards=2), killer)
    assert weights_of(result.output) == expected
    assert sum("a shard was lost" in warning for warning in result.run["warnings"]) >= 2
    assert sorted(line["block"] for line in journal_of(result.output)) == [0, 1, 2, 3]


# -- sweeps and pruned inputs ------------------------------------------------------------------------------------------

SWEEPS = {"sweeps": 2, "reconstruct": "block", "refine": "r2-dsnot"}
IN_ORDER = {"inputs": "pruned", "reconstruct": "window:2", "criterion": "sparsegpt", "refine": "none"}


@pytest.fixture(scope="module")
def expected_of(
    tiny_model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, str]]:
    """make(**options) -> the digests of what such a run makes, from a plain Shard in this process."""

    def make(**options: Any) -> dict[str, str]:
        sizes = {"samples": SAMPLES, "length": LENGTH, "microbatch": MICROBATCH}
        output = str(tmp_path_factory.mktemp("expected") / "out")
        config = PruneConfig(
            model=str(tiny_model()), output=output, calibration=str(text), **sizes, **(MADE_OF | options)
        )
        return prune_without_ray(config)

    return make


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("options", [SWEEPS, IN_ORDER], ids=["sweeps", "pruned inputs"])
def test_a_shard_killed_while_blocks_wait_for_each_other_costs_a_warning_and_no_bit(
    request_for: Any,
    watched: type[Watched],
    expected_of: Callable[..., dict[str, str]],
    one_cluster: None,
    recorded: str,
    options: dict[str, Any],
) -> None:
    done: list[int] = []
    kill = kill_once(watched, 0)

    def later(block: int) -> None:
        done.append(block)
        if len(done) == (5 if "sweeps" in options else 2):  # in the first sweep; after the first window
            kill(block)

    result = prune(request_for(shards=2, **options), Listener(on_block=later))
    assert weights_of(result.output) == expected_of(**options)
    assert any("a shard was lost" in warning for warning in result.run["warnings"])
    assert not list((result.output / "espalier").glob("sweep-*")), "what earlier sweeps left is gone"


@pytest.mark.ray
@pytest.mark.slow
def test_killed_in_a_sweep_a_run_resumes_with_other_shards_to_the_same_bytes(
    request_for: Any, expected_of: Callable[..., dict[str, str]], tmp_path: Path, one_cluster: None, recorded: str
) -> None:
    killed, options = tmp_path / "killed", {"sweeps": 1, "correction": [0.5], "refine": "none"}
    done: list[int] = []

    def copy_what_a_killed_run_leaves(block: int) -> None:
        done.append(block)
        if len(done) == 5:
            shutil.copytree(tmp_path / "out", killed, ignore=shutil.ignore_patterns("*.tmp"))

    config = request_for(shards=2, **options)
    whole = weights_of(prune(config, Listener(on_block=copy_what_a_killed_run_leaves)).output)
    journal = journal_of(killed)
    assert sum(line["sweep"] == 0 for line in journal) == 4 and sum(line["sweep"] == 1 for line in journal) < 4
    assert not list(killed.glob("*.index.json"))
    assert weights_of(resume(killed, shards=1).output) == whole == expected_of(**options)
    assert sum(line["sweep"] == 0 for line in journal_of(killed)) == 4, "the sweep before is not made again"


# -- what is no run to go on with --------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(request_for: Any, model: Path) -> tuple[Path, dict[str, Any]]:
    """A run's directory as it is right after the run began, and its run.json."""
    config = request_for(model=model)
    _, fingerprint = driver.inspect(config)
    run = {"run_id": "x", "status": "running", "config": config.model_dump(mode="json"), "fingerprint": fingerprint}
    RunDirectory.claim(Path(config.output), run).release()
    return Path(config.output), run


def refusal(output: Path, **options: Any) -> str:
    with pytest.raises(Refusal) as caught:
        resume(output, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_finished_run_is_not_resumed(interrupted: tuple[Path, dict[str, Any]]) -> None:
    output, run = interrupted
    (output / "espalier" / "run.json").write_text(json.dumps(run | {"status": "finished"}))
    (output / "espalier" / "report.md").touch()
    assert "finished" in refusal(output) and "report.md" in refusal(output)


@pytest.mark.parametrize("content", [None, "", "[]", '{"status": "running"}', "not JSON"])
def test_a_directory_without_a_run_of_ours_is_not_resumed(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "espalier").mkdir()
    if content is not None:
        (tmp_path / "espalier" / "run.json").write_text(content)
    assert "no run to resume" in refusal(tmp_path)


def test_a_missing_directory_is_not_resumed(tmp_path: Path) -> None:
    assert "no run to resume" in refusal(tmp_path / "nowhere")


def test_a_run_whose_model_changed_in_between_is_not_resumed(
    interrupted: tuple[Path, dict[str, Any]], model: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert "not the checkpoint that this run began with" in refusal(interrupted[0])


def test_more_shards_than_blocks_are_refused_and_the_run_stays(interrupted: tuple[Path, dict[str, Any]]) -> None:
    assert "at most 4" in refusal(interrupted[0], shards=5)
    assert (interrupted[0] / "espalier" / "run.json").exists()


def test_two_processes_do_not_work_on_one_run(interrupted: tuple[Path, dict[str, Any]]) -> None:
    mine, _ = RunDirectory.reopen(interrupted[0])
    with pytest.raises(Refusal, match=rf"process {os.getpid()} on \S+ is at work on this run"):
        RunDirectory.reopen(interrupted[0])
    with pytest.raises(Refusal, match=rf"process {os.getpid()} on \S+ is at work on this run; let it end, or give"):
        check_free(interrupted[0])
    mine.release()
    with pytest.raises(Refusal, match="espalier resume"):
        check_free(interrupted[0])
    RunDirectory.reopen(interrupted[0])[0].release()


def test_what_follows_a_torn_line_stands_by_itself(interrupted: tuple[Path, dict[str, Any]]) -> None:
    output, _ = interrupted
    journal = output / "espalier" / "journal.jsonl"
    journal.write_text('{"event": "a", "n": 1}\n{"event": "a", "n"')
    directory, _ = RunDirectory.reopen(output)
    directory.note("a", n=3)
    assert [entry["n"] for entry in directory.noted("a")] == [1, 3]
    directory.release()


def test_ends_that_changed_after_they_were_noted_count_as_missing(interrupted: tuple[Path, dict[str, Any]]) -> None:
    output, _ = interrupted
    directory, _ = RunDirectory.reopen(output)
    assert directory.finished_ends() is None
    (output / "ends").write_text("whole")
    directory.note_ends(["ends"])
    assert directory.finished_ends() == ["ends"]
    (output / "ends").write_text("torn")
    assert directory.finished_ends() is None
    directory.release()


# -- devices that fail -------------------------------------------------------------------------------------------------

FAILING = """
from pathlib import Path

import torch


def loses_its_device_once(weight, statistics):
    if not Path("lost").exists():
        Path("lost").touch()
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    return weight.abs().float()


def needs_too_much(weight, statistics):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. Of the allocated memory 1 GiB is")
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_shard_whose_device_is_lost_is_made_anew_and_costs_no_bit(
    command: Callable[..., Command], request_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    run = command("--shards", 2, "--criterion", "failing.loses_its_device_once", "--reconstruct", "none")
    code, _ = run.finish()
    assert code == 0, run.lines
    lost = r"warning: a shard was lost \(CUDA error: device-side assert triggered, on node .*\); streaming"
    assert any(re.search(lost, line) for line in run.lines), run.lines
    monkeypatch.syspath_prepend(tmp_path)  # where the file `lost` lies by now
    alike = {"criterion": "failing.loses_its_device_once", "reconstruct": "none", "epochs": EPOCHS}
    expected = prune_without_ray(request_for(**alike, output=str(tmp_path / "expected")))
    assert weights_of(tmp_path / "out") == expected


@pytest.mark.ray
@pytest.mark.slow
def test_memory_that_runs_out_ends_in_one_line_with_block_need_and_remedy(
    command: Callable[..., Command], tmp_path: Path, recorded: str
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    run = command("--criterion", "failing.needs_too_much")
    assert run.finish()[0] == 2
    line = r"^espalier: block \d, mask of .* on cpu: CUDA out of memory\. Tried to allocate 9\.00 GiB; use "
    assert re.search(line, run.lines[-1]), run.lines
    assert json.loads((tmp_path / "out" / "espalier" / "run.json").read_text())["status"] == "failed"
