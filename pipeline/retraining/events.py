"""Events that the ranks of a training run report: kept, and passed on to the recorder, the journal and the terminal."""

import math
import time
from typing import Any

from espalier.pipeline.record.metric_names import named
from espalier.pipeline.record.recorder import Recorder
from espalier.pipeline.reports.format import duration
from espalier.pipeline.run.directory import RunDirectory
from espalier.pipeline.run.progress import Reporter
from espalier.stages.errors import Refusal
from espalier.stages.metrics.perplexity import perplexity_of
from espalier.stages.training.spec import RetrainSpec

REPORT_SECONDS = 5.0  # between two lines about steps
HELD = ("parameters", "optimizer", "shadow")  # what a rank says how many bytes it keeps of


class RunEvents:
    """All that was reported so far, and what an earlier process of the run journalled of its evaluations."""

    def __init__(self, directory: RunDirectory, reporter: Reporter) -> None:
        self.directory, self.reporter = directory, reporter
        self.begun = False  # whether there is anything to go on from
        self.losses: dict[int, float] = {}
        self.evaluations: dict[int, float] = {entry["step"]: entry["loss"] for entry in directory.noted("evaluated")}
        self.memory: dict[int, dict[str, int]] = {}
        self.peaks: dict[int, int] = {}
        self.seconds = self.tracking = 0.0  # of the steps that were reported, and of these what the shadow took
        self.tokens = self.snapshots = 0
        self.reported = 0.0

    @property
    def losses_in_order(self) -> list[float]:
        """Of every step, the first one's first."""
        return [self.losses[step] for step in sorted(self.losses)]

    def take(self, event: dict[str, Any], spec: RetrainSpec, recorder: Recorder) -> None:
        """One event of `espalier.stages.training.rank.train`; of those of all ranks alike, rank 0's."""
        rank, step = event["rank"], event.get("step", 0)
        match event["event"]:
            case "holds":
                held = self.memory[rank] = {name: event[name] for name in HELD if name in event}
                recorder.metrics(named({f"memory/{name}_bytes_rank{{n}}": held[name] for name in held}, n=rank))
            case "done":
                self.peaks[rank] = event["peak_memory"]
                self.losses = dict(enumerate(event["losses"]))
                self.evaluations |= dict(event["evaluations"])  # one that a process before was ended too soon to hear
            case _ if rank != 0:
                pass
            case "begin":
                self.begun = True
                if step:
                    self.reporter.note(f"going on after step {step}")
            case "steps":
                self._take_steps(event, spec, recorder)
            case "evaluated":
                loss = self.evaluations[step] = event["loss"]
                self.directory.note("evaluated", step=step, loss=loss)
                recorder.metrics(named({"eval/loss": loss, "eval/perplexity": perplexity_of(loss)}), step)
                self.reporter.note(
                    f"step {step}/{spec.steps}   evaluated: loss {loss:.4f}   perplexity {perplexity_of(loss):,.2f}"
                )
            case "saved":
                self.directory.note("checkpoint", step=step)

    def _take_steps(self, event: dict[str, Any], spec: RetrainSpec, recorder: Recorder) -> None:
        losses, rates, first = event["losses"], event["rates"], event["first"]
        for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), first + 1):
            recorder.metrics(named({"train/loss": loss, "train/learning_rate": rate}), step)
        done = first + len(losses)
        speed = event["tokens"] / event["seconds"]
        recorder.metrics(named({"train/tokens_per_second": speed}), done)
        self.losses |= dict(enumerate(losses, first))
        self.seconds += event["seconds"]
        self.tracking += event["tracking"]
        self.tokens += event["tokens"]
        if spec.shadow is not None:
            self.snapshots += done // spec.shadow.every - first // spec.shadow.every
        if not all(math.isfinite(loss) for loss in losses):
            raise Refusal(f"step {done}: the loss is not finite; lower --learning-rate, or set --clip")
        if time.monotonic() - self.reported > REPORT_SECONDS or done == spec.steps:
            self.reported = time.monotonic()
            left = event["seconds"] / max(1, len(losses)) * (spec.steps - done)
            self.reporter.note(
                f"step {done}/{spec.steps}   loss {losses[-1]:.4f}   rate {rates[-1]:.1e}   "
                f"{speed:,.0f} tokens/s" + (f"   eta {duration(left)}" if left else "")
            )
