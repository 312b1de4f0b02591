import copy
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import RMSNorm, TanhGate

from torchtune_fused import patch_model
from torchtune_fused.modules import FusedTransformerSelfAttentionLayer

SIZES = {
    "vocab_size": 10,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 16,
}
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True}


def layers(lora=False, norm=RMSNorm, scale=None):
    """A patched layer and the stock one that it is a copy of."""
    model = lora_llama3_2(**LORA, **SIZES, lora_rank=2, lora_alpha=4) if lora else llama3_2(**SIZES)
    stock = model.layers[0]
    if norm is not RMSNorm:
        stock.sa_norm, stock.mlp_norm = norm(32), norm(32)
    if scale is not None:
        stock.sa_scale, stock.mlp_scale = scale(), scale()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(stock)
    patch_model(fused)
    assert type(fused) is FusedTransformerSelfAttentionLayer
    return fused, stock


def x(*shape):
    return torch.randn(*(shape or (2, 7)), 32)


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("norm", [RMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("scale", [None, TanhGate], ids=["", "scaled"])
def test_as_torchtune(lora, norm, scale, assert_same):
    fused, stock = layers(lora, norm, scale)
    for shape in ((2, 7), (1, 3)):
        assert_same(fused, stock, [x(*shape)])


def test_masks_positions_and_frozen_parameters(assert_same):
    fused, stock = layers()
    mask = (torch.rand(2, 7, 7) < 0.6) | torch.eye(7).bool()
    for layer in (fused, stock):
        layer.sa_norm.requires_grad_(False)
        layer.mlp.requires_grad_(False)
    arguments = {"mask": mask, "input_pos": torch.arange(7) + 3, "encoder_input": None}
    assert_same(fused, stock, [x()], lambda layer, x: layer(x, **arguments))


@pytest.mark.parametrize("name", ["sa_norm", "mlp_norm", "attn", "mlp", "sa_scale", "mlp_scale"])
def test_hooks_see_what_they_see_in_torchtune(name):
    fused, stock = layers()
    inputs, seen = x(), []
    for layer in (fused, stock):
        layer.get_submodule(name).register_forward_hook(
            lambda module, args, out: seen.append((args[0], out))
        )
        layer(inputs)
    (ours_in, ours_out), (theirs_in, theirs_out) = seen
    torch.testing.assert_close(ours_in, theirs_in)
    torch.testing.assert_close(ours_out, theirs_out)


def test_other_norms_and_other_tensors(assert_same):
    class Tagged(torch.Tensor):
        pass

    fused, stock = layers()
    for layer in (fused, stock):
        layer.sa_norm = nn.Identity()
    assert_same(fused, stock, [x()])
    assert type(fused(x().as_subclass(Tagged))) is Tagged


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_normed_activations_are_not_kept(lora):
    fused, _ = layers(lora)
    seen = []
    for name in ("attn", "mlp"):
        fused.get_submodule(name).register_forward_pre_hook(
            lambda module, args: seen.append(weakref.ref(args[0]))
        )
    out = fused(x().requires_grad_())
    assert [ref() for ref in seen] == [None, None]
    leaves = [p for p in fused.parameters() if p.requires_grad]
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_checkpointed_activations_are_the_same():
    fused, _ = layers()
    checkpointed = checkpoint_wrapper(copy.deepcopy(fused))
    inputs = x()
    grads = []
    for layer in (fused, checkpointed):
        layer(inputs).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    assert all(map(torch.equal, *grads))


def test_compiles_without_graph_breaks():
    fused, _ = layers()
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    inputs = x().requires_grad_()
    results = []
    for layer in (fused, compiled):
        out = layer(inputs)
        grads = torch.autograd.grad(out.square().sum(), [inputs, *layer.parameters()])
        results.append([out, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
