"""The demo's text, three parts of the standard library that share no file, and the model it ships with."""

import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from espalier.pipeline.demo import sources, train
from espalier.stages.errors import Refusal

PARTS: tuple[sources.Part, ...] = ("training", "calibration", "held-out")


def names(texts: list[str]) -> list[str]:
    return [text.splitlines()[0].removeprefix("# file: ") for text in texts]


@pytest.fixture(scope="module")
def stdlib() -> dict[str, list[str]]:
    return {part: sources.files(part) for part in PARTS}


def make_library(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def test_parts_share_no_file_and_no_text(stdlib: dict[str, list[str]]) -> None:
    for part in PARTS:
        others = [name for other in PARTS if other != part for name in names(stdlib[other])]
        assert not set(names(stdlib[part])) & set(others)
    trained_on = sources.training_text()
    assert not [name for name in names(stdlib["held-out"]) if f"# file: {name}\n" in trained_on]


def test_parts_are_about_as_large_as_promised_and_sorted(stdlib: dict[str, list[str]]) -> None:
    count = {part: len(stdlib[part]) for part in PARTS}
    total = sum(count.values())
    assert total > 300
    assert 0.02 < count["held-out"] / total < 0.06
    assert 0.03 < count["calibration"] / total < 0.09
    assert all(names(stdlib[part]) == sorted(names(stdlib[part])) for part in PARTS)


def test_a_file_stays_in_its_part_whatever_the_python_version() -> None:
    # The model that ships was trained under this split: to change it is to evaluate on what was trained on.
    assert sources.part_of("functools.py") == "held-out"
    assert sources.part_of("asyncio/events.py") == "held-out"
    assert sources.part_of("tarfile.py") == "calibration"
    assert sources.part_of("os.py") == "training"


def test_each_text_is_headed_by_its_name_and_is_the_file(stdlib: dict[str, list[str]]) -> None:
    text = next(text for text in stdlib["held-out"] if text.startswith("# file: functools.py\n"))
    original = (Path(sysconfig.get_paths()["stdlib"]) / "functools.py").read_text("utf-8")
    assert text.removeprefix("# file: functools.py\n").strip() == original.strip()


def test_tests_tables_packages_and_unreadable_files_are_left_out(tmp_path: Path) -> None:
    root = make_library(
        tmp_path,
        {
            "os.py": b"x = 1\r\ny = 2\r\n",
            "test/test_os.py": b"skip = 1\n",
            "site-packages/torch.py": b"skip = 1\n",
            "encodings/cp037.py": b"skip = 1\n",
            "_sysconfigdata__linux.py": b"skip = 1\n",
            "table.py": b"skip = 1\n" * sources.LARGEST_FILE,
            "latin.py": b"skip = '\xe9'\n",
            "empty.py": b"",
        },
    )
    assert sources.files("training", root) == ["# file: os.py\nx = 1\ny = 2\n"]


def test_a_library_without_sources_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"no held-out text.*use a Python that has them") as refused:
        sources.files("held-out", tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_written_texts_fill_their_size_with_whole_lines_of_every_file(
    tmp_path: Path, stdlib: dict[str, list[str]]
) -> None:
    calibration, held_out = sources.write_texts(tmp_path / "new", 100_000, 60_000)
    assert (calibration.name, held_out.name) == ("calibration.txt", "held-out.txt")
    for path, part, limit in ((calibration, "calibration", 100_000), (held_out, "held-out", 60_000)):
        written = path.read_text("utf-8")
        assert 0.97 * limit < path.stat().st_size <= limit
        assert [line[len("# file: ") :] for line in written.splitlines() if line.startswith("# file: ")] == names(
            stdlib[part]
        )
        whole = {line for text in stdlib[part] for line in text.split("\n")}
        assert set(written.removesuffix("\n").split("\n")) <= whole
        assert written.endswith("\n")


def test_a_part_smaller_than_its_limit_is_written_whole(tmp_path: Path) -> None:
    _, held_out = sources.write_texts(tmp_path, 1000, 10**9)
    assert held_out.read_text("utf-8") == sources.held_out_text()


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in sources.write_texts(tmp_path / "a", 5000, 5000)]
    assert first == [path.read_bytes() for path in sources.write_texts(tmp_path / "b", 5000, 5000)]


def test_the_model_that_ships_is_small_and_knows_held_out_sources() -> None:
    folder = Path(sources.__file__).parent / "model"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    text = sources.held_out_text()[:40_000]
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert train.perplexity(model, torch.tensor(tokens)) < 60  # guessing is 4,096
