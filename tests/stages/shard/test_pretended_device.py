"""Everything that a shard does, on a device that is not the CPU: what no GPU was needed to find out.

Masks, and values that are solved for, are the CPU's to the bit (attention by SDPA's plain way on both); what AdamW
fits, which takes whole matrices there and stretches of them on a CPU, to rounding. And how often the host waits.

`make fast` runs seven recipes, five families and a tower of these; `pytest tests/stages/shard/test_pretended_device.py`
all.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import NAMES, family_checkpoint, layers_of
from image_models import SEEING, image_folder, seeing_checkpoint
from pretended_device import DEVICE, NAME, MixedDevices, PretendedDevice
from safetensors.torch import load_file
from streaming import GENTLE, Images, make_shards, prune, same_bits, stream
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from espalier.stages.criteria.equations import CRITERIA
from espalier.stages.data.image_samples import load_processor
from espalier.stages.data.pixel_table import build_pixel_table
from espalier.stages.loading.skeleton import read_config
from espalier.stages.loading.vision import VisionSkeleton
from espalier.stages.recipe import BlockTask, Recipe
from espalier.stages.reconstruction import fit as reconstruction_fit
from espalier.stages.shadow.spec import ShadowSpec
from espalier.stages.shadow.store import write_shadow
from espalier.stages.statistics import InputStatistics

LENGTH, SAMPLES = 12, 9
HALF: dict[str, Any] = {"sparsity": None, "pattern": (2, 4)}
BARE = {
    **{name: Recipe(criterion=name, reconstruct="none") for name in CRITERIA},
    **{
        f"{name} 2:4": Recipe(criterion=name, reconstruct="none", **HALF)
        for name in ("wanda", "sparsegpt", "alps", "stochria", "temporal")
    },
    **{f"wanda + {name}": Recipe(refine=name, reconstruct="none") for name in ("dsnot", "r2-dsnot", "swaps")},
    "magnitude + swaps 2:4": Recipe(criterion="magnitude", refine="swaps", reconstruct="none", **HALF),
    "wanda + dsnot 2:4": Recipe(refine="dsnot", reconstruct="none", **HALF),
    "ria, solved": Recipe(criterion="ria", solve=True, reconstruct="none"),
    "one matrix": Recipe(scope="matrix", reconstruct="none"),
    "threshold": Recipe(sparsity=None, threshold=0.5, reconstruct="none"),
    "owl": Recipe(allocation="owl", reconstruct="none"),
}
FITTED = {
    "component": Recipe(),
    "matrix": Recipe(reconstruct="matrix"),
    "block": Recipe(reconstruct="block", criterion="alps"),
    "window": Recipe(reconstruct="window", blocks_per_unit=2),
    "corrected": Recipe(reconstruct="block", criterion="alps", targets="corrected"),
    "pruned inputs": Recipe(inputs="pruned", criterion="magnitude"),  # of masks that hang on inputs some bits tip over
    "sweep": Recipe(sweeps=1),
    "sweep, corrected": Recipe(sweeps=1, corrections=(0.3,), reconstruct="block"),
    "temporal, refined": Recipe(criterion="temporal", refine="swaps"),
}
ALWAYS = ("wanda", "sparsegpt 2:4", "temporal", "wanda + swaps", "component", "corrected", "pruned inputs")
ALWAYS_FAMILIES = ("llama", "gpt2", "opt", "qwen2_moe", "llava")

pytestmark = pytest.mark.slow


def some_always(names: Iterable[str], always: Iterable[str]) -> list[Any]:
    """The names as parameters, those slow that are not among `always`."""
    return [pytest.param(name, marks=() if name in always else pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(autouse=True)
def to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits are taken where they end: which share of the way is best may hang on the last bits of two errors."""
    monkeypatch.setattr(reconstruction_fit, "SHARES", (1.0,))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return family_checkpoint(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("seeing")
    return cache(lambda name: seeing_checkpoint(home / name, name, torch.float32))


@pytest.fixture(scope="module")
def shadow(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Importances at random of the tiny model's weights."""
    directory = tmp_path_factory.mktemp("shadow") / "shadow"
    model, generator = AutoModelForCausalLM.from_pretrained(tiny_checkpoint()), torch.Generator().manual_seed(5)
    held = {name: torch.rand(weight.shape, generator=generator) for name, weight in model.named_parameters()}
    write_shadow(directory, model.config, held, ShadowSpec(), updates=1)
    return directory


def shadowed(recipe: Recipe, shadow: Path) -> Recipe:
    return replace(recipe, shadow=str(shadow)) if recipe.criterion == "temporal" else recipe


def written(model: Path, home: Path, inputs: Any, recipe: Recipe, blocks: int, **spec: Any) -> dict[str, Tensor]:
    shards = make_shards(model, home, 1, LENGTH, blocks=blocks, recipe=recipe, **spec)
    prune(shards, inputs)
    shards[0].copy_ends()
    return {k: t for file in sorted((home / "output").glob("*.safetensors")) for k, t in load_file(file).items()}


def here_and_there(
    model: Path, home: Path, inputs: Any, recipe: Recipe, blocks: int = 4, **spec: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], PretendedDevice]:
    here = written(model, home / "here", inputs, recipe, blocks, **spec)
    with PretendedDevice() as device:
        there = written(model, home / "there", inputs, recipe, blocks, device=NAME, **spec)
    assert device.launches > 1000
    assert here.keys() == there.keys()
    return here, there, device


def assert_alike(here: dict[str, Tensor], there: dict[str, Tensor], fitted: bool) -> None:
    for name, tensor in here.items():
        if fitted:
            assert torch.equal(tensor == 0, there[name] == 0), name
            torch.testing.assert_close(there[name], tensor, rtol=2e-4, atol=2e-5)
        else:
            assert same_bits(tensor, there[name]), name


@pytest.mark.parametrize("name", some_always(BARE, ALWAYS))
def test_masks_and_solved_values_are_the_cpus(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], shadow: Path, tmp_path: Path, name: str
) -> None:
    tokens = tiny_tokens(SAMPLES, LENGTH)
    here, there, _ = here_and_there(tiny_checkpoint(), tmp_path, tokens, shadowed(BARE[name], shadow))
    assert_alike(here, there, fitted=False)


