"""A shard by itself: what it refuses, what it leaves as it was, what it frees, and the perplexity it measures."""

import math
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import BATCH, GENTLE, begin, make_shards, microbatches, prune, same_bits, stream, whole_model, worked

from espalier.stages.errors import OutOfStep, Refusal
from espalier.stages.metrics.perplexity import Measures
from espalier.stages.metrics.profile import Timeline
from espalier.stages.recipe import BlockTask, Recipe, derived_seed
from espalier.stages.shard.block_pruner import BlockPruner
from espalier.stages.shard.hidden_states import Pass
from espalier.stages.shard.shard import Shard
from espalier.stages.shard.spec import ShardSpec, block_file, sweep_directory
from espalier.stages.storage.files import file_digest
from espalier.stages.storage.hf_checkpoint import write_tensors

LENGTH = 16


@pytest.fixture
def shard(tiny_checkpoint, tmp_path) -> Shard:
    return make_shards(
        tiny_checkpoint("llama", blocks=3), tmp_path, 1, LENGTH, blocks=3, recipe=Recipe(learning_rate=GENTLE)
    )[0]


def test_a_microbatch_out_of_order_is_out_of_step(shard, tiny_tokens) -> None:
    hidden = shard.embed(tiny_tokens(BATCH, LENGTH))
    shard.begin(Pass(microbatches=3))
    shard.forward(0, hidden)
    with pytest.raises(OutOfStep, match="expected microbatch 1, got 2"):
        shard.forward(2, hidden)
    with pytest.raises(OutOfStep, match="expected microbatch 1, got 0"):
        shard.forward(0, hidden)
    shard.forward(1, hidden)  # the one it waits for is still welcome


def test_block_by_block_out_of_step(tiny_checkpoint, tiny_tokens, tmp_path) -> None:
    shard = make_shards(tiny_checkpoint("llama", blocks=3), tmp_path, 1, LENGTH, blocks=3, resident="one")[0]
    hidden = shard.embed(tiny_tokens(BATCH, LENGTH))
    shard.begin(Pass(microbatches=2))
    shard.receive(0, hidden)
    with pytest.raises(OutOfStep, match="holds 1 of 2"):
        shard.advance()
    with pytest.raises(OutOfStep, match="not advanced"):
        shard.emit(0)


@pytest.mark.parametrize("keeps", [None, 0])
def test_a_call_that_comes_twice_does_not_pass_for_the_next(tiny_checkpoint, tiny_tokens, tmp_path, keeps) -> None:
    """Ray may repeat one whose answer was lost."""
    shard = make_shards(
        tiny_checkpoint("llama", blocks=3),
        tmp_path,
        1,
        LENGTH,
        blocks=3,
        recipe=Recipe(inputs="pruned"),
        resident="one",
    )[0]
    hidden = shard.embed(tiny_tokens(BATCH, LENGTH))
    shard.begin(Pass(microbatches=2, keeps=keeps))
    shard.receive(0, hidden)
    shard.receive(1, hidden)
    shard.advance()
    with pytest.raises(OutOfStep, match="holds the inputs of block 2, not of block 0"):
        shard.advance()
    shard.emit(0)
    with pytest.raises(OutOfStep, match="was to emit microbatch 1, not 0"):
        shard.emit(0)
    shard.emit(1)


def test_finished_blocks_are_passed_once(tiny_checkpoint, tiny_tokens, tmp_path) -> None:
    recipe = Recipe(inputs="pruned", reconstruct="none")
    shard = make_shards(tiny_checkpoint("llama", blocks=3), tmp_path, 1, LENGTH, blocks=3, recipe=recipe)[0]
    for again in (False, True):
        begin([shard], tokens := tiny_tokens(BATCH, LENGTH), keeps=0, onward=False)
        shard.receive(0, shard.embed(tokens))
        if again:
            shard.pass_on((0,), 0)
            with pytest.raises(OutOfStep, match="holds the inputs of block 1, not of block 0"):
                shard.pass_on((0,), 0)
        else:
            shard.work(BlockTask(blocks=(0,)))
            shard.committed(BlockTask(blocks=(0,)))


