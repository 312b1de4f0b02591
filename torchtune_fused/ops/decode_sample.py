"""Drawing the next tokens from logits, with the state of the random numbers on the device.

Gumbel-max trick: Maddison et al., A* Sampling, https://arxiv.org/abs/1411.0030. Random numbers:
Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (Philox 4x32-10), 2011.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, check_device, check_shape, define_op


def decode_sample(logits: Tensor, rng_state: Tensor, *, temperature: float = 1.0) -> Tensor:
    """One token per row, drawn from ``softmax(logits / temperature)``.

    The noise is a function of ``rng_state``, the row and the vocabulary index only, and the state
    advances on the device: replaying a captured call draws anew, and the same state draws the same.

    Args:
        logits (Tensor): fp32 of shape ``[b, vocab]``; ``-inf`` is never drawn from a row with any
            finite logit, so filters such as top-k may come before.
        rng_state (Tensor): int64 ``[seed, offset]``; one is added to the offset, in place.
        temperature (float): what the logits are divided by; 0 takes the largest logit, the first of
            equals, and leaves ``rng_state`` alone.

    Returns:
        Tensor: token ids, int64 of shape ``[b]``.

    Raises:
        TypeError: if ``logits`` is not fp32 or ``rng_state`` not int64.
        ValueError: if shapes or devices don't fit, or ``temperature < 0``.
    """
    op = "decode_sample"
    if logits.dtype != torch.float32 or rng_state.dtype != torch.int64:
        raise TypeError(
            f"{op}: logits must be float32 and rng_state int64, got {logits.dtype} and "
            f"{rng_state.dtype}"
        )
    if logits.ndim != 2:
        raise ValueError(f"{op}: logits must have shape [b, vocab], got {list(logits.shape)}")
    check_shape(op, "rng_state", rng_state, (2,))
    check_device(op, "rng_state", rng_state, "logits", logits)
    if not temperature >= 0:
        raise ValueError(f"{op}: temperature must be at least 0, got {temperature}")
    return torch.ops.torchtune_fused.decode_sample(logits.contiguous(), rng_state, temperature)


@define_op("decode_sample(Tensor logits, Tensor(a!) rng_state, float temperature) -> Tensor")
def _reference(logits, rng_state, temperature):
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits / temperature + _gumbel(rng_state, *logits.shape)
    rng_state[1] += 1
    return scores.argmax(-1)


@torch.library.register_fake("torchtune_fused::decode_sample", lib=LIBRARY)
def _(logits, rng_state, temperature):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_LOW = 0xFFFFFFFF


def _gumbel(rng_state: Tensor, rows: int, vocab: int) -> Tensor:
    """Gumbel noise of shape ``[rows, vocab]``, as the kernel draws it."""
    device = rng_state.device
    seed, offset = rng_state.unbind()
    quads = torch.arange((vocab + 3) // 4, device=device).expand(rows, -1)
    row = torch.arange(rows, device=device).unsqueeze(1).expand_as(quads)
    counter = [quads, row, (offset & _LOW).expand_as(row), (offset >> 32 & _LOW).expand_as(row)]
    bits = torch.stack(_philox(counter, [seed & _LOW, seed >> 32 & _LOW]), -1)
    uniform = ((bits >> 8).flatten(1)[:, :vocab].float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform))


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four 32-bit words for each counter of four, in int64, whose products wrap as uint64 do."""
    x, y, z, w = counter
    first, second = key
    for _ in range(10):
        a, b = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = (
            (b >> 32 & _LOW) ^ y ^ first,
            b & _LOW,
            (a >> 32 & _LOW) ^ w ^ second,
            a & _LOW,
        )
        first, second = first + 0x9E3779B9 & _LOW, second + 0xBB67AE85 & _LOW
    return [x, y, z, w]
