import pytest
import torch

from torchtune_fused.generation.sampling import Sampler

VOCAB = 50


@pytest.fixture
def logits():
    return torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def test_greedy_takes_the_largest_logit(logits):
    assert Sampler(temperature=0.0, seed=1)(logits).equal(logits.argmax(-1))
    assert Sampler(temperature=1.0, top_k=1, seed=1)(logits).equal(logits.argmax(-1))


def test_a_temperature_near_zero_is_greedy_and_not_nan(logits):
    assert Sampler(temperature=1e-38, seed=1)(logits * 1e4).equal(logits.argmax(-1))


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.9}])
def test_tokens_come_with_their_probabilities(transformers_filter, options):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    temperature = 0.8
    exact = transformers_filter(logits, temperature, **options).softmax(-1)[0]
    draws = 40_000
    sampler = Sampler(temperature=temperature, seed=0, **options)
    counts = sampler(logits.expand(draws, -1)).bincount(minlength=12)
    assert counts[exact == 0].sum() == 0
    expected = exact[exact > 0] * draws
    chi_square = ((counts[exact > 0] - expected) ** 2 / expected).sum()
    # With 11 degrees of freedom or fewer, chance exceeds 31.3 less than once in a thousand times.
    assert chi_square < 31.3


def test_the_same_seed_draws_the_same_tokens(logits):
    def draw(seed):
        sampler = Sampler(temperature=1.0, seed=seed)
        return torch.stack([sampler(logits) for _ in range(20)])

    assert draw(5).equal(draw(5))
    assert not draw(5).equal(draw(6))


def test_any_integer_is_a_seed(logits):
    seeds = [-(2**63), -1, 0, 2**63, 2**64 - 1, 2**70]
    assert all(Sampler(temperature=1.0, seed=seed)(logits).max() < VOCAB for seed in seeds)


def test_a_seed_neither_follows_nor_moves_the_default_generator(logits):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = Sampler(temperature=1.0, seed=5)(logits)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    assert Sampler(temperature=1.0, seed=5)(logits).equal(first)


def test_without_a_seed_the_default_generator_decides(logits):
    def draw(seed):
        torch.manual_seed(seed)
        sampler = Sampler(temperature=1.0)
        return torch.stack([sampler(logits) for _ in range(20)])

    assert draw(5).equal(draw(5))
    assert not draw(5).equal(draw(6))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": None},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_p": "half"},
        {"seed": "lucky"},
        {"seed": 1.5},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        Sampler(**options)
