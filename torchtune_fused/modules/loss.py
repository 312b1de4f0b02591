"""torchtune's cross-entropy losses on the fused op, which projects hidden states by itself.

A loss and its model have to be introduced to each other: the model then leaves out its head, and
the loss uses it. Recipes of torchtune's main branch do so by ``loss.set_model_output(model)``.
Those of 0.6.1 know one loss by its name, and hand the model that loss's number of chunks.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder
from torchtune.modules import loss as stock
from torchtune.modules.tied_linear import TiedLinear

from torchtune_fused.modules._plain import forward_as, is_plain_tensor
from torchtune_fused.ops import linear_cross_entropy


class LinearCrossEntropyLoss(stock.CEWithChunkedOutputLoss):
    """Mean cross-entropy of hidden states, by the protocol of torchtune's main branch.

    The logits of a few thousand tokens at a time are all that is ever stored; see
    :func:`torchtune_fused.ops.linear_cross_entropy`. Where a model can't leave out its head, it
    computes logits, and the loss is torchtune's ``CEWithChunkedOutputLoss``; a warning says why.

    Args:
        num_output_chunks (int): Chunks of logits, for a model that computes them.
        ignore_index (int): Label of the tokens that don't count.
        z_loss (float): Adds ``z_loss * logsumexp(logits)²`` to the loss of each token.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100, z_loss: float = 0.0):
        super().__init__(num_output_chunks, ignore_index)
        self.z_loss = z_loss
        self._obstacle: str | None = "the model is not one that torchtune_fused has patched"
        self._model: tuple[TransformerDecoder, ...] = ()  # in a tuple, so that it is no submodule

    def apply_compile_strategy(self, *args, **kwargs) -> "LinearCrossEntropyLoss":
        """As in torchtune's main branch; there is nothing to compile around the op."""
        return self

    def set_model_output(self, model: TransformerDecoder) -> None:
        """Make a model return hidden states from now on, and use its head here.

        Call it after FSDP has been applied. A model that was set before has its head back.

        Args:
            model (TransformerDecoder): A patched or sharded decoder. If its head has more to it
                than a weight, or is parallel, it returns chunks of logits instead.
        """
        self.return_head(_obstacle(model))
        if self._obstacle is not None:
            model.set_num_output_chunks(int(self.num_output_chunks))
            return
        if isinstance(model, FSDPModule) and not isinstance(_weight_owner(model), FSDPModule):
            # The head's weight is the root's, which must not free it when its own forward ends.
            model.set_reshard_after_forward(False, recurse=False)
        self._model = (model,)
        model.skip_output_layer = True

    def return_head(self, reason: str | None) -> None:
        """Let the model compute logits again; ``reason`` is what a warning says of that."""
        for model in self._model:
            model.skip_output_layer = False
        self._model, self._obstacle = (), reason

    def forward(self, outputs: Tensor | list[Tensor], targets: Tensor) -> Tensor:
        """The mean loss of the tokens that are not ignored.

        Args:
            outputs (Tensor | list[Tensor]): Hidden states ``[..., embed_dim]``, normalised; or the
                chunks of logits ``[b, s / num_output_chunks, vocab_size]`` of a model that has kept
                its head.
            targets (Tensor): Labels ``[...]``, or ``[b, s]`` for logits.

        Returns:
            Tensor: fp32 scalar; NaN if all tokens are ignored.

        Raises:
            RuntimeError: If no model has been set, or its weight is not whole.
        """
        if isinstance(outputs, list):
            self._warn_of_logits()
            return super().forward(outputs, targets)
        if not self._model:
            raise RuntimeError(
                f"{type(self).__name__} got a tensor and has no head to apply to it: call "
                "set_model_output(model) first, or in a config of torchtune 0.6.1 let loss be "
                "torchtune_fused.modules.CEWithChunkedOutputLoss"
            )
        owner = _weight_owner(self._model[0])
        if not isinstance(owner, FSDPModule):
            return self._loss(outputs, _left_head(outputs, owner.weight), targets)
        # So that FSDP gathers the weight around it.
        with forward_as(owner, lambda hidden: self._loss(hidden, owner.weight, targets)):
            return owner(outputs)

    def compute_cross_entropy(
        self, logits: Tensor, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        """The sum of the losses of one chunk of logits; see torchtune's."""
        loss = super().compute_cross_entropy(logits, labels, normalize)
        if self.z_loss:
            squares = logits.float().logsumexp(-1).square()
            loss = loss + self.z_loss * squares.masked_fill(labels == self.ignore_index, 0).sum()
        return loss

    def _loss(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if isinstance(weight, DTensor):
            raise RuntimeError(
                "the head's weight is sharded where the loss needs it: call set_model_output after "
                "FSDP has been applied, and keep the root's reshard_after_forward off"
            )
        return linear_cross_entropy(
            hidden, weight, targets, ignore_index=self.ignore_index, z_loss=self.z_loss
        )

    def _warn_of_logits(self) -> None:
        if self._obstacle is not None:
            warnings.warn(
                f"the loss is computed from logits, as {self._obstacle}; it takes more memory so",
                stacklevel=3,
            )
            self._obstacle = None  # once is enough


class CEWithChunkedOutputLoss(LinearCrossEntropyLoss):
    """:class:`LinearCrossEntropyLoss` by the protocol of torchtune 0.6.1.

    In the config of any of its fine-tuning recipes, beside a model of
    ``torchtune_fused.fused_model``::

        loss:
          _component_: torchtune_fused.modules.CEWithChunkedOutputLoss

    The recipes know it by its class's name, which is that of the loss it stands in for, and call
    ``model.set_num_output_chunks(loss.num_output_chunks)``. The number brings the loss along.
    """

    @property
    def num_output_chunks(self) -> "ChunkCount":
        """The number of chunks, by which a patched model meets this loss."""
        return ChunkCount(self._num_output_chunks, self)

    @num_output_chunks.setter
    def num_output_chunks(self, value: int) -> None:
        self._num_output_chunks = value


class ChunkCount(int):
    """A number of chunks that knows which loss wants them.

    A recipe that compares it with another loss's number is about to hand both of them the same
    outputs, as torchtune's do for knowledge distillation. So the model keeps its head then.
    """

    loss: LinearCrossEntropyLoss

    def __new__(cls, value: int, loss: LinearCrossEntropyLoss) -> "ChunkCount":
        count = super().__new__(cls, value)
        count.loss = loss
        return count

    def __eq__(self, other: object) -> bool:
        self.loss.return_head("another loss needs the logits too")
        return super().__eq__(other)

    __hash__ = int.__hash__


def leave_head(hidden: Tensor, view: Tensor) -> None:
    """Leave the loss of ``hidden`` a view of the head's weight, to be used in the weight's place.

    On the tensor, since the view belongs to the same forward pass: backward, it leads to the
    embedding that ``hidden`` came from.
    """
    hidden._head_view = view


def _left_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """The view that goes with ``hidden``, or with what that is a view of; else ``weight``."""
    if torch.compiler.is_compiling():
        return weight
    for tensor in (hidden, hidden._base):
        view = getattr(tensor, "_head_view", None)
        if view is not None and view._base is weight:
            return view
    return weight


def _weight_owner(model: TransformerDecoder) -> nn.Module:
    """The module whose weight the head multiplies by."""
    return model.output.tied_module if isinstance(model.output, TiedLinear) else model.output


def _obstacle(model: TransformerDecoder) -> str | None:
    """Why the head of a model can't be left to the loss; None if it can."""
    if not hasattr(model, "skip_output_layer"):
        return f"a {type(model).__name__} always applies its head: patch the model first"
    output = model.output
    if not isinstance(output, TiedLinear):
        # FSDP makes a class of its own for each class that it wraps.
        cls = type(output).__bases__[-1] if isinstance(output, FSDPModule) else type(output)
        if cls is not nn.Linear:
            return f"the output head is a {cls.__name__}, not an nn.Linear"
        if output.bias is not None:
            return "the output head has a bias"
    weight = _weight_owner(model).weight
    if isinstance(weight, DTensor):
        if not isinstance(model, FSDPModule) or weight.device_mesh.ndim > 1:
            return "the output head is parallelised by something else than plain FSDP"
    elif not is_plain_tensor(weight):
        return f"the output head's weight is a {type(weight).__name__}"
    return None
