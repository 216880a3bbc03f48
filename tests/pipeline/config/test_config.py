"""The request: the same names and the same checks from flags, YAML and Python."""

from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from espalier.pipeline.cli import main as cli
from espalier.pipeline.cli.flags import options_of, with_all_options
from espalier.pipeline.config.named_recipe import NAMES, recipe_options, recipe_text
from espalier.pipeline.config.options import build_config, read_yaml
from espalier.pipeline.config.prune import EvalConfig, PruneConfig
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.config.track import TrackConfig
from espalier.pipeline.config.training import TrainingConfig
from espalier.pipeline.pruning import prune as driver
from espalier.stages.errors import Refusal
from espalier.stages.masks import parse_pattern

LEAST: dict[str, Any] = {"model": "m", "output": "o", "calibration": "c"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """asked(arguments of `espalier prune`) -> the PruneConfig that they come to."""
    seen: list[PruneConfig] = []

    class Done(Refusal):
        pass

    def instead(config: PruneConfig) -> None:
        seen.append(config)
        raise Done("seen")

    monkeypatch.setattr(driver, "prune", instead)

    def ask(*arguments: object) -> PruneConfig:
        assert cli.main(["prune", *map(str, arguments)]) == 2
        return seen.pop()

    return ask


def test_yaml_names_may_have_dashes_or_underscores(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("learning-rate: 0.1\nspool_memory: 2GiB\n")
    config = build_config(read_yaml(tmp_path / "a.yaml") | LEAST, PruneConfig)
    assert (config.learning_rate, config.spool_memory) == (0.1, 2 << 30)


def test_a_flag_goes_before_the_yaml_and_the_yaml_before_the_default(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: from-yaml\noutput: o\ncalibration: c\nepochs: 5\nseed: 7\n")
    config = asked("from-flag", "--config", tmp_path / "a.yaml", "--seed", 8)
    assert (config.model, config.epochs, config.seed, config.samples) == ("from-flag", 5, 8, 128)
    assert asked("--config", tmp_path / "a.yaml").model == "from-yaml"


def test_a_target_flag_replaces_the_other_target_of_the_yaml(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: m\noutput: o\ncalibration: c\npattern: '2:4'\n")
    config = asked("--config", tmp_path / "a.yaml", "--sparsity", "0.6")
    assert (config.sparsity, config.pattern, config.groups) == (0.6, None, None)
    assert asked("--config", tmp_path / "a.yaml").groups == (2, 4)


def test_every_field_is_a_flag_and_gets_there(asked: Any) -> None:
    options = {
        "length": 64,
        "bos": "window",
        "text_column": "body",
        "shards": 2,
        "threads": 3,
        "microbatch": 4,
        "window": 5,
        "resident": "one",
        "spool_memory": 1 << 20,
        "scratch": "s",
        "dtype": "float32",
        "compute": "bf16",
        "device": "cpu",
        "address": "a:1",
        "output": "o",
        "calibration": "c",
        "tower": "language",
        "recipe": "fast",
        "sparsity": 0.25,
        "criterion": "stochria",
        "shadow": "s",
        "scope": "matrix",
        "allocation": "owl",
        "refine": "dsnot",
        "solve": "on",
        "targets": "plain",
        "reconstruct": "window:2",
        "inputs": "dense",
        "sweeps": 2,
        "correction": [0.3, 0.6],
        "tolerance": 0.02,
        "epochs": 6,
        "batch": 7,
        "learning_rate": 0.5,
        "samples": 8,
        "eval": "e",
        "seed": 9,
        "experiment": "x",
        "run_name": "n",
        "parent_run": "p",
    }
    written = options | {"correction": "0.3,0.6"}
    flags = [part for name, value in written.items() for part in (f"--{name.replace('_', '-')}", value)]
    config = asked(
        "m", *flags, "--trust-remote-code", "--criterion-option", "alpha=1", "--criterion-option", "ratio=0.5"
    )
    expected = options | {"model": "m", "trust_remote_code": True, "pattern": None, "threshold": None, "overrides": []}
    expected["criterion_options"] = {"alpha": "1", "ratio": "0.5"}
    assert config.model_dump() == expected
    assert set(expected) == set(PruneConfig.model_fields)


def test_both_targets_are_refused_wherever_they_come_from() -> None:
    with pytest.raises(ValueError, match="give one of the two"):  # pydantic's, with the same words
        PruneConfig(**LEAST, sparsity=0.5, pattern="2:4")
    with pytest.raises(Refusal, match="give one of the two"):
        build_config(LEAST | {"sparsity": 0.5, "pattern": "2:4"}, PruneConfig)


def test_values_are_solved_for_where_the_gram_matrix_is_there_unless_said_otherwise() -> None:
    def solves(**options: object) -> bool:
        return build_config(LEAST | {"criterion": "wanda"} | options, PruneConfig).block_recipe.solve

    assert solves(refine="swaps") and solves(criterion="alps") and solves(criterion="sparsegpt")
    assert not solves() and not solves(refine="dsnot") and not solves(refine="swaps", solve="off")
    assert not solves(criterion="sparsegpt", criterion_options={"update": "no"})  # its masks alone were asked for
    assert solves(solve="on") and solves(solve=True) and not solves(refine="swaps", solve=False)  # YAML's on and off


def test_targets_are_corrected_where_values_are_solved_unless_said_otherwise() -> None:
    def targets(**options: object) -> str:
        return build_config(LEAST | options, PruneConfig).block_recipe.targets

    assert {targets(refine="swaps"), targets(criterion="alps"), targets(solve="on")} == {"corrected"}
    assert targets(criterion="alps", solve="off") == "corrected"  # its own values
    assert {targets(criterion="wanda", solve="off"), targets(criterion="alps", targets="plain")} == {"plain"}
    assert targets(criterion="alps", criterion_options={"update": "no"}) == "plain"
    with pytest.raises(Refusal, match=r"targets corrected: .* use --solve on or --criterion alps"):
        build_config(LEAST | {"criterion": "wanda", "solve": "off", "targets": "corrected"}, PruneConfig)


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_ratio_is_at_least_zero_and_below_one(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"sparsity {wrong}"):
        PruneConfig(**LEAST, sparsity=wrong)


def test_patterns() -> None:
    assert parse_pattern("2:4") == (2, 4) and parse_pattern(" 4 : 8 ") == (4, 8)
    for wrong in ("", "2", "2:4:8", "-2:4", "4:2", "x:y", "0:4", "2.0:4"):
        with pytest.raises(Refusal):
            parse_pattern(wrong)


@pytest.mark.parametrize(
    ("name", "hint"), [("sparcity", "did you mean sparsity"), ("epoch", "did you mean epochs"), ("zzz", "options: ")]
)
def test_an_unknown_name_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(Refusal, match=hint) as caught:
        build_config(LEAST | {name: 1}, PruneConfig)
    assert repr(name) in str(caught.value)


def test_a_bad_value_is_named_in_one_line() -> None:
    with pytest.raises(Refusal) as caught:
        build_config(LEAST | {"epochs": "many"}, PruneConfig)
    assert "epochs" in str(caught.value) and "'many'" in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_run_records_can_be_asked_for_again() -> None:
    for config in (PruneConfig(**LEAST, sparsity=0.25), PruneConfig(**LEAST, pattern="2:4", epochs=3)):
        recorded = config.model_dump(mode="json")
        assert build_config(driver.recorded_request(recorded, None), PruneConfig).model_dump() == config.model_dump()
        assert build_config(driver.recorded_request(recorded, 3), PruneConfig).shards == 3


def test_names_of_recipes() -> None:
    assert PruneConfig(**LEAST).recipe_name == "alps 50 % + block"
    assert PruneConfig(**LEAST, pattern="2:4", reconstruct="none", criterion="magnitude").recipe_name == "magnitude 2:4"
    wanda = LEAST | {"criterion": "wanda"}
    assert PruneConfig(**wanda, sparsity=0.625, refine="none", reconstruct="window:4").recipe_name == (
        "wanda 62.5 % + window:4"
    )
    assert (
        PruneConfig(**wanda, reconstruct="component", inputs="pruned", refine="dsnot").recipe_name
        == "wanda 50 % + dsnot + component + pruned inputs"
    )
    assert PruneConfig(**wanda, refine="swaps").recipe_name == "wanda 50 % + swaps + block"
    assert PruneConfig(**LEAST, sweeps=2).recipe_name == "alps 50 % + block + 2 sweeps"


def test_a_recipe_s_name_stands_for_its_options_and_others_go_before_it() -> None:
    def options(**given: Any) -> dict[str, Any]:
        return build_config(LEAST | given, PruneConfig).model_dump()

    for name in NAMES:
        for option, value in recipe_options(name).items():
            assert options(recipe=name)[option] == value, (name, option)
            assert f"\n{option}:" in recipe_text(name)
    assert options() == options(recipe="balanced"), "the default"
    assert options() == LEAST | {
        name: field.default for name, field in PruneConfig.model_fields.items() if name not in LEAST
    }, "and what a flag's help calls its default"
    fast = options(recipe="fast", reconstruct="component")
    assert fast["reconstruct"] == "component" and fast["criterion"] == "wanda"
    assert options(recipe="best", epochs=1)["epochs"] == 1
    with pytest.raises(Refusal, match="recipe"):
        options(recipe="bset")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sweeps": 1, "inputs": "pruned"}, "sweeps 1 with inputs pruned"),
        ({"sweeps": 1, "reconstruct": "none"}, "sweeps 1 with reconstruct none"),
        ({"sweeps": 1, "reconstruct": "matrix"}, "sweeps 1 with reconstruct matrix"),
        ({"sweeps": 3, "correction": "0.3,0.6"}, "correction 0.3,0.6: 3 sweeps take one share, or 3"),
        ({"sweeps": 1, "correction": "1.5"}, "correction 1.5: give shares from 0 to 1"),
        ({"correction": "some"}, "correction some: give shares"),
        ({"reconstruct": "window:0"}, "reconstruct 'window:0': choose"),
        ({"reconstruct": "window"}, "reconstruct 'window': choose"),
        ({"reconstruct": "layer"}, "reconstruct 'layer': choose"),
        ({"pattern": "2:4", "allocation": "owl"}, "allocation owl with pattern 2:4"),
        ({"pattern": "2:4", "scope": "matrix"}, "scope matrix with pattern 2:4"),
        ({"criterion": "wandas"}, "did you mean wanda"),
        ({"criterion": "ria", "criterion_options": ["alpha=-1"]}, "alpha"),
        ({"criterion": "ria", "criterion_options": ["alpha"]}, "criterion-option 'alpha': write name=value"),
        ({"criterion": "wanda", "criterion_options": {"alpha": 0.5}}, "alpha"),
        ({"overrides": [{"match": "0.*"}]}, "nothing to change"),
        ({"overrides": [{"match": "0.*", "sparsety": 0}]}, "did you mean sparsity"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal) as caught:
        build_config(LEAST | wrong, PruneConfig)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_one_correction_serves_all_sweeps_and_a_list_one_each() -> None:
    assert PruneConfig(**LEAST, sweeps=2, correction=0.5).block_recipe.corrections == (0.5, 0.5)
    assert PruneConfig(**LEAST, sweeps=2, correction="0.3,0.6").block_recipe.corrections == (0.3, 0.6)
    for correction, predicts_inputs in (("auto", True), ("foreseen", True), (1, False)):
        assert PruneConfig(**LEAST, sweeps=5, correction=correction).block_recipe.predicts_inputs == predicts_inputs
    assert PruneConfig(**LEAST).block_recipe.corrections == ()


def test_eval_has_the_flags_of_its_own_configuration() -> None:
    command = with_all_options(get_command(cli.app).commands["eval"])  # type: ignore[attr-defined]
    assert set(EvalConfig.model_fields) <= {parameter.name for parameter in command.params}


def test_what_track_says_again_of_a_flag_of_training_keeps_its_panel_and_its_words() -> None:
    retrain, track = (
        {option.name: option.annotation.__metadata__[0] for option in options_of(kind)}
        for kind in (RetrainConfig, TrackConfig)
    )
    assert track["batch"].help.startswith("Windows in an optimizer step") and "[64]" in track["batch"].help
    for name in set(TrainingConfig.model_fields) - {"model", "output"}:
        assert track[name].rich_help_panel == retrain[name].rich_help_panel, name
    assert [name for name in retrain if name in ("steps", "epochs", "tokens", "batch")] == [
        *("steps", "epochs", "tokens", "batch")
    ], "a flag of its own is shown where its kind is"
    assert all(option.help for option in [*retrain.values(), *track.values()])