def test_what_a_killed_process_left_of_a_block_goes_when_its_replacement_opens(tiny_checkpoint, tmp_path) -> None:
    spec = make_shards(tiny_checkpoint("llama"), tmp_path, 2, LENGTH, recipe=Recipe(sweeps=1))[0].spec
    result = tmp_path / "output"
    (between := sweep_directory(result, 0, 1)).mkdir(parents=True)
    mine, others = spec.last - 1, spec.last
    left = [folder / f".{block_file(block)}.77.tmp" for folder in (result, between) for block in (mine, others)]
    for path in left:
        path.write_bytes(b"half of it")
    Shard(spec).open()
    assert [path.exists() for path in left] == [False, True, False, True]


def test_work_before_the_stream_is_out_of_step(shard, tiny_tokens) -> None:
    with pytest.raises(OutOfStep, match="shard 0 holds no inputs of its blocks"):
        shard.work(BlockTask(blocks=(1,)))
    shard.begin(Pass(microbatches=2, keeps=0))
    shard.forward(0, shard.embed(tiny_tokens(BATCH, LENGTH)))
    assert shard.ready is None  # the pass has not ended
    with pytest.raises(OutOfStep, match="shard 0 holds 1 of 2 inputs of block 0"):
        shard.work(BlockTask(blocks=(1,)))
    shard.forward(1, shard.embed(tiny_tokens(BATCH, LENGTH, seed=1)))
    assert shard.ready == (0, 0)
    with pytest.raises(OutOfStep, match="for sweep 0, not those of block 1 for sweep 1"):
        shard.work(BlockTask(blocks=(1,), sweep=1))
    shard.work(BlockTask(blocks=(1,)))
    assert shard.ready == (0, 2)
    with pytest.raises(OutOfStep, match="holds the inputs of block 2 for sweep 0, not those of block 1"):
        shard.work(BlockTask(blocks=(1,)))


