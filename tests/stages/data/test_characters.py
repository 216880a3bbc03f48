"""Characters as tokens, windows that begin anywhere, and thresholds that land where they should."""

from pathlib import Path

import numpy as np
import pytest
import torch

from espalier.stages.data.characters import SlidingWindows, character_tokenizer, split_text
from espalier.stages.data.token_table import build_token_table
from espalier.stages.errors import Refusal
from espalier.stages.masks import thresholds_for_sparsity

TEXT = "First Citizen:\r\nBefore we proceed  any further, hear me speak.\n\n\tÀ tous: 𝛼!\n" * 20


def test_a_character_is_a_token_and_comes_back_as_it_was(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = character_tokenizer(TEXT)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for reader in (tokenizer, loaded):
        ids = reader(TEXT, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(TEXT) and reader.decode(ids) == TEXT
    assert len(tokenizer) == len(set(TEXT)) + 1
    assert tokenizer("F€", add_special_tokens=False)["input_ids"][1] == len(tokenizer) - 1


def test_the_text_is_split_by_characters_with_every_line_break_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT.encode())
    training, evaluation = split_text(tmp_path / "text", 0.1)
    assert training + evaluation == TEXT
    assert len(training) == int(0.9 * len(TEXT))


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"], ids=["missing", "empty", "not UTF-8"])
def test_data_that_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "poem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Refusal, match="poem"):
        split_text(file, 0.1)


def test_windows_slide_over_the_whole_text(tmp_path: Path) -> None:
    ids = list(range(40))
    table = build_token_table(
        [ids], None, length=8, samples=None, seed=0, path=tmp_path / "t.arrow", vocab_size=40
    )  # five windows, one behind the other
    windows = SlidingWindows(str(table.path), 8)
    assert len(windows) == 33
    batch = windows.batch([0, 3, 32])
    assert [row[0] for row in batch["input_ids"].tolist()] == [0, 3, 32]
    assert batch["input_ids"][1].tolist() == ids[3:11] and batch["labels"].dtype == torch.int64


def test_rates_land_where_the_sorted_scores_say() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [scale * torch.randn(60, 80, generator=generator).abs() ** power for scale, power in ((3, 1), (1e-4, 2))]
    shares = [0.0, 0.2, 0.6, 0.94, 0.999]
    rates = thresholds_for_sparsity(iter(matrices), shares)
    assert rates[0] == 0 and rates == sorted(rates)
    everything = torch.cat([(matrix / matrix.std(correction=0)).flatten() for matrix in matrices]).numpy()
    for share, rate in zip(shares[1:], rates[1:], strict=True):
        assert rate == pytest.approx(np.quantile(everything, share, method="inverted_cdf"), rel=1e-3)
        removed = sum(int((matrix <= rate * matrix.std(correction=0)).sum()) for matrix in matrices) / everything.size
        assert share <= removed < share + 2e-3


def test_rates_of_scores_that_are_all_alike_take_all_or_nothing() -> None:
    assert thresholds_for_sparsity([torch.zeros(4, 4)], [0.0, 0.5])[0] == 0
    with pytest.raises(ValueError, match="no scores"):
        thresholds_for_sparsity([], [0.5])
