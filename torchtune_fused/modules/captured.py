"""Functions of tensors as CUDA graphs: one launch from the host instead of hundreds."""

from collections.abc import Callable

import torch
from torch import Tensor


class CapturedCall:
    """A function that is captured in a CUDA graph and replayed from then on.

    The first call runs the function as it is, which initialises whatever it initialises lazily;
    the second captures it; all later ones copy their inputs into the graph's and replay it. So the
    function must do the same launches each time, on memory that stays where it is, without looking
    at values from the host. On other devices than CUDA every call runs the function.

    Args:
        function (Callable[..., Tensor]): Takes tensors of fixed shapes or None, returns a tensor.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor | None, ...] = ()
        self._output: Tensor | None = None
        self._warm = False

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Call the function.

        Args:
            *inputs (Tensor | None): As the function takes them, of the shapes of the first call.

        Returns:
            Tensor: What the function returns. The next call overwrites it.
        """
        device = next(x.device for x in inputs if x is not None)
        if not self._warm or device.type != "cuda":
            self._warm = True
            return self._function(*inputs)
        with torch.cuda.device(device):  # graphs are captured and replayed on the current one
            if self._graph is None:
                self._capture(inputs)
            for static, x in zip(self._inputs, inputs, strict=True):
                if static is not None and static is not x:
                    static.copy_(x)
            self._graph.replay()
        return self._output

    def own_input(self, place: int) -> Tensor | None:
        """The graph's own memory of an input, to write the next one into and pass it to the call.

        Args:
            place (int): Which input.

        Returns:
            Tensor | None: None if that input is, or if nothing has been captured yet.
        """
        return None if self._graph is None else self._inputs[place]

    def _capture(self, inputs: tuple[Tensor | None, ...]) -> None:
        # A call in inference mode may be followed by one outside, which must write to these too.
        with torch.inference_mode(False):
            static = tuple(None if x is None else x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using CUDA (a data loader pinning memory, say).
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._function(*static)
        # Only now: a capture that failed leaves the object as it was.
        self._graph, self._inputs, self._output = graph, static, output
