"""The real SmolLM2 in bf16 on the GPU, against transformers."""

import pytest
import torch
from torchtune.data import Message
from torchtune.modules.common_utils import delete_kv_caches
from transformers import AutoModelForCausalLM

from torchtune_fused import ShardTransformerDecoder, generate
from torchtune_fused.generation import HFTokenizer

# Along the greedy answers to these, in fp32, the best token leads by 0.24 or more. Where two tokens
# are closer than bf16 logits are exact (about 0.1), no two bf16 programs need to agree.
QUESTIONS = (
    "What is the capital of Japan?",
    "How many days are in a week?",
    "Count from one to ten.",
    "List the months of the year.",
    "Which ocean is the largest?",
)
NEW = 64


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = HFTokenizer(smollm2)
    chats = ([Message("user", question), Message("assistant", "")] for question in QUESTIONS)
    return [tokenizer.tokenize_messages(chat, add_end_tokens=False)[0] for chat in chats]


@torch.no_grad()
def test_greedy_text_equals_transformers(smollm2, prompts):
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).cuda().eval()
    ours = ShardTransformerDecoder.from_pretrained(smollm2, dtype=torch.bfloat16, device="cuda")
    same = 0
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )[0]
        end = int(theirs.generation_config.eos_token_id)
        found = generate(ours, prompt, max_new_tokens=NEW, stop_tokens=[end])[0]
        same += torch.equal(found, expected)
    assert same >= 4


@torch.no_grad()
def test_logits_are_as_exact_as_transformers(smollm2, prompts):
    load = AutoModelForCausalLM.from_pretrained
    truth = load(smollm2, dtype=torch.float32).cuda().eval()
    theirs = load(smollm2, dtype=torch.bfloat16).cuda().eval()
    ours = ShardTransformerDecoder.from_pretrained(smollm2, dtype=torch.bfloat16, device="cuda")
    for prompt in prompts:
        # The prompt at once, then what the truth answers token by token, as decoding runs.
        ids = torch.tensor([prompt], device="cuda")
        answer = truth.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
        )
        length, total = len(prompt), answer.shape[1]
        slots = torch.arange(total, device="cuda")
        with torch.device("cuda"):
            ours.setup_caches(1, torch.bfloat16, decoder_max_seq_len=total)
        mask = (slots <= slots[:, None])[None]
        found = [ours(ids, mask=mask[:, :length], input_pos=slots[:length])]
        found += [
            ours(answer[:, i : i + 1], mask=mask[:, i : i + 1], input_pos=slots[i : i + 1])
            for i in range(length, total)
        ]
        delete_kv_caches(ours)
        expected = truth(answer).logits
        error = (torch.cat(found, 1) - expected).abs().amax()
        # The rule of the project: at most twice the error of plain PyTorch in the same dtype.
        assert error <= 2 * (theirs(answer).logits.float() - expected).abs().amax()
