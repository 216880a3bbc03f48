"""The token table: windows of the text in order, seeded samples, the same from every kind of file, refusals."""

import gzip
import hashlib
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from espalier.stages.data import token_table as tokens
from espalier.stages.data import tokenize as tokenise
from espalier.stages.data.token_table import TokenTable, build_token_table
from espalier.stages.errors import Refusal
from espalier.stages.text import text_file as textfile
from espalier.stages.text.documents import Document

TEXT = "a tree that grows flat against its frame bears more fruit than the wild one naïve ✓ 12 34"
WORDS = TEXT.split()
VOCABULARY = 400


def prose(lines: int, seed: int = 0) -> str:
    """Lines of words, some indented, some blank, so that a cut at any line break is not always harmless."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(lines):
        words = " ".join(rng.choice(WORDS, size=rng.integers(1, 12)))
        out.append("\n" if rng.random() < 0.2 else " " * int(4 * (rng.random() < 0.3)) + words + "\n")
    return "".join(out)


def trained(pre_tokenizer, decoder, alphabet) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([prose(500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", model_max_length=64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    )


@pytest.fixture(scope="module")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a blank is put before whatever it is given, which must not happen at each piece."""
    lines = pre_tokenizers.Split("\n", "isolated")
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first")
    return trained(pre_tokenizers.Sequence([lines, metaspace]), decoders.Metaspace(), [])


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(tokenise, "PIECE", 2000)
    monkeypatch.setattr(tokenise, "BATCH", 8000)


@pytest.fixture
def build(tmp_path, tokenizer):
    def call(
        source, samples=None, length=16, seed=0, tokenizer=tokenizer, vocab_size=VOCABULARY, name="t.arrow", **more
    ):
        return build_token_table(
            source,
            tokenizer,
            length=length,
            samples=samples,
            seed=seed,
            path=tmp_path / "out" / name,
            vocab_size=vocab_size,
            **more,
        )

    return call


def ids_of(table: TokenTable) -> np.ndarray:
    return table.rows(0, len(table)).reshape(-1)


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("which", ["tokenizer", "metaspace_tokenizer"])
def test_windows_are_the_whole_text_tokenised_in_one_go(which, request, build, tmp_path, small_pieces):
    tokenizer = request.getfixturevalue(which)
    text = prose(2000)
    assert len(text) > 20 * tokenise.PIECE
    table = build(str(write(tmp_path / "a.txt", text)), tokenizer=tokenizer)
    expected = whole(tokenizer, text)
    assert len(table) == len(expected) // 16
    assert ids_of(table).tolist() == expected[: table.tokens]


@pytest.mark.parametrize("which", ["tokenizer", "metaspace_tokenizer"])
def test_text_without_line_breaks_keeps_every_character(which, request, small_pieces):
    text = prose(800).replace("\n", " ").replace("  ", " ")
    tokenizer = request.getfixturevalue(which)
    parts = list(tokenise.tokenised(iter([Document([text])]), tokenizer))
    assert len(parts) > 5
    ids = np.concatenate([part.ids for part in parts]).tolist()
    assert tokenizer.decode(ids).strip() == tokenizer.decode(whole(tokenizer, text)).strip()


def test_pieces_do_not_depend_on_how_the_text_arrives(small_pieces, tokenizer):
    def pieces(blocks):
        return [part.ids.tolist() for part in tokenise.tokenised(iter([Document(blocks)]), tokenizer)]

    text = prose(1000)
    for size in (1, 999, 5000):
        blocks = [text[start : start + size] for start in range(0, len(text), size)]
        assert pieces(blocks) == pieces([text])


def test_line_breaks_are_kept_as_they_are(build, tmp_path, tokenizer):
    text = "one\r\ntwo\rthree\n\n\nfour" * 20
    table = build(write(tmp_path / "a.txt", text), length=2)
    assert tokenizer.decode(ids_of(table)) == tokenizer.decode(whole(tokenizer, text)[: table.tokens])
    assert "\r\n" in tokenizer.decode(ids_of(table))


