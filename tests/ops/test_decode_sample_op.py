import pytest
import torch

from torchtune_fused.ops import decode_sample
from torchtune_fused.ops.decode_sample import _gumbel, _gumbel_from, _philox, filter_logits

VOCAB = 50


@pytest.fixture
def logits():
    return torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def state(seed=11, offset=0):
    return torch.tensor([seed, offset])


FILTERS = [(1, None), (7, None), (None, 0.5), (None, 1e-6), (7, 0.8), (VOCAB, 1.0)]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_filters_are_those_of_transformers(transformers_filter, logits, temperature, top_k, top_p):
    ours = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
    theirs = transformers_filter(logits, temperature, top_k, top_p)
    # Both only decide what to discard, so what is left is equal bit for bit.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_the_best_of_what_transformers_keeps_is_drawn(transformers_filter, logits, top_k, top_p):
    rng = state()
    for _ in range(20):
        scores = transformers_filter(logits, 0.7, top_k, top_p) + _gumbel(rng, *logits.shape)
        tokens = decode_sample(logits, rng, temperature=0.7, top_k=top_k, top_p=top_p)
        assert torch.equal(tokens, scores.argmax(-1))


def test_top_k_keeps_ties_and_more_than_the_vocabulary_keeps_all():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = filter_logits(logits, top_k=2)
    assert kept.isfinite().tolist() == [[False, True, True, True, False]]
    assert filter_logits(logits, top_k=99).equal(logits)


def test_top_p_keeps_the_first_of_equals():
    kept = filter_logits(torch.zeros(1, 8), top_p=0.3)
    assert kept.isfinite().tolist() == [[True] * 3 + [False] * 5]


def test_philox_gives_the_known_answers_of_its_authors():
    ones, zeros = torch.tensor(0xFFFFFFFF), torch.tensor(0)
    known = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert [int(word) for word in _philox([ones] * 4, [ones] * 2)] == known
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(word) for word in _philox([zeros] * 4, [zeros] * 2)] == known


def test_noise_is_finite_at_its_ends_and_follows_its_distribution():
    assert _gumbel_from(torch.tensor([0, 2**32 - 1])).isfinite().all()
    noise = _gumbel(state(), 4, 250_000).flatten().double()
    for level in (-1.0, 0.0, 1.0, 5.0, 9.0):
        above = -torch.expm1(-torch.exp(torch.tensor(-level, dtype=torch.float64)))
        # Five standard deviations of a count of independent draws.
        allowed = 5 * (above * (1 - above) * len(noise)).sqrt()
        assert ((noise > level).sum() - above * len(noise)).abs() < allowed


def test_each_draw_is_new_and_a_state_repeats():
    logits, rng = torch.zeros(2, 1000), state()
    first, second = decode_sample(logits, rng), decode_sample(logits, rng)
    assert rng.tolist() == [11, 2] and not torch.equal(first, second)
    assert torch.equal(decode_sample(logits, state()), first)


def test_temperature_zero_is_greedy_and_draws_nothing():
    logits, rng = torch.zeros(2, 1000), state()
    logits[:, 77] = 1
    assert decode_sample(logits, rng, temperature=0.0, top_k=3).tolist() == [77, 77]
    assert rng.tolist() == [11, 0]


@pytest.mark.parametrize("filters", [(), (5,), (5, 0.9)])
def test_it_is_a_well_formed_op(logits, filters):
    arguments = (logits, state(), 0.7, *filters)
    torch.library.opcheck(torch.ops.torchtune_fused.decode_sample.default, arguments)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "must be float32"),
        ({"logits": torch.zeros(3)}, ValueError, r"shape \[b, vocab\]"),
        ({"rng_state": torch.zeros(3, dtype=torch.int64)}, ValueError, "rng_state must have shape"),
        ({"temperature": -1.0}, ValueError, "temperature must be"),
        ({"top_k": 0}, ValueError, "top_k must be"),
        ({"top_p": 0.0}, ValueError, "top_p must be"),
        ({"top_p": 1.5}, ValueError, "top_p must be"),
    ],
)
def test_bad_input_is_named(changed, error, match):
    arguments = {"logits": torch.zeros(2, 3), "rng_state": state()} | changed
    with pytest.raises(error, match=match):
        decode_sample(arguments.pop("logits"), arguments.pop("rng_state"), **arguments)
