import pytest
import torch

from torchtune_fused.ops.decode_sample import _gumbel, decode_sample


def state(seed, offset=0):
    return torch.tensor([seed, offset], device="cuda")


@pytest.mark.parametrize("rows, vocab", [(1, 1), (1, 128256), (3, 50257), (16, 1001)])
def test_greedy_is_the_first_of_the_largest(rows, vocab):
    logits = torch.randn(rows, vocab, device="cuda").round(decimals=1)  # with ties
    tokens = decode_sample(logits, state(1), temperature=0.0)
    largest = logits.amax(-1, keepdim=True)
    assert torch.equal(tokens, (logits == largest).int().argmax(-1))


def test_greedy_finds_nan_and_negative_infinity():
    logits = torch.full((2, 3000), -torch.inf, device="cuda")
    logits[0, 2999] = -1e30
    logits[1, 1234] = torch.nan
    assert decode_sample(logits, state(1), temperature=0.0).tolist() == [2999, 1234]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_noise_is_that_of_the_reference(temperature):
    logits, rng = 3 * torch.randn(5, 32003, device="cuda"), state(-7, 2**40 + 3)
    scores = logits / temperature + _gumbel(rng, *logits.shape)
    tokens = decode_sample(logits, rng, temperature=temperature)
    # The logarithms of two libraries differ in the last bit, which may swap equals.
    assert (scores.gather(1, tokens[:, None])[:, 0] >= scores.amax(-1) - 1e-4).all()
    assert rng.tolist() == [-7, 2**40 + 4]


def test_frequencies_are_the_probabilities():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], device="cuda")
    rows = 60000
    tokens = decode_sample(probabilities.log().expand(rows, -1), state(5))
    counts = torch.bincount(tokens, minlength=5)
    assert counts[4] == 0
    expected = rows * probabilities[:4]
    # Chi squared with three degrees of freedom: above 21.1 once in 10,000 times.
    assert ((counts[:4] - expected).square() / expected).sum() < 21.1


def test_a_captured_draw_is_new_at_each_replay_and_repeats_from_the_same_state():
    logits, rng = torch.zeros(4, 5000, device="cuda"), state(3)
    eager = [decode_sample(logits, rng).tolist() for _ in range(5)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = decode_sample(logits, rng)
    for _ in range(2):
        rng.copy_(state(3))
        captured = []
        for _ in range(5):
            graph.replay()
            captured.append(tokens.tolist())
        assert captured == eager
    assert len({tuple(draw) for draw in eager}) == 5
