"""Drawing the next tokens from logits, with the state of the random numbers on the device.

Gumbel-max trick: Maddison et al., A* Sampling, https://arxiv.org/abs/1411.0030. Random numbers:
Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (Philox 4x32-10), 2011.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, check_device, check_shape, define_op


def decode_sample(
    logits: Tensor,
    rng_state: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One token per row, drawn from ``softmax(logits / temperature)`` cut by top-k, then by top-p.

    The noise is a function of ``rng_state``, the row and the vocabulary index only, and the state
    advances on the device: replaying a captured call draws anew, and the same state draws the same.

    Args:
        logits (Tensor): fp32 of shape ``[b, vocab]``. ``-inf`` is never drawn from a row with any
            finite logit. A row that holds NaN or inf gives some token of the vocabulary: the first
            NaN (as in ``torch.argmax``) or inf if ``temperature`` is 0, else any.
        rng_state (Tensor): int64 ``[seed, offset]``; one is added to the offset, in place.
        temperature (float): what the logits are divided by; 0 takes the largest logit, the first of
            equals, whatever the filters, and leaves ``rng_state`` alone.
        top_k (int | None): keep the ``top_k`` largest logits, and all that equal the last of them.
        top_p (float | None): of those, keep a token while the probability of the tokens before it
            has not reached ``top_p`` (nucleus sampling, https://arxiv.org/abs/1904.09751). Tokens
            are ordered by descending logit, equals by index; the first is always kept.

    Returns:
        Tensor: token ids, int64 of shape ``[b]``.

    Raises:
        TypeError: if ``logits`` is not fp32 or ``rng_state`` not int64.
        ValueError: if shapes or devices don't fit, ``temperature < 0``, ``top_k < 1``, or ``top_p``
            is not in (0, 1].
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
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}")
    return torch.ops.torchtune_fused.decode_sample(
        logits.contiguous(), rng_state, temperature, top_k, top_p
    )


@define_op(
    "decode_sample(Tensor logits, Tensor(a!) rng_state, float temperature, int? top_k=None, "
    "float? top_p=None) -> Tensor"
)
def _reference(logits, rng_state, temperature, top_k=None, top_p=None):
    if temperature == 0:
        return logits.argmax(-1)
    # The largest logit is taken off first, so that no temperature overflows.
    inverse = min(1 / temperature, torch.finfo(torch.float32).max)
    scores = (logits - logits.amax(-1, keepdim=True)) * inverse
    scores = filter_logits(scores, top_k=top_k, top_p=top_p)
    scores += _gumbel(rng_state, *logits.shape)
    rng_state[1] += 1
    return scores.argmax(-1)


@torch.library.register_fake("torchtune_fused::decode_sample", lib=LIBRARY)
def _(logits, rng_state, temperature, top_k=None, top_p=None):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def filter_logits(
    logits: Tensor, *, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Put the logits that top-k and then top-p discard at minus infinity.

    Args:
        logits (Tensor): ``[b, vocab]``, already divided by the temperature.
        top_k (int | None): As in :func:`decode_sample`; more than the vocabulary keeps all.
        top_p (float | None): As in :func:`decode_sample`.

    Returns:
        Tensor: logits of the same shape and dtype.
    """
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        # In double precision: a running sum of fp32 drifts by more than the smallest of its terms.
        before = probs.cumsum(-1, dtype=torch.float64) - probs
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, tokens, ordered)
    return logits


_LOW = 0xFFFFFFFF


def _gumbel(rng_state: Tensor, rows: int, vocab: int) -> Tensor:
    """Gumbel noise of shape ``[rows, vocab]``, as the kernel draws it."""
    device = rng_state.device
    seed, offset = rng_state.unbind()
    quads = torch.arange((vocab + 3) // 4, device=device).expand(rows, -1)
    row = torch.arange(rows, device=device).unsqueeze(1).expand_as(quads)
    counter = [quads, row, (offset & _LOW).expand_as(row), (offset >> 32 & _LOW).expand_as(row)]
    bits = torch.stack(_philox(counter, [seed & _LOW, seed >> 32 & _LOW]), -1)
    return _gumbel_from(bits.flatten(1)[:, :vocab])


def _gumbel_from(bits: Tensor) -> Tensor:
    """Gumbel noise from uniform 32-bit integers.

    What draws an unlikely token is the upper tail of the noise, which therefore comes from uniform
    numbers near 0, where floats are fine, and never from one that was rounded to 1: that would be
    infinite noise.
    """
    uniform = (bits.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


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
