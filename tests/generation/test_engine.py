import itertools

import pytest
import torch
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder, delete_kv_caches, disable_kv_cache

from torchtune_fused import Shard, ShardTransformerDecoder, generate
from torchtune_fused.generation import stream

VOCAB, MAX_SEQ_LEN = 97, 64
SIZES = {
    "vocab_size": VOCAB,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": MAX_SEQ_LEN,
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


def randomize(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def model():
    return randomize(llama3(**SIZES))


@torch.no_grad()
def without_cache(model, prompt, steps):
    """Greedy generation by the definition: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def test_each_row_continues_as_it_would_alone_and_without_a_cache(model):
    tokens = generate(model, PROMPTS, max_new_tokens=20)
    assert tokens.shape == (3, 25)
    assert tokens.dtype == torch.int64
    assert tokens[:, :5].tolist() == [[0, 0, 1, 2, 3], [4, 5, 6, 7, 8], [0, 0, 0, 0, 9]]
    for row, prompt in zip(tokens.tolist(), PROMPTS, strict=True):
        assert row[5:] == without_cache(model, prompt, 20)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_prompts_may_be_lists_or_tensors(model, dtype):
    expected = generate(model, [[1, 2, 3]], max_new_tokens=6)
    for prompt in ([1, 2, 3], torch.tensor([1, 2, 3], dtype=dtype), torch.tensor([[1, 2, 3]])):
        assert generate(model, prompt, max_new_tokens=6).equal(expected)


def test_a_leading_run_of_pad_id_in_a_tensor_is_padding(model):
    padded = torch.tensor([[96, 96, 1, 96, 3], [4, 5, 6, 7, 96]])
    tokens = generate(model, padded, max_new_tokens=8, pad_id=96)
    assert tokens[0, 5:].tolist() == without_cache(model, [1, 96, 3], 8)
    assert tokens[1, 5:].tolist() == without_cache(model, [4, 5, 6, 7, 96], 8)
    # Without a pad_id it is a token like any other.
    tokens = generate(model, padded, max_new_tokens=8)
    assert tokens[0, 5:].tolist() == without_cache(model, [96, 96, 1, 96, 3], 8)


def test_in_lists_pad_id_only_fills(model):
    tokens = generate(model, [[96, 1], [96, 2, 3, 4]], max_new_tokens=5, pad_id=96)
    assert tokens[0, :4].tolist() == [96, 96, 96, 1]
    assert tokens[0, 4:].tolist() == without_cache(model, [96, 1], 5)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20, "seed": 4}])
def test_streaming_yields_the_columns_of_generate(model, options):
    tokens = generate(model, PROMPTS, max_new_tokens=9, **options)
    steps = list(stream(model, PROMPTS, max_new_tokens=9, **options))
    assert torch.stack(steps, 1).equal(tokens[:, 5:])


def test_one_seed_gives_one_result_whatever_the_default_generator_does(model):
    def sample(seed):
        torch.rand(3)
        return generate(model, PROMPTS, max_new_tokens=20, temperature=1.5, top_p=0.95, seed=seed)

    assert sample(1).equal(sample(1))
    assert not sample(1).equal(sample(2))


def test_a_row_ends_with_its_stop_token_and_generation_with_the_last_row(model):
    free = generate(model, PROMPTS, max_new_tokens=20)[:, 5:]
    stop = [free[0, 3].item(), free[1, 6].item()]
    ends = [next((i for i, t in enumerate(row) if t in stop), 19) for row in free.tolist()]
    assert len(set(ends)) > 1
    for pad_id in (None, 96):
        tokens = generate(model, PROMPTS, max_new_tokens=20, stop_tokens=stop, pad_id=pad_id)
        tokens = tokens[:, 5:]
        assert tokens.shape[1] == max(ends) + 1
        for row, free_row, end in zip(tokens.tolist(), free.tolist(), ends, strict=True):
            assert row[: end + 1] == free_row[: end + 1]
            filler = row[end] if pad_id is None else pad_id
            assert set(row[end + 1 :]) <= {filler}


def test_caches_are_made_to_measure_and_removed(model):
    steps = stream(model, PROMPTS, max_new_tokens=7)
    assert not model.caches_are_setup()
    next(steps)
    # 5 prompt tokens and 7 new ones.
    assert model.layers[0].attn.kv_cache.k_cache.shape == (3, 2, 12, 8)
    steps.close()
    assert not model.caches_are_setup()
    assert not model.caches_are_enabled()
    generate(model, PROMPTS, max_new_tokens=7)
    assert not model.caches_are_setup()


def test_caches_are_removed_when_a_step_fails(model):
    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, [1, 2], max_new_tokens=2)
    assert not model.caches_are_setup()
    hook.remove()
    assert generate(model, [1, 2], max_new_tokens=2)[0, 2:].tolist() == without_cache(
        model, [1, 2], 2
    )


def test_caches_of_the_caller_are_emptied_used_and_kept(model):
    expected = generate(model, PROMPTS, max_new_tokens=8)
    model.setup_caches(batch_size=3, dtype=torch.float32, decoder_max_seq_len=20)
    caches = [layer.attn.kv_cache for layer in model.layers]
    for _ in range(2):
        assert generate(model, PROMPTS, max_new_tokens=8).equal(expected)
    assert [layer.attn.kv_cache for layer in model.layers] == caches
    assert model.caches_are_enabled()
    # The last token is only chosen, never fed.
    assert caches[0].size == 12


@pytest.mark.parametrize(
    ("rows", "slots", "message"),
    [
        (3, 12, "cache too small: the model's KV caches hold 3 rows of 12 tokens"),
        (2, 20, "cache too small: the model's KV caches hold 2 rows of 20 tokens"),
        (4, 20, "were set up for a batch of 4, this call has 3"),
    ],
)
def test_caches_of_the_caller_that_do_not_fit_are_an_error(model, rows, slots, message):
    model.setup_caches(batch_size=rows, dtype=torch.float32, decoder_max_seq_len=slots)
    model.layers[0].attn.kv_cache.k_cache.fill_(7)
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, max_new_tokens=8)
    assert model.layers[0].attn.kv_cache.k_cache.eq(7).all()
    delete_kv_caches(model)
    generate(model, PROMPTS, max_new_tokens=8)


def test_disabled_caches_are_an_error(model):
    model.setup_caches(batch_size=1, dtype=torch.float32, decoder_max_seq_len=20)
    with disable_kv_cache(model), pytest.raises(ValueError, match="caches are disabled"):
        generate(model, [1], max_new_tokens=2)


def test_only_the_last_position_is_projected(model):
    widths = []
    model.output.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    generate(model, [1, 2, 3, 4], max_new_tokens=3)
    assert widths == [1, 1, 1]


def test_gradients_and_mode_are_left_alone(model):
    model.train()
    model.output_hidden_states = [1]
    steps = stream(model, [1, 2], max_new_tokens=3)
    assert not next(steps).requires_grad
    assert torch.is_grad_enabled()
    assert model.training
    assert len(list(steps)) == 2


def test_a_model_that_chunks_its_output_for_training_generates(model):
    expected = generate(model, PROMPTS, max_new_tokens=4)
    model.set_num_output_chunks(8)
    assert generate(model, PROMPTS, max_new_tokens=4).equal(expected)


def test_lora_models_generate():
    model = randomize(
        lora_llama3(
            ["q_proj", "v_proj"], apply_lora_to_mlp=True, lora_rank=4, lora_alpha=8, **SIZES
        )
    )
    tokens = generate(model, PROMPTS, max_new_tokens=8)
    assert tokens[1, 5:].tolist() == without_cache(model, PROMPTS[1], 8)


def test_bf16_models_get_caches_of_their_dtype(model):
    model = model.bfloat16()
    steps = stream(model, PROMPTS, max_new_tokens=4)
    next(steps)
    assert model.layers[0].attn.kv_cache.k_cache.dtype == torch.bfloat16
    assert len(list(steps)) == 3


def test_the_whole_context_can_be_used(model):
    tokens = generate(model, [1, 2, 3], max_new_tokens=MAX_SEQ_LEN - 3)
    assert tokens.shape == (1, MAX_SEQ_LEN)
    assert tokens[0, 3:].tolist() == without_cache(model, [1, 2, 3], MAX_SEQ_LEN - 3)


GOOD = {"prompt_tokens": [1, 2, 3], "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"prompt_tokens": []}, ValueError, "empty prompt"),
        ({"prompt_tokens": [[1], []]}, ValueError, "empty prompt"),
        ({"prompt_tokens": torch.empty(0, dtype=torch.int64)}, ValueError, "empty prompt"),
        ({"prompt_tokens": torch.empty(0, 3, dtype=torch.int64)}, ValueError, "empty prompt"),
        ({"prompt_tokens": torch.tensor([[7, 7]]), "pad_id": 7}, ValueError, "empty prompt"),
        ({"prompt_tokens": [1, VOCAB]}, ValueError, "token 97 of prompt 0 is outside of the voc"),
        ({"prompt_tokens": [[1], [2, -1]]}, ValueError, "token -1 of prompt 1 is outside"),
        ({"prompt_tokens": "Hello"}, TypeError, "list of ids.*got str"),
        ({"prompt_tokens": 5}, TypeError, "list of ids.*got int"),
        ({"prompt_tokens": [1.5]}, TypeError, "must be integers"),
        ({"prompt_tokens": [[1], 2]}, TypeError, "must be integers"),
        ({"prompt_tokens": [1, [2]]}, TypeError, "must be integers"),
        ({"prompt_tokens": torch.tensor([1.0])}, TypeError, "must be integers"),
        ({"prompt_tokens": torch.ones(1, 1, 1, dtype=torch.int64)}, ValueError, r"\[s\] or \[b"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be"),
        ({"max_new_tokens": 2.0}, ValueError, "max_new_tokens must be"),
        ({"max_new_tokens": 62}, ValueError, "3 prompt tokens and 62 new ones exceed .* of 64"),
        ({"prompt_tokens": [1] * 65}, ValueError, "65 prompt tokens and 4 new ones exceed"),
        ({"temperature": -1.0}, ValueError, "temperature must be"),
        ({"top_k": 0}, ValueError, "top_k must be"),
        ({"top_p": 0.0}, ValueError, "top_p must be"),
        ({"top_p": 1.5}, ValueError, "top_p must be"),
        ({"pad_id": VOCAB}, ValueError, "pad_id 97 is outside of the vocabulary"),
        ({"stop_tokens": 2}, ValueError, "stop_tokens must be a list"),
        ({"stop_tokens": ["</s>"]}, ValueError, "stop_tokens must be a list"),
        ({"seed": "x"}, ValueError, "seed must be"),
    ],
)
def test_bad_requests_are_refused_by_the_call_itself(model, bad, error, message):
    for start in (generate, stream):
        with pytest.raises(error, match=message):
            start(model, **{**GOOD, **bad})
    assert not model.caches_are_setup()


def test_what_is_no_whole_model_is_refused(model):
    with pytest.raises(TypeError, match=r"expected a torchtune TransformerDecoder .* got Linear"):
        generate(torch.nn.Linear(2, 2), **GOOD)
    parts = {
        name: getattr(model, name)
        for name in ("tok_embeddings", "layers", "max_seq_len", "num_heads", "head_dim")
    }
    for start, end in itertools.combinations_with_replacement(range(3), 2):
        shard = ShardTransformerDecoder(
            shard=Shard("tiny", start, end, 3), norm=model.norm, output=model.output, **parts
        )
        assert isinstance(shard, TransformerDecoder)
        if (start, end) == (0, 2):
            assert generate(shard, **GOOD).equal(generate(model, **GOOD))
        else:
            with pytest.raises(ValueError, match="is not a whole model"):
                generate(shard, **GOOD)
