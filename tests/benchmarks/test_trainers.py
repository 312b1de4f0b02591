import pytest
import torch
from omegaconf import OmegaConf

from torchtune_fused.benchmarks.contest import OURS, TORCHTUNE, TRANSFORMERS
from torchtune_fused.benchmarks.lora import lora
from torchtune_fused.benchmarks.packed import packed
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.benchmarks.train import train
from torchtune_fused.benchmarks.transformers_trainer import llama_config

# Losses in fp32, whose sums run in another order, over few steps of a small learning rate.
SAME = 1e-5

CONFIG = """
checkpoint: null
seed: 0
model: &model
  _component_: torchtune.models.llama3_2.llama3_2
  vocab_size: 101
  num_layers: 2
  num_heads: 4
  num_kv_heads: 2
  embed_dim: 64
  intermediate_dim: 80
  max_seq_len: 64
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
train:
  shapes: [[2, 16]]
packed:
  shapes: [[3, 8]]
lora:
  shapes: [[2, 16]]
  model:
    <<: *model
    _component_: torchtune.models.llama3_2.lora_llama3_2
    lora_attn_modules: [q_proj, v_proj]
    lora_rank: 4
    lora_alpha: 8
"""


@pytest.fixture
def setting():
    return Setting(OmegaConf.create(CONFIG), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("section", [train, packed, lora])
def test_torchtune_and_ours_do_the_same_work(setting, section):
    (contest,) = section(setting)
    steps = {
        system.name: system.build()
        for system in contest.systems
        if system.ours or (system.name == TORCHTUNE)
    }
    losses = {name: torch.stack([step() for _ in range(4)]) for name, step in steps.items()}
    torch.testing.assert_close(losses[OURS], losses[TORCHTUNE], rtol=SAME, atol=0)
    assert len(losses[OURS].unique()) == 4  # it does train


def test_any_loss_that_takes_logits_and_labels_can_be_set(setting):
    (contest,) = train(setting)
    chunked, whole = [], []
    setting.cfg.loss = {"_component_": "torch.nn.CrossEntropyLoss"}
    (other,) = train(setting)
    for losses, of in ((chunked, contest), (whole, other)):
        name = TORCHTUNE if of is contest else OURS
        step = next(system for system in of.systems if system.name == name).build()
        losses += [step() for _ in range(2)]
    torch.testing.assert_close(torch.stack(chunked), torch.stack(whole), rtol=SAME, atol=0)


def test_transformers_trains_a_model_of_the_same_sizes(setting):
    from transformers import LlamaForCausalLM

    (contest,) = train(setting)
    step = next(system for system in contest.systems if system.name == TRANSFORMERS).build()
    # What a model knows that was never trained: the logarithm of the vocabulary's size.
    assert step().item() == pytest.approx(torch.tensor(101.0).log().item(), rel=0.05)
    theirs = LlamaForCausalLM(llama_config(setting.structure))
    ours = setting.structure
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_only_adapters_are_trained_and_counted(setting):
    (full,), (adapters,) = train(setting), lora(setting)
    # A frozen weight takes 4 FLOPs a token instead of 6.
    assert 0.6 * full.flops < adapters.flops < 0.8 * full.flops
