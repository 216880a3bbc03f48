"""Shadow directories, the criterion that reads them, and thresholds: on plain shards, byte for byte, and refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_models import family_checkpoint
from safetensors.torch import load_file
from streaming import GENTLE, make_shards, prune
from transformers import AutoModelForCausalLM

from espalier.pipeline.config.options import build_config
from espalier.pipeline.config.prune import PruneConfig
from espalier.pipeline.planning.model_info import model_facts
from espalier.pipeline.planning.resolve import check_recipe_fits
from espalier.stages.errors import Refusal
from espalier.stages.layer_rules import resolve_overrides
from espalier.stages.loading.skeleton import read_config
from espalier.stages.masks import keep_mask
from espalier.stages.recipe import Recipe
from espalier.stages.shadow.spec import ShadowSpec
from espalier.stages.shadow.store import Shadow, check_shadow, write_shadow
from espalier.stages.shadow.tracker import ShadowTracker
from espalier.stages.shard.spec import block_file
from espalier.stages.storage.hf_checkpoint import Checkpoint

LENGTH, SAMPLES, BLOCKS = 16, 8, 4
THRESHOLD = Recipe(criterion="temporal", sparsity=None, threshold=0.5)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


def tracked(model: Path, directory: Path, **options: object) -> dict[str, torch.Tensor]:
    """A shadow of a model whose weights move at random, written to `directory`; its importances."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    spec = ShadowSpec(**options)
    tracker = ShadowTracker.of(spec, module.named_parameters())
    with torch.no_grad():
        for _ in range(3):
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            tracker.update()
    importances = tracker.importance()
    write_shadow(directory, module.config, importances, spec, tracker.updates)
    return importances


@pytest.fixture(scope="module")
def shadow(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("shadow") / "shadow"
    return directory, tracked(model, directory)


def pruned(home: Path) -> dict[str, torch.Tensor]:
    return {k: v for index in range(BLOCKS) for k, v in load_file(home / "output" / block_file(index)).items()}


def test_a_block_reads_the_importances_that_were_written(shadow: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, importances = shadow
    loaded = Shadow(directory).load(2, {"mlp.down_proj.weight", "self_attn.q_proj.weight"})
    assert torch.equal(loaded["mlp.down_proj.weight"], importances["model.layers.2.mlp.down_proj.weight"])
    assert torch.equal(loaded["self_attn.q_proj.weight"], importances["model.layers.2.self_attn.q_proj.weight"])
    assert len(check_shadow(directory, read_config(directory))) == 64


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_matrices_stored_transposed_and_experts_score_by_their_own_importance(family: str, tmp_path: Path) -> None:
    model = family_checkpoint(tmp_path)(family)
    importances = tracked(model, tmp_path / "shadow")
    tokens = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    recipe = Recipe(criterion="temporal", shadow=str(tmp_path / "shadow"), reconstruct="none")
    (shard,) = make_shards(model, tmp_path, 1, LENGTH, blocks=2, recipe=recipe)
    prune([shard], tokens)
    stack = {"gpt2": "transformer.h.1.mlp.c_proj.weight", "mixtral": "model.layers.1.mlp.experts.down_proj"}[family]
    matrices = importances[stack].mT[None] if family == "gpt2" else importances[stack]
    inside = stack.split(".1.", 1)[1]
    written = Checkpoint.of_file(tmp_path / "output" / block_file(1))
    result = shard.skeleton.load_tensors(1, [inside], written)[inside]
    result = result.mT[None] if family == "gpt2" else result
    for weight, importance in zip(result, matrices, strict=True):
        assert torch.equal(weight != 0, keep_mask(importance, 0.5))


@pytest.mark.parametrize(
    "recipe",
    [
        replace(THRESHOLD, reconstruct="none"),
        replace(THRESHOLD, refine="swaps", sweeps=1, corrections=(0.3,)),
        replace(THRESHOLD, refine="r2-dsnot", inputs="pruned", reconstruct="window", blocks_per_unit=2),
        Recipe(criterion="temporal", sparsity=None, pattern=(2, 4), refine="dsnot", reconstruct="matrix"),
    ],
    ids=["bare", "swaps and a sweep", "pruned windows", "2:4"],
)
@pytest.mark.slow
def test_the_same_bytes_for_any_cut_and_as_many_zeros_in_a_row_as_the_scores_say(
    recipe: Recipe,
    model: Path,
    shadow: tuple[Path, dict[str, torch.Tensor]],
    tiny_tokens: Callable[..., torch.Tensor],
    tmp_path: Path,
) -> None:
    directory, importances = shadow
    recipe = replace(recipe, shadow=str(directory), learning_rate=GENTLE)
    tokens = tiny_tokens(SAMPLES, LENGTH)
    for place, way in enumerate([{"shards": 1}, {"shards": 2, "resident": "one", "spool_memory": 0}]):
        prune(make_shards(model, tmp_path / str(place), length=LENGTH, recipe=recipe, **way), tokens)
    one, two = pruned(tmp_path / "0"), pruned(tmp_path / "1")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for name, weight in one.items():
        if not name.endswith("_proj.weight"):
            continue
        keep = keep_mask(importances[name], pattern=recipe.pattern, threshold=recipe.threshold)
        assert torch.equal((weight != 0).sum(1), keep.sum(1)), name
        if recipe.refine == "none":
            assert torch.equal(weight != 0, keep), name


def test_a_threshold_is_a_multiple_of_the_matrix_own_deviation() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])  # σ = √(35/12) = 1.708
    assert keep_mask(scores, threshold=1.0).tolist() == [[False, False, True], [True, True, True]]
    assert keep_mask(scores, threshold=0.0).tolist() == [[False, True, True], [True, True, True]]
    assert not keep_mask(scores, threshold=3.0).any()
    assert keep_mask(torch.ones(2, 2), threshold=2.0).all()  # nothing deviates


