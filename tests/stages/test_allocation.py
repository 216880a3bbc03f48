"""OWL's ratios against its definition, and the user's exceptions layer by layer."""

import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.stages.allocation import outlier_share, owl
from espalier.stages.errors import Refusal
from espalier.stages.layer_rules import LayerRule, check_matches, layer_rule, resolve_overrides, unmatched

quick = settings(max_examples=100, deadline=None, derandomize=True)
NAMES = [f"{block}.{layer}" for block in range(12) for layer in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
DEFAULT = LayerRule(criterion="wanda", sparsity=0.5)


# OWL


def test_the_outlier_share_counts_over_all_matrices_of_the_block() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.rand(size, generator=generator) ** 8 for size in ((4, 6), (3, 8), (10, 6))]
    together = torch.cat([matrix.flatten() for matrix in matrices]).double()
    for m in (1.0, 3.0, 5.0):
        expected = (together > m * together.mean()).double().mean().item()
        assert outlier_share(lambda: matrices, m) == expected > 0
        in_rows = [row for matrix in matrices for row in matrix]
        assert outlier_share(lambda rows=in_rows: iter(rows), m) == expected


def test_a_block_without_outliers_has_none() -> None:
    assert outlier_share(lambda: [torch.ones(4, 4), torch.ones(2, 2)]) == 0.0
    assert outlier_share(lambda: [torch.zeros(4, 4)]) == 0.0
    assert outlier_share(list) == 0.0


@quick
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=80),
    st.floats(0.1, 0.9),
    st.floats(0, 0.09),
    st.randoms(use_true_random=False),
)
def test_the_mean_is_kept_and_no_block_leaves_the_interval(shares, sparsity, spread, random) -> None:
    weights = [random.randint(1, 10**9) for _ in shares]
    for counts in (None, weights):
        ratios = owl(shares, sparsity, spread, counts)
        mean = math.fsum(r * w for r, w in zip(ratios, counts or [1] * len(shares), strict=True))
        assert mean / sum(counts or [1] * len(shares)) == pytest.approx(sparsity, abs=1e-12)
        assert all(sparsity - spread - 1e-12 <= ratio <= sparsity + spread + 1e-12 for ratio in ratios)
        by_share = [ratio for _, ratio in sorted(zip(shares, ratios, strict=True), key=lambda pair: -pair[0])]
        assert by_share == sorted(by_share)


def test_more_outliers_mean_fewer_zeros_and_the_farthest_block_reaches_the_spread() -> None:
    ratios = owl([0.02, 0.05, 0.02, 0.03], 0.6)
    assert ratios[1] == pytest.approx(0.52) and ratios[0] == ratios[2] == pytest.approx(0.64)
    assert ratios[1] < ratios[3] < ratios[0]
    assert owl([0.03, 0.03, 0.03], 0.6) == [0.6, 0.6, 0.6]
    assert owl([0.01, 0.09], 0.5, spread=0.0) == [0.5, 0.5]


def test_heavier_blocks_weigh_more_in_the_mean() -> None:
    light, heavy = owl([0.1, 0.0], 0.5, 0.09, weights=[1, 9])
    assert light == pytest.approx(0.41) and heavy == pytest.approx(0.51)


@pytest.mark.parametrize(("sparsity", "spread"), [(0.05, 0.08), (0.95, 0.08), (0.5, 0.5)])
def test_ratios_that_leave_their_range_are_refused_with_the_spread_that_fits(sparsity, spread) -> None:
    with pytest.raises(
        Refusal, match=rf"sparsity {sparsity} with a spread of {spread} takes block \d to .*spread below"
    ):
        owl([0.0, 0.1, 0.2], sparsity, spread)
    with pytest.raises(Refusal, match=r"owl spread -0\.1"):
        owl([0.0, 0.1], 0.5, -0.1)
    with pytest.raises(Refusal, match="owl spread nan"):
        owl([0.0, 0.1], 0.5, math.nan)


def test_a_spread_as_large_as_the_sparsity_leaves_a_block_dense() -> None:
    assert owl([0.0, 0.2], 0.08, 0.08) == pytest.approx([0.16, 0.0], abs=1e-15)


# Overrides


def overrides_of(text: str) -> list:
    return resolve_overrides(yaml.safe_load(text))


