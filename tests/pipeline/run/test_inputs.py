"""What a command's options make of its text: the BOS, the column, what is told, and what a resumed run still says."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from whole_runs import add_tokenizer

from espalier.pipeline.commands import evaluate
from espalier.pipeline.config.prune import EvalConfig, PruneConfig
from espalier.pipeline.config.retrain import RetrainConfig
from espalier.pipeline.config.track import TrackConfig
from espalier.pipeline.run.inputs import bos_for, tell, token_table
from espalier.pipeline.weight_tracking.data import prepare
from espalier.stages.data.token_table import TokenTable
from espalier.stages.data.training_batches import open_source
from espalier.stages.errors import Refusal

BOS, LENGTH = 128, 16


@pytest.fixture
def spoken(model: Path) -> Path:
    """The tiny model with a tokenizer that begins a text with <s>."""
    add_tokenizer(model, {"<s>": BOS})
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


@pytest.fixture
def table_of(spoken: Path, tmp_path: Path) -> Callable[..., TokenTable]:
    def make(kind: Any, source: Any, purpose: Any, family: str = "llama", **options: Any) -> TokenTable:
        name = "data" if kind is RetrainConfig else "calibration"
        config = kind(model=str(spoken), output=str(tmp_path / "out"), **{name: source}, **options)
        facts: Any = SimpleNamespace(vocabulary=BOS + 1, family=family)
        return token_table(purpose, source, config, facts, LENGTH, tmp_path / f"{kind.__name__}{len(options)}{family}")

    return make


@pytest.fixture
def records(tmp_path: Path) -> Path:
    file = tmp_path / "a.jsonl"
    lines = [{"n": n, "text": "no", "data": {"body": f"story {n} of a bird"}} for n in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(("kind", "purpose"), [(PruneConfig, "calibration"), (RetrainConfig, "training")])
def test_the_options_of_a_command_reach_its_tokens(
    table_of: Callable[..., TokenTable], records: Path, kind: Any, purpose: str
) -> None:
    plain = table_of(kind, str(records), purpose, text_column="data.body", bos="none").rows(0, 20)
    assert bytes(plain[0].tolist()) == b"story 0 of a bir" and BOS not in plain
    auto = table_of(kind, str(records), purpose, text_column="data.body")
    assert auto.rows(0, 1)[0].tolist() == [BOS, *b"story 0 of a bi"]
    heads = table_of(kind, str(records), purpose, "gemma3_text", text_column="data.body").rows(0, 20)
    assert (heads[:, 0] == BOS).all()
    with pytest.raises(Refusal, match="text-column body: no such column, among: n"):
        table_of(kind, str(records), purpose, "other", text_column="body")


def test_auto_is_window_for_gemma_alone_and_what_is_asked_for_is_done() -> None:
    families = ("gemma", "gemma2", "gemma3_text", "llama")
    assert [bos_for("auto", family) for family in families] == [*["window"] * 3, "auto"]
    assert bos_for("none", "gemma") == "none"


def test_a_resumed_run_says_what_was_read_though_the_text_is_gone(
    table_of: Callable[..., TokenTable], records: Path
) -> None:
    told: list[list[str]] = []
    for _ in range(2):
        notes: list[str] = []
        tell(table_of(PruneConfig, str(records), "calibration"), notes.append)
        told.append(notes)
        records.unlink(missing_ok=True)
    assert told[0] == told[1] and len(told[0]) == 2
    assert told[0][0] == 'calibration text a.jsonl: read column "text"; <s> before each document'
    assert told[0][1].startswith('warning: calibration text a.jsonl: column "text" holds "no" in every record')


def test_token_ids_in_a_file_need_no_tokenizer(
    table_of: Callable[..., TokenTable], spoken: Path, tmp_path: Path
) -> None:
    for file in spoken.glob("tokenizer*"):
        file.unlink()
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps({"input_ids": [n] * LENGTH}) + "\n" for n in range(5)))
    assert table_of(PruneConfig, str(ids), "calibration").rows(0, 5)[:, 3].tolist() == list(range(5))
    ids.write_text(json.dumps({"text": "words"}))
    with pytest.raises(Refusal, match="its tokenizer cannot be read"):
        table_of(PruneConfig, str(ids), "calibration", "anew")


def test_eval_reads_its_text_by_the_same_options(spoken: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    def build(source: Any, tokenizer: Any, **options: Any) -> TokenTable:
        assert (options["bos"], options["text_column"]) == ("window", "data.body")
        raise Enough

    monkeypatch.setattr(evaluate, "build_token_table", build)
    config = EvalConfig(model=str(spoken), data=str(records), bos="window", text_column="data.body", shards=1)
    with pytest.raises(Enough):
        evaluate.evaluate(config)


@pytest.mark.parametrize("bos", ["auto", "document", "window", "none"])
def test_track_marks_beginnings_by_the_same_option(bos: str, spoken: Path, tmp_path: Path) -> None:
    config = json.loads((spoken / "config.json").read_text())
    (spoken / "config.json").write_text(json.dumps(config | {"vocab_size": BOS + 1}))
    (file := tmp_path / "text.txt").write_text("abcdefgh" * 40)
    asked: dict[str, Any] = {"model": str(spoken), "data": str(file), "data_kind": "text", "length": LENGTH}
    material = prepare(TrackConfig(**asked, bos=bos, held_out=0.5, rates=[1], finetune_steps=1), tmp_path / "home")
    training, evaluation = (open_source(source) for source in (material.sources.data, material.sources.eval) if source)
    rows = torch.cat([source.batch(range(len(source)))["input_ids"] for source in (training, evaluation)])
    held_out = rows[len(training) :]
    marked = {"auto": "document"}.get(bos, bos)
    assert (marked == "window") == bool((rows[:, 0] == BOS).all())
    assert (marked != "none") == (int(rows[0, 0]) == BOS) == (int(held_out[0, 0]) == BOS)
    assert int((rows == BOS).sum()) == {"none": 0, "document": 2, "window": len(rows)}[marked]
    text = LENGTH - (marked == "window")
    shift = int(marked == "document")  # the one that begins the text is among the ids that windows slide over
    assert len(training) == 160 - text + 1  # whole windows lie in the table
    assert bytes(training.batch([3])["input_ids"][0, -text:].tolist()).decode() == ("abcdefgh" * 3)[3 - shift :][:text]


def test_pictures_have_no_beginning_to_mark(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "model": {},
        "data": "rendered",
        "data_kind": "pictures",
        "rates": [1],
        "finetune_steps": 1,
    }
    with pytest.raises(Refusal, match="bos window: pictures are no text"):
        prepare(TrackConfig(**asked, bos="window"), tmp_path)
