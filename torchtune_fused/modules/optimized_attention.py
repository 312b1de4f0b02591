"""Multi-head attention that stands alone, for models not built from torchtune's parts."""

from torch import Tensor, nn

from torchtune_fused.ops import attention


class OptimizedAttention(nn.Module):
    """Multi-head self-attention of every token to every token.

    Args:
        d_model (int): size of the input and of the output.
        n_heads (int): number of heads; divides ``d_model``.

    Raises:
        ValueError: if ``n_heads`` doesn't divide ``d_model``.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        if d_model % n_heads != 0:
            raise ValueError(f"n_heads ({n_heads}) must divide d_model ({d_model})")
        self.n_heads = n_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.output_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Applies attention.

        Args:
            x (Tensor): input of shape ``[b, s, d_model]``.
            mask (Tensor | None): bool of shape ``[b or 1, s, s]``; True lets a token attend.

        Returns:
            Tensor: shape and dtype of ``x``.
        """
        q, k, v = (
            projection(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.output_proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))
