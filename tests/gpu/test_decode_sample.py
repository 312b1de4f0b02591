import pytest
import torch

from torchtune_fused.ops.decode_sample import _gumbel, decode_sample


def state(seed, offset=0):
    return torch.tensor([seed, offset], device="cuda")


def mass_before(logits, temperature, top_k):
    """Probability of the tokens ahead of each one, fp64, infinite for those that top-k discards."""
    logits = logits.double()
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    ordered, tokens = logits.sort(descending=True, stable=True)
    probs = (ordered / temperature).softmax(-1)
    before = (probs.cumsum(-1) - probs).masked_fill(ordered == -torch.inf, torch.inf)
    return torch.empty_like(before).scatter_(-1, tokens, before)


def check_draws(logits, temperature=1.0, top_k=None, top_p=None, draws=4):
    """The tokens drawn have the best perturbed scores of those that the filters keep."""
    top = logits.amax(-1, keepdim=True).double()
    before = mass_before(logits, temperature, top_k)
    limit = 1.0 if top_p is None else top_p
    # Masses in fp32 differ from those in fp64 by some roundings.
    slack = 1e-6 if limit < 1 else 0
    surely, possibly = before < limit - slack, before < limit + slack
    if limit == 1:
        surely = possibly = before < torch.inf
    surely = surely | (before == 0) & (logits == top)
    rng = state(9)
    for _ in range(draws):
        noise = _gumbel(rng, *logits.shape)
        scores = (logits.double() - top) / temperature + noise
        tokens = decode_sample(logits, rng, temperature=temperature, top_k=top_k, top_p=top_p)
        row = torch.arange(len(tokens), device="cuda")
        assert possibly[row, tokens].all()
        best = scores.masked_fill(~surely, -torch.inf).amax(-1)
        # Two libraries' logarithms and fp32 scores differ in the last bits, which may swap equals.
        assert (scores[row, tokens] >= best - 1e-4).all()


def random_logits(rows, vocab, kind):
    logits = 3 * torch.randn(rows, vocab, device="cuda")
    if kind == "bf16":  # many ties
        logits = logits.bfloat16().float()
    elif kind == "banned":
        banned = torch.rand(rows, vocab, device="cuda") < 0.9
        banned[:, vocab // 2] = False
        logits = logits.masked_fill(banned, -torch.inf)
    return logits


SHAPES = [(3, 1), (16, 7), (3, 1000), (16, 32000), (1, 128256), (3, 151936)]
FILTERS = [
    *((k, None) for k in (1, 2, 50, 300, 512, 513, 200_000)),
    *((None, p) for p in (1e-6, 0.1, 0.9, 0.999, 1.0)),
    *((k, p) for k in (1, 50, 300, 200_000) for p in (1e-6, 0.9, 0.999)),
]


@pytest.mark.parametrize("rows, vocab", [(1, 1), (1, 128256), (3, 50257), (16, 1001)])
def test_greedy_is_the_first_of_the_largest(rows, vocab):
    logits = torch.randn(rows, vocab, device="cuda").round(decimals=1)  # with ties
    tokens = decode_sample(logits, state(1), temperature=0.0)
    largest = logits.amax(-1, keepdim=True)
    assert torch.equal(tokens, (logits == largest).int().argmax(-1))


def test_greedy_finds_nan_and_negative_infinity_and_equal_zeros():
    logits = torch.full((3, 3000), -torch.inf, device="cuda")
    logits[0, 2999] = -1e30
    logits[1, 1234] = torch.nan
    logits[2, 5], logits[2, 2500] = -0.0, 0.0
    assert decode_sample(logits, state(1), temperature=0.0).tolist() == [2999, 1234, 5]


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 2.5])
def test_the_noise_is_that_of_the_reference(temperature):
    check_draws(torch.randn(5, 32003, device="cuda"), temperature)
    rng = state(-7, 2**40 + 3)
    decode_sample(torch.zeros(1, 5, device="cuda"), rng)
    assert rng.tolist() == [-7, 2**40 + 4]


@pytest.mark.parametrize("kind", ["plain", "bf16", "banned"])
@pytest.mark.parametrize("top_k, top_p", FILTERS)
@pytest.mark.parametrize("rows, vocab", SHAPES)
def test_filters(rows, vocab, top_k, top_p, kind):
    check_draws(random_logits(rows, vocab, kind), 0.8, top_k, top_p)


