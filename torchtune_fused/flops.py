"""The floating-point operations of a decoder, and those that a GPU can do at most: what MFU needs.

Counted is what the model asks for (PaLM, https://arxiv.org/abs/2204.02311, appendix B), not what a
program does: recomputed activations add nothing, and of causal attention only half counts.
"""

import re

import torch
from torch import nn
from torchtune.modules import TransformerDecoder

# Dense bf16 TFLOP/s from the vendor's data sheets, by what stands in the device's name.
_PEAK_TFLOPS = {
    r"A100": 312,
    r"A10": 125,
    r"A10G": 70,
    r"A40": 149.7,
    r"A6000": 154.8,
    r"L4": 121,
    r"L40S": 362,
    r"RTX 3090": 71,
    r"RTX 4090": 165.2,
    r"GH200": 989,
    r"H100 NVL": 835,
    r"H100 PCIe": 756,
    r"H100 80GB HBM3": 989,
    r"H200": 989,
    r"B200": 2250,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device by its data sheet; None for a CPU or a GPU not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = (peak for part, peak in _PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    return next((peak * 1e12 for peak in known), None)


def training_flops(model: TransformerDecoder, batch_size: int, seq_len: int) -> float:
    """FLOPs of one training step.

    Each weight takes 2 FLOPs a token in the forward pass and 2 for the gradient of its input, and,
    if it is trained, 2 for its own gradient.

    Args:
        model (TransformerDecoder): The model, on any device, also the meta device.
        batch_size (int): Documents: for packed sequences, all documents of all packs.
        seq_len (int): Tokens a document.

    Returns:
        float: FLOPs, forward and backward.
    """
    per_token = sum(w.numel() * (6 if w.requires_grad else 4) for w in _matrices(model))
    return batch_size * (seq_len * per_token + 3 * _attention_flops(model, seq_len))


def prefill_flops(model: TransformerDecoder, batch_size: int, seq_len: int) -> float:
    """FLOPs of one forward pass of which only the last position's logits are asked for.

    Args:
        model (TransformerDecoder): The model, on any device, also the meta device.
        batch_size (int): Prompts.
        seq_len (int): Tokens a prompt.

    Returns:
        float: FLOPs.
    """
    head = _head(model).numel()
    per_token = 2 * (sum(w.numel() for w in _matrices(model)) - head)
    return batch_size * (seq_len * per_token + 2 * head + _attention_flops(model, seq_len))


def _matrices(model: TransformerDecoder) -> list[nn.Parameter]:
    """The weights that tokens are multiplied by; a row of an embedding is only copied."""
    embedding, head = model.tok_embeddings.weight, _head(model)
    return [p for p in model.parameters() if p.ndim == 2 and (p is head or p is not embedding)]


def _head(model: TransformerDecoder) -> nn.Parameter:
    tied = not isinstance(model.output, nn.Module)  # torchtune's TiedLinear is none
    return model.tok_embeddings.weight if tied else model.output.weight


def _attention_flops(model: TransformerDecoder, seq_len: int) -> float:
    """FLOPs of the forward pass of causal attention over one document, sliding windows ignored."""
    dims = sum(layer.attn.num_heads * layer.attn.head_dim for layer in model.layers)
    return 2 * dims * seq_len**2