def test_sample_is_in_text_order_and_without_repeats(build):
    rows = np.arange(400 * 16).reshape(400, 16)
    table = build(rows.tolist(), samples=40, vocab_size=rows.size)
    firsts = table.rows(0, 40)[:, 0]
    assert len(table) == 40
    assert (np.diff(firsts) > 0).all()
    assert set(firsts // 16) <= set(range(400))
    assert (table.rows(0, 40) == rows[firsts // 16]).all()
    assert firsts[-1] // 16 > 200, "the sample stays at the beginning of the text"


def test_large_sample_compacts_without_overwriting_what_is_still_to_be_read(build):
    rows = np.arange(5000 * 4).reshape(5000, 4)
    table = build(rows, samples=4000, length=4, vocab_size=rows.size)
    chosen = table.rows(0, 4000)[:, 0] // 4
    assert (table.rows(0, 4000) == rows[chosen]).all()
    assert len(set(chosen)) == 4000


def test_same_seed_gives_the_same_rows_and_another_seed_other_rows(build):
    text = [prose(1000)]
    first, again, other = (build(text, 20, seed=seed, name=f"{i}.arrow") for i, seed in enumerate((3, 3, 4)))
    assert first.digest == again.digest
    assert (first.rows(0, 20) == again.rows(0, 20)).all()
    assert (first.rows(0, 20) != other.rows(0, 20)).any()
    assert first.path.read_bytes() == again.path.read_bytes()


def test_sample_reads_no_further_than_sixteen_windows_for_each(build, monkeypatch):
    taken = []

    def endless(*_):
        while True:
            taken.append(4)
            yield Document(ids=np.array([1, 2, 3, 4]))

    monkeypatch.setattr(tokens.corpus, "documents", endless)
    monkeypatch.setattr(tokenise, "BATCH_PIECES", 1)
    assert len(build("endless", samples=3, length=4, tokenizer=None)) == 3
    assert len(taken) == 48 == 3 * tokens.CANDIDATES


def test_parquet_jsonl_text_and_list_of_one_document_agree(build, tmp_path, small_pieces):
    text = prose(600)
    write(tmp_path / "a.txt", text)
    write(tmp_path / "a.jsonl", json.dumps({"id": 1, "text": text}) + "\n")
    write(tmp_path / "b.json", json.dumps([{"body": text, "id": 1}]))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    pq.write_table(pa.table({"id": [1], "text": [text]}), tmp_path / "odd [name]*.parquet")
    names = ["a.txt", "a.jsonl", "b.json", "c.json.gz", "odd [name]*.parquet"]
    digests = {build(str(tmp_path / name)).digest for name in names} | {build([text]).digest}
    assert len(digests) == 1


def test_documents_are_separated_by_the_end_of_text_id(build, tmp_path, tokenizer):
    texts = [prose(5, seed) for seed in range(200)]
    expected: list[int] = []
    for text in texts:
        expected += ([tokenizer.eos_token_id] if expected else []) + whole(tokenizer, text)
    records = (
        [{"text": text} for text in texts[:100]] + [{"text": ""}, {"text": None}] + [{"text": t} for t in texts[100:]]
    )
    write(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=33)
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", texts):
        table = build(source)
        assert ids_of(table).tolist() == expected[: table.tokens]
        assert len(expected) - table.tokens < 16


def test_folder_reads_its_data_files_in_order_and_leaves_the_rest(build, tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    first, second = prose(30, 1), prose(30, 2)
    write(folder / "README.md", "not text to calibrate on")
    write(folder / ".hidden.txt", "nor this")
    write(folder / "a.txt", first)
    write(folder / "deep" / "b.jsonl", json.dumps({"text": second}) + "\n")
    assert build(folder).digest == build([first, second]).digest
    sources = tmp_path / "sources"
    sources.mkdir()
    write(sources / "x.py", first)
    assert build(sources).digest == build([first]).digest


def test_id_lists_of_the_right_length_are_the_rows_and_others_are_documents(build, tokenizer):
    rows = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert build(rows, length=4).rows(0, 2).tolist() == rows
    assert build(np.array(rows), length=4).rows(0, 2).tolist() == rows
    documents = build([[2, 3, 4], [], [5, 6]], length=3)
    assert documents.rows(0, 2).tolist() == [[2, 3, 4], [tokenizer.eos_token_id, 5, 6]]
    assert build([[2, 3, 4], [5]], length=2, tokenizer=None).rows(0, 2).tolist() == [[2, 3], [4, 5]]


def test_table_opens_with_its_facts_and_reads_any_rows_without_copying(build, tmp_path):
    rows = np.arange(3000 * 8, dtype="<i4").reshape(3000, 8)
    build(rows, length=8, vocab_size=rows.size, purpose="evaluation", name="rows.arrow")
    table = TokenTable.open(tmp_path / "out" / "rows.arrow")
    assert (len(table), table.length, table.tokens, table.purpose) == (3000, 8, 24000, "evaluation")
    assert table.digest == hashlib.sha256(rows.tobytes()).hexdigest()
    assert table.rows(2999, 3000).dtype == np.int32
    assert (table.rows(1020, 2060) == rows[1020:2060]).all()
    assert np.shares_memory(table.rows(5, 2000), table.rows(1000, 1001))
    assert not table.rows(0, 1).flags.writeable
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rows.arrow"]
    schema = pa.ipc.open_file(tmp_path / "out" / "rows.arrow").schema
    assert schema.field("tokens").type == pa.list_(pa.field("item", pa.int32()), 8)
    assert schema.metadata[b"samples"] == b"3000"


def test_memory_does_not_grow_with_the_text(build, tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr(textfile, "BLOCK", 10_000)
    peaks = []
    for repeats in (2, 40):
        file = write(tmp_path / f"{repeats}.txt", prose(1_000) * repeats)
        tracemalloc.start()
        build(file)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 200_000
    assert peaks[1] < file.stat().st_size


def test_long_text_raises_no_warning_about_the_models_context(build, capfd, recwarn):
    build([prose(200)])
    assert "longer than" not in capfd.readouterr().err
    assert not [warning for warning in recwarn if "longer than" in str(warning.message)]


def test_too_short_text_says_how_much_there_is(build, tmp_path, tokenizer):
    text = prose(100)
    held = len(whole(tokenizer, text))
    windows = held // 16
    grouped = f"{held:,}".replace(",", " ")
    with pytest.raises(Refusal) as refusal:
        build(write(tmp_path / "stories.txt", text), samples=128)
    assert str(refusal.value) == (
        f"calibration text stories.txt holds {grouped} tokens = {windows} windows of 16, fewer than the "
        f"128 samples x 16 asked for; give more text, or --samples {windows}"
    )
    assert len(build(write(tmp_path / "stories.txt", text), samples=windows)) == windows
    with pytest.raises(Refusal, match=r"evaluation text .* 0 windows of 4096; give more text, or a length of at most"):
        build([text], length=4096, purpose="evaluation")


REFUSED_FILES = {
    "empty.txt": (b"", r"empty\.txt is empty"),
    "empty.jsonl": (b"", r"empty\.jsonl is empty"),
    "latin.txt": (b"caf\xe9 au lait", r"latin\.txt: not UTF-8 at byte offset 3 .*0xe9"),
    "cut.txt": (b"abc\xc3", r"cut\.txt: not UTF-8 at byte offset 3 "),
    "late.txt": (b"a" * (2**20 - 1) + "é".encode() + b"b" * 100 + b"\xff", r"not UTF-8 at byte offset 1048677 "),
    "broken.jsonl": (
        b'{"text": "a"}\n{"text": \n',
        r"broken\.jsonl: cannot be read: line 2: Expecting value; mend that line",
    ),
    "broken.parquet": (b"PAR1junk", r"broken\.parquet: cannot be read: Parquet magic bytes"),
    "columns.jsonl": (b'{"a": "x", "b": "y", "n": 1}\n', r'no column "text".*a \(text\), b \(text\), n \(number\)'),
    "numbers.jsonl": (b'{"text": 1}\n', r'line 1: column "text" holds number, not text'),
    "nulls.jsonl": (b'{"text": null}\n', r"nulls\.jsonl is empty"),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_unusable_file_is_refused_in_one_line_and_leaves_nothing(name, build, tmp_path):
    content, message = REFUSED_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=message) as refusal:
        build(tmp_path / name)
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_file_and_empty_folder_are_refused(build, tmp_path):
    for missing in (tmp_path / "nope.txt", str(tmp_path / "nope"), "nope", "", "data/nope.jsonl"):
        with pytest.raises(Refusal, match="no such file or folder"):
            build(missing)
    (tmp_path / "folder").mkdir()
    with pytest.raises(Refusal, match="the folder holds no files"):
        build(tmp_path / "folder")


def test_hub_data_set_out_of_reach_is_refused_within_seconds(build, monkeypatch):
    import huggingface_hub

    def unreachable(*_: object, **more: object) -> None:
        assert more["timeout"] <= 5
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    started = time.monotonic()
    with pytest.raises(Refusal, match=r"allenai/c4:en: no such file here, and the Hugging Face hub cannot be reached"):
        build("allenai/c4:en", samples=1)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [[1, 2], [3, VOCABULARY]],
            rf"token id {VOCABULARY} is beyond the model's vocabulary of {VOCABULARY}; .*belong",
        ),
        ([[1, 2], [-7, 2]], "token id -7 is negative"),
        ([[1, 2], [1.5, 2.5]], "id list 1 does not hold plain integers"),
        ([[1, 2], [2**40, 2]], "token id 1099511627776 is beyond"),
        ([], "empty"),
        (["text", 3], "text 1 of the list is of type int"),
        (["text", "\udc80"], "lone surrogate"),
    ],
)
def test_unusable_list_is_refused(rows, message, build):
    with pytest.raises(Refusal, match=message):
        build(rows, length=2)


def test_tokenizer_of_another_model_is_refused(build):
    with pytest.raises(
        Refusal, match="beyond the model's vocabulary of 100; this tokenizer and this model do not belong"
    ):
        build([prose(50)], vocab_size=100)


def test_request_that_makes_no_sense_is_refused(build):
    with pytest.raises(Refusal, match="length 1 is too short"):
        build([prose(50)], length=1)
    with pytest.raises(Refusal, match="0 samples asked for"):
        build([prose(50)], samples=0)
    with pytest.raises(Refusal, match="needs the model's tokenizer"):
        build([prose(50)], tokenizer=None)


def test_file_that_is_no_whole_table_is_refused_on_opening(build, tmp_path):
    build([prose(200)])
    good = (tmp_path / "out" / "t.arrow").read_bytes()
    for name, content in {"cut.arrow": good[: len(good) // 2], "text.arrow": b"hello", "empty.arrow": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refusal, match="not a whole token table"):
            TokenTable.open(tmp_path / name)
    with pytest.raises(Refusal, match="no such file"):
        TokenTable.open(tmp_path / "nope.arrow")


def test_full_disk_is_refused_and_leaves_nothing(build, tmp_path, monkeypatch):
    import errno
    import os

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refusal, match=r"t\.arrow: the disk is full"):
        build([prose(200)])
    assert list((tmp_path / "out").iterdir()) == []
