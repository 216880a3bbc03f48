"""Text as people have it: every shape of record, file and folder gives the same tokens, or a line that says why not."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from espalier.stages.data.token_table import TokenTable, build_token_table
from espalier.stages.errors import Refusal
from espalier.stages.text.records import reader_of

STORIES = [f"Lily saw {n} birds, and bird {n} sang:{' good' * (n % 5)} day!\nThe end of {n}." for n in range(60)]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    """Without a chat template; begins a text with <s> by its own rule."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(STORIES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def chatty(plain):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def build(tmp_path, plain):
    def call(source, tokenizer=plain, length=16, samples=None, **more) -> TokenTable:
        path = tmp_path / "out" / "t.arrow"
        more = {"vocab_size": 400, "seed": 0} | more
        return build_token_table(source, tokenizer, length=length, samples=samples, path=path, **more)

    return call


def ids_of(table: TokenTable) -> list[int]:
    return table.rows(0, len(table)).reshape(-1).tolist()


def bare(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def expected(tokenizer, texts: list[str], length: int = 16) -> list[int]:
    """A BOS before each text."""
    ids = [one for text in texts for one in [1, *bare(tokenizer, text)]]
    return ids[: len(ids) // length * length]


# -- records -----------------------------------------------------------------------------------------------------------

SHAPES = {
    "text": lambda story: {"id": "x", "meta": {"n": 1}, "text": story},
    "content": lambda story: {"path": "x", "lang": "en", "content": story},
    "data.text": lambda story: {"id": "x", "data": {"text": story, "source": "web"}},
    "only": lambda story: {"n": 1, "story": story},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_column_that_holds_the_text_is_found_and_told(build, plain, tmp_path, shape, suffix):
    records, file = [SHAPES[shape](story) for story in STORIES], tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        file.write_text(json.dumps(records, indent=1)) if suffix == ".json" else lines(file, records)
    table = build(file)
    assert ids_of(table) == expected(plain, STORIES)
    name = {"only": "story"}.get(shape, shape)
    assert table.read == f'calibration text a{suffix}: read column "{name}"; <s> before each document'


def test_text_column_names_another_and_a_wrong_name_lists_what_there_is(build, plain, tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"text": "no", "n": 1, "data": {"body": story}} for story in STORIES])
    assert ids_of(build(file, text_column="data.body")) == expected(plain, STORIES)
    with pytest.raises(Refusal, match=r"text-column body: no such column, among: text \(text\), n \(number\), data"):
        build(file, text_column="body")
    with pytest.raises(Refusal, match="text-column n holds number, not text"):
        build(file, text_column="n")
    with pytest.raises(Refusal, match=r"a\.txt: text-column body: plain text has no columns; leave it out"):
        build(tmp_path_text(tmp_path), text_column="body")
    other = lines(tmp_path / "b.jsonl", [{"text": story} for story in STORIES])
    assert ids_of(build(other, text_column="data.body", column_required=False)) == expected(plain, STORIES)
    assert build(tmp_path / "a.txt", text_column="data.body", column_required=False).tokens


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (("instruction", "input", "output"), "instruction + input + output"),
        (("instruction", "output"), "instruction + output"),
        (("prompt", "completion"), "prompt + completion"),
        (("question", "answer"), "question + answer"),
    ],
)
def test_columns_that_belong_together_are_joined_and_it_is_said(build, plain, tmp_path, names, joined):
    parts = {"instruction": "Tell.", "input": "", "prompt": "Tell.", "question": "Tell."}
    file = lines(tmp_path / "a.jsonl", [{name: parts.get(name, story) for name in names} for story in STORIES])
    table = build(file)
    assert ids_of(table) == expected(plain, [f"Tell.\n{story}" for story in STORIES])
    assert f"read columns {joined}, joined by line breaks;" in table.read
    spaced = lines(tmp_path / "b.jsonl", [{"prompt": "Tell.", "completion": f" {story}"} for story in STORIES])
    assert ids_of(build(spaced)) == expected(plain, [f"Tell. {story}" for story in STORIES])


