"""A user's exceptions by name: which layers are pruned otherwise, and how."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

from espalier.stages.criteria.scoring import check_criterion, check_options
from espalier.stages.errors import Refusal, nearest, unknown
from espalier.stages.masks import Scope, check_sparsity, check_threshold, parse_pattern

AMOUNTS = ("sparsity", "pattern", "threshold")  # the ways to say how much goes


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRule:
    """How one layer is pruned. Exactly one of `sparsity`, `pattern` and `threshold` is set."""

    criterion: str = "wanda"
    criterion_options: Mapping[str, Any] = field(default_factory=dict)
    sparsity: float | None = 0.5
    pattern: tuple[int, int] | None = None
    threshold: float | None = None  # in standard deviations of the matrix's scores
    scope: Scope | None = None  # see Recipe

    @property
    def dense(self) -> bool:
        """No weight is removed."""
        return self.pattern is None and self.threshold is None and not self.sparsity


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """What is different in the layers whose name, `<block>.<layer>`, a shell pattern matches."""

    match: str
    changes: Mapping[str, Any]
    """Fields of LayerRule. Of `sparsity`, `pattern` and `threshold` one is given, and the others as None."""

    def matches(self, name: str) -> bool:
        """Whether this is about the layer `name`, such as 0.mlp.down_proj."""
        return fnmatchcase(name, self.match)


def resolve_overrides(entries: Sequence[Any]) -> list[Override]:
    """Overrides from what YAML gave: a list of mappings, each with `match` and what to change.

    Changes are those of a run, under the same names: sparsity, pattern, threshold, criterion, criterion_options, scope;
    and `dense: true`, a short way to say `sparsity: 0`. Raises Refusal, naming the entry, for anything else.
    """
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        raise Refusal(f"overrides {entries!r}: must be a list, such as [{{match: 0.mlp.down_proj, sparsity: 0}}]")
    return [_override(f"overrides, entry {place}", entry) for place, entry in enumerate(entries, 1)]


def _override(where: str, entry: Any) -> Override:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("match"), str):
        raise Refusal(f'{where}: {entry!r} must have match: "<block>.<layer>", such as "*.mlp.down_proj", in quotes')
    where = f"{where} ({entry['match']})"
    given = {str(key).replace("-", "_"): value for key, value in entry.items() if key != "match"}
    known = [*(known.name for known in fields(LayerRule)), "dense"]
    for key in given:
        if key not in known:
            raise Refusal(f"{where}: {key!r} {unknown(key, known)}")
    amounts = [key for key in (*AMOUNTS, "dense") if key in given]
    if len(amounts) > 1:
        raise Refusal(f"{where}: {' and '.join(amounts)} are given; give one of them")
    if not given:
        raise Refusal(f"{where}: nothing to change; give one of: {', '.join(known)}")
    try:
        return Override(match=entry["match"], changes=_changes(given))
    except Refusal as refusal:
        raise Refusal(f"{where}: {refusal}") from None


def _amount(**one: Any) -> dict[str, Any]:
    """How much goes, said in one of three ways."""
    return dict.fromkeys(AMOUNTS) | one


def _changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked fields of LayerRule. Raises Refusal."""
    changes: dict[str, Any] = {}
    if "dense" in given:
        if given["dense"] is not True:
            raise Refusal(f"dense = {given['dense']!r}: can only be true; a later entry with a sparsity prunes again")
        changes |= _amount(sparsity=0.0)
    if "sparsity" in given:
        if type(given["sparsity"]) not in (int, float):
            raise Refusal(f"sparsity {given['sparsity']!r}: must be a number, at least 0 and below 1")
        changes |= _amount(sparsity=check_sparsity(float(given["sparsity"])))
    if "pattern" in given:
        if not isinstance(given["pattern"], str):
            raise Refusal(f'pattern {given["pattern"]!r}: write it in quotes, such as "2:4" (YAML reads 2:4 as a time)')
        changes |= _amount(pattern=parse_pattern(given["pattern"]))
    if "threshold" in given:
        if type(given["threshold"]) not in (int, float):
            raise Refusal(f"threshold {given['threshold']!r}: must be a number of at least 0")
        changes |= _amount(threshold=check_threshold(float(given["threshold"])))
    if "scope" in given:
        if given["scope"] not in get_args(Scope):
            raise Refusal(f"scope {given['scope']!r}: must be {' or '.join(get_args(Scope))}")
        changes["scope"] = given["scope"]
    if "criterion" in given:
        changes |= {"criterion": check_criterion(str(given["criterion"])), "criterion_options": {}}
    if "criterion_options" in given:
        options = given["criterion_options"]
        if not isinstance(options, Mapping):
            raise Refusal(f"criterion_options {options!r}: must be name: value, such as {{alpha: 0.5}}")
        if "criterion" in changes:
            options = check_options(changes["criterion"], options)
        changes["criterion_options"] = dict(options)
    return changes


def layer_rule(overrides: Sequence[Override], block: int, layer: str, default: LayerRule) -> LayerRule:
    """The rule for `layer` (mlp.down_proj, say) of a block: the default, changed by every entry that matches in turn.

    Later entries win. Another criterion starts from that criterion's own options. Raises Refusal for options that the
    layer's criterion does not take.
    """
    rule = default
    for override in overrides:
        if override.matches(f"{block}.{layer}"):
            rule = replace(rule, **override.changes)
    if rule is not default:
        rule = replace(rule, criterion_options=check_options(rule.criterion, rule.criterion_options))
    return rule


def unmatched(overrides: Iterable[Override], names: Sequence[str]) -> list[Override]:
    """The overrides that match no layer. `names`: every layer of the model, `<block>.<layer>`."""
    return [override for override in overrides if not any(map(override.matches, names))]


def check_matches(overrides: Iterable[Override], names: Sequence[str]) -> None:
    """Raises Refusal, with the nearest names, if an override matches no layer of the model."""
    for override in unmatched(overrides, names):
        near = nearest(override.match, names, at_most=3, cutoff=0.4) or names[:3]
        raise Refusal(f"override {override.match!r} matches no layer; layers are named {', '.join(near)}")
