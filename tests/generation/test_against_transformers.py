"""Greedy generation against transformers' own, on the same checkpoints in fp32."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchtune_fused import ShardTransformerDecoder, generate
from torchtune_fused.generation import HFTokenizer

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Wide enough that random weights do not settle on repeating one token.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    # Shorter than the prompts, so that the window closes over the padding as well.
    "mistral": {"sliding_window": 6},
}
PROMPTS = [[5, 17, 3, 88, 41], [9], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70]]
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "Name three prime numbers greater than 10, and explain why each of them is prime.",
    "Hi",
]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    config = transformers.AutoConfig.for_model(request.param, **TINY, **FAMILIES[request.param])
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def transformers_greedy(folder, prompts, steps):
    """Each prompt continued on its own: no batch, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


@pytest.mark.parametrize("patch", [False, True], ids=["stock", "patched"])
def test_a_padded_batch_gives_the_tokens_of_transformers(checkpoint, patch):
    steps = 32
    expected = transformers_greedy(checkpoint, PROMPTS, steps)
    assert all(len(set(answer)) > 5 for answer in expected)
    model = ShardTransformerDecoder.from_pretrained(checkpoint, dtype=torch.float32, patch=patch)
    tokens = generate(model, PROMPTS, max_new_tokens=steps)
    assert tokens[:, -steps:].tolist() == expected


def test_smollm2_gives_the_tokens_of_transformers(smollm2):
    steps = 64
    theirs, ours = AutoTokenizer.from_pretrained(smollm2), HFTokenizer(smollm2)
    prompts = [
        theirs.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    expected = transformers_greedy(smollm2, prompts, steps)
    model = ShardTransformerDecoder.from_pretrained(smollm2, dtype=torch.float32)
    tokens = generate(model, prompts, max_new_tokens=steps)[:, -steps:]
    assert tokens.tolist() == expected
    assert "Paris" in ours.decode(tokens[0].tolist())
