"""Text of tokens as they come, never half a character."""

from collections.abc import Callable, Sequence


class TextStream:
    """Decodes a growing list of tokens piece by piece.

    The text of a token depends on its neighbours: a character may take several tokens, and a word
    loses its leading space at the start of a text. So each piece is decoded together with the one
    before it, and held back while its last character is incomplete.

    Args:
        decode (Callable[[Sequence[int]], str]): From token ids to text, as of a tokenizer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._before: list[int] = []
        self._pending: list[int] = []

    def put(self, token: int) -> str:
        """Add a token, and return the text that is now complete; often a word, sometimes none."""
        self._pending.append(token)
        piece = self._piece()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._before, self._pending = self._pending, []
        return piece

    def end(self) -> str:
        """Return what was held back, incomplete as it is."""
        piece = self._piece()
        self._before, self._pending = [], []
        return piece

    def _piece(self) -> str:
        return self._decode(self._before + self._pending)[len(self._decode(self._before)) :]
