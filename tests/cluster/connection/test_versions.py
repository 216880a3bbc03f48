"""Nodes with other versions than the driver's: refused before anything runs there, with both named."""

from pathlib import Path

import pytest
import ray

from espalier.cluster.connection import connect
from espalier.cluster.connection.connect import existing_cluster
from espalier.cluster.connection.versions import refuse_others, versions_here
from espalier.stages.errors import Refusal


def test_versions_are_those_installed_without_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "espalier.cluster.connection.versions.version", lambda name: {"torch": "2.13.0+cu128"}.get(name, "1.0")
    )
    found = versions_here()
    assert found["torch"] == "2.13.0" and found["transformers"] == found["ray"] == "1.0"
    assert found["espalier"].startswith("code ") and found["Python"].count(".") == 1


def test_each_difference_is_named_with_both_sides_and_the_same_are_not() -> None:
    ours = versions_here()
    refuse_others([("10.0.0.1", ours), ("10.0.0.2", ours | {"something else": "1"})])
    theirs = ours | {"torch": "1.0", "Python": "3.9"}
    del theirs["transformers"]
    with pytest.raises(Refusal) as caught:
        refuse_others([("10.0.0.1", ours), ("10.0.0.2", theirs)])
    assert str(caught.value).startswith(
        "node 10.0.0.2 has Python 3.9, torch 1.0, transformers not installed, "
        f"and this process Python {ours['Python']}, torch {ours['torch']}, transformers {ours['transformers']}: "
    )


@pytest.mark.ray
@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ("transformers-0.0.1.dist-info/METADATA", "has transformers 0.0.1, and this process transformers "),
        ("espalier/another.py", "has espalier code "),
    ],
)
def test_a_node_with_another_library_or_another_espalier_is_refused(
    planted: str, said: str, member: object, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    with pytest.raises(Refusal) as caught, existing_cluster(member.address, {planted: file}):  # type: ignore[attr-defined]
        pass
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not ray.is_initialized()


@pytest.mark.ray
def test_a_cluster_of_another_ray_is_refused_with_both_named(member: object, monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.1\nThis process was started with:\n    Ray: 2.60"
    )

    def refuse(**_: object) -> None:
        raise RuntimeError(told)

    monkeypatch.setattr(connect.ray, "init", refuse)
    with (
        pytest.raises(
            Refusal, match=r"refuses: Version mismatch: .* Ray: 2\.1 .* Ray: 2\.60; install the same"
        ) as caught,
        existing_cluster(member.address),
    ):  # type: ignore[attr-defined]
        pass
    assert "\n" not in str(caught.value)
