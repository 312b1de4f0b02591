import copy

import pytest
import torch
from torch import nn
from torchtune.generation import generate
from torchtune.modules import (
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    local_kv_cache,
)
from torchtune.modules.common_utils import disable_kv_cache

from torchtune_fused import Shard, ShardTransformerDecoder

TOKENS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def parts(layers) -> dict:
    """Arguments of the constructor besides the shard."""
    return {
        "tok_embeddings": nn.Embedding(97, 48),
        "layers": layers,
        "max_seq_len": 32,
        "num_heads": 4,
        "head_dim": 12,
        "norm": RMSNorm(48),
        "output": nn.Linear(48, 97, bias=False),
    }


@pytest.fixture
def stock(load) -> TransformerDecoder:
    """torchtune's own decoder around the same layers and weights."""
    model = load(patch=False)
    return TransformerDecoder(
        tok_embeddings=model.tok_embeddings,
        layers=list(model.layers),
        max_seq_len=32,
        num_heads=4,
        head_dim=12,
        norm=model.norm,
        output=model.output,
    ).eval()


# --- The whole model is a torchtune decoder -------------------------------------------------------


@torch.inference_mode()
def test_a_whole_model_gives_what_torchtunes_decoder_gives(load, stock):
    model = load(patch=False)
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(model(TOKENS), stock(TOKENS))
    mask = torch.ones(2, 11, 11, dtype=torch.bool).tril()
    mask[1, :, :3] = False
    mask.diagonal(dim1=1, dim2=2).fill_(True)
    position = torch.arange(11).repeat(2, 1)
    position[1] = (position[1] - 3).clamp(min=0)
    expected = stock(TOKENS, mask=mask, input_pos=position)
    assert torch.equal(model(TOKENS, mask=mask, input_pos=position), expected)


