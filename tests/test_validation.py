import math

import pytest
import torch
from torch import nn
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from torchtune_fused import patch_model
from torchtune_fused.validation import compare, compare_modules, true_logits, truth_dtype, twins

SIZES = {
    "vocab_size": 101,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "embed_dim": 48,
    "intermediate_dim": 80,
    "max_seq_len": 32,
}
PARTS = ("sa_norm", "attn", "mlp_norm", "mlp")


@pytest.fixture
def build():
    def build(builder=llama3_2, dtype=torch.float32):
        torch.manual_seed(0)
        model = builder(**SIZES)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model.to(dtype)

    return build


@pytest.fixture
def tokens():
    return torch.randint(101, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def results():
    """A truth in fp32 and what stock made of it in bf16: its rounding, and no other error."""
    torch.manual_seed(0)
    truth = torch.randn(7, 33)
    return truth, truth.bfloat16()


def test_errors_are_those_of_their_definition(results):
    truth, stock = results
    stock, fused = stock + 0.5, stock.clone()
    fused[3, 4] += 2
    report = compare("it", stock, fused, truth, torch.bfloat16)
    for error, x in ((report.stock, stock), (report.fused, fused)):
        difference = x.double() - truth.double()
        assert error.largest == pytest.approx(difference.abs().max().item(), rel=1e-5)
        relative = difference.square().sum().sqrt() / truth.double().square().sum().sqrt()
        assert error.relative == pytest.approx(relative.item(), rel=1e-5)
    assert report.output == "[7, 33]"


def test_a_result_as_exact_as_stocks_passes(results):
    truth, stock = results
    report = compare("it", stock, stock.clone(), truth, torch.bfloat16)
    assert report.passed
    assert 0 < report.of_limit < 0.5
    assert report.same_argmax == 1


def test_one_wrong_element_fails(results):
    truth, stock = results
    fused = stock.clone()
    # Twice the error of stock and a rounding of the largest value are some 2% of it.
    fused[2, 5] += 0.05 * truth.abs().max()
    report = compare("it", stock, fused, truth, torch.bfloat16)
    assert not report.passed
    assert 1 < report.of_limit < 10


def test_many_small_errors_fail(results):
    """None of them is larger than what the largest element may be off by."""
    truth, stock = results
    fused = (truth + 0.012).bfloat16()
    report = compare("it", stock, fused, truth, torch.bfloat16)
    assert report.fused.largest < 2 * report.stock.largest + truth.abs().max() / 256
    assert not report.passed


def test_argmax_agreement_is_by_row(results):
    truth, stock = results
    fused = stock.clone()
    fused[0, stock[0].argmin()] = 100
    report = compare("it", stock, fused, truth, torch.bfloat16)
    assert report.same_argmax == pytest.approx(6 / 7)


def test_nan_fails(results):
    truth, stock = results
    fused = stock.clone()
    fused[0, 0] = math.nan
    assert not compare("it", stock, fused, truth, torch.bfloat16).passed


@pytest.mark.parametrize(
    ("change", "output"),
    [
        (lambda x: x[:5], "[5, 33] bfloat16, not [7, 33] bfloat16"),
        (lambda x: x.float(), "[7, 33] float32, not [7, 33] bfloat16"),
    ],
    ids=["shape", "dtype"],
)
def test_another_shape_or_dtype_fails_and_is_named(results, change, output):
    truth, stock = results
    report = compare("it", stock, change(stock), truth, torch.bfloat16)
    assert not report.passed
    assert report.output == output


def test_zeros_are_compared_too():
    zeros = torch.zeros(2, 3)
    assert compare("it", zeros, zeros, zeros.double(), torch.float32).passed
    assert not compare("it", zeros, zeros + 1e-30, zeros.double(), torch.float32).passed


def test_there_is_no_truth_wider_than_fp64():
    with pytest.raises(ValueError, match=r"torch.float64 has no truth"):
        truth_dtype(torch.float64)


@pytest.mark.parametrize("patched", [False, True])
def test_twins_share_their_weights_and_nothing_else(build, patched):
    model = build()
    if patched:
        patch_model(model)
    stock, fused, report = twins(model)
    theirs, ours = dict(stock.named_parameters()), dict(fused.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(theirs[name] is ours[name] for name in ours)
    assert not any(type(m).__module__.startswith("torchtune_fused") for m in stock.modules())
    for name, fused_class in report.swapped.items():
        assert type(fused.get_submodule(name)).__name__ == fused_class
    assert {f"layers.{i}.{part}" for i in (0, 1) for part in PARTS} < report.swapped.keys()


def test_what_is_no_decoder_or_cannot_be_fused_is_refused():
    with pytest.raises(ValueError, match="expected a torchtune TransformerDecoder, got Linear"):
        twins(nn.Linear(2, 2))

    class OtherDecoder(TransformerDecoder):
        pass

    parts = {"tok_embeddings": nn.Embedding(5, 4), "layers": [nn.Identity()], "norm": nn.Identity()}
    other = OtherDecoder(**parts, output=nn.Linear(4, 5), max_seq_len=8, num_heads=1, head_dim=4)
    with pytest.raises(ValueError, match="no module of the model has a fused counterpart"):
        twins(other)


@pytest.mark.parametrize("builder", [llama3_1, llama3_2, qwen2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_fused_module_and_its_layer_are_compared(build, tokens, builder, dtype):
    stock, fused, report = twins(build(builder, dtype))
    compared = list(compare_modules(stock, fused, report.swapped, tokens))
    layers = [[*(f"layers.{i}.{part}" for part in PARTS), f"layers.{i}"] for i in (0, 1)]
    assert [comparison.name for comparison in compared] == [*layers[0], *layers[1], "norm"]
    for comparison in compared:
        assert comparison.output == "[2, 11, 48]"
        assert comparison.passed, comparison
    # Stock makes errors in bf16: a truth without them is not stock's own result.
    if dtype == torch.bfloat16:
        assert all(comparison.stock.largest > 0 for comparison in compared)


def test_a_wrong_module_is_told_from_the_others(build, tokens):
    """Inputs are stock's: what comes after the wrong module is not blamed for it."""
    stock, fused, report = twins(build())
    fused.layers[0].mlp_norm.eps = 0.1
    compared = compare_modules(stock, fused, report.swapped, tokens)
    failed = [comparison.name for comparison in compared if not comparison.passed]
    assert failed == ["layers.0.mlp_norm", "layers.0"]


@pytest.mark.parametrize("builder", [llama3_1, llama3_2], ids=["untied", "tied"])
def test_the_truth_is_the_model_in_fp64(build, tokens, builder):
    stock, _, _ = twins(build(builder))
    logits = true_logits(stock, tokens)
    assert logits.dtype == torch.float64
    # A decoder's logits are fp32 whatever its dtype is: 2 ** -24 of each is rounding.
    expected = build(builder).double()(tokens)
    torch.testing.assert_close(logits.float(), expected, rtol=1e-6, atol=0)
    # Nor has it changed the model.
    assert {p.dtype for p in stock.parameters()} == {torch.float32}
