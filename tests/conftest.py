"""What several rooms share: one thread, one Ray cluster, tiny random checkpoints, the folder of reference data."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from espalier.cluster.arithmetic import steady_products

if TYPE_CHECKING:
    from espalier.cluster.rank_group import RankGroup

steady_products()  # before the first product of this process, as every worker does
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ |= {"CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": "/nowhere"}  # no command compiles anything

WINDOW = 6  # the sliding windows of the tiny models: shorter than the sequences that the tests run
VOCABULARY = 128
_shared_cluster = contextlib.ExitStack()  # empty, or with the cluster of those that ask for `one_cluster`
_shared_ranks: "list[RankGroup]" = []  # in that cluster, once something asks for `two_ranks`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First those that share the two raylets, then those that share one cluster, then the rest: each starts once."""

    def rank(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return 0 if "two_raylets" in names else 1 if "one_cluster" in names else 2

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (`make test`), a room whose tests share a cluster stays in one of them, and every file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            room, _, file = nodeid.partition("::")[0].rpartition("/")
            return room if "/cluster" in room or "/pipeline" in room else file

    return ByRoom(config, log)


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


@pytest.fixture(scope="module")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray cluster that this process is connected to, and whole runs that use its warm shards: see
    tests/support/warm.py.

    It goes on from module to module and ends with the first test that does not ask for it.
    """
    import ray
    from warm import WarmShardGroup, warm_cluster

    if not ray.is_initialized():
        _shared_cluster.enter_context(warm_cluster(tmp_path_factory.mktemp("shards")))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("espalier.pipeline.pruning.run", "espalier.pipeline.commands.evaluate"):
            patch.setattr(f"{module}.ShardGroup", WarmShardGroup)
        yield


@pytest.fixture(scope="module")
def two_ranks(one_cluster: None) -> "Iterator[RankGroup]":
    """Two ZeRO ranks in the shared cluster, for all modules that train: a rank imports DeepSpeed for seconds."""
    from espalier.cluster.rank_group import RankGroup

    if not _shared_ranks:
        _shared_cluster.callback(_shared_ranks.clear)
        _shared_ranks.append(_shared_cluster.enter_context(RankGroup(2)))
    yield _shared_ranks[0]


@pytest.fixture(autouse=True)
def no_cluster_of_others(request: pytest.FixtureRequest) -> None:
    """A test that does not ask for the shared cluster finds neither a connection nor the environment of one."""
    if "one_cluster" not in request.fixturenames:
        _shared_cluster.close()


@pytest.fixture(scope="session", autouse=True)
def no_cluster_stays() -> Iterator[None]:
    yield
    _shared_cluster.close()


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