def test_a_broken_off_pass_is_forgotten_when_the_next_begins(shard, tiny_tokens, tiny_checkpoint, tmp_path) -> None:
    tokens = tiny_tokens(8, LENGTH)
    shard.begin(Pass(microbatches=4, keeps=0))
    shard.forward(0, shard.embed(tokens[:2]))  # and then the driver died
    prune([shard], tokens)
    other = make_shards(
        tiny_checkpoint("llama", blocks=3), tmp_path / "b", 1, LENGTH, blocks=3, recipe=Recipe(learning_rate=GENTLE)
    )[0]
    prune([other], tokens)
    for index in range(3):
        ours, theirs = (tmp_path / part / block_file(index) for part in ("output", "b/output"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_work_leaves_the_dense_blocks_as_they_were(shard, tiny_tokens) -> None:
    tokens = tiny_tokens(8, LENGTH)
    before = stream([shard], tokens)
    prune([shard], tokens)
    after = stream([shard], tokens)
    assert all(same_bits(left, right) for left, right in zip(before, after, strict=True))


def test_opened_pruned_it_streams_the_finished_files(shard, tiny_tokens, tiny_checkpoint, tmp_path) -> None:
    tokens = tiny_tokens(8, LENGTH)
    dense = stream([shard], tokens)
    prune([shard], tokens)
    shard.open((0,))
    pruned = stream([shard], tokens)
    assert not torch.equal(dense[0], pruned[0])
    # The same, as a whole checkpoint of the finished files, by transformers.
    source = tiny_checkpoint("llama", blocks=3)
    tensors = load_file(source / "model.safetensors")
    for index in range(3):
        tensors |= load_file(tmp_path / "output" / block_file(index))
    (tmp_path / "whole").mkdir()
    save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "whole" / "config.json").write_text((source / "config.json").read_text())
    whole = whole_model(tmp_path / "whole", torch.float32)
    assert all(
        same_bits(shard.logits(hidden), whole(part)) for hidden, part in zip(pruned, microbatches(tokens), strict=True)
    )
    shard.open()
    assert same_bits(stream([shard], tokens)[0], dense[0])  # and back


@pytest.mark.parametrize("spool_memory", [0, 10_000, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_work_frees_every_spool(tiny_checkpoint, tiny_tokens, tmp_path, spool_memory) -> None:
    model = tiny_checkpoint("llama", blocks=3)
    shard = make_shards(
        model,
        tmp_path,
        1,
        LENGTH,
        blocks=3,
        recipe=Recipe(learning_rate=GENTLE),
        spool_memory=spool_memory,
        resident="one",
    )[0]
    stream([shard], tiny_tokens(8, LENGTH), 0)
    files = list((tmp_path / "scratch").rglob("*.arrow"))
    assert bool(files) == (spool_memory < 1 << 30)
    assert (shard.budget.used > 0) == (spool_memory > 0)
    for index in range(3):
        shard.work(BlockTask(blocks=(index,)))
    assert shard.budget.used == 0
    assert 0 <= shard.budget.peak <= spool_memory
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perplexity_is_that_of_the_whole_model(tiny_checkpoint, tiny_tokens, tmp_path, dtype, monkeypatch) -> None:
    monkeypatch.setattr(
        "espalier.stages.metrics.perplexity.HEAD_POSITIONS", 5
    )  # so that 15 predictions are cut into three pieces
    directory, tokens = tiny_checkpoint("qwen3", dtype, tied=True), tiny_tokens(6, LENGTH)
    shards = make_shards(directory, tmp_path, 2, LENGTH)
    outputs = zip(stream(shards, tokens), microbatches(tokens), strict=True)
    measures = sum((shards[-1].measure(hidden, part) for hidden, part in outputs), Measures())
    assert measures.tokens == 6 * (LENGTH - 1) and measures.kl is None
    whole, plain = whole_model(directory, getattr(torch, dtype)), 0.0
    for part in microbatches(tokens):
        log_p = whole(part).double().log_softmax(-1)
        plain -= sum(
            float(log_p[sample, place - 1, int(part[sample, place])])
            for sample in range(len(part))
            for place in range(1, LENGTH)
        )
    assert measures.perplexity == pytest.approx(math.exp(plain / measures.tokens), rel=1e-6)


def test_the_report_counts_what_is_in_the_file(shard, tiny_tokens, tmp_path) -> None:
    reports = prune([shard], tiny_tokens(8, LENGTH))
    for index, report in enumerate(reports):
        tensors = load_file(tmp_path / "output" / report["file"])
        zeros = {
            name: int((tensors[f"model.layers.{index}.{name}.weight"] == 0).sum())
            for name in ("self_attn.q_proj", "mlp.down_proj")
        }
        assert {name: report["layers"][name]["zeros"] for name in zeros} == zeros
        assert len(report["layers"]) == 7
        assert report["sparsity"] == 0.5
        assert (report["block"], report["tokens"]) == (index, 8 * LENGTH)
        assert [unit["name"] for unit in report["units"]] == ["self_attn", "mlp"]


def test_every_tensor_outside_the_blocks_is_copied_once(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "espalier.stages.loading.ends.ENDS_FILE_BYTES", 10_000
    )  # less than the embedding: several files
    directory = tiny_checkpoint("llama", "bfloat16", sharded=True)
    shard = make_shards(directory, tmp_path, 1, LENGTH)[0]
    files = shard.copy_ends()
    copied = {name: tensor for file in files for name, tensor in load_file(tmp_path / "output" / file).items()}
    assert sorted(name for names in files.values() for name in names) == sorted(copied)
    assert sorted(copied) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert len(files) > 1
    dense = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert all(same_bits(tensor, dense[name]) for name, tensor in copied.items())


def test_nan_in_calibration_names_block_layer_and_sample(shard, tiny_tokens) -> None:
    hidden = shard.embed(tiny_tokens(BATCH, LENGTH))
    broken = hidden.clone()
    broken[1, 3, 7] = math.nan
    shard.begin(Pass(microbatches=2, keeps=0, onward=False))
    shard.forward(0, hidden)
    shard.forward(1, broken)
    with pytest.raises(Refusal, match=r"block 0, self_attn.q_proj: sample 3: NaN or infinity"):
        shard.work(BlockTask(blocks=(0,)))


def test_a_config_that_does_not_match_the_weights_is_refused(tiny_checkpoint, tmp_path) -> None:
    source = tiny_checkpoint("llama", blocks=3)
    for number, (change, message) in enumerate(
        [
            (('"intermediate_size": 48', '"intermediate_size": 40'), r"model\.layers\.0\.mlp\.\w+\.weight.*config"),
            (('"vocab_size": 128', '"vocab_size": 120'), r"(embed_tokens|lm_head)\.weight.*config"),
            (('"num_hidden_layers": 3', '"num_hidden_layers": 5'), r"no tensor model\.layers\.3\..*config"),
        ]
    ):
        model = tmp_path / str(number)
        model.mkdir()
        text = (source / "config.json").read_text()
        assert change[0] in text
        (model / "config.json").write_text(text.replace(*change))
        (model / "model.safetensors").symlink_to(source / "model.safetensors")
        with pytest.raises(Refusal, match=message):
            make_shards(model, tmp_path, 1, LENGTH, blocks=5 if "hidden_layers" in change[0] else 3)


def test_seeds_differ_by_run_block_component_and_sweep() -> None:
    assert derived_seed(0, 1, "mlp", 0) == derived_seed(0, 1, "mlp", 0)
    parts = [(run, block, unit, sweep) for run in (0, 1) for block in (0, 1, 11) for unit in "ab" for sweep in (0, 1)]
    seeds = {derived_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_only_what_a_shard_owns_is_loaded(tiny_checkpoint, tmp_path) -> None:
    directory = tiny_checkpoint("llama", tied=False)
    middle = Shard(
        ShardSpec(
            index=1,
            first=1,
            last=3,
            embeds=False,
            heads=False,
            model=str(directory),
            output=str(tmp_path),
            scratch=str(tmp_path),
            length=LENGTH,
        )
    )
    middle.open()
    held = sum(p.numel() for block in middle.blocks.held.values() for p in block.parameters())
    whole = sum(entry.elements for entry in middle.checkpoint.entries.values() if ".layers." in entry.name)
    assert held == whole // 2
    for name, parameter in middle.skeleton.model.named_parameters():
        assert parameter.untyped_storage().nbytes() <= 8, f"{name} takes memory in a shard without ends"


@pytest.mark.parametrize("resident", ["all", "one"])
def test_a_commit_that_fails_is_told_at_the_next_block_and_when_asked_and_can_be_done_again(
    tiny_checkpoint, tiny_tokens, tmp_path, monkeypatch, resident
) -> None:
    model, tokens = tiny_checkpoint("llama", blocks=3), tiny_tokens(8, LENGTH)
    shard, other = (
        make_shards(
            model, tmp_path / part, 1, LENGTH, blocks=3, recipe=Recipe(learning_rate=GENTLE), resident=resident
        )[0]
        for part in ("failed", "fine")
    )
    stream([shard], tokens, 0)

    def full(path, tensors) -> str:
        raise Refusal(f"{path}: disk full")

    with monkeypatch.context() as patched:
        patched.setattr("espalier.stages.shard.commit.write_tensors", full)
        shard.work(BlockTask(blocks=(1,)))
        with pytest.raises(Refusal, match=r"block-00001.*disk full"):
            shard.work(BlockTask(blocks=(2,)))
        with pytest.raises(Refusal, match=r"block-00001.*disk full"):
            shard.committed(BlockTask(blocks=(1,)))
    for block in (1, 2):
        with pytest.raises(OutOfStep, match=rf"blocks \({block},\) of sweep 0 are not on their way to disk here"):
            shard.committed(BlockTask(blocks=(block,)))
    assert shard.ready == (0, 3), "what block 1 was worked on with is used up, as after any loss"
    for each in (shard, other):
        stream([each], tokens, 0)
    (report,), (expected,) = (worked(each, BlockTask(blocks=(1,))) for each in (shard, other))
    assert report["digest"] == expected["digest"]


def test_one_block_is_written_while_the_next_is_worked_on_and_the_one_after_waits(
    tiny_checkpoint, tiny_tokens, tmp_path, monkeypatch
) -> None:
    shard = make_shards(
        tiny_checkpoint("llama", blocks=3), tmp_path, 1, LENGTH, blocks=3, recipe=Recipe(reconstruct="none")
    )[0]
    stream([shard], tiny_tokens(8, LENGTH), 0)
    disk, writing = threading.Semaphore(0), threading.Semaphore(0)  # room for one more block; a block that waits for it

    def slow(path, tensors) -> str:
        writing.release()
        assert disk.acquire(timeout=60)
        return write_tensors(path, tensors)

    monkeypatch.setattr("espalier.stages.shard.commit.write_tensors", slow)
    shard.work(BlockTask(blocks=(0,)))
    assert writing.acquire(timeout=60)
    assert not (tmp_path / "output" / block_file(0)).exists(), "it is worked on and not yet written"
    following = threading.Thread(target=shard.work, args=(BlockTask(blocks=(1,)),))
    following.start()
    following.join(timeout=0.5)
    assert following.is_alive(), "block 1 is not handed over before block 0 is on disk"
    assert [(phase.phase, phase.block) for phase in shard.timeline.export()][-1] == ("mask", 1)
    disk.release(2)
    following.join(timeout=60)
    (first,), (second,) = (shard.committed(BlockTask(blocks=(block,))) for block in (0, 1))
    assert [report["file"] for report in (first, second)] == [block_file(0), block_file(1)]
    for report in (first, second):
        assert file_digest(tmp_path / "output" / report["file"]) == report["digest"]


def test_the_timeline_joins_stretches_of_one_phase(monkeypatch) -> None:
    clock = iter([0.0, 1.0, 1.2, 2.0, 5.0, 6.0, 6.1, 7.0])
    monkeypatch.setattr("espalier.stages.metrics.profile.time.time", lambda: next(clock))
    timeline = Timeline()
    for name in ("stream", "stream", "stream", "mask"):
        with timeline.phase(name):
            pass
    assert [(phase.phase, phase.start, phase.end) for phase in timeline.export()] == [
        ("stream", 0.0, 2.0),
        ("stream", 5.0, 6.0),  # after a pause
        ("mask", 6.1, 7.0),
    ]


def test_the_next_block_is_read_while_one_is_at_work(tiny_checkpoint, tiny_tokens, tmp_path, monkeypatch) -> None:
    recipe = Recipe(learning_rate=GENTLE)
    (shard,) = make_shards(
        tiny_checkpoint("llama", blocks=4), tmp_path, 1, LENGTH, blocks=4, recipe=recipe, resident="one"
    )
    read, load, run = {index: threading.Event() for index in range(4)}, shard.skeleton.load_block, BlockPruner.run
    at_most = []

    def loading(index, checkpoint) -> torch.nn.Module:
        block = load(index, checkpoint)
        read[index].set()
        return block

    def working(work) -> None:
        (index,) = work.order.blocks
        assert index == 3 or read[index + 1].wait(60)
        at_most.append(sum(event.is_set() for event in read.values()) - index - 1)
        run(work)

    monkeypatch.setattr(shard.skeleton, "load_block", loading)
    monkeypatch.setattr(BlockPruner, "run", working)
    stream([shard], tiny_tokens(8, LENGTH), 0)
    for event in read.values():
        event.clear()
    for index in range(4):
        shard.work(BlockTask(blocks=(index,)))
    assert at_most == [1, 1, 1, 0], "and no more than the next"
    ahead = [phase.block for phase in shard.timeline.export() if phase.phase == "read"]
    assert ahead[-3:] == [1, 2, 3]
