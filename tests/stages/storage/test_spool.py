"""Spools: the bits come back, from memory and from disk; the budget holds; nothing stays behind."""

import errno
import math
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import same_bits

from espalier.stages.errors import Refusal
from espalier.stages.storage.spool import Spool, SpoolBudget

LENGTH, CHANNELS = 5, 7


def samples(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits of the dtype: NaNs with payloads, denormals and negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count, LENGTH, CHANNELS * dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fits", [0, 3, 100], ids=["disk", "mixed", "memory"])
def test_bits_come_back_in_any_order(tmp_path, dtype, fits) -> None:
    data = samples(8, dtype)
    spool = Spool(tmp_path / "s.arrow", SpoolBudget(fits * data[0].nbytes))
    for part in data.split(3):
        spool.append(part)
    assert len(spool) == 8
    assert (tmp_path / "s.arrow").exists() == (fits < 8)
    assert spool.disk_bytes == max(8 - fits, 0) * data[0].nbytes
    for index in [7, 0, 3, 3, 2, 6, 1, 5, 4]:
        assert same_bits(spool[index], data[index])
    assert same_bits(spool.batch([6, 0, 3]), data[[6, 0, 3]])
    spool.close()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 12), st.data())
def test_bits_come_back_however_they_were_appended(tmp_path_factory, counts, fits, data) -> None:
    everything = samples(sum(counts), torch.bfloat16, seed=len(counts))
    spool = Spool(tmp_path_factory.mktemp("spool") / "s.arrow", SpoolBudget(fits * everything[0].nbytes))
    for part in everything.split(counts):
        spool.append(part)
    order = data.draw(st.permutations(range(len(everything))))
    assert same_bits(spool.batch(order), everything[order])
    spool.close()


@pytest.mark.parametrize("fits", [0, 2, 100], ids=["disk", "mixed", "memory"])
def test_samples_may_differ_in_length(tmp_path, fits) -> None:
    data = samples(1, torch.float32)[0]
    lengths = [3, 3, 5, 1]
    spool = Spool(tmp_path / "s.arrow", SpoolBudget(fits * 3 * CHANNELS * 4))
    for length in lengths:
        spool.append(data[None, :length])
    assert spool.ragged
    for index, length in enumerate(lengths):
        assert same_bits(spool[index], data[:length])
    assert same_bits(spool.batch([0, 1]), torch.stack([data[:3], data[:3]]))
    assert same_bits(spool.batch([3, 2]), torch.cat([data[:1], data[:5]])[None])
    assert spool.disk_bytes == {0: 12, 2: 6, 100: 0}[fits] * CHANNELS * 4
    spool.close()


def test_what_was_appended_may_be_overwritten_afterwards(tmp_path) -> None:
    data = samples(4, torch.float32)
    kept, spool = data.clone(), Spool(tmp_path / "s.arrow", SpoolBudget(2 * data[0].nbytes))
    spool.append(data)
    data.zero_()
    assert same_bits(spool.batch([0, 1, 2, 3]), kept)
    spool.close()


def test_views_are_kept_without_what_they_view(tmp_path) -> None:
    wide = torch.randn(2, 1000, LENGTH, CHANNELS)
    spool = Spool(tmp_path / "s.arrow", SpoolBudget(1 << 20))
    spool.append(wide[:, 500])
    assert spool[1].untyped_storage().nbytes() == LENGTH * CHANNELS * 4
    spool.append(wide[:, 500].transpose(1, 2).contiguous().transpose(1, 2))
    assert same_bits(spool[3], wide[1, 500])


@pytest.mark.parametrize("read_first", [False, True])
def test_close_removes_the_file_and_frees_the_budget(tmp_path, read_first) -> None:
    data = samples(5, torch.float32)
    budget = SpoolBudget(2 * data[0].nbytes)
    spool = Spool(tmp_path / "deep" / "s.arrow", budget)
    spool.append(data)
    assert budget.used == budget.peak == 2 * data[0].nbytes
    if read_first:
        spool.batch([0, 4])
    spool.close()
    assert budget.used == 0
    assert list((tmp_path / "deep").iterdir()) == []
    assert (len(spool), spool.disk_bytes) == (0, 0)
    spool.close()  # twice does no harm
    assert budget.used == 0


def test_spools_share_one_budget(tmp_path) -> None:
    data = samples(4, torch.float32)
    budget = SpoolBudget(math.floor(4.5 * data[0].nbytes))
    first, second = Spool(tmp_path / "1.arrow", budget), Spool(tmp_path / "2.arrow", budget)
    first.append(data)
    second.append(data)  # no more than none of it fits
    assert (first.disk_bytes, second.disk_bytes) == (0, 4 * data[0].nbytes)
    assert budget.peak <= budget.limit
    first.close()
    third = Spool(tmp_path / "3.arrow", budget)
    third.append(data)  # in what the first gave back
    assert third.disk_bytes == 0
    third.close()
    second.append(data[:2])  # room again, but what follows a sample on disk is on disk, or the order would be lost
    assert second.disk_bytes == 6 * data[0].nbytes
    assert same_bits(second.batch([3, 0, 5, 4]), data[[3, 0, 1, 0]])


def test_work_in_the_same_memory_is_left_its_part(tmp_path) -> None:
    data = samples(2, torch.float32)
    budget = SpoolBudget(3 * data[0].nbytes)
    first, second, third = (Spool(tmp_path / f"{name}.arrow", budget) for name in range(3))
    with budget.leaving(2 * data[0].nbytes):
        first.append(data)
        assert (budget.used, first.disk_bytes) == (data[0].nbytes, data[0].nbytes)
        with budget.leaving(5 * data[0].nbytes):
            second.append(data)
    assert (budget.used, second.disk_bytes) == (data[0].nbytes, 2 * data[0].nbytes)
    third.append(data)
    assert third.disk_bytes == 0


def test_a_full_disk_is_refused_with_the_remedies(tmp_path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "s.arrow").symlink_to("/dev/full")
    spool = Spool(tmp_path / "s.arrow", SpoolBudget(0))
    with pytest.raises(Refusal, match=r"s\.arrow: cannot spool activations .*--scratch .*--spool-memory"):
        spool.append(samples(2, torch.float32))
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_with_the_last_bytes_is_refused(tmp_path, monkeypatch) -> None:
    class Writer:
        def write_batch(self, batch: pa.RecordBatch) -> None:
            pass

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool(tmp_path / "s.arrow", SpoolBudget(0))
    monkeypatch.setattr(pa.ipc, "new_file", lambda *args: Writer())
    spool.append(samples(1, torch.float32))
    with pytest.raises(Refusal, match=r"cannot spool activations \(No space left on device\)"):
        spool[0]


def test_samples_spilled_to_disk_come_back_in_their_places(tmp_path) -> None:
    samples = torch.randn(7, 5, 3).bfloat16()
    budget = SpoolBudget(3 * samples[0].nbytes)
    spool = Spool(tmp_path / "mixed.arrow", budget)
    spool.append(samples)
    assert budget.used == 3 * samples[0].nbytes
    spool.spill()
    assert budget.used == 0 and len(spool) == 7
    assert spool.disk_bytes == samples.nbytes
    assert all(torch.equal(spool[index], samples[index]) for index in (6, 0, 3, 2, 5, 1, 4))
    spool.close()
    assert not (tmp_path / "mixed.arrow").exists()
