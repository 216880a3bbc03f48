"""run.json, field by field: the classes and the README's tables say the same."""

import re
from pathlib import Path

from espalier.pipeline.record.run_record import (
    ModelRecord,
    PruneRecord,
    RetrainRecord,
    ShardRecord,
    TrackPoint,
    TrackRecord,
)
from espalier.stages.block_report import BlockReport, LayerCount, UnitReport

README = (Path(__file__).parents[3] / "pipeline" / "README.md").read_text()
FIELDS = README[README.index("## `run.json`, field by field") : README.index("## Every metric in MLflow")]
RUN, BLOCK = FIELDS.split("**A block's report**")
COMMANDS = {"prune": PruneRecord, "retrain": RetrainRecord, "track": TrackRecord}


def words(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without its head."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")
    ]


def test_each_command_s_run_json_has_the_fields_of_the_readme() -> None:
    besides = RUN[RUN.index("A track has besides") :]
    for command, record in COMMANDS.items():
        documented = {
            name
            for cells in rows(RUN)
            if command in cells[2].split(", ") or cells[2] == "all"
            for name in words(cells[0])
        }
        own = set(record.__annotations__) - documented
        assert documented <= set(record.__annotations__), command
        assert own == (set() if command != "track" else own & words(besides)), command
    assert set(TrackPoint.__annotations__) <= words(besides)


def test_a_block_s_report_has_the_fields_of_the_readme() -> None:
    table = {name: cells for cells in rows(BLOCK) for name in words(cells[0])}
    assert set(table) == set(BlockReport.__annotations__)
    assert words(table["units"][2]) == set(UnitReport.__annotations__)
    assert words(table["layers"][2]) == set(LayerCount.__annotations__)


def test_what_is_within_a_field_is_named_there() -> None:
    table = {name: " ".join(cells) for cells in rows(RUN) for name in words(cells[0])}
    assert set(ModelRecord.__annotations__) <= words(table["model"])
    assert set(ShardRecord.__annotations__) <= words(table["shards"])
