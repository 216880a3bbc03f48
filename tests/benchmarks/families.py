"""Every causal language model that transformers knows, tried as `espalier prune` tries a family that is new to it.

python tests/benchmarks/families.py [FAMILY ...] [--jobs 2] [--seconds 120]

A config with the family's own defaults goes the way of `espalier.stages.shard.probe`, each family in a process of its
own. Each passes or is refused in one line; another exception, a second line or a process that does not end in time is a
fault, and the exit code says so.
"""

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from bench_model import report
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from espalier.stages.errors import Refusal
from espalier.stages.loading.skeleton import Skeleton, read_config
from espalier.stages.shard.probe import probe

# What published models say and the family's config class leaves out: without it transformers makes no model.
STATED = {
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "n_routed_experts": 64, "n_shared_experts": 2},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
}
KINDS = {  # of refusals, by what they say
    "an encoder, an encoder-decoder or not of text": "no decoder of text",
    "recurrent models": "recurrent",
    "transformers makes no model": "transformers makes no model of the defaults",
    "transformers cannot read": "transformers makes no config of the defaults",
    "which is not supported here": "weights that transformers puts together when it loads them",
    "has no num_hidden_layers": "its blocks are not found",
    "cutting its config": "cutting its config",
    "blocks; a row in FAMILIES": "its blocks are not found",
    "lie in no known component": "linears in no known component",
    "building a small model": "building a small model of it",
    "predicting the next token": "no decoder of text",
    "streaming block by block": "streaming block by block",
    "looking for its matrices": "matrices that are no linear, expert or router",
    "looking at how it calls": "components given more than their input",
    "pruning and reconstruction": "pruning and reconstruction",
    "loading what was written": "loading what was written",
}


def tried(family: str, home: Path) -> tuple[str, str]:
    """What becomes of it, ("passes" | kind of refusal | "FAULT"), and what is said."""
    try:
        config = AutoConfig.for_model(family, **STATED.get(family, {}))
    except Exception as error:
        return "transformers makes no config of the defaults", str(error).splitlines()[-1].strip()
    try:
        model = home / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config.to_dict() | {"model_type": family}, default=str))
        line = probe(Skeleton(read_config(model), torch.float32), home, None) or ""
    except Refusal as refusal:
        said = str(refusal).replace(str(home), "")
        kinds = [kind for words, kind in KINDS.items() if words in said]
        return ("FAULT" if "\n" in said else kinds[0] if kinds else "another refusal"), said
    except Exception:
        return "FAULT", traceback.format_exc(limit=-3)
    return "passes", line


def in_a_process(family: str, seconds: float) -> tuple[str, str, str, float]:
    """Family, what becomes of it, what is said, seconds."""
    context = multiprocessing.get_context("fork")  # what was imported is there
    started = time.perf_counter()
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="espalier-families-") as home:
        process = context.Process(target=_answer, args=(theirs, family, Path(home)))
        process.start()
        theirs.close()
        try:
            found = ours.recv() if ours.poll(seconds) else ("FAULT", f"no answer within {seconds:.0f} s")
        except EOFError:
            found = "FAULT", "the process died"
        process.kill()
        process.join()
    return family, *found, time.perf_counter() - started


def _answer(pipe: Connection, family: str, home: Path) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    torch.set_num_threads(1)
    pipe.send(tried(family, home))
    pipe.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120, help="that each may take")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    assert AutoModelForCausalLM and AutoModelForImageTextToText  # imported before the first fork
    kinds: Counter[str] = Counter()
    faults = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for family, kind, said, seconds in pool.map(
            lambda name: in_a_process(name, arguments.seconds), arguments.families
        ):
            kinds[kind] += 1
            faults += [family] if kind == "FAULT" else []
            print(f"{family:28} {seconds:5.1f} s  {kind:45}  {'' if kind == 'passes' else said}", flush=True)
    for kind, count in kinds.most_common():
        print(f"{count:4}  {kind}")
    report("families", {"families": len(arguments.families), "kinds": dict(kinds.most_common()), "faults": faults})
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