@pytest.mark.parametrize("patch", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_torchtunes_generate(load, stock, patch, cached):
    model = load(patch=patch)
    expected, _ = generate(stock, TOKENS, max_generated_tokens=9, top_k=1)
    if not cached:
        tokens, _ = generate(model, TOKENS, max_generated_tokens=9, top_k=1)
    else:
        with local_kv_cache(model, batch_size=2, device=torch.device("cpu"), dtype=torch.float32):
            tokens, _ = generate(model, TOKENS, max_generated_tokens=9, top_k=1)
        assert not model.caches_are_setup()
    assert torch.equal(tokens, expected)


@torch.inference_mode()
def test_output_in_chunks(load, stock):
    model = load(patch=False)
    model.set_num_output_chunks(3)
    stock.set_num_output_chunks(3)
    chunks = model(TOKENS)
    assert len(chunks) == 3
    assert all(torch.equal(a, b) for a, b in zip(chunks, stock(TOKENS), strict=True))


@torch.inference_mode()
def test_hidden_states_of_the_whole_model(load, stock):
    model = load(patch=False)
    model.output_hidden_states = stock.output_hidden_states = [0, 2]
    outputs = model(TOKENS)
    assert len(outputs) == 3
    assert all(torch.equal(a, b) for a, b in zip(outputs, stock(TOKENS), strict=True))


@torch.inference_mode()
def test_hidden_and_unembed_make_up_forward(load):
    model = load()
    h = model.forward_hidden(TOKENS)
    assert h.shape == (2, 11, 48)
    assert torch.equal(model.unembed(h), model(TOKENS))
    # One row through the head against eleven: the matrix product may sum in another order.
    torch.testing.assert_close(model.unembed(h[:, -1:]), model(TOKENS)[:, -1:], atol=1e-5, rtol=0)


def test_gradients_reach_every_weight(load):
    model = load().train()
    model(TOKENS).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- Shards ---------------------------------------------------------------------------------------


def test_a_shard_has_only_its_layers_under_their_own_numbers(load):
    middle = load(1, 2)
    assert {name.split(".")[1] for name in middle.state_dict()} == {"1", "2"}
    assert middle.tok_embeddings is middle.norm is middle.output is None
    assert len(middle.layers) == 2
    assert middle.layers[0] is middle.get_submodule("layers.1")
    assert middle.layers[-1] is middle.get_submodule("layers.2")
    assert list(middle.layers[1:]) == [middle.layers[1]]
    with pytest.raises(IndexError):
        middle.layers[2]
    with pytest.raises(TypeError, match="a shard's range of layers is fixed"):
        middle.layers.append(nn.Identity())
    with pytest.raises(TypeError, match="a shard's range of layers is fixed"):
        del middle.layers[0]


def test_a_shard_can_be_copied(load):
    model = load(1, 2)
    other = copy.deepcopy(model)
    assert other.state_dict().keys() == model.state_dict().keys()
    h = torch.randn(1, 5, 48)
    with torch.inference_mode():
        assert torch.equal(other(hidden_state=h), model(hidden_state=h))


@torch.inference_mode()
def test_hidden_states_are_numbered_as_in_the_whole_model(load):
    whole, first, last = load(), load(0, 1), load(2, 3)
    for model in (whole, first, last):
        model.output_hidden_states = [1, 2, 3]
    *expected, logits = whole(TOKENS)
    *of_first, h = first(TOKENS)
    *of_last, output = last(hidden_state=h)
    assert (len(of_first), len(of_last)) == (1, 2)
    pairs = zip([*of_first, *of_last, output], [*expected, logits], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("patch", [False, True], ids=["stock", "patched"])
@torch.inference_mode()
def test_shards_with_caches_decode_as_the_whole_model_does(load, patch):
    whole, chain = load(patch=patch), [load(0, 0, patch), load(1, 2, patch), load(3, 3, patch)]
    mask = torch.ones(1, 16, 16, dtype=torch.bool).tril()
    for model in (whole, *chain):
        assert not model.caches_are_setup()
        model.setup_caches(2, torch.float32, decoder_max_seq_len=16)
        assert model.caches_are_setup()
        assert model.caches_are_enabled()
    for _ in range(2):
        for span in (slice(0, 9), slice(9, 10), slice(10, 11)):
            inputs = {"mask": mask[:, span], "input_pos": torch.arange(11)[span]}
            h = chain[0](TOKENS[:, span], **inputs)
            for model in chain[1:]:
                h = model(hidden_state=h, **inputs)
            assert torch.equal(h, whole(TOKENS[:, span], **inputs))
        for model in (whole, *chain):
            model.reset_caches()


@torch.inference_mode()
def test_a_disabled_cache_is_left_as_it_is(load):
    model = load(1, 2)
    h = torch.randn(1, 5, 48)
    mask = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    expected = model(hidden_state=h, mask=mask)
    model.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    with disable_kv_cache(model):
        assert torch.equal(model(hidden_state=h, mask=mask), expected)
    assert model.layers[0].attn.kv_cache.size == 0


# --- The constructor ------------------------------------------------------------------------------


def test_layers_may_be_the_shards_own_or_the_whole_models(load):
    layers = list(load().layers)
    shard = Shard("llama", 1, 2, 4)
    own = ShardTransformerDecoder(shard=shard, **parts(layers[1:3]))
    of_whole = ShardTransformerDecoder(shard=shard, **parts(nn.ModuleList(layers)))
    sparse = ShardTransformerDecoder(shard=shard, **parts([None, *layers[1:3], None]))
    for model in (own, of_whole, sparse):
        assert list(model.layers) == layers[1:3]
        assert model.tok_embeddings is model.norm is model.output is None


def test_one_layer_is_copied_for_each(load):
    layer = load().layers[0]
    assert isinstance(layer, TransformerSelfAttentionLayer)
    model = ShardTransformerDecoder(shard=Shard("llama", 2, 3), **parts(layer), num_layers=4)
    assert model.shard == Shard("llama", 2, 3, 4)
    a, b = model.layers
    assert a.attn.q_proj.weight.data_ptr() != b.attn.q_proj.weight.data_ptr()
    assert torch.equal(a.attn.q_proj.weight, layer.attn.q_proj.weight)


@pytest.mark.parametrize(
    ("shard", "changes", "message"),
    [
        (Shard("m", 0, 1, 4), {"tok_embeddings": None}, "needs tok_embeddings"),
        (Shard("m", 2, 3, 4), {"norm": None}, "needs norm and output"),
        (Shard("m", 2, 3, 4), {"output": None}, "needs norm and output"),
        (Shard("m", 0, 2, 4), {}, "2 layers were given .* its own 3, or all 4"),
        (Shard("m", 0, 1, 4), {"num_layers": 5}, "n_layers is 4, but the model has 5"),
        (Shard("m", 0, 1, 4), {"layers": [nn.Identity(), None]}, "owns layer 1, but None"),
        (Shard("m", 0, 1), {"layers": nn.Identity()}, "num_layers must say"),
        (
            Shard("m", 2, 3, 4),
            {"output": TiedLinear(nn.Embedding(97, 48))},
            "does not hold the embedding",
        ),
    ],
)
def test_parts_that_do_not_fit_the_shard(shard, changes, message):
    arguments = {**parts([nn.Identity(), nn.Identity()]), **changes}
    with pytest.raises(ValueError, match=message):
        ShardTransformerDecoder(shard=shard, **arguments)


def test_a_shard_that_is_not_of_the_checkpoint(llama):
    with pytest.raises(ValueError, match="the last layer being 3"):
        ShardTransformerDecoder.from_pretrained(llama, Shard("llama", 2, 4))
    with pytest.raises(ValueError, match="n_layers is 8, but the model has 4"):
        ShardTransformerDecoder.from_pretrained(llama, Shard("llama", 0, 3, 8))


# --- Inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "inputs", "message"),
    [
        (None, {}, "give it tokens, no hidden_state"),
        (TOKENS, {"hidden_state": torch.zeros(2, 11, 48)}, "give it tokens, no hidden_state"),
        (TOKENS + 90, {}, "outside of the vocabulary of 97"),
        (TOKENS - 97, {}, "token -.* is outside of the vocabulary"),
        (TOKENS.float(), {}, r"dtype torch\.float32, expected \[b, s\] of int64 or int32"),
        (TOKENS[0], {}, r"shape \[11\]"),
        (TOKENS[:, :0], {}, "the prompt is empty"),
        (TOKENS.repeat(1, 3), {}, r"33.*max_seq_len \(32\)"),
        (
            TOKENS,
            {"mask": torch.ones(11, 11).bool()},
            r"mask has shape \[11, 11\], expected \[2 or",
        ),
        (TOKENS, {"mask": torch.ones(3, 11, 11).bool()}, r"expected \[2 or 1, 11, 11\]"),
        (TOKENS, {"mask": torch.ones(2, 11, 32).bool()}, r"expected \[2 or 1, 11, 11\]"),
        (TOKENS, {"input_pos": torch.arange(10)}, r"input_pos has shape \[10\], expected \[11\]"),
        (TOKENS, {"input_pos": torch.arange(11) + 22}, "input_pos holds 32, outside of 0 to 31"),
        (TOKENS, {"input_pos": torch.arange(11) - 1}, "input_pos holds -1"),
    ],
)
def test_bad_inputs(load, tokens, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        load()(tokens, **inputs)
    assert "\n" not in str(error.value)


def test_bad_inputs_of_a_later_shard(load):
    last = load(2, 3)
    h = torch.zeros(2, 11, 48)
    for inputs in ({}, {"tokens": TOKENS}, {"tokens": TOKENS, "hidden_state": h}):
        with pytest.raises(ValueError, match="give it hidden_state, no tokens"):
            last(**inputs)
    with pytest.raises(ValueError, match=r"hidden_state has shape \[11, 48\]"):
        last(hidden_state=h[0])
    with pytest.raises(ValueError, match="only the last shard projects to logits"):
        load(0, 1).unembed(h)


def test_a_cache_that_is_too_small(load):
    model = load()
    model.setup_caches(2, torch.float32, decoder_max_seq_len=12)
    mask = torch.ones(1, 13, 12, dtype=torch.bool).tril()
    wide = torch.arange(26).view(2, 13)

    def run(tokens, start: int):
        span = slice(start, start + tokens.shape[1])
        return model(tokens, mask=mask[:, span], input_pos=torch.arange(13)[span])

    with pytest.raises(
        ValueError, match="13 more tokens do not fit the KV cache, which holds 0 of"
    ):
        run(wide, 0)
    with pytest.raises(ValueError, match="a batch of 3 does not fit the KV cache"):
        run(torch.zeros(3, 4, dtype=torch.int64), 0)
    run(TOKENS, 0)
    with pytest.raises(ValueError, match=r"2 more tokens .* holds 11 of at most 12"):
        run(TOKENS[:, :2], 11)
    # What was refused has changed nothing: the last slot can still be filled.
    run(TOKENS[:, :1], 11)
    with pytest.raises(ValueError, match=r"expected \[2 or 1, 1, 12\]"):
        model.reset_caches()
        model(TOKENS[:, :1], mask=mask[:, :1, :1], input_pos=torch.arange(1))


@pytest.mark.parametrize("given", ["mask", "input_pos"])
def test_caches_need_mask_and_positions(load, given):
    model = load(1, 2)
    model.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    inputs = {"mask": torch.ones(1, 3, 8).bool(), "input_pos": torch.arange(3)}
    with pytest.raises(ValueError, match="must be provided"):
        model(hidden_state=torch.zeros(1, 3, 48), **{given: inputs[given]})


@torch.inference_mode()
def test_a_shard_compiles_without_a_graph_break(load):
    first, last = load(0, 1), load(2, 3)
    compiled = [torch.compile(model, backend="eager", fullgraph=True) for model in (first, last)]
    assert torch.equal(compiled[1](hidden_state=compiled[0](TOKENS)), load()(TOKENS))
