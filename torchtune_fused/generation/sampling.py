"""From next-token logits to tokens: greedy, temperature, top-k and top-p, on the logits' device."""

import torch
from torch import Tensor


class Sampler:
    """Draws one token a row from next-token logits, with no host synchronisation.

    The filters apply in the order of transformers: temperature, then top-k, then top-p.

    Args:
        temperature (float): What the logits are divided by; 0 takes the largest logit (greedy).
        top_k (int | None): Keep the ``top_k`` largest logits, and all that tie with the last of
            them.
        top_p (float | None): Keep the smallest set of tokens whose probabilities reach ``top_p``
            (nucleus sampling, https://arxiv.org/abs/1904.09751).
        seed (int | None): Seed of this sampler's own generator; without one, torch's default
            generator of the device is used.
        device (torch.device | str): Device of the logits to come.

    Raises:
        ValueError: If ``temperature`` is not a finite number >= 0, ``top_k`` is not an integer
            >= 1, ``top_p`` is outside (0, 1], or ``seed`` is not an integer.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not _is_number(temperature) or not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
        if top_k is not None and (not is_int(top_k) or top_k < 1):
            raise ValueError(f"top_k must be an integer >= 1 (or None to keep all), got {top_k!r}")
        if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1] (or None to keep all), got {top_p!r}")
        if seed is not None and not is_int(seed):
            raise ValueError(f"seed must be an integer (or None), got {seed!r}")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._generator = None
        if seed is not None:
            self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw one token a row.

        Args:
            logits (Tensor): ``[b, vocab]``, floating point.

        Returns:
            Tensor: token ids, int64 ``[b]``.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        # The largest logit is taken off first, so that no temperature overflows.
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        probs = filter_logits(logits, top_k=self.top_k, top_p=self.top_p).softmax(-1)
        # An exponential race: the first of independent arrivals with rates p is i with
        # probability p_i. torch.multinomial does the same, but checks its input on the host.
        arrivals = torch.empty_like(probs).exponential_(1, generator=self._generator)
        return (probs / arrivals).argmax(-1)


def filter_logits(
    logits: Tensor, *, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Put the logits that top-k and then top-p discard at minus infinity.

    Args:
        logits (Tensor): ``[b, vocab]``, already divided by the temperature.
        top_k (int | None): As in :class:`Sampler`; more than the vocabulary keeps all.
        top_p (float | None): As in :class:`Sampler`; the likeliest token is always kept.

    Returns:
        Tensor: logits of the same shape and dtype.
    """
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, tokens = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # A token is kept while those before it have not reached top_p.
        ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, tokens, ordered)
    return logits


def is_int(value) -> bool:
    """Whether ``value`` is an integer; True and False, which Python counts as ones, are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return is_int(value) or isinstance(value, float)
