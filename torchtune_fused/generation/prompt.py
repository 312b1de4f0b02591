"""Prompts of every accepted form, as one left-padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtune_fused.generation.sampling import is_int


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts, padded on the left so that they all end in the same slot.

    Attributes:
        tokens (Tensor): int64 ``[b, s]``.
        padding (Tensor): int64 ``[b]``: how many leading slots of each row are padding.
    """

    tokens: Tensor
    padding: Tensor

    def to(self, device: torch.device) -> "Prompt":
        """The same prompt on another device."""
        return Prompt(self.tokens.to(device), self.padding.to(device))


def make_prompt(tokens: Sequence | Tensor, *, pad_id: int | None, vocab_size: int) -> Prompt:
    """Check a prompt and left-pad it.

    Args:
        tokens (Sequence | Tensor): One prompt as a list of ids or a tensor ``[s]``; or several,
            as a list of lists of any lengths or a tensor ``[b, s]``. In a tensor, the leading run
            of ``pad_id`` in a row is padding.
        pad_id (int | None): What fills the padding; None fills it with 0, and says that a tensor
            holds none.
        vocab_size (int): Ids must be below it.

    Returns:
        Prompt: the batch, on the device that the tokens are on (lists: the CPU).

    Raises:
        TypeError: If ``tokens`` is none of these forms.
        ValueError: If a prompt is empty, or if it or ``pad_id`` is outside of the vocabulary.
    """
    if pad_id is not None and not (is_int(pad_id) and 0 <= pad_id < vocab_size):
        raise ValueError(f"pad_id {pad_id!r} is outside of the vocabulary of {vocab_size}")
    if isinstance(tokens, Tensor):
        prompt = _from_tensor(tokens, pad_id)
    else:
        prompt = _from_lists(tokens, pad_id)
    lengths = prompt.tokens.shape[1] - prompt.padding
    if not lengths.numel() or lengths.min() < 1:
        raise ValueError("empty prompt: every prompt needs at least one token")
    outside = (prompt.tokens < 0) | (prompt.tokens >= vocab_size)
    if outside.any():
        row, slot = outside.nonzero()[0].tolist()
        raise ValueError(
            f"token {prompt.tokens[row, slot].item()} of prompt {row} is outside of the "
            f"vocabulary of {vocab_size}: was it made with this model's tokenizer?"
        )
    return prompt


def _from_tensor(tokens: Tensor, pad_id: int | None) -> Prompt:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise TypeError(f"prompt tokens must be integers, got a tensor of {tokens.dtype}")
    if tokens.ndim not in (1, 2):
        raise ValueError(f"prompt tokens must be [s] or [b, s], got {list(tokens.shape)}")
    tokens = torch.atleast_2d(tokens).long()
    if pad_id is None:
        padding = tokens.new_zeros(tokens.shape[0])
    else:
        padding = (tokens == pad_id).long().cumprod(-1).sum(-1)
    return Prompt(tokens, padding)


def _from_lists(tokens: Sequence, pad_id: int | None) -> Prompt:
    if not isinstance(tokens, Sequence) or isinstance(tokens, (str, bytes)):
        raise TypeError(
            "prompt tokens must be a list of ids, a list of such lists, or a tensor; "
            f"got {type(tokens).__name__}"
        )
    rows = tokens if tokens and isinstance(tokens[0], Sequence) else [tokens]
    for row in rows:
        if not isinstance(row, Sequence) or not all(map(is_int, row)):
            raise TypeError("prompt tokens must be integers, in one list or in a list of lists")
    longest = max(map(len, rows))
    filler = 0 if pad_id is None else pad_id
    padding = [longest - len(row) for row in rows]
    padded = [[filler] * n + list(row) for n, row in zip(padding, rows, strict=True)]
    return Prompt(torch.tensor(padded).view(len(rows), longest).long(), torch.tensor(padding))
