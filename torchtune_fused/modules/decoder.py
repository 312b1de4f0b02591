"""torchtune's TransformerDecoder with captured decoding steps, and a head that a loss can take."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask
from torchtune.modules import TiedLinear, TransformerDecoder

from torchtune_fused.modules._plain import forward_as, is_plain, share_state
from torchtune_fused.modules.loss import ChunkCount, leave_head
from torchtune_fused.modules.step_runner import StepRunner
from torchtune_fused.ops import tied_embedding


class CapturedSteps(TransformerDecoder):
    """What a decoder needs to run its decoding steps as one CUDA graph."""

    _runner: StepRunner | None = None

    def step(self, x: Tensor, mask: Tensor | None, input_pos: Tensor | None) -> Tensor | None:
        """One decoding step: :meth:`StepRunner.__call__` on this decoder."""
        if self._runner is None:
            self._runner = StepRunner()
        return self._runner(self, x, mask, input_pos)

    def reset_caches(self) -> None:
        """Empty the KV caches."""
        super().reset_caches()
        if self._runner is not None:
            self._runner.forget_length()


class HeadForLoss(TransformerDecoder):
    """What a decoder needs to leave its head to the loss (``modules/loss.py``)."""

    #: Whether ``forward`` ends with normalised hidden states ``[b, s, embed_dim]``, in the weights'
    #: dtype, in place of logits.
    skip_output_layer: bool = False

    def forward(self, tokens: Tensor, **kwargs) -> Tensor | list[Tensor]:
        """As in torchtune; a tied head that is left to the loss shares the embedding's gradient."""
        if not self._shares_gradient():
            return super().forward(tokens, **kwargs)
        embedding, views = self.tok_embeddings, []

        def embed(ids: Tensor) -> Tensor:
            h, view = tied_embedding(ids, embedding.weight)
            views.append(view)
            return h

        with forward_as(embedding, embed):  # so that the rest of torchtune's forward runs as it is
            hidden = super().forward(tokens, **kwargs)
        leave_head(hidden, *views)
        return hidden

    def _shares_gradient(self) -> bool:
        """Whether the weight is one plain tensor that nothing but embedding and head depend on."""
        embedding = self.tok_embeddings
        return (
            self.skip_output_layer
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and isinstance(self.output, TiedLinear)
            and self.output.tied_module is embedding
            and is_plain(embedding, nn.Embedding)
            and embedding.weight.requires_grad
            and embedding.padding_idx is None
            and embedding.max_norm is None
            and not (embedding.scale_grad_by_freq or embedding.sparse)
            and not (self.output_hidden_states or isinstance(self, FSDPModule))
        )

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """As in torchtune; a loss that comes with the number may take the head over."""
        super().set_num_output_chunks(int(num_output_chunks))
        if isinstance(num_output_chunks, ChunkCount):
            num_output_chunks.loss.set_model_output(self)

    def unembed(self, h: Tensor) -> Tensor | list[Tensor]:
        """The last norm and, unless ``skip_output_layer``, the head."""
        return self.norm(h) if self.skip_output_layer else super().unembed(h)


class FusedTransformerDecoder(HeadForLoss, CapturedSteps):
    """Drop-in for :class:`torchtune.modules.TransformerDecoder`: same state dict and results.

    On a GPU, with KV caches and without gradients, calls of up to 16 tokens run as one CUDA graph
    over the decoding kernels; everything else runs as in torchtune.
    """

    @classmethod
    def from_stock(cls, module: TransformerDecoder) -> "FusedTransformerDecoder":
        """The same decoder, sharing all of its state with ``module``."""
        return share_state(module, TransformerDecoder, cls)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | BlockMask | None = None,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """As :meth:`torchtune.modules.TransformerDecoder.forward`.

        Args:
            tokens (Tensor): Token ids ``[b, s]``.
            mask (Tensor | BlockMask | None): As there; required with KV caches.
            encoder_input (Tensor | None): As there.
            encoder_mask (Tensor | None): As there.
            input_pos (Tensor | None): As there; required with KV caches.

        Returns:
            Tensor | list[Tensor]: fp32 logits ``[b, s, vocab_size]``, the list that
            ``output_hidden_states`` or ``set_num_output_chunks`` ask for, or what
            ``skip_output_layer`` does.

        Raises:
            ValueError: As there, or if the KV caches are full.
        """
        if encoder_input is None and mask is not None and input_pos is not None:
            logits = self.step(tokens, mask, input_pos)
            if logits is not None:
                return logits.clone()  # the next step overwrites it
        return super().forward(
            tokens,
            mask=mask,
            encoder_input=encoder_input,
            encoder_mask=encoder_mask,
            input_pos=input_pos,
        )
