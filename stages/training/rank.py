"""What one ZeRO rank runs: cross-entropy on text, the pruned weights held at zero, evaluated and saved on the way.

A run is a generator of events, plain dicts that say what happened; whoever runs the ranks passes them on. All ranks run
the same steps. Of what they say, rank 0 tells what concerns the run, and each tells what it holds.
"""

import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from espalier.stages.data.training_batches import Order, Source, microbatches_of, open_source, predicted_tokens
from espalier.stages.metrics.profile import peak_bytes
from espalier.stages.shadow.slices import parameter_of
from espalier.stages.shadow.tracker import ShadowTracker
from espalier.stages.training.arriving import Values, hollow_model
from espalier.stages.training.checkpoint import (
    MASTER,
    StoredSlices,
    directory_of,
    finish,
    latest,
    read_back,
    read_state,
    write_slices,
    write_state,
)
from espalier.stages.training.consolidate import IMPORTANCE, consolidate, consolidate_shadow
from espalier.stages.training.engine import make_engine, new_state, updates_of
from espalier.stages.training.lr_schedule import rate_at
from espalier.stages.training.model import Mask, checkpoint_activations, hold_zeros, load_model
from espalier.stages.training.partition import held, owned, slices, state_bytes
from espalier.stages.training.spec import DTYPES, RetrainSpec

REPORT_EVERY = 10  # steps whose losses are reported together: reading one makes a GPU wait
Event = dict[str, Any]


def train(spec: RetrainSpec, device: str) -> Iterator[Event]:
    """Train as `spec` says, from its newest checkpoint if there is one, in a process that has joined its group.

    Every event has its rank. By their "event": `begin` (step), `holds` (bytes on this rank of parameters, of optimizer
    state and of the shadow), `steps` (first, losses, rates, tokens, seconds, of
    these those that `tracking` took), `evaluated` (step, loss), `saved` (step),
    `done` (losses of all steps, all evaluations, peak memory of this rank in bytes).
    At the end HOME/consolidated holds a plain checkpoint, and HOME/shadow one of importances if they were tracked.
    """
    rank = Rank(spec, torch.device(device))
    try:
        yield from rank.run()
    finally:
        rank.close()


