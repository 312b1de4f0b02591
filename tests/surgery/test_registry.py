import sys
import textwrap

import pytest
import torch
from torch import nn
from torchtune.modules import MultiHeadAttention, TransformerSelfAttentionLayer

from torchtune_fused import patch_model, register_builder, unpatch_model
from torchtune_fused.modules import FusedAttention
from torchtune_fused.surgery import Decline, registry

TOKENS = torch.arange(22).view(2, 11) * 7 % 101


class Gain(nn.Module):
    """A module that some other package would like to replace."""

    def __init__(self, size=4):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(size))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.gain


class OtherGain(Gain):
    """Its replacement, with a state of its own."""


@pytest.fixture(autouse=True)
def restored_registry():
    known = dict(registry._builders)
    yield
    registry._builders.clear()
    registry._builders.update(known)


def replace_gain(module):
    other = OtherGain(len(module.gain))
    other.load_state_dict(module.state_dict())
    other.train(module.training)
    return other


def test_a_replacement_with_its_own_state():
    register_builder(Gain)(replace_gain)
    gain = Gain()
    model = nn.Sequential(gain, nn.ModuleList([gain]))
    report = patch_model(model)
    assert report.swapped == {"0": "OtherGain"}
    assert type(model[0]) is OtherGain
    assert model[1][0] is model[0]

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model[0](torch.ones(4)).sum().backward()
    optimizer.step()
    model[0].gain.requires_grad_(False)
    model.eval()
    trained = model[0].gain
    unpatch_model(model)
    assert model[0] is gain and model[1][0] is gain
    assert gain.gain is trained  # so that an optimizer goes on with it
    assert not gain.gain.requires_grad
    assert not gain.training
    assert gain.calls == 1


def test_what_is_inside_a_replaced_module_goes_with_it(llama):
    class Layer(TransformerSelfAttentionLayer):
        pass

    def build(module):
        return Layer(module.attn, module.mlp, sa_norm=module.sa_norm, mlp_norm=module.mlp_norm)

    del registry._builders[TransformerSelfAttentionLayer]
    register_builder(TransformerSelfAttentionLayer)(build)
    expected = llama(TOKENS)
    report = patch_model(llama)
    assert report.swapped["layers.0"] == "Layer"
    assert type(llama.layers[0].attn) is MultiHeadAttention
    torch.testing.assert_close(llama(TOKENS), expected)
    unpatch_model(llama)
    assert type(llama.layers[0]) is TransformerSelfAttentionLayer
    assert torch.equal(llama(TOKENS), expected)


def test_a_replacement_cannot_become_the_model_itself():
    register_builder(Gain)(replace_gain)
    report = patch_model(Gain())
    assert report.declined == {"": "it is the model itself, and its replacement is another object"}


@pytest.mark.parametrize(
    ("builder", "error", "message"),
    [
        (lambda m: 1 / 0, ZeroDivisionError, "division"),
        (lambda m: None, TypeError, "must return a module or a Decline, got NoneType for 'norm'"),
        (lambda m: Gain(5), TypeError, "the replacement of 'norm' must have the state-dict keys"),
    ],
    ids=["raises", "returns nothing", "another shape"],
)
def test_nothing_is_changed_if_a_builder_fails(llama, builder, error, message):
    register_builder(Gain)(builder)
    llama.norm = Gain()
    before = [(name, type(m), id(m)) for name, m in llama.named_modules()]
    with pytest.raises(error, match=message):
        patch_model(llama)
    assert [(name, type(m), id(m)) for name, m in llama.named_modules()] == before


def test_decline():
    register_builder(Gain)(lambda module: Decline("it is fine as it is"))
    report = patch_model(nn.Sequential(Gain()))
    assert report.declined == {"0": "it is fine as it is"}
    assert report.swapped == {}


def test_builders_are_for_exact_classes():
    class Special(MultiHeadAttention):
        pass

    register_builder(Gain)(replace_gain)
    special = Special.__new__(Special)
    nn.Module.__init__(special)
    model = nn.Sequential(OtherGain(), special)
    assert patch_model(model).swapped == {}
    assert not isinstance(model[1], FusedAttention)


def test_one_builder_for_a_class():
    register_builder(Gain)(replace_gain)
    register_builder(Gain)(replace_gain)  # the same once more, as after a reload
    with pytest.raises(ValueError, match=r"Gain has a builder already, .*replace_gain"):
        register_builder(Gain)(lambda module: module)


def install(folder, monkeypatch, code, value="pack_of_builders"):
    """What pip leaves behind of a package with an entry point in our group."""
    (folder / "pack_of_builders.py").write_text(textwrap.dedent(code))
    info = folder / "pack_of_builders-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pack-of-builders\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[torchtune_fused.builders]\nrope = {value}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "pack_of_builders", raising=False)


def test_builders_of_installed_packages(tmp_path, monkeypatch, llama):
    install(
        tmp_path,
        monkeypatch,
        """
        from torchtune.models.llama3_1 import Llama3ScaledRoPE
        from torchtune_fused import register_builder
        from torchtune_fused.surgery import Decline

        @register_builder(Llama3ScaledRoPE)
        def build(module):
            return Decline("asked and declined by another package")
        """,
    )
    report = patch_model(llama)
    assert report.declined == {
        "layers.0.attn.pos_embeddings": "asked and declined by another package"
    }
    assert report.swapped["layers.0.attn"] == "FusedAttention"


@pytest.mark.parametrize("value", ["pack_of_builders", "absent_module"])
def test_a_broken_package_is_named(tmp_path, monkeypatch, llama, value):
    install(tmp_path, monkeypatch, "raise RuntimeError('needs a newer torch')", value)
    with pytest.raises(ImportError, match=f"entry point rope = {value} in the group"):
        patch_model(llama)
    assert type(llama.layers[0].attn) is MultiHeadAttention
