import copy
import io

import pytest
import torch
from torch import nn
from torchtune.generation import generate
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
)
from torchtune.modules.common_utils import disable_kv_cache, local_kv_cache
from torchtune.modules.peft import LoRALinear, get_adapter_params

from torchtune_fused import patch_model, unpatch_model
from torchtune_fused.modules import FusedAttention, FusedFeedForward, FusedRMSNorm

TOKENS = torch.arange(22).view(2, 11) * 7 % 101
FUSED = (FusedAttention, FusedFeedForward, FusedRMSNorm)


def modules_of(model, *classes):
    return [module for module in model.modules() if type(module) in classes]


def results(model, **kwargs):
    model.zero_grad()
    out = model(TOKENS, **kwargs)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return {"output": out.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(ours, theirs, name="output"):
    # fp32 with sums in another order, through two layers and a softmax each: fifty times its
    # rounding, of the largest value.
    atol = 50 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


def assert_same_results(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_same(ours[name], expected, name)


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_outputs_and_gradients_of_the_families(model, mask):
    mask = None if mask == "none" else (torch.rand(2, 11, 11) < 0.6).tril() | torch.eye(11).bool()
    expected = results(model, mask=mask)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())

    patch_model(model)
    assert_same_results(results(model, mask=mask), expected)
    assert not modules_of(model, MultiHeadAttention, FeedForward, RMSNorm)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p is parameters[name] for name, p in model.named_parameters())

    unpatch_model(model)
    assert not modules_of(model, *FUSED)
    unpatched = results(model, mask=mask)
    assert all(torch.equal(value, expected[name]) for name, value in unpatched.items())


def test_report(llama):
    report = patch_model(llama)
    assert report.swapped["layers.0.attn"] == "FusedAttention"
    assert report.swapped["layers.1.mlp"] == "FusedFeedForward"
    assert report.swapped["norm"] == "FusedRMSNorm"
    assert report.declined == {}
    lines = str(report).splitlines()
    assert lines[0] == f"patched {len(report.swapped)} modules"
    assert "  2 x layers.*.attn: FusedAttention" in lines
    assert "  2 x layers.*.sa_norm: FusedRMSNorm" in lines
    assert len(lines) < 9


def test_report_says_what_was_declined_and_why(llama):
    for layer in llama.layers:
        layer.mlp.activation = nn.Tanh()
    llama.layers[0].mlp.w3 = None
    llama.norm.forward = lambda x: x
    report = patch_model(llama)
    assert report.declined == {
        "layers.0.mlp": "it has no up projection, and only gated feed-forwards are fused",
        "layers.1.mlp": "its activation is Tanh(), not a plain SiLU, GELU or ReLU",
        "norm": "its forward was replaced on the instance, which a fused one would ignore",
    }
    assert not report.declined.keys() & report.swapped.keys()
    assert "left 3 as they are" in str(report)
    assert "  1 x layers.*.mlp: its activation is Tanh()" in str(report)


def test_modules_without_a_builder_are_untouched(build):
    gemma = build("gemma")
    others = [m for m in gemma.modules() if type(m) is GemmaNormEmbeddings]
    report = patch_model(gemma)
    assert others and set(others) <= set(gemma.modules())
    swapped = {"FusedAttention", "FusedFeedForward", "FusedGemmaRMSNorm"}
    assert set(report.swapped.values()) >= swapped


def test_idempotent(llama):
    patch_model(llama)
    modules = [(name, type(m), id(m)) for name, m in llama.named_modules()]
    report = patch_model(llama)
    assert report.swapped == report.declined == {}
    assert str(report) == "patched 0 modules"
    assert [(name, type(m), id(m)) for name, m in llama.named_modules()] == modules
    unpatch_model(llama)
    unpatch_model(llama)
    assert not modules_of(llama, *FUSED)


def test_references_and_hooks_survive(llama):
    attention, calls = llama.layers[0].attn, []
    attention.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    patch_model(llama)
    llama(TOKENS)
    assert llama.layers[0].attn is attention
    unpatch_model(llama)
    llama(TOKENS)
    assert calls == [FusedAttention, MultiHeadAttention]


def test_weights_trained_while_patched_stay(llama):
    patch_model(llama)
    optimizer = torch.optim.SGD(llama.parameters(), lr=0.1)
    before = llama(TOKENS).detach()
    llama(TOKENS).square().mean().backward()
    optimizer.step()
    trained = llama(TOKENS).detach()
    unpatch_model(llama)
    assert not torch.allclose(trained, before)
    assert_same(llama(TOKENS), trained)


def test_before_weights_are_loaded(build):
    stock = build("mistral")
    with torch.device("meta"):
        model = build("mistral")
    patch_model(model)
    model.load_state_dict(stock.state_dict(), assign=True)
    for attention in modules_of(model, FusedAttention):
        attention.pos_embeddings.rope_init()
    assert_same(model(TOKENS), stock(TOKENS))


def test_copies_are_independent_and_can_be_unpatched(llama):
    expected = llama(TOKENS)
    patch_model(llama)
    twin = copy.deepcopy(llama)
    torch.testing.assert_close(twin(TOKENS), expected)
    unpatch_model(twin)
    assert not modules_of(twin, *FUSED)
    assert len(modules_of(llama, *FUSED)) == 9
    assert torch.equal(twin(TOKENS), expected)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    torch.testing.assert_close(llama(TOKENS), expected)


def test_saving_a_whole_module():
    # Attention can't be pickled in torchtune itself: it holds a local function.
    model = nn.Sequential(RMSNorm(8), nn.Linear(8, 8))
    patch_model(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded[0]) is FusedRMSNorm
    unpatch_model(loaded)
    assert type(loaded[0]) is RMSNorm