def test_records_that_mix_types_in_other_columns_are_read(build, plain, tmp_path):
    odd = [None, 1, "a", {"x": 1}, [1, "b"]]
    records = [{"meta": odd[n % 5], "text": story} for n, story in enumerate(STORIES)]
    assert ids_of(build(lines(tmp_path / "a.jsonl", records))) == expected(plain, STORIES)
    records[40] = {"text": 7}
    with pytest.raises(Refusal, match=r'a\.jsonl: line 41: column "text" holds number, not text; mend it, or name'):
        build(lines(tmp_path / "a.jsonl", records))


def test_a_column_that_plainly_is_no_text_is_warned_of(build, tmp_path):
    same = build(lines(tmp_path / "a.jsonl", [{"split": "train", "n": n} for n in range(50)]))
    assert same.warnings == [
        'calibration text a.jsonl: column "split" holds "train" in every record: is that text? If not, say which '
        "column is by --text-column"
    ]
    (words,) = build(lines(tmp_path / "b.jsonl", [{"id": f"row-{n}"} for n in range(50)])).warnings
    assert 'column "id" holds single words' in words
    assert TokenTable.open(same.path).warnings == [words]  # a resumed run says it again
    assert build(lines(tmp_path / "c.jsonl", [{"text": story} for story in STORIES])).warnings == []


def test_token_ids_in_a_column_are_the_documents(build, plain, tmp_path):
    ids = [bare(plain, story) for story in STORIES]
    padded = [row + [2] * (64 - len(row)) for row in ids]
    masks = [[1] * len(row) + [0] * (64 - len(row)) for row in ids]
    pq.write_table(pa.table({"input_ids": padded, "attention_mask": masks}), tmp_path / "a.parquet")
    lines(tmp_path / "a.jsonl", [{"input_ids": row} for row in ids])
    joined = [one for row in ids for one in [2, *row]][1:]
    for name in ("a.parquet", "a.jsonl"):
        for tokenizer, want in ((plain, joined), (None, [one for row in ids for one in row])):
            table = build(tmp_path / name, tokenizer=tokenizer)
            assert ids_of(table) == want[: table.tokens]
            where = " where attention_mask is 1" if name == "a.parquet" else ""
            assert table.read == f'calibration text {name}: read column "input_ids"{where} as token ids'
    rows = np.arange(320).reshape(20, 16)
    pq.write_table(pa.table({"input_ids": rows.tolist()}), tmp_path / "rows.parquet")
    for bos in ("auto", "document", "window", "none"):
        assert build(tmp_path / "rows.parquet", bos=bos).rows(0, 20).tolist() == rows.tolist()
    with pytest.raises(Refusal, match="token id 300 is beyond the model's vocabulary of 300"):
        build(tmp_path / "rows.parquet", vocab_size=300)


# -- conversations -----------------------------------------------------------------------------------------------------