def test_a_layer_follows_every_entry_that_matches_and_later_ones_win() -> None:
    overrides = overrides_of(
        """
        - match: "*.mlp.down_proj"
          pattern: "2:4"
        - match: "[0-3].*"
          criterion: ria
          criterion_options: {alpha: 1}
        - match: "0.mlp.down_proj"
          dense: true
        - match: "11.*"
          sparsity: 0.7
          scope: matrix
        """
    )
    rule = lambda block, layer: layer_rule(overrides, block, layer, DEFAULT)  # noqa: E731
    assert rule(5, "self_attn.q_proj") is DEFAULT
    assert rule(5, "mlp.down_proj") == LayerRule(criterion="wanda", sparsity=None, pattern=(2, 4))
    ria = {"criterion": "ria", "criterion_options": {"alpha": 1.0}}
    assert rule(3, "mlp.up_proj") == LayerRule(**ria, sparsity=0.5)
    assert rule(1, "mlp.down_proj") == LayerRule(**ria, sparsity=None, pattern=(2, 4))
    assert rule(0, "mlp.down_proj") == LayerRule(**ria, sparsity=0.0)
    assert [rule(0, "mlp.down_proj").dense, rule(1, "mlp.down_proj").dense, DEFAULT.dense] == [True, False, False]
    assert rule(11, "mlp.down_proj") == LayerRule(sparsity=0.7, pattern=None, scope="matrix")


def test_another_criterion_starts_from_its_own_options() -> None:
    default = LayerRule(criterion="ria", criterion_options={"alpha": 1.0}, sparsity=0.5)
    overrides = resolve_overrides([{"match": "0.*", "criterion": "wanda"}, {"match": "1.*", "sparsity": 0.2}])
    assert layer_rule(overrides, 0, "mlp.up_proj", default).criterion_options == {}
    assert layer_rule(overrides, 1, "mlp.up_proj", default).criterion_options == {"alpha": 1.0}
    options = resolve_overrides([{"match": "*", "criterion-options": {"alpha": "0"}}])
    assert layer_rule(options, 1, "mlp.up_proj", default).criterion_options == {"alpha": 0.0}
    with pytest.raises(Refusal, match="criterion wanda: option 'alpha' is unknown"):
        layer_rule(options, 1, "mlp.up_proj", DEFAULT)


def test_an_override_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    overrides = resolve_overrides([{"match": "0.mlp.*", "sparsity": 0}, {"match": "0.mlp.downproj", "sparsity": 0}])
    assert unmatched(overrides, NAMES) == overrides[1:]
    check_matches(overrides[:1], NAMES)
    with pytest.raises(Refusal, match=r"override '0.mlp.downproj' matches no layer; .*0\.mlp\.down_proj") as refused:
        check_matches(overrides, NAMES)
    assert "\n" not in str(refused.value)
    with pytest.raises(Refusal, match=r"'\?\?\?\?' matches no layer; .*0.self_attn.q_proj"):
        check_matches(resolve_overrides([{"match": "????", "sparsity": 0}]), NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{match: 0.a, sparsity: 0}", "overrides .*must be a list"),
        ("[sparsity]", "entry 1: 'sparsity' must have match"),
        ("[{sparsity: 0}]", "entry 1: .* must have match"),
        ("[{match: 1, sparsity: 0}]", "entry 1: .* must have match"),
        ('[{match: "0.a"}]', r"entry 1 \(0.a\): nothing to change"),
        ('[{match: "0.a", sparsty: 0}]', r"\(0.a\): 'sparsty' is unknown; did you mean sparsity\?"),
        ('[{match: "0.a", sparsity: 0.5, pattern: "2:4"}]', "sparsity and pattern are given; give one"),
        ('[{match: "0.a", sparsity: 0.5, dense: true}]', "sparsity and dense are given"),
        ('[{match: "0.a", dense: false}]', "dense = False: can only be true"),
        ('[{match: "*", sparsity: 0}, {match: "0.a", sparsity: 1}]', r"entry 2 \(0.a\): sparsity 1.0: .*below 1"),
        ('[{match: "0.a", sparsity: half}]', "sparsity 'half': must be a number"),
        ('[{match: "0.a", sparsity: true}]', "sparsity True: must be a number"),
        ('[{match: "0.a", pattern: 2:4}]', "pattern 124: write it in quotes"),
        ('[{match: "0.a", pattern: "5:4"}]', "pattern 5:4: .*1 <= N <= M"),
        ('[{match: "0.a", pattern: "2of4"}]', "pattern '2of4': write N:M"),
        ('[{match: "0.a", scope: column}]', "scope 'column': must be row or matrix"),
        ('[{match: "0.a", criterion: wander}]', "criterion 'wander' is unknown; did you mean wanda"),
        ('[{match: "0.a", criterion: ria, criterion_options: {alpha: -1}}]', "option alpha = -1 must be at least 0"),
        ('[{match: "0.a", criterion_options: 5}]', "criterion_options 5: must be name: value"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused_in_one_line(text, message) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        overrides_of(text)
    assert "\n" not in str(refused.value)
