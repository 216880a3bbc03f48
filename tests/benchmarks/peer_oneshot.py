"""llm-compressor's one-shot Wanda or SparseGPT on random tokens; run by speed.py with the peer's own Python.

pip install torch==2.13.0 llmcompressor        # in an environment of its own
"""

import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, criterion, pattern = sys.argv[1:4]
samples, length, threads = map(int, sys.argv[4:7])
modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[criterion]
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
ids = torch.randint(model.config.vocab_size, (samples, length), generator=torch.Generator().manual_seed(0))
started, cpu = time.perf_counter(), time.process_time()
oneshot(
    model=model,
    dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
    recipe=modifier(sparsity=0.5, mask_structure=pattern, targets=["Linear"], ignore=["re:.*lm_head"]),
    tokenizer=AutoTokenizer.from_pretrained(directory),
    max_seq_length=length,
    num_calibration_samples=samples,
    pipeline="sequential",
)
print("PEER " + json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}))
