"""From next-token logits to tokens: greedy, temperature, top-k and top-p, on the logits' device."""

import torch
from torch import Tensor

from torchtune_fused.ops import decode_sample


class Sampler:
    """Draws one token a row from next-token logits, with no host synchronisation.

    The filters apply in the order of transformers: temperature, then top-k, then top-p.

    Args:
        temperature (float): What the logits are divided by; 0 takes the largest logit (greedy).
        top_k (int | None): Keep the ``top_k`` largest logits, and all that tie with the last of
            them.
        top_p (float | None): Keep the smallest set of tokens whose probabilities reach ``top_p``
            (nucleus sampling, https://arxiv.org/abs/1904.09751).
        seed (int | None): Seed of this sampler's own random numbers, which are the same on every
            device; without one, torch's default generator of the device gives it.
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
        self._rng_state = torch.zeros(2, dtype=torch.int64, device=device)
        if seed is not None:
            self._rng_state[0] = (seed + 2**63) % 2**64 - 2**63  # as the 64 bits of int64
        elif temperature > 0:
            self._rng_state[:1].random_()

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw one token a row.

        Args:
            logits (Tensor): ``[b, vocab]``, floating point.

        Returns:
            Tensor: token ids, int64 ``[b]``.
        """
        return decode_sample(
            logits.float(),
            self._rng_state,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def is_int(value) -> bool:
    """Whether ``value`` is an integer; True and False, which Python counts as ones, are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return is_int(value) or isinstance(value, float)
