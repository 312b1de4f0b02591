"""torchtune's TransformerSelfAttentionLayer, with its additions and norms as one op."""

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtune.modules import TransformerSelfAttentionLayer

from torchtune_fused.modules._plain import is_plain, share_state
from torchtune_fused.modules.feed_forward import FusedFeedForward
from torchtune_fused.modules.rms_norm import add_norm


class FusedTransformerSelfAttentionLayer(TransformerSelfAttentionLayer):
    """Drop-in for :class:`torchtune.modules.TransformerSelfAttentionLayer`, around any modules.

    Norms that are fused themselves, and carry no hooks, run as one op with the addition to the
    residual stream, forward and backward. What they give is not kept for the backward pass but
    computed anew, unless activations are checkpointed, offloaded or compiled. A feed-forward of the
    same kind adds its result to the stream in its last product.
    """

    @classmethod
    def from_stock(
        cls, module: TransformerSelfAttentionLayer
    ) -> "FusedTransformerSelfAttentionLayer":
        """The same layer, sharing all of its state with ``module``."""
        return share_state(module, TransformerSelfAttentionLayer, cls)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | BlockMask | None = None,
        input_pos: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Self-attention and feed-forward, each added to the residual stream ``x``.

        Args:
            x (Tensor): input of shape ``[b, s, embed_dim]``.
            mask (Tensor | BlockMask | None): as attention takes it.
            input_pos (Tensor | None): positions of the tokens, ``[s]`` or ``[b, s]``.
            **kwargs: ignored, as in torchtune.

        Returns:
            Tensor: shape and dtype of ``x``.
        """
        y, x, unkept = add_norm(self.sa_norm, x)
        with unkept:
            attn_out = self.sa_scale(self.attn(y, y, mask=mask, input_pos=input_pos))
        y, h, unkept = add_norm(self.mlp_norm, x, attn_out)
        with unkept:
            if is_plain(self.mlp, FusedFeedForward) and is_plain(self.mlp_scale, nn.Identity):
                return self.mlp(y, residual=h)
            return h + self.mlp_scale(self.mlp(y))