class Rank:
    """One rank of one run."""

    def __init__(self, spec: RetrainSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.home = Path(spec.home)
        self.data = open_source(spec.data)
        self.eval = open_source(spec.eval) if spec.eval else None
        self.order = Order(len(self.data), spec.batch, spec.seed)
        self.losses: list[float] = []  # of all steps since the run's first
        self.evaluations: list[tuple[int, float]] = []  # (step, loss) likewise
        self.step = 0  # optimizer steps done
        self.tracker: ShadowTracker | None = None
        self.engine: Any = self._open()
        self.pending: list[tuple[Tensor, float]] = []  # losses not reported yet, and their learning rates
        self.tokens, self.seconds, self.tracking = 0, 0.0, 0.0  # since they were last reported

    def _open(self) -> Any:
        """The engine, its state that of the newest checkpoint where there is one."""
        spec, checkpoint = self.spec, latest(self.home)
        model, values = self._model(checkpoint)
        if spec.masked:
            hold_zeros(model)
        if spec.activation_checkpointing:
            checkpoint_activations(model)
        engine = make_engine(model, spec, self.ranks, values)
        if checkpoint is not None:
            state = read_state(checkpoint)
            self.step, self.losses, self.evaluations = state["step"], state["losses"], state["evaluations"]
            read_back(
                checkpoint,
                held(engine),
                engine.basic_optimizer,
                lambda home: new_state(home, state["updates"]),
            )
        if spec.shadow is not None:
            named = [(f"{name}@{start}", view) for name, start, view in slices(engine)]
            self.tracker = ShadowTracker.of(spec.shadow, named, spec.seed)
            if checkpoint is not None:
                self.tracker.load(*sorted(checkpoint.glob("shadow-*-of-*.safetensors")))
        return engine

    def _model(self, checkpoint: Path | None) -> tuple[PreTrainedModel, Values | None]:
        """The model to train, its values those of the checkpoint; in stage 3 hollow, and where it gets them from."""
        spec = self.spec
        source, dtype = Path(spec.model), DTYPES[spec.dtype]
        mask = None if spec.mask is None else Mask(source, Path(spec.mask), spec.trust_remote_code)
        stored = None if checkpoint is None else StoredSlices(checkpoint, MASTER)
        hollow = hollow_model(source, dtype, spec.trust_remote_code) if spec.zero_stage == 3 else None
        if hollow is None:
            model = load_model(source, dtype, spec.seed, spec.trust_remote_code)
            if mask is not None:
                mask.fill(model)
            if stored is not None:  # the 16-bit weights, or the partitions, are made from these
                stored.fill(model)
            return model, None
        model, first = hollow
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

        def values(name: str) -> Tensor:
            if stored is not None and name in stored:
                return stored.read(name, 0, shapes[name].numel()).view(shapes[name])
            value = first(name)
            if mask is not None:
                mask.apply(name, value)
            return value

        return model, values

    def close(self) -> None:
        """Let go of the model, so that the process can take up another run."""
        engine, self.engine, self.tracker = self.engine, None, None
        engine.destroy()
        del engine
        gc.collect()

    def run(self) -> Iterator[Event]:
        """The whole run, or what is left of it."""
        spec, first = self.spec, self.step
        yield self._event("begin", step=first)
        if first == spec.steps:  # a run that was interrupted later than that
            yield self._event("holds", **self._bytes())
        while self.step < spec.steps:
            self._train_step()
            last = self.step == spec.steps
            evaluates = self.eval is not None and _due(self.step, spec.eval_every, last)
            saves = _due(self.step, spec.checkpoint_every, last)
            if evaluates or saves or self.step % REPORT_EVERY == 0:
                yield self._steps_event()
            if self.step == first + 1:  # from the first step on, Adam's state is there
                yield self._event("holds", **self._bytes())
            if evaluates:
                self.evaluations.append((self.step, self._evaluate()))
                yield self._event("evaluated", step=self.step, loss=self.evaluations[-1][1])
            if saves:
                self._save()
                yield self._event("saved", step=self.step)
        self._consolidate()
        yield self._event(
            "done", losses=self.losses, evaluations=self.evaluations, peak_memory=peak_bytes(str(self.device))
        )

    def _event(self, name: str, **values: Any) -> Event:
        return {"event": name, "rank": self.rank, **values}

    def _bytes(self) -> dict[str, int]:
        shadow = {} if self.tracker is None else {"shadow": self.tracker.nbytes}
        return state_bytes(self.engine) | shadow

    # -- one step --------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        spec, engine, started = self.spec, self.engine, time.perf_counter()
        rate = rate_at(self.step, peak=spec.learning_rate, schedule=spec.schedule, warmup=spec.warmup, steps=spec.steps)
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = rate
        engine.train()
        total = torch.zeros((), device=self.device)
        for number, examples in microbatches_of(self.order.step(self.step), spec.microbatch, self.rank, self.ranks):
            batch = self._batch(self.data, examples)
            with self._dropout_of(number):
                loss = engine(**batch, use_cache=False).loss
                engine.backward(loss)
            engine.step()
            total += loss.detach().float()
            self.tokens += batch["labels"].numel()
        total /= spec.accumulation(self.ranks) * self.ranks
        dist.all_reduce(total)
        self.step += 1
        if self.tracker is not None and spec.shadow is not None and self.step % spec.shadow.every == 0:
            began = time.perf_counter()
            self.tracker.update()
            self.tracking += time.perf_counter() - began
        self.pending.append((total, rate))
        self.seconds += time.perf_counter() - started

    @contextmanager
    def _dropout_of(self, number: int) -> Iterator[None]:
        """Within it, torch's own random numbers depend on (seed, step, micro-batch): not on ranks, nor on restarts."""
        seed = hash((self.spec.seed, self.step, number)) & 0x7FFF_FFFF_FFFF_FFFF
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed(seed)
            yield

    def _batch(self, source: Source, examples: Any) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in source.batch(examples).items()}

    def _steps_event(self) -> Event:
        """The steps since they were last reported."""
        losses = [float(loss) for loss, _ in self.pending]
        rates = [rate for _, rate in self.pending]
        first = self.step - len(losses)
        self.losses += losses
        spent = {"tokens": self.tokens * self.ranks, "seconds": self.seconds, "tracking": self.tracking}
        self.pending, self.tokens, self.seconds, self.tracking = [], 0, 0.0, 0.0
        return self._event("steps", first=first, losses=losses, rates=rates, **spent)

    # -- between steps ---------------------------------------------------------------------------------------------

    def _evaluate(self) -> float:
        """Mean loss in nats over all predicted tokens to evaluate on, the micro-batches shared out over the ranks."""
        source, size = self.eval, self.spec.microbatch
        assert source is not None
        starts = list(range(0, len(source), size))
        rounds = -(-len(starts) // self.ranks)
        sums = torch.zeros(2, dtype=torch.float64)
        self.engine.eval()
        with torch.no_grad():
            for turn in range(rounds):
                # All ranks run as often: under stage 3 each forward pass is a common one.
                mine = turn * self.ranks + self.rank
                start = starts[min(mine, len(starts) - 1)]
                batch = self._batch(source, range(start, min(start + size, len(source))))
                loss = self.engine(**batch, use_cache=False).loss
                if mine < len(starts):
                    tokens = predicted_tokens(batch["labels"])
                    sums += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64)
        sums = sums.to(self.device)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def _save(self) -> None:
        """All ranks' slices as one checkpoint."""
        directory = self._emptied(directory_of(self.home, self.step))
        write_state(directory, owned(self.engine), self.engine.basic_optimizer, self.rank, self.ranks)
        if self.tracker is not None:
            self.tracker.save(directory / f"shadow-{self.rank}-of-{self.ranks}.safetensors")
        dist.barrier()
        if self.rank == 0:
            state = {"step": self.step, "updates": updates_of(self.engine), "losses": self.losses, "ranks": self.ranks}
            state["evaluations"] = self.evaluations
            finish(self.home, self.step, state)
        dist.barrier()

    def _emptied(self, directory: Path) -> Path:
        """A directory for all ranks' files, without those of an attempt that was cut short, on other ranks perhaps."""
        if self.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        dist.barrier()
        return directory

    def _consolidate(self) -> None:
        """Plain checkpoints of the model and, if weights were averaged, of their importances. By rank 0, from files."""
        importances = self.home / "importances"
        if self.tracker is not None:
            self._emptied(importances)
            found = ((*parameter_of(name), q.view(-1)) for name, q in self.tracker.importance().items())
            write_slices(importances, IMPORTANCE, found, self.rank, self.ranks)
            dist.barrier()
        checkpoint = latest(self.home)
        if self.rank == 0 and checkpoint is not None:
            model = consolidate(checkpoint, self.home / "consolidated", self.spec)
            if self.tracker is not None:
                consolidate_shadow(model, importances, self.home / "shadow", self.spec, self.tracker.updates)
        dist.barrier()


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