def test_a_layer_may_have_a_threshold_or_criterion_of_its_own(
    model: Path, shadow: tuple[Path, dict[str, torch.Tensor]], tiny_tokens: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    directory, importances = shadow
    overrides = resolve_overrides(
        [{"match": "1.mlp.*", "criterion": "temporal", "threshold": 1}, {"match": "2.mlp.up_proj", "threshold": 0.7}]
    )
    recipe = Recipe(criterion="magnitude", overrides=tuple(overrides), shadow=str(directory), reconstruct="none")
    prune(make_shards(model, tmp_path, 1, LENGTH, recipe=recipe), tiny_tokens(SAMPLES, LENGTH))
    weights, dense = pruned(tmp_path), load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[name] != 0, keep_mask(importances[name], threshold=1.0))
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(weights[name] != 0, keep_mask(dense[name].abs(), threshold=0.7))
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(weights[name] != 0, keep_mask(dense[name].abs(), 0.5))


def test_a_shadow_of_another_model_is_refused_as_is_none_and_an_empty_one(
    model: Path, shadow: tuple[Path, dict[str, torch.Tensor]], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory, importances = shadow
    other = read_config(tiny_checkpoint(hidden=64))
    with pytest.raises(Refusal, match=r"of another model \(llama, 4 blocks, 32 wide\), not of this one .*64 wide"):
        check_shadow(directory, other)
    with pytest.raises(Refusal, match=r"no shadow.json in it"):
        check_shadow(model, other)
    config = read_config(model)
    write_shadow(tmp_path / "empty", config, importances, ShadowSpec(), 0)
    with pytest.raises(Refusal, match="holds no snapshot"):
        check_shadow(tmp_path / "empty", config)
    with pytest.raises(Refusal, match=r"model.norm.weight is not there, the model's \(32,\)"):
        lacking = {name: q for name, q in importances.items() if name != "model.norm.weight"}
        write_shadow(tmp_path / "lacking", config, lacking, ShadowSpec(), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1}, "threshold -1.0: standard deviations"),
        ({"threshold": float("nan")}, "threshold nan"),
        ({"threshold": 1, "sparsity": 0.5}, "sparsity 0.5 and threshold 1: give one"),
        ({"threshold": 1, "pattern": "2:4"}, "pattern 2:4 and threshold 1: give one"),
        ({"threshold": 1, "allocation": "owl"}, "allocation owl with threshold 1"),
        ({"threshold": 1, "scope": "row"}, "scope row with threshold 1"),
        ({"threshold": 1, "criterion": "sparsegpt"}, "self_attn.q_proj: threshold 1 with criterion sparsegpt"),
        ({"threshold": 1, "criterion": "alps"}, "self_attn.q_proj: threshold 1 with criterion alps"),
        ({"scope": "row", "criterion": "sparsegpt"}, "self_attn.q_proj: scope row with criterion sparsegpt"),
        ({"criterion": "temporal"}, "criterion temporal: scores by a shadow; give --shadow DIR"),
        ({"shadow": "there", "criterion": "wanda"}, "shadow there: criterion wanda does not read it"),
        ({"overrides": [{"match": "*", "threshold": "1"}]}, "threshold '1': must be a number"),
        ({"overrides": [{"match": "*", "threshold": 1, "sparsity": 0.5}]}, "sparsity and threshold are given"),
    ],
)
def test_what_makes_no_sense_with_a_threshold_a_scope_or_a_shadow_is_refused(
    options: dict[str, object], message: str, model: Path
) -> None:
    facts = model_facts(read_config(model), str(model))
    with pytest.raises(Refusal, match=message):
        wanted = {"model": str(model), "output": "out", "calibration": "text", **options}
        check_recipe_fits(facts, build_config(wanted, PruneConfig).block_recipe)
