"""Whole runs for tests: a tokenizer and a text for tiny models, a run without Ray, a command in its own process."""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from streaming import BATCH, make_shards, prune

from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.planning.model_info import model_facts
from espalier.pipeline.planning.resolve import resolve_auto
from espalier.pipeline.record.metric_names import METRICS
from espalier.pipeline.run.inputs import load_tokenizer
from espalier.pipeline.run.progress import Reporter
from espalier.stages.data.token_table import build_token_table
from espalier.stages.loading.skeleton import read_config

LENGTH, SAMPLES, MICROBATCH = 32, 16, 2
GIVE_UP_SECONDS = 180  # for what takes ten on an idle machine


def add_tokenizer(directory: Path, ids: dict[str, int] | None = None) -> None:
    """Gives the model in `directory` a tokenizer: a character's id is its ASCII code, or what `ids` says."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocabulary = {chr(code): code for code in range(128)} | (ids or {})
    Tokenizer(BPE(vocab=vocabulary, merges=[])).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_text(path: Path, characters: int, seed: int) -> Path:
    """A file of lower-case words."""
    source = random.Random(seed)
    words = ("".join(source.choices("etaoinshrdlu", k=source.randint(1, 9))) for _ in range(characters))
    path.write_text(" ".join(words)[:characters])
    return path


def users_modules(folder: Path) -> Path:
    """`folder` with modules that have the names of our folders, and one of a common name: importing any but `cluster`,
    which has a criterion, ends the process."""
    (folder / "stages").mkdir(parents=True)
    for name in ("pipeline.py", "stages/__init__.py", "tokens.py"):
        (folder / name).write_text(f"raise SystemExit('the {name} of the user was imported')\n")
    (folder / "cluster.py").write_text("def mine(weight, statistics):\n    return weight.abs().float()\n")
    return folder


def weights_of(output: Path) -> dict[str, str]:
    """Digest of every safetensors file of a checkpoint."""
    files = sorted(output.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def journal_of(output: Path, event: str = "block") -> list[dict[str, Any]]:
    """The journal's whole lines of one kind."""
    lines = []
    for line in (output / "espalier" / "journal.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if line["event"] == event]


def recorded_outside_the_table(run: Path) -> set[str]:
    """Metrics of a run, by the copy in the directory that holds its metrics.jsonl, that METRICS does not have."""
    forms = [re.escape(name).replace(r"\{n\}", r"\d+") for name in METRICS]
    known = re.compile("|".join(re.sub(r"\\\{[a-z]+\\\}", ".+", form) for form in forms))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    recorded = {name for line in lines for name in json.loads(line)["metrics"]}
    assert recorded, "a run records something"
    return {name for name in recorded if not known.fullmatch(name)}


def prune_line(wanted: dict[str, Any], **more: object) -> list[str]:
    """The command line of `prune` with these options, those in `more` before those in `wanted`."""
    options = {name: value for name, value in wanted.items() if name != "model"} | more
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return ["prune", wanted["model"], *(part for pair in pairs for part in pair)]


def prune_without_ray(config: PruneConfig) -> dict[str, str]:
    """`weights_of` what `config` asks for, made by one plain Shard in this process."""
    model, output = Path(config.model), Path(config.output)
    assert isinstance(config.length, int) and config.microbatch == BATCH
    facts = model_facts(read_config(model), config.model)
    config = resolve_auto(config, facts)
    home = output.parent / f"{output.name} without Ray"
    home.mkdir(parents=True)
    table = build_token_table(
        config.calibration,
        load_tokenizer(config.model),
        length=config.length,
        samples=config.samples,
        seed=config.seed,
        path=home / "tokens.arrow",
        vocab_size=facts.vocabulary,
    )
    shards = make_shards(model, home, 1, config.length, blocks=facts.blocks, recipe=config.block_recipe)
    prune(shards, torch.from_numpy(table.rows(0, len(table)).copy()))
    shards[0].copy_ends()
    return weights_of(home / "output")


class Listener(Reporter):
    """Keeps what a run tells, and calls `on_block` and `on_step` when these happen."""

    def __init__(self, on_block: Callable[[int], None] | None = None, on_step: Callable[[int], None] | None = None):
        self.notes: list[str] = []
        self.on_block, self.on_step = on_block, on_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def pass_begins(self, name: str, microbatches: int) -> Callable[[int], None]:
        return self.on_step if self.on_step and name == "stream" else lambda done: None

    def work_begins(self, blocks_by_shard: Any, finished: int) -> None:
        self.notes.append(f"{finished} finished before")

    def block_done(self, report: Any, recipe: str, blocks: int) -> None:
        if self.on_block:
            self.on_block(report["block"])


class Command:
    """`espalier ARGUMENTS` in a process of its own, which leads a session of its own."""

    def __init__(self, arguments: Sequence[object], environment: dict[str, str], directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "espalier", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | environment,
            cwd=directory,
        )
        self.lines: list[str] = []  # of stderr, as far as they were read
        self._timer = threading.Timer(GIVE_UP_SECONDS, self.process.kill)  # so that no read waits for ever
        self._timer.daemon = True
        self._timer.start()

    def until(self, pattern: str) -> None:
        """Returns when a line of stderr matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return
        raise AssertionError(f"no line matches {pattern!r} in:\n" + "\n".join(self.lines))

    def listens(self) -> bool:
        """Whether the process has come as far as to wait for the signals that end it: SIGTERM is blocked then."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        blocked = next((line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), "0")
        return bool(int(blocked, 16) >> (signal.SIGTERM - 1) & 1)

    def family(self) -> list[psutil.Process]:
        """The process and all that it has started, as of now."""
        leader = psutil.Process(self.process.pid)
        return [leader, *leader.children(recursive=True)]

    def kill(self) -> list[psutil.Process | str]:
        """SIGKILL, to the driver alone; what of its family did not end by itself within twenty seconds, or of its files
        did not go with it."""
        self.process.send_signal(signal.SIGSTOP)  # it does no more while its family is looked up
        family = self.family()
        ours = os.environ.get("RAY_AUTH_TOKEN_PATH")  # of the tests' shared cluster: the driver was started with it
        tokens = {member.environ().get("RAY_AUTH_TOKEN_PATH") for member in family[1:]} - {None, ours}
        self.process.kill()
        self.finish()
        _, left = psutil.wait_procs(family, timeout=20)
        return [*left, *(token for token in tokens if token and Path(token).parent.exists())]

    def interrupt(self) -> None:
        """What Ctrl-C on a terminal does: SIGINT to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self) -> tuple[int, str]:
        """(exit code, what it printed on stdout)."""
        assert self.process.stderr is not None and self.process.stdout is not None
        self.lines += self.process.stderr.read().splitlines()  # not communicate: it would lose what is buffered here
        out = self.process.stdout.read()
        self.process.wait()
        self._timer.cancel()
        return self.process.returncode, out


def alive(family: Sequence[psutil.Process]) -> list[str]:
    """Which of these processes are more than an entry that nobody has collected yet."""
    left = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(f"{process.pid} {process.name()}")
    return left
