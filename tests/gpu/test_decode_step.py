"""Whole steps of a small decoder: the ops in a row, eager and captured in a CUDA graph."""

import pytest
import torch

from torchtune_fused.ops import attention_decode
from torchtune_fused.ops.decode_embed import decode_embed_
from torchtune_fused.ops.decode_gated import decode_gated
from torchtune_fused.ops.decode_linear import decode_linear
from torchtune_fused.ops.decode_qkv import decode_qkv

LAYERS, HEADS, KV_HEADS, D, DIM, HIDDEN, VOCAB, MAX_LEN = 6, 8, 2, 64, 512, 1408, 5000, 256


class Decoder:
    """A Llama-like decoder of the decode ops alone, with random weights."""

    def __init__(self, batch, dtype=torch.bfloat16):
        def weight(n, k):
            return (torch.randn(n, k, device="cuda") * k**-0.5).to(dtype)

        self.layers = [
            {
                "qkv": [weight(HEADS * D, DIM), *(weight(KV_HEADS * D, DIM) for _ in range(2))],
                "out": weight(DIM, HEADS * D),
                "gate": weight(HIDDEN, DIM),
                "up": weight(HIDDEN, DIM),
                "down": weight(DIM, HIDDEN),
                "norms": [torch.rand(DIM, device="cuda").to(dtype) + 0.5 for _ in range(2)],
                "caches": [
                    torch.full((batch, KV_HEADS, MAX_LEN, D), torch.nan, device="cuda", dtype=dtype)
                    for _ in range(2)
                ],
            }
            for _ in range(LAYERS)
        ]
        self.head, self.embedding = weight(VOCAB, DIM), weight(VOCAB, DIM)
        angles = torch.rand(MAX_LEN, D // 2, device="cuda") * 6.28
        self.rope = (angles.cos(), angles.sin())
        self.cache_pos = torch.arange(MAX_LEN, device="cuda")
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
        self.logits = torch.zeros(batch, 1, VOCAB, device="cuda")

    def reset(self):
        self.cache_pos.copy_(torch.arange(MAX_LEN, device="cuda"))
        self.tokens.copy_(torch.arange(len(self.tokens), device="cuda").unsqueeze(1))
        for layer in self.layers:
            for cache in layer["caches"]:
                cache.fill_(torch.nan)

    def step(self):
        x = torch.empty(len(self.tokens), 1, DIM, device="cuda", dtype=self.embedding.dtype)
        decode_embed_(x[:, 0], self.tokens[:, 0], self.embedding)
        for layer in self.layers:
            first, second = layer["norms"]
            caches = layer["caches"]
            q = decode_qkv(
                x, *layer["qkv"], *caches, self.cache_pos, norm_weight=first, rope=self.rope
            )
            seen = attention_decode(q, *caches, self.cache_pos[1:2]).transpose(1, 2).flatten(2)
            x = decode_linear(seen, layer["out"], residual=x)
            hidden = decode_gated(x, layer["gate"], layer["up"], norm_weight=second)
            x = decode_linear(hidden, layer["down"], residual=x)
        self.logits.copy_(decode_linear(x, self.head, norm_weight=first, fp32_out=True))
        self.tokens.copy_(self.logits.argmax(-1))
        self.cache_pos.add_(1)

    def trace(self, step, count):
        self.reset()
        logits, tokens = [], []
        for _ in range(count):
            step()
            logits.append(self.logits.clone())
            tokens.append(self.tokens.clone())
        return torch.stack(logits), torch.stack(tokens)


@pytest.mark.parametrize("dim", [8, 512, 4104])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_the_embedding(dtype, dim):
    weight = torch.randn(1001, dim, device="cuda").to(dtype)
    for ids in ([0], [1000, 0], torch.randint(1001, (16,)).tolist()):
        ids = torch.tensor(ids, device="cuda")
        out = torch.empty(len(ids), dim, device="cuda", dtype=dtype)
        for _ in range(3):  # the launch overlaps what wrote the ids, and what still reads `out`
            ids = (ids + 1) % 1001
            decode_embed_(out, ids, weight)
            assert torch.equal(out, weight[ids])


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_captured_steps_equal_eager_ones_bit_for_bit(batch):
    decoder = Decoder(batch)
    eager = decoder.trace(decoder.step, 48)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    for _ in range(3):
        captured = decoder.trace(graph.replay, 48)
        assert torch.equal(eager[1], captured[1])
        assert torch.equal(eager[0], captured[0])
    assert eager[0].isfinite().all()


def test_a_captured_step_serves_every_length():
    """One graph, captured with an empty cache, equals eager steps up to the last slot."""
    decoder = Decoder(1)
    graph = torch.cuda.CUDAGraph()
    decoder.reset()
    decoder.step()  # what capturing needs loaded
    with torch.cuda.graph(graph):
        decoder.step()
    count = MAX_LEN - 1
    eager, captured = decoder.trace(decoder.step, count), decoder.trace(graph.replay, count)
    assert torch.equal(eager[0], captured[0])


def test_captured_attention_sees_what_was_written_just_before():
    q = torch.randn(1, 8, 1, 64, device="cuda").bfloat16()
    source = torch.randn(2, 1, 2, 4096, 64, device="cuda").bfloat16()
    caches, length = torch.zeros_like(source), torch.zeros(1, dtype=torch.int64, device="cuda")
    given = torch.full_like(length, 4000)

    def run():
        attention_decode(q, *caches, length)  # one that an attention may read its cache behind
        caches.copy_(source)
        length.copy_(given)
        return attention_decode(q, *caches, length)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for filled in (4000, 17, 2222):
        source.normal_()
        given.fill_(filled)
        caches.zero_()
        length.zero_()
        graph.replay()
        assert torch.equal(out, attention_decode(q, *source, given))
