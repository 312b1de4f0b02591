"""Our losses on small decoders, against torchtune's on stock ones, called as its recipes do."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torchtune import training
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import loss as stock
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from torchtune_fused import ShardTransformerDecoder, patch_model, unpatch_model
from torchtune_fused.modules import CEWithChunkedOutputLoss, LinearCrossEntropyLoss

SIZES = {
    "vocab_size": 101,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 64,
    "intermediate_dim": 48,
}
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8}


def tied():
    return llama3_2(**SIZES)


def untied():
    return llama3(**SIZES)


def frozen():
    model = lora_llama3_2(**SIZES, **LORA)
    set_trainable_params(model, get_adapter_params(model))
    return model


def adapted_head():
    return lora_qwen2(**SIZES, **LORA, apply_lora_to_output=True)


def built(build):
    model = build()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def batch():
    tokens = torch.randint(SIZES["vocab_size"], (3, 21))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[1, :9] = -100
    return tokens, labels


def introduce(loss, model):
    """As torchtune's recipes do, having built both: those of 0.6.1, or those of its main branch."""
    if loss.__class__.__name__ == "CEWithChunkedOutputLoss":
        model.set_num_output_chunks(loss.num_output_chunks)
    else:
        loss.set_model_output(model)


def step(model, loss, batch):
    """Loss and gradients, as in a recipe's ``_loss_step`` and after it."""
    tokens, labels = batch
    logits = model(tokens)
    if not isinstance(logits, list):
        labels = labels.reshape(-1)
        logits = logits.reshape(-1, logits.size(-1))
    count = (labels != loss.ignore_index).sum()
    value = loss(logits, labels) * count
    value.backward()
    return {"loss": value.detach()} | {n: p.grad for n, p in model.named_parameters()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # fp32 with sums in another order, as in this folder's conftest.py.
        scale = 1.0 if expected is None else expected.abs().max().item()
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("build", [tied, untied, frozen])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_the_recipes(build, compiled, batch, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    model = built(build)
    fused = copy.deepcopy(model)
    patch_model(fused)
    theirs, ours = stock.CEWithChunkedOutputLoss(), CEWithChunkedOutputLoss()
    if compiled:
        ours = training.compile_loss(ours, verbose=False)
    introduce(theirs, model)
    introduce(ours, fused)
    assert fused(batch[0]).shape == (3, 21, SIZES["embed_dim"])  # no logits
    assert_same(step(fused, ours, batch), step(model, theirs, batch))


def embedding_additions(run):
    with torch.profiler.profile() as profile:
        run()
    events = profile.key_averages()
    return sum(e.count for e in events if e.key == "torchtune_fused::embedding_add_")


def test_a_tied_weight_gets_its_gradient_in_one_piece(batch):
    model = built(tied)
    fused = copy.deepcopy(model)
    patch_model(fused)
    theirs, ours = stock.CEWithChunkedOutputLoss(), CEWithChunkedOutputLoss()
    introduce(theirs, model)
    introduce(ours, fused)
    assert embedding_additions(lambda: step(fused, ours, batch)) == 1
    step(model, theirs, batch)
    # A second step adds to the gradients of the first.
    assert_same(step(fused, ours, batch), step(model, theirs, batch))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_tied_weight_in_several_forward_passes(order, batch):
    model = built(tied)
    fused = copy.deepcopy(model)
    patch_model(fused)
    tokens, labels = batch
    results = []
    pairs = (fused, CEWithChunkedOutputLoss()), (model, stock.CEWithChunkedOutputLoss())
    for either, loss in pairs:
        introduce(loss, either)
        values = [loss(out, labels) for out in (either(tokens), either(tokens.flip(0)))]
        for i in order:
            values[i].backward()
        results.append({n: p.grad for n, p in either.named_parameters()})
    assert_same(*results)


def test_a_tied_weight_whose_hidden_states_come_as_a_view_or_a_copy(batch):
    fused = built(tied)
    patch_model(fused)
    loss = LinearCrossEntropyLoss()
    introduce(loss, fused)
    tokens, labels = batch
    gradients = []
    for additions, change in ((1, torch.Tensor.view_as), (0, lambda hidden, _: hidden.clone())):
        hidden = fused(tokens)
        hidden = change(hidden, hidden)[:, :-1]
        value = loss(hidden, labels[:, :-1])
        assert embedding_additions(value.backward) == additions
        gradients.append({n: p.grad for n, p in fused.named_parameters()})
        fused.zero_grad()
    assert_same(*gradients)


def test_a_tied_weight_whose_head_is_not_used(batch):
    model = built(tied)
    fused = copy.deepcopy(model)
    patch_model(fused)
    introduce(LinearCrossEntropyLoss(), fused)
    model.output = nn.Identity()
    for either in (model, fused):
        either(batch[0]).sin().sum().backward()
    assert_same(*({n: p.grad for n, p in m.named_parameters()} for m in (fused, model)))
    with torch.no_grad():
        assert not fused(batch[0]).requires_grad


def test_a_step_of_the_main_branchs_recipes(batch):
    model = built(untied)
    fused = copy.deepcopy(model)
    patch_model(fused)
    ours, theirs = LinearCrossEntropyLoss(), stock.CEWithChunkedOutputLoss()
    introduce(ours.apply_compile_strategy(backend="eager"), fused)
    introduce(theirs, model)
    tokens, labels = batch
    torch.testing.assert_close(ours(fused(tokens), labels), theirs(model(tokens), labels))
    assert_same(step(fused, ours, batch), step(model, theirs, batch))


@pytest.mark.filterwarnings("ignore:the loss is computed from logits")
def test_z_loss_is_the_same_from_hidden_states_and_from_logits(batch):
    model = built(untied)
    losses = []
    for patched in (True, False):
        if patched:
            patch_model(model)
        else:
            unpatch_model(model)
        loss = CEWithChunkedOutputLoss(num_output_chunks=4, z_loss=0.05)
        introduce(loss, model)
        losses.append(step(model, loss, batch)["loss"])
    plain = stock.CEWithChunkedOutputLoss(num_output_chunks=4)
    without = step(model, plain, batch)["loss"]
    torch.testing.assert_close(losses[0], losses[1])
    logits = torch.cat(model(batch[0]), 1)
    squares = logits.logsumexp(-1).square()[batch[1] != -100]
    torch.testing.assert_close(losses[0], without + 0.05 * squares.sum())


def with_bias():
    model = untied()
    model.output = nn.Linear(SIZES["embed_dim"], SIZES["vocab_size"])
    return model


@pytest.mark.parametrize(
    ("build", "patched", "loss", "reason"),
    [
        (adapted_head, True, CEWithChunkedOutputLoss, "the output head is a FusedLoRALinear, not"),
        (adapted_head, True, LinearCrossEntropyLoss, "the output head is a FusedLoRALinear, not"),
        (with_bias, True, CEWithChunkedOutputLoss, "the output head has a bias"),
        (untied, False, CEWithChunkedOutputLoss, "the model is not one that torchtune_fused has"),
        (untied, False, LinearCrossEntropyLoss, "a TransformerDecoder always applies its head"),
    ],
)
def test_where_logits_are_needed_a_warning_says_why(build, patched, loss, reason, batch):
    model = built(build)
    fused = copy.deepcopy(model)
    if patched:
        patch_model(fused)
    theirs, ours = stock.CEWithChunkedOutputLoss(), loss()
    introduce(theirs, model)
    introduce(ours, fused)
    with pytest.warns(UserWarning, match=reason):
        found = step(fused, ours, batch)
    assert_same(found, step(model, theirs, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(fused, ours, batch)  # once was enough


def test_a_tensor_without_a_head_is_an_error():
    with pytest.raises(RuntimeError, match="call set_model_output"):
        LinearCrossEntropyLoss()(torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64))


def test_state_dicts_and_parameters_stay_what_they_are():
    model = built(untied)
    patch_model(model)
    keys, loss = model.state_dict().keys(), CEWithChunkedOutputLoss()
    introduce(loss, model)
    assert model.state_dict().keys() == keys
    assert not list(loss.parameters())
    assert not loss.state_dict()


def test_all_labels_ignored(batch):
    model = built(tied)
    patch_model(model)
    loss = CEWithChunkedOutputLoss()
    introduce(loss, model)
    found = step(model, loss, (batch[0], torch.full_like(batch[1], -100)))
    assert found.pop("loss").isnan()  # as in torchtune
    assert not any(grad.any() for grad in found.values())


def test_a_sharded_decoder_leaves_its_head_too(batch, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    truth = LlamaForCausalLM(config)
    truth.save_pretrained(tmp_path)
    model, loss = ShardTransformerDecoder.from_pretrained(tmp_path), CEWithChunkedOutputLoss()
    introduce(loss, model)
    tokens, labels = batch
    expected = nn.functional.cross_entropy(truth(tokens).logits.flatten(0, 1), labels.flatten())
    # Two models' fp32 sums.
    torch.testing.assert_close(loss(model(tokens), labels), expected, rtol=1e-5, atol=0)
