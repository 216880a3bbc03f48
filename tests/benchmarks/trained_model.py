"""What benchmarks of a small trained model share: which model and texts, flags, a quiet reporter, the code's commit."""

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from espalier.pipeline.demo import sources
from espalier.pipeline.run.progress import Reporter

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


def parser(description: str | None, scratch: str) -> argparse.ArgumentParser:
    """The flags that say what is measured on; `scratch` is the default directory's name among temporary files."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = SHARED / "models" / "pystdlib-5m"
    made.add_argument(
        "--model", type=Path, default=trained if trained.exists() else ROOT / "pipeline" / "demo" / "model"
    )
    made.add_argument("--calibration", type=Path, help="text file; with --eval")
    made.add_argument("--eval", type=Path, help="text file")
    made.add_argument("--samples", type=int, default=64)
    made.add_argument("--length", type=int, default=256)
    made.add_argument("--windows", type=int, default=64, help="windows of --length tokens to evaluate on")
    made.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / scratch)
    return made


def parsed(flags: argparse.ArgumentParser) -> argparse.Namespace:
    """The settings, with a scratch directory that is there."""
    settings = flags.parse_args()
    settings.scratch = settings.scratch.absolute()
    settings.scratch.mkdir(parents=True, exist_ok=True)
    return settings


class Quiet(Reporter):
    """Says nothing of a run but what went wrong."""

    def __init__(self) -> None:
        pass

    def note(self, text: str) -> None:
        if text.startswith("warning"):
            print(f"  {text}")

    def pass_begins(self, name: str, microbatches: int) -> Callable[[int], None]:
        return lambda done: None

    def work_begins(self, blocks_by_shard: Any, finished: int) -> None:
        pass

    def block_done(self, report: Any, recipe: str, blocks: int) -> None:
        pass


def commit() -> str:
    """What code this is, as git says it."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def texts_for(settings: argparse.Namespace) -> tuple[Path, Path]:
    """Calibration text, and as much of the evaluation text as makes `windows` windows, which spares every run the rest
    of it."""
    calibration, evaluation = settings.calibration, settings.eval
    if calibration is None or evaluation is None:
        calibration, evaluation = SHARED / "data" / "pystdlib-calib.txt", SHARED / "data" / "pystdlib-valid.txt"
        if not (calibration.exists() and evaluation.exists()):
            calibration, evaluation = settings.scratch / "calibration.txt", settings.scratch / "held-out.txt"
            calibration.write_text(sources.calibration_text())
            evaluation.write_text(sources.held_out_text())
    excerpt = settings.scratch / f"evaluation-{settings.windows}x{settings.length}.txt"
    if not excerpt.exists():
        text = evaluation.read_text()
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in tokens["offset_mapping"]]
        # One token more: cut off there, the last one may be tokenised otherwise.
        excerpt.write_text(text[: ends[min(settings.windows * settings.length, len(ends) - 1)]])
    return calibration, excerpt