def conversations(shape: str) -> list[dict]:
    if shape == "prompt":
        ask = {"role": "user", "content": "Tell."}
        return [{"prompt": [ask], "completion": [{"role": "assistant", "content": story}]} for story in STORIES]
    keys = ("from", "value", "human", "gpt") if shape == "conversations" else ("role", "content", "user", "assistant")
    speaker, words, asks, answers = keys
    return [
        {"id": f"id_{n}", shape: [{speaker: asks, words: "Tell."}, {speaker: answers, words: story}]}
        for n, story in enumerate(STORIES)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("shape", ["messages", "conversations", "prompt"])
def test_conversations_go_through_the_chat_template_with_one_bos(build, chatty, tmp_path, shape, suffix):
    file, records = tmp_path / f"a{suffix}", conversations(shape)
    lines(file, records) if suffix == ".jsonl" else pq.write_table(pa.Table.from_pylist(records), file)
    turns = [[{"role": "user", "content": "Tell."}, {"role": "assistant", "content": story}] for story in STORIES]
    want = [one for turn in turns for one in chatty.apply_chat_template(turn, return_dict=False)]
    for bos in ("auto", "document", "none"):
        table = build(file, tokenizer=chatty, bos=bos)
        assert ids_of(table) == want[: table.tokens]
    assert ", through the chat template" in table.read
    assert ids_of(table).count(1) in (len(STORIES), len(STORIES) - 1)


def test_without_a_chat_template_the_turns_are_joined_and_it_is_said(build, plain, tmp_path):
    table = build(lines(tmp_path / "a.jsonl", conversations("conversations")))
    assert ids_of(table) == expected(plain, [f"Tell.\n{story}" for story in STORIES])
    assert 'read column "conversations", turns joined by line breaks (no chat template); <s> before' in table.read


def test_conversations_that_the_template_refuses_are_left_out_and_counted(build, chatty, tmp_path):
    records = conversations("messages")
    records[3]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    table = build(lines(tmp_path / "a.jsonl", records), tokenizer=chatty)
    assert table.warnings == [
        "1 of 60 conversations left out, as the chat template refuses them "
        "(calibration text a.jsonl: line 4: no system)"
    ]
    with pytest.raises(Refusal, match="line 1: no system: the chat template takes none of the conversations"):
        build(lines(tmp_path / "b.jsonl", [records[3]]), tokenizer=chatty)


def test_turns_of_parts_are_their_text_and_a_picture_is_refused(build, chatty, tmp_path):
    def record(part: dict) -> dict:
        return {"messages": [{"role": "user", "content": [{"type": "text", "text": "Tell."}, part]}]}

    parts = build(lines(tmp_path / "a.jsonl", [record({"type": "text", "text": s}) for s in STORIES]), tokenizer=chatty)
    whole = lines(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "Tell." + s}]} for s in STORIES])
    first = ids_of(parts)
    assert first == ids_of(build(whole, tokenizer=chatty))
    with pytest.raises(Refusal, match="line 1: a turn holds a part of type image"):
        build(lines(tmp_path / "a.jsonl", [record({"type": "image"})]), tokenizer=chatty)


# -- the beginning of a text -------------------------------------------------------------------------------------------


def test_bos_stands_where_it_is_asked_for(build, plain, tmp_path):
    texts = [bare(plain, story) for story in STORIES]
    between = {"document": 1, "auto": 1, "none": 2}
    for bos, mark in between.items():
        want = [one for ids in texts for one in [mark, *ids]][0 if mark == 1 else 1 :]
        table = build(STORIES, bos=bos)
        assert ids_of(table) == want[: table.tokens] and table.tokens > len(want) - 16
    rows = build(STORIES, bos="window").rows(0, 200)
    assert rows.shape[1] == 16 and (rows[:, 0] == 1).all()
    inside = [one for row in rows.tolist() for one in row[1:] if one != 1]
    assert inside == [one for ids in texts for one in ids][: len(inside)]  # nothing of the text is lost
    assert "<s> at the head of each window and document" in build(tmp_path_text(tmp_path), bos="window").read


def tmp_path_text(folder: Path) -> Path:
    (folder / "a.txt").write_text("\n".join(STORIES))
    return folder / "a.txt"


def test_bos_goes_by_the_tokenizers_own_rule(build, plain):
    silent = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(plain.backend_tokenizer.to_str()), bos_token="<s>", eos_token="</s>"
    )
    silent.backend_tokenizer.post_processor = processors.ByteLevel()
    assert 1 not in ids_of(build(STORIES, tokenizer=silent)) and 2 in ids_of(build(STORIES, tokenizer=silent))
    assert ids_of(build(STORIES, tokenizer=silent, bos="document")) == expected(plain, STORIES)
    silent.bos_token = None
    with pytest.raises(Refusal, match="bos document: the model's tokenizer has no BOS token; leave --bos out"):
        build(STORIES, tokenizer=silent, bos="document")


def test_a_text_that_begins_with_the_bos_gets_no_second(build, plain):
    assert ids_of(build([f"<s>{story}" for story in STORIES])) == expected(plain, STORIES)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.txt.bz2", "really-gzip.txt"])
