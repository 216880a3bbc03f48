"""What several rooms share: one thread, tiny random checkpoints of every family, and the folder of reference data."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WINDOW = 6  # the sliding windows of the tiny models: shorter than the sequences that the tests run
VOCABULARY = 128


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts what it puts in the background deaf to SIGINT; tests that press Ctrl-C would wait for ever."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Torch on one thread: quicker on a busy machine at these sizes, and the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(family: str, tied: bool, blocks: int, hidden: int) -> Any:
    """A config of the family with everything that its blocks can have: GQA, biases, sliding windows, mixed layers."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    common: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 3 // 2,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    mixture = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"][:blocks]
    windows = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": mixture}
    if family == "llama":
        return LlamaConfig(**common)
    if family == "mistral":
        return MistralConfig(**common, sliding_window=WINDOW)
    if family == "qwen2":
        return Qwen2Config(**common)  # its q, k and v have biases
    return Qwen3Config(**common, head_dim=hidden // 4, **windows)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(family="llama", dtype="float32", tied=False, sharded=False, blocks=4, hidden=32, seed=0) -> its directory.

    A random model saved by transformers, made once a session for each set of arguments: copy it before changing it.
    """

    @cache
    def make(
        family: str = "llama",
        dtype: str = "float32",
        tied: bool = False,
        sharded: bool = False,
        blocks: int = 4,
        hidden: int = 32,
        seed: int = 0,
    ) -> Path:
        from transformers import AutoModelForCausalLM

        directory = tmp_path_factory.mktemp(f"tiny-{family}")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(tiny_config(family, tied, blocks, hidden))
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norm gains all one and biases all zero would hide mistakes
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model = model.to(getattr(torch, dtype))
        model.config.dtype = getattr(torch, dtype)
        model.save_pretrained(directory, max_shard_size="20KB" if sharded else "1GB")
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_tokens() -> Callable[..., torch.Tensor]:
    """make(samples, length, seed=0) -> random token ids (samples, length) int32."""

    def make(samples: int, length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (samples, length), generator=generator, dtype=torch.int32)

    return make


@pytest.fixture(scope="session")
def shared_folder() -> Callable[..., Path]:
    """find("oracles", "file") -> that path in the folder `shared` beside the repository; skips where there is none."""

    def find(*parts: str) -> Path:
        path = (Path(__file__).resolve().parents[1].parent / "shared").joinpath(*parts)
        if not path.exists():
            pytest.skip(f"needs shared/{'/'.join(parts)} beside the repository")
        return path

    return find