@pytest.mark.parametrize("top_k, top_p", [(300, None), (None, 0.5), (None, 0.999), (300, 0.5)])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda noise: torch.zeros_like(noise),
        lambda noise: (noise > noise.amax(-1, keepdim=True) - 0.1).float(),  # few above equals
        lambda noise: (noise > 0).float(),
        lambda noise: noise + 1e4,
        lambda noise: noise * 1e-4 - 7,
        lambda noise: noise * 1e4,
        lambda noise: noise.sort(descending=True).values,
        # What is left when all tokens but a range of them are banned.
        lambda noise: torch.nn.functional.pad(noise[:, :6000], (20_000, 74_003), value=-torch.inf),
    ],
    ids=[
        "equal",
        "few above equals",
        "two values",
        "far from zero",
        "narrow",
        "wide",
        "descending",
        "a range",
    ],
)
def test_filters_on_distributions_that_are_hard_to_cut(make, temperature, top_k, top_p):
    check_draws(make(torch.randn(2, 100_003, device="cuda")), temperature, top_k, top_p)


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"top_k": 1}, 1),
        ({"top_k": 50}, 50),
        ({"top_k": 4000}, 4000),
        ({"top_p": 1e-6}, 1),
        ({"top_p": 0.1}, None),
        ({"top_p": 0.9}, None),
        ({"top_k": 300, "top_p": 0.501}, None),
    ],
)
@pytest.mark.parametrize("vocab", [7001, 128256])
def test_the_last_token_kept_may_be_drawn_and_the_next_may_not(vocab, options, kept):
    # The token with the most noise takes the place of the last one kept, then of the next; the
    # logits differ by too little for any other to be drawn while it is kept.
    logits = torch.linspace(0, -1e-3, vocab, device="cuda")[None]
    if kept is None:
        before = mass_before(logits, 1.0, options.get("top_k"))
        kept = int((before < options["top_p"]).sum())
    lucky = int(_gumbel(state(4), 1, vocab).argmax())
    for place, drawn in [(kept - 1, True), (kept, False)]:
        swapped = logits.clone()
        swapped[0, place], swapped[0, lucky] = logits[0, lucky], logits[0, place]
        assert (decode_sample(swapped, state(4), **options).item() == lucky) == drawn


def test_equals_at_the_limit_of_top_p_are_kept_in_order():
    logits = torch.zeros(3, 90_000, device="cuda")
    expected = _gumbel(state(2), 3, 90_000)[:, :30_000].argmax(-1)
    # The smallest p that 30,000 of the 90,000 reach.
    assert torch.equal(decode_sample(logits, state(2), top_p=29_999.5 / 90_000), expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_softmax_give_some_token_and_leave_the_others_alone(value, options):
    logits = torch.randn(3, 5003, device="cuda")
    expected = decode_sample(logits, state(1), **options)
    logits[1, ::2] = value
    logits[2] = value
    tokens = decode_sample(logits, state(1), **options)
    assert tokens[0] == expected[0] and ((tokens >= 0) & (tokens < 5003)).all()


def test_a_temperature_near_zero_is_greedy():
    logits = 1e4 * torch.randn(4, 1000, device="cuda")
    for options in ({}, {"top_k": 9}, {"top_p": 0.9}):
        tokens = decode_sample(logits, state(1), temperature=1e-38, **options)
        assert torch.equal(tokens, logits.argmax(-1))


def test_rows_that_start_off_16_bytes():
    logits = torch.randn(4 * 4000 + 1, device="cuda")[1:].view(4, 4000)
    expected = decode_sample(logits.clone(), state(1), top_k=200, top_p=0.9)
    assert torch.equal(decode_sample(logits, state(1), top_k=200, top_p=0.9), expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.8}])
def test_frequencies_are_the_probabilities(options):
    weights = torch.tensor([0.1, 0.2, 0.05, 0.3, 0.25, 0.1, 0.0], device="cuda")
    kept = mass_before(weights.log()[None], 1.0, options.get("top_k"))[0] < options.get("top_p", 1)
    exact = (weights * kept) / (weights * kept).sum()
    rng, rows = state(5), 3000
    logits = weights.log().expand(rows, -1)
    tokens = torch.cat([decode_sample(logits, rng, **options) for _ in range(20)])
    counts, expected = torch.bincount(tokens, minlength=7), len(tokens) * exact
    assert counts[exact == 0].sum() == 0
    chi_square = ((counts - expected).square() / expected)[exact > 0].sum()
    # With five degrees of freedom or fewer, above 25.7 once in 10,000 times.
    assert chi_square < 25.7


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 400}, {"top_k": 900}, {"top_p": 0.8}, {"top_k": 400, "top_p": 0.8}]
)
def test_a_captured_draw_is_new_at_each_replay_and_repeats_from_the_same_state(options):
    logits, rng = torch.randn(4, 5000, device="cuda"), state(3)
    eager = [decode_sample(logits, rng, **options).tolist() for _ in range(5)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = decode_sample(logits, rng, **options)
    for _ in range(2):
        rng.copy_(state(3))
        captured = []
        for _ in range(5):
            graph.replay()
            captured.append(tokens.tolist())
        assert captured == eager
    assert len({tuple(draw) for draw in eager}) == 5