def test_adapters_are_fused_and_what_is_not_is_reported(build):
    report = patch_model(build("lora_llama3"))
    assert report.swapped["layers.0.attn.q_proj"] == "FusedLoRALinear"
    assert report.swapped["layers.1.mlp.w2"] == "FusedLoRALinear"
    assert not report.declined
    report = patch_model(build("dora_llama3"))
    assert report.declined["layers.0.attn.q_proj"].startswith("DoRA")


def test_lora_added_after_patching(llama):
    patch_model(llama)
    for layer in llama.layers:
        layer.attn.q_proj = LoRALinear(48, 48, rank=2, alpha=4)
        layer.mlp.w1 = LoRALinear(48, 80, rank=2, alpha=4)
        nn.init.normal_(layer.mlp.w1.lora_b.weight)
    patched = llama(TOKENS)
    assert len(get_adapter_params(llama)) == 8
    unpatch_model(llama)
    assert len(get_adapter_params(llama)) == 8
    assert_same(llama(TOKENS), patched)


def test_frozen_parameters_stay_frozen(build):
    model = build("lora_llama3")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    patch_model(model)
    trained = results(model).keys() - {"output"}
    assert trained == {name for name, _ in model.named_parameters() if "lora" in name}


def test_the_model_itself():
    norm = RMSNorm(8)
    x = torch.randn(3, 8)
    expected = norm(x)
    assert patch_model(norm).swapped == {"": "FusedRMSNorm"}
    assert type(norm) is FusedRMSNorm
    torch.testing.assert_close(norm(x), expected)
    unpatch_model(norm)
    assert type(norm) is RMSNorm


def test_a_module_in_several_places(llama):
    llama.layers[1].mlp_norm = llama.layers[0].mlp_norm
    llama.layers[1].attn = llama.layers[0].attn
    expected = llama(TOKENS)
    report = patch_model(llama)
    assert "layers.1.attn" not in report.swapped
    assert llama.layers[1].attn is llama.layers[0].attn
    assert type(llama.layers[1].attn) is FusedAttention
    assert_same(llama(TOKENS), expected)


def test_fused_modules_that_were_built_are_not_unpatched(llama):
    built = FusedAttention.from_stock(llama.layers[0].attn)
    llama.layers[0].attn = built
    patch_model(llama)
    unpatch_model(llama)
    assert type(llama.layers[0].attn) is FusedAttention
    assert type(llama.layers[1].attn) is MultiHeadAttention


def test_unpatching_refuses_a_module_that_changed_its_class(llama):
    patch_model(llama)
    nn.utils.parametrizations.weight_norm(llama.norm, "scale", dim=None)
    with pytest.raises(RuntimeError, match="'norm' was patched to be FusedRMSNorm and has become"):
        unpatch_model(llama)
    assert len(modules_of(llama, *FUSED)) == 8
    nn.utils.parametrize.remove_parametrizations(llama.norm, "scale")
    unpatch_model(llama)
    assert not modules_of(llama, *FUSED)


PROMPTS = torch.tensor([[0, 0, 5, 17, 3], [9, 8, 7, 6, 5]])


@pytest.mark.parametrize("cached", [False, True], ids=["", "cache"])
@pytest.mark.parametrize("prompt", [PROMPTS, PROMPTS[1]], ids=["padded", "one"])
def test_generate_of_torchtune(model, cached, prompt):
    def run():
        torch.manual_seed(3)
        arguments = {"max_generated_tokens": 12, "pad_id": 0, "temperature": 0.8, "top_k": 20}
        if not cached:
            return generate(model, prompt, **arguments)
        with local_kv_cache(
            model,
            batch_size=prompt.view(-1, 5).shape[0],
            device=torch.device("cpu"),
            dtype=torch.float32,
            decoder_max_seq_len=17,
        ):
            return generate(model, prompt, **arguments)

    model.eval()
    tokens, logits = run()
    patch_model(model)
    fused_tokens, fused_logits = run()
    assert torch.equal(fused_tokens, tokens)
    assert_same(fused_logits, logits)


def test_disabled_caches(llama):
    patch_model(llama)
    expected = llama(TOKENS)
    llama.setup_caches(2, torch.float32, decoder_max_seq_len=16)
    with disable_kv_cache(llama):
        mask = torch.ones(1, 11, 11, dtype=torch.bool).tril()
        assert_same(llama(TOKENS, mask=mask), expected)


@pytest.mark.parametrize("name", ["llama3_2", "qwen2", "gemma", "lora_llama3"])
def test_compiles_without_graph_breaks(build, name):
    torch.compiler.reset()
    model = build(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in parameter_name or name != "lora_llama3")
    patch_model(model)
    for kwargs in ({}, {"input_pos": torch.arange(11)}):
        expected = results(model, **kwargs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        out = compiled(TOKENS, **kwargs)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        got = {"output": out.detach()} | {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None
        }
        assert_same_results(got, expected)


def test_decoding_compiles_without_graph_breaks(llama):
    torch.compiler.reset()
    patch_model(llama)
    llama.setup_caches(2, torch.float32, decoder_max_seq_len=16)
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    mask = torch.ones(1, 11, 16, dtype=torch.bool).tril()
    outputs = []
    for model in (llama, compiled):
        llama.reset_caches()
        for part in (slice(0, 8), slice(8, 9), slice(9, 10)):
            with torch.no_grad():
                logits = model(
                    TOKENS[:, part], mask=mask[:, part], input_pos=torch.arange(11)[part]
                )
            outputs.append(logits)
    for eager, traced in zip(outputs[:3], outputs[3:], strict=True):
        assert_same(traced, eager)
