"""How far predictions are apart: against float64 arithmetic and whole models, and what is kept between two passes."""

import pytest
import torch
from streaming import make_shards, microbatches, same_bits, stream, whole_model

from espalier.stages.errors import OutOfStep
from espalier.stages.metrics.perplexity import COMPARED_POSITIONS, Measures, compare, measure
from espalier.stages.shard.hidden_states import KeptStates

POSITIONS, VOCABULARY = 2 * COMPARED_POSITIONS + 3, 50  # more than one piece, the last one short


def logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_is_that_of_float64(dtype: torch.dtype) -> None:
    dense, other = logits(0, dtype), logits(0, dtype) + 0.01 * logits(1, dtype)
    divergence, agreeing = compare(dense, other)
    log_p, log_q = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    plain = float((log_p.exp() * (log_p - log_q)).sum())
    assert plain > 0 and divergence == pytest.approx(plain, rel=1e-4)
    assert agreeing == sum(int(p.argmax() == q.argmax()) for p, q in zip(dense, other, strict=True))


def test_of_equal_predictions_it_is_exactly_zero_and_of_far_ones_large_and_finite() -> None:
    assert compare(logits(0), logits(0)) == (0.0, POSITIONS)
    far = torch.zeros(POSITIONS, VOCABULARY)
    far[:, 0] = 1e4  # all but one token with a probability that float32 cannot hold
    divergence, agreeing = compare(logits(0), far)
    assert 1e3 * POSITIONS < divergence < 1e4 * POSITIONS
    assert agreeing == int((logits(0).argmax(-1) == 0).sum())


def test_divergence_has_a_direction() -> None:
    assert compare(logits(0), logits(1))[0] != pytest.approx(compare(logits(1), logits(0))[0], rel=1e-3)


def test_each_head_turns_its_own_states_into_logits_and_the_last_position_predicts_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (2, 9), generator=generator)
    ours, theirs = (torch.randn(2, 9, width, generator=generator) for width in (4, 6))
    our_head, their_head = (torch.randn(width, VOCABULARY, generator=generator) for width in (4, 6))
    measures = measure(lambda hidden: hidden @ our_head, ours, tokens, (lambda hidden: hidden @ their_head, theirs))
    q, p = (ours @ our_head).double().log_softmax(-1)[:, :-1], (theirs @ their_head).double().log_softmax(-1)[:, :-1]
    assert measures.tokens == measures.compared == 2 * 8
    assert measures.kl == pytest.approx(float((p.exp() * (p - q)).sum()) / 16, rel=1e-5)
    assert measures.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert measures.nats == pytest.approx(-float(q.gather(-1, tokens[:, 1:, None]).sum()), rel=1e-6)


def test_a_shard_compares_with_a_model_that_has_another_head_and_width(tiny_checkpoint, tiny_tokens, tmp_path) -> None:
    ours, theirs = tiny_checkpoint(), tiny_checkpoint("qwen3", tied=True, hidden=64, seed=1)
    tokens = tiny_tokens(6, 16)

    def compared(model, reference) -> Measures:
        for number, hidden in enumerate(stream(dense := make_shards(reference, tmp_path, 2, 16), tokens)):
            dense[-1].kept.put(number, hidden)
        shards = make_shards(model, tmp_path, 2, 16, reference=str(reference))
        outputs = enumerate(zip(stream(shards, tokens), microbatches(tokens), strict=True))
        return sum((shards[-1].measure(h, part, shards[-1].kept.get(n)) for n, (h, part) in outputs), Measures())

    p, q = (whole_model(model, torch.float32)(tokens)[:, :-1].double().log_softmax(-1) for model in (theirs, ours))
    measures = compared(ours, theirs)
    assert measures.compared == measures.tokens == 6 * 15
    assert measures.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert measures.agreeing == int((p.argmax(-1) == q.argmax(-1)).sum())
    itself = compared(theirs, theirs)
    assert (itself.kl, itself.top1_agreement) == (0.0, 1.0)


def test_measures_add_up_and_an_overflow_is_an_infinite_perplexity() -> None:
    assert Measures(2, 3.0, 2, 0.5, 1) + Measures(1, 1.0, 1, 0.25, 1) == Measures(3, 4.0, 3, 0.75, 2)
    assert Measures(1, 1e6).perplexity == float("inf")
    assert Measures(1, 1.0).kl is None and Measures(1, 1.0).top1_agreement is None


def test_kept_states_come_back_bit_for_bit_and_lost_ones_are_out_of_step(tmp_path) -> None:
    kept = KeptStates(tmp_path / "states")
    states = [torch.randn(2, 5, 4).bfloat16() for _ in range(3)]
    for number, hidden in enumerate(states):
        kept.put(number, hidden)
    kept.put(1, states[1])  # asked again after a restart
    again = KeptStates(tmp_path / "states")  # another process
    assert again.holds(3) and not again.holds(4)
    assert all(same_bits(again.get(number), hidden) for number, hidden in enumerate(states))
    with pytest.raises(OutOfStep, match="microbatch 3"):
        again.get(3)
    again.clear()
    assert not again.holds(1) and not (tmp_path / "states").exists()