@pytest.mark.parametrize("name", some_always(FITTED, ALWAYS))
def test_units_are_reconstructed_as_on_the_cpu(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], shadow: Path, tmp_path: Path, name: str
) -> None:
    recipe = shadowed(replace(FITTED[name], learning_rate=GENTLE), shadow)
    here, there, _ = here_and_there(tiny_checkpoint(), tmp_path, tiny_tokens(SAMPLES, LENGTH), recipe)
    assert_alike(here, there, fitted=True)


@pytest.mark.parametrize("name", some_always(NAMES, ALWAYS_FAMILIES))
def test_families(family: Callable[..., Path], tiny_tokens: Callable[..., Tensor], tmp_path: Path, name: str) -> None:
    model, tokens, blocks = family(name, "float32"), tiny_tokens(SAMPLES, LENGTH), layers_of(name)
    here, there, _ = here_and_there(model, tmp_path / "bare", tokens, Recipe(reconstruct="none"), blocks)
    assert_alike(here, there, fitted=False)
    here, there, _ = here_and_there(model, tmp_path / "fit", tokens, Recipe(learning_rate=GENTLE), blocks)
    assert_alike(here, there, fitted=True)


@pytest.mark.parametrize("name", some_always(SEEING, ALWAYS_FAMILIES))
def test_vision_towers(seeing: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = image_folder(tmp_path / "images", 8, words=1, seed=2)
    (folder / "captions.jsonl").unlink()
    model = seeing(name)
    eyes = VisionSkeleton(read_config(model), torch.float32)
    path = tmp_path / "images.arrow"
    table = build_pixel_table(folder, load_processor(model), eyes, length=400, samples=8, seed=0, path=path)
    images, blocks = Images(table, 1 if eyes.layout.packed else 2), len(eyes.layers)
    for recipe in (Recipe(reconstruct="none"), Recipe(learning_rate=GENTLE)):
        home = tmp_path / recipe.reconstruct
        here, there, _ = here_and_there(model, home, images, recipe, blocks, tower="vision")
        assert_alike(here, there, fitted=recipe.reconstruct != "none")


@pytest.mark.parametrize(("stored", "compute"), [("bfloat16", "fp32"), ("float32", "bf16")])
def test_streams_in_any_precision(
    tiny_checkpoint: Callable[..., Path],
    tiny_tokens: Callable[..., Tensor],
    tmp_path: Path,
    stored: str,
    compute: str,
) -> None:
    model, tokens = tiny_checkpoint("qwen2", stored), tiny_tokens(3, LENGTH)
    (shard,) = make_shards(model, tmp_path, 1, LENGTH, compute=compute)
    expected = [shard.logits(hidden) for hidden in stream([shard], tokens)]
    with PretendedDevice():
        (shard,) = make_shards(model, tmp_path, 1, LENGTH, compute=compute, device=NAME)
        for hidden, logits in zip(stream([shard], tokens), expected, strict=True):
            assert hidden.device == DEVICE
            assert same_bits(shard.logits(hidden).cpu(), logits)


# -- how often the host waits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hessian", [False, True])
def test_an_update_of_the_statistics_waits_once(hessian: bool) -> None:
    with PretendedDevice() as device:
        statistics = InputStatistics(64, hessian=hessian, out_features=8, device=DEVICE)
        x, y = torch.randn(4, 300, 64).to(DEVICE), torch.randn(4, 300, 8).to(DEVICE)
        with device.counted() as waits:
            statistics.update(x, y)
    assert sum(waits.values()) <= 1, waits


def test_a_pass_waits_no_oftener_than_its_updates(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    """Four shared inputs a block, four blocks, five microbatches: a wait each. For blocks alone: as the model's own
    code looks at its positions, once a call; and for what was kept to be in the host's memory before it is read."""
    with PretendedDevice() as device:
        (shard,) = make_shards(tiny_checkpoint(), tmp_path, 1, LENGTH, recipe=Recipe(reconstruct="none"), device=NAME)
        with device.counted() as waits:
            stream([shard], tiny_tokens(SAMPLES, LENGTH), 0)
        assert sum(waits.values()) <= 2 * 5, waits
        with device.counted() as waits:
            for block in range(4):
                shard.gather(BlockTask(blocks=(block,)))
    updates = sum(times for place, times in waits.items() if "statistics.py" in place)
    assert 0 < updates <= 4 * 4 * 5, waits
    others = {place for place in waits if "statistics.py" not in place and "weight_rms" not in place}
    assert all("skeleton.py" in place or "spool.py" in place for place in others), others


def test_conjugate_gradients_do_not_wait_at_every_step(
    tiny_checkpoint: Callable[..., Path], tiny_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    tokens = tiny_tokens(SAMPLES, LENGTH)
    _, _, device = here_and_there(tiny_checkpoint(), tmp_path, tokens, BARE["alps"])
    alps = {place: times for place, times in device.waits.items() if "alps.py" in place}
    assert sum(alps.values()) <= 28 * 11, alps  # 28 matrices: four factors, four looks at the mask, three more


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_the_device_refuses_what_accelerators_refuse() -> None:
    with PretendedDevice() as device:
        far, near = torch.ones(3, 3, device=DEVICE), torch.ones(3, 3)
        with pytest.raises(MixedDevices):
            far @ near
        with pytest.raises(MixedDevices):
            far.add_(near)
        with pytest.raises(TypeError, match="can't convert"):
            far.numpy()
        assert torch.equal((far * torch.tensor(2.0)).cpu(), near * 2)  # a lone number may come from the host
        with device.counted() as waits:
            far.sum().item()
            far[far > 0]
        assert sum(waits.values()) >= 2
        assert device.uploaded == 0 and device.downloaded == 36


def test_a_rotation_of_complex_numbers_has_its_gradient_there_too() -> None:
    """As Llama 4 turns its queries: going back it multiplies by the conjugate, which torch keeps as a bit of a view."""
    x, turn = torch.randn(3, 8), torch.polar(torch.ones(4), torch.randn(4))

    def gradient(x: Tensor, turn: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        turned = torch.view_as_real(torch.view_as_complex(x.reshape(3, 4, 2)) * turn)
        return torch.autograd.grad(turned.square().sum() + turned[..., 0].sum(), x)[0].detach()

    with PretendedDevice():
        there = gradient(x.to(DEVICE), turn.to(DEVICE)).cpu()
    torch.testing.assert_close(there, gradient(x, turn))