def test_packed_text_is_unpacked_whatever_it_is_called(build, plain, tmp_path, name):
    text = "\n".join(STORIES).encode()
    import bz2

    pack = {"zst": lambda: pa.Codec("zstd").compress(text, asbytes=True), "bz2": lambda: bz2.compress(text)}
    half = len(text) // 2  # two members one behind the other, as `cat a.gz b.gz` makes them
    packed = pack.get(name.rpartition(".")[2], lambda: gzip.compress(text[:half]) + gzip.compress(text[half:]))()
    (tmp_path / name).write_bytes(packed)
    assert ids_of(build(tmp_path / name)) == expected(plain, [text.decode()])
    (tmp_path / name).write_bytes(packed[: len(packed) // 3])
    with pytest.raises(Refusal, match=r"cannot be read: ") as refusal:
        build(tmp_path / name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["a[1] b.jsonl.gz", "50%20off?.jsonl", "x#y*z.jsonl.zst", "http:::x.jsonl", "CAPS.JSONL", "[a].parquet"]
)
def test_any_file_name_is_a_file_name(build, plain, tmp_path, name):
    data = "".join(json.dumps({"text": story}) + "\n" for story in STORIES).encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": STORIES}), tmp_path / name)
    elif name.endswith(".zst"):
        (tmp_path / name).write_bytes(pa.Codec("zstd").compress(data, asbytes=True))
    else:
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert ids_of(build(tmp_path / name)) == expected(plain, STORIES)


def test_a_byte_order_mark_is_dropped(build, plain, tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + "\n".join(STORIES).encode())
    assert ids_of(build(tmp_path / "a.txt")) == expected(plain, ["\n".join(STORIES)])
    file = lines(tmp_path / "a.jsonl", [{"text": story} for story in STORIES])
    file.write_bytes(mark + file.read_bytes())
    assert ids_of(build(file)) == expected(plain, STORIES)


BROKEN = {
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"not UTF-8 at byte offset 27 .*0xe9.*convert the file"),
    "utf16.txt": ("abc" * 9).encode("utf-16") and (("abc" * 9).encode("utf-16"), r"UTF-16, .*iconv -f utf-16 -t utf-8"),
    "data.bin": (bytes(range(256)) * 9, r"no text at all by its zero bytes"),
    "cut.json": (b'[{"text": "a"}, {"text": "b"}', r"line 1: the array that it holds does not end"),
    "half.json": (b'[{"text": "a"}, {"text": "b', r"line 1: Unterminated string"),
    "lone.jsonl": (b'{"text": "a"}\n{"text": "\\ud800"}\n', r"line 2 holds a lone surrogate"),
    "deep.jsonl": (b"[" * 100_000, r"line 1: nested too deeply"),
    "ids.jsonl": (b'{"input_ids": [1, 99999999999999999999]}\n', r"token id -1 is negative"),
    "floats.jsonl": (b"1.5\n2.5\n", r"line 1: its strings holds number, not text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_says_where(build, tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name][0])
    with pytest.raises(Refusal, match=BROKEN[name][1]) as refusal:
        build(tmp_path / name, length=2)
    assert "\n" not in str(refusal.value) and name in str(refusal.value)


def test_json_comes_value_by_value_wherever_the_blocks_of_the_file_end(tmp_path, monkeypatch):
    from espalier.stages.text import text_file as textfile

    records = [{"text": 'é\\"\n' * n, "n": [n, None, True, 1.5e3]} for n in range(30)]
    text = {
        "a.jsonl": "".join(json.dumps(record) + "\r\n\n" for record in records),
        "a.json": json.dumps(records, indent=2, ensure_ascii=False),
        "b.json": "\n".join(json.dumps(record, indent=1) for record in records),
        "c.jsonl": "".join(json.dumps([n, n]) + "\n" for n in range(30)),
    }
    for name, content in text.items():
        (tmp_path / name).write_bytes(content.encode())
        for block in (1, 7, 64, 1 << 20):
            monkeypatch.setattr(textfile, "BLOCK", block)
            found = list(reader_of(tmp_path / name, name)(None))
            assert [value for _, value in found] == ([[n, n] for n in range(30)] if name[0] == "c" else records)
            assert name != "a.jsonl" or [place for place, _ in found] == [f"line {2 * n + 1}" for n in range(30)]


def test_csv_and_tsv_are_read_by_their_header(build, plain, tmp_path):
    quoted = ['"' + story.replace('"', '""') + '"' for story in STORIES]
    (tmp_path / "a.csv").write_text("n,text\n" + "".join(f"{n},{story}\n" for n, story in enumerate(quoted)))
    (tmp_path / "a.tsv").write_text("n\tstory\n" + "".join(f"{n}\t{story}\n" for n, story in enumerate(quoted)))
    for name in ("a.csv", "a.tsv"):
        assert ids_of(build(tmp_path / name)) == expected(plain, STORIES)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_other_files_too_gives_its_text(build, plain, tmp_path):
    folder = tmp_path / "a [b] c"
    folder.mkdir()
    for name in ("README.md", "LICENSE.txt", "table.csv", "script.py", "dataset_info.json"):
        (folder / name).write_text("{}")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    lines(folder / "z.jsonl", [{"text": story} for story in STORIES])
    table = build(folder)
    assert ids_of(table) == expected(plain, STORIES)
    assert "read 1 file, 6 left out (LICENSE.txt, README.md, dataset_info.json, …), " in table.read
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "a.py").write_text(STORIES[0])
    (sources / "logo.png").write_bytes(b"\x89PNG\0\0")
    assert ids_of(build(sources)) == expected(plain, STORIES[:1])
    (sources / "a.py").unlink()
    with pytest.raises(Refusal, match="none of its 1 files is text"):
        build(sources)


def test_what_datasets_saved_is_read_as_it_was_saved(build, plain, tmp_path):
    saved = datasets.Dataset.from_dict({"text": [*STORIES, "no"]}).select(range(len(STORIES)))
    shuffled = saved.shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "one [1]", num_shards=3)
    assert ids_of(build(tmp_path / "one [1]")) == expected(plain, shuffled["text"][:])
    datasets.DatasetDict(test=shuffled, train=saved).save_to_disk(tmp_path / "splits")
    table = build(tmp_path / "splits")
    assert ids_of(table) == expected(plain, STORIES)
    assert 'read split "train" of test, train, column "text"' in table.read
    datasets.DatasetDict(test=saved, other=saved).save_to_disk(tmp_path / "ask")
    with pytest.raises(Refusal, match=r"holds the splits test, other; give one's folder, such as .*ask/test"):
        build(tmp_path / "ask")
    next((tmp_path / "one [1]").glob("data-00001*")).unlink()
    with pytest.raises(Refusal, match=r"data-00001-of-00003\.arrow, which its state\.json names, is missing"):
        build(tmp_path / "one [1]")


def test_memory_does_not_grow_with_the_records(tmp_path):
    import tracemalloc

    peaks = []
    for count in (2_000, 40_000):
        file = lines(tmp_path / f"{count}.jsonl", [{"text": "x" * 200, "n": n} for n in range(count)])
        tracemalloc.start()
        assert sum(1 for _ in reader_of(file, "a")(None)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 8e6 < file.stat().st_size


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "saved"])
@pytest.mark.slow
def test_a_home_that_cannot_be_written_to_does_not_matter(tmp_path, plain, kind):
    if kind == "saved":
        datasets.Dataset.from_dict({"text": STORIES}).save_to_disk(tmp_path / f"a.{kind}")
    elif kind == "parquet":
        pq.write_table(pa.table({"text": STORIES}), tmp_path / f"a.{kind}")
    else:
        file = lines(tmp_path / "a.jsonl", [{"text": story} for story in STORIES])
        (tmp_path / f"a.{kind}").write_bytes(gzip.compress(file.read_bytes()))
    plain.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    code = (
        "import sys; from pathlib import Path; from espalier.stages.data.token_table import build_token_table\n"
        "from espalier.pipeline.run.inputs import load_tokenizer\n"
        "home = Path(sys.argv[1])\n"
        "table = build_token_table(sys.argv[2], load_tokenizer(str(home / 'tokenizer')), length=16, samples=None, "
        "seed=0, path=home / 't.arrow', vocab_size=400)\nprint(len(table))"
    )
    nowhere = dict.fromkeys(("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"), "/proc/nowhere")
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tmp_path / f"a.{kind}")],
        env=os.environ | nowhere | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(expected(plain, STORIES)) // 16
