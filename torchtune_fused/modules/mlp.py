"""A gated MLP that stands alone, for models not built from torchtune's parts."""

from torch import Tensor, nn

from torchtune_fused.modules.feed_forward import fuse
from torchtune_fused.ops.gated_activation import ACTIVATIONS, check_activation


class MultiLayerPerceptron(nn.Module):
    """Gated MLP: ``down_proj(activation(gate_proj(x)) * up_proj(x))``.

    Args:
        input_dim (int): size of the input and of the output.
        hidden_dim (int): size of the layer between them.
        activation (str): ``"silu"``, ``"gelu_tanh"``, ``"gelu"`` or ``"relu"``.
        use_bias (bool): whether the projections have biases.

    Raises:
        ValueError: if the activation is unknown.
    """

    def __init__(
        self, input_dim: int, hidden_dim: int, activation: str = "silu", use_bias: bool = False
    ) -> None:
        super().__init__()
        check_activation("MultiLayerPerceptron", activation)
        self.activation = activation
        self.gate_proj = nn.Linear(input_dim, hidden_dim, bias=use_bias)
        self.up_proj = nn.Linear(input_dim, hidden_dim, bias=use_bias)
        self.down_proj = nn.Linear(hidden_dim, input_dim, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the MLP.

        Args:
            x (Tensor): input of shape ``[..., input_dim]``.

        Returns:
            Tensor: shape and dtype of ``x``.
        """
        out = fuse(x, self.gate_proj, self.up_proj, self.down_proj, self.activation)
        if out is None:
            activation, _ = ACTIVATIONS[self.activation]
            out = self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))
        return out


#: The name by which the module was first proposed.
MultiLayerPreceptron = MultiLayerPerceptron
