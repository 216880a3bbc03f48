"""Sections that every report.md has: times, how to load it, how to do it again."""

import shlex
from typing import cast

import yaml

from espalier.pipeline.record.run_record import CheckpointRecord, PruneRecord, RetrainRecord
from espalier.pipeline.reports.format import duration, operations, plain, table
from espalier.stages.metrics.energy import described

PHASES = {  # by the names that the terminal, run.json and MLflow have for them
    "tokens": "text and images made into samples",
    "connect": "connection to Ray",
    "load": "shards started, their blocks loaded",
    "evaluate_dense": "dense model evaluated",
    "stream": "calibration streamed through the shards",
    "work": "blocks scored, masked, reconstructed, written",
    "train": "ranks' models, steps, evaluations, checkpoints",
    "steps": "of train: optimizer steps",
    "track": "of steps: the shadow",
    "assemble": "checkpoint assembled and verified",
    "evaluate": "pruned model evaluated",
    "total": "",
}


def warnings(run: CheckpointRecord) -> str:
    return "\n".join(f"> **Warning.** {warning}\n>" for warning in run.get("warnings", ())).removesuffix("\n>")


def times(run: CheckpointRecord) -> str:
    seconds = run.get("seconds", {})
    order = [*(phase for phase in PHASES if phase in seconds and phase != "total"), *(seconds.keys() - PHASES.keys())]
    energy, flops = run.get("energy", {}), run.get("flops", {})
    rows = [
        [
            phase,
            PHASES.get(phase, ""),
            duration(seconds[phase]),
            described(energy.get(phase)),
            operations(flops.get(phase)),
        ]
        for phase in [*order, "total"]
        if phase in seconds
    ]
    return table(["phase", "what", "time", "energy of the machine", "floating-point operations"], rows)


def loading(run: CheckpointRecord) -> str:
    output = str(run["output"])
    opening = f"A plain checkpoint{' with exact zeros' if run.get('sparsity') else ''}:\n\n```python\n"
    if run["model"].get("images"):
        return (
            f"{opening}"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f"model = AutoModelForImageTextToText.from_pretrained({output!r}, dtype='auto')\n"
            f"processor = AutoProcessor.from_pretrained({output!r})\n```"
        )
    return (
        f"{opening}"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({output!r}, dtype='auto')\n"
        f"tokenizer = AutoTokenizer.from_pretrained({output!r})\n```"
    )


def recipe(run: CheckpointRecord) -> str:
    config = {name: value for name, value in run.get("config", {}).items() if value is not None}
    for name in ("model", "output", "config"):  # given on the command line
        config.pop(name, None)
    if "pattern" in config or "threshold" in config:  # they exclude sparsity, and an unused one has a default
        config.pop("sparsity", None)
    if "threshold" in config:
        config.pop("scope", None)
    for name in ("calibration", "data", "eval"):
        if isinstance(config.get(name), (list, tuple)):  # texts or token ids given in Python, possibly millions
            config[name] = f"{name.upper()}_TEXT"
    command = run.get("command", "prune")
    model = shlex.quote(str(run["model"]["path"]))
    written = yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=False, allow_unicode=True).rstrip()
    return (
        f"Save these lines as `recipe.yaml`:\n\n```yaml\n{written}\n```\n\n```sh\n"
        f"espalier {command} {model} --output NEW_DIRECTORY --config recipe.yaml\n```"
    )


def surroundings(run: PruneRecord | RetrainRecord) -> str:
    pruned = cast(PruneRecord, run)  # a training run has neither shards nor versions
    rows = [
        [f"shard {shard['index']}", f"blocks {shard['first']}–{shard['last']} on {shard['device']}, {shard['node']}"]
        for shard in pruned.get("shards", ())
    ]
    rows += [["text", read] for read in run.get("read", {}).values() if read]
    rows += [[name, str(version)] for name, version in pruned.get("versions", {}).items()]
    rows += [["run", str(run.get("run_id"))], ["MLflow run", str(run.get("mlflow_run_id") or "none")]]
    rows.append(["MLflow", str(run.get("tracking_uri"))])
    return table(["", ""], rows)
