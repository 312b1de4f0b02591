"""What every op of the package shares: the library it is registered in and its argument checks.

An op has a schema and a reference in plain PyTorch, which serves every device that has no kernel of
its own: the CPU where ATen has a better one, CUDA when the compiled library is loaded.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from torchtune_fused.build import load_kernels

LIBRARY = torch.library.Library("torchtune_fused", "DEF")


@dataclass
class _Op:
    """An op, as the dispatcher knows it, and the shortest ways past the dispatcher."""

    overload: torch._ops.OpOverload
    on_cpu: Callable
    everywhere: Callable | None  # the same function on all devices, if the op is made of others
    function: type[Function] | None = None  # with its gradient, if it has one

    def run(self, *args):
        """Computes the op for tensors that neither autograd nor a tracer watches."""
        if self.everywhere is not None:
            return self.everywhere(*args)
        if args[0].is_cpu:
            return self.on_cpu(*args)
        if self.function is None:
            return self.overload(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)


_ops: dict[str, _Op] = {}


def define_op(
    schema: str, cpu: Callable | None = None, *, composite: bool = False
) -> Callable[[Callable], Callable]:
    """Declares an op by its schema, with the decorated function as its reference.

    Args:
        schema (str): the schema without the namespace, e.g. ``"relu(Tensor x) -> Tensor"``.
        cpu (Callable | None): what runs on the CPU. Default: the reference.
        composite (bool): whether the op is made of others, so that the reference is all there is on
            any device.

    Returns:
        Callable[[Callable], Callable]: decorator which gives the function back unchanged.
    """

    def register(reference: Callable) -> Callable:
        name, on_cpu = schema.partition("(")[0], cpu or reference
        on_any = _loading_kernels(reference)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, on_cpu, "CPU")
        LIBRARY.impl(name, on_any, "CompositeExplicitAutograd")
        overload = getattr(torch.ops.torchtune_fused, name).default
        _ops[name] = _Op(overload, on_cpu, on_any if composite else None)
        return reference

    return register


def _loading_kernels(reference: Callable) -> Callable:
    """``reference``, which loads the kernels when it first meets a CUDA tensor.

    That one call still runs on the reference; the kernels, once loaded, take its place. Not sooner:
    asking for the GPU initialises CUDA, which a process that is yet to fork must not do.
    """
    loaded = False

    @functools.wraps(reference)
    def run(*args):
        nonlocal loaded
        if not loaded and _on_cuda(args):
            load_kernels()
            loaded = True
        return reference(*args)

    return run


def _on_cuda(arg) -> bool:
    """Whether an argument is a CUDA tensor, or several of which one is."""
    if isinstance(arg, list | tuple):
        return any(_on_cuda(each) for each in arg)
    return isinstance(arg, Tensor) and arg.is_cuda


def register_autograd(
    name: str,
    backward: Callable,
    setup_context: Callable,
    *,
    differentiable: int = 1,
    twice: bool = False,
) -> None:
    """Gives an op a gradient, by its first outputs; the others only serve the backward pass.

    Args:
        name (str): the op, without the namespace.
        backward (Callable): from the context and the gradients of the first outputs to a tuple of
            the gradients of all inputs.
        setup_context (Callable): keeps in the context what backward needs, from ``inputs`` and
            ``output``; see ``torch.library.register_autograd``.
        differentiable (int): how many outputs are differentiable.
        twice (bool): whether ``backward`` is made of differentiable ops. If it is not, gradients of
            gradients are an error.
    """

    def setup(ctx, inputs, output):
        # No zeros in place of gradients that nobody computed: they may be as large as activations.
        # Only where another output has one is there something to compute.
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[differentiable:])
            ctx.out_shapes = [out.shape for out in output[:differentiable]]
        setup_context(ctx, inputs, output)

    def formula(ctx, *grads):
        if not twice:
            refuse_create_graph(name)
        grads = grads[:differentiable]
        if any(grad is None for grad in grads):
            known = next((grad for grad in grads if grad is not None), None)
            if known is None:
                return (None,) * len(ctx.needs_input_grad)
            shaped = zip(grads, ctx.out_shapes, strict=True)
            grads = [known.new_zeros(shape) if grad is None else grad for grad, shape in shaped]
        return backward(ctx, *grads)

    torch.library.register_autograd(
        f"torchtune_fused::{name}", formula, setup_context=setup, lib=LIBRARY
    )
    op = _ops[name]

    def forward(ctx, *args):
        output = op.run(*args)
        setup(ctx, args, output)
        return output

    # By its name a profiler knows it, forward and backward.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
    op.function = type(f"torchtune_fused::{name}", (Function,), methods)


def refuse_create_graph(name: str) -> None:
    """Raises in a backward pass that is itself recorded, by an op whose gradient has none."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name} has no second derivative: run the backward pass without create_graph=True"
        )


def call(name: str, *args):
    """Runs an op, past the dispatcher when no tracer has to see it.

    The way from Python through the dispatcher back to Python and, once more, to autograd costs as
    much as the ops themselves for the few tokens of a decoding step, and more than a layer's
    kernels take to launch in training.
    """
    op = _ops[name]
    if is_traced():
        return op.overload(*args)
    if not torch.is_grad_enabled():
        return op.run(*args)
    if op.function is None:
        return op.overload(*args)
    return op.function.apply(*args)


def is_traced() -> bool:
    """Whether a compiler or a dispatch mode is watching what ops are called."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in the precision references compute in: fp32, or fp64 for an fp64 tensor."""
    return x if x.dtype == torch.float64 else x.float()


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with its last dimension dense, as the attention kernels read rows; rarely a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_tensor(
    op: str, name: str, x: Tensor, shape: Sequence[int], like_name: str, like: Tensor
) -> None:
    """Raises unless ``x`` has a shape and the dtype and device of ``like``."""
    # In one function, and calling others only to complain: decoding does this for every argument.
    if x.shape != shape:
        check_shape(op, name, x, shape)
    if x.dtype != like.dtype or x.device != like.device:
        check_like(op, name, x, like_name, like)


def check_shape(op: str, name: str, x: Tensor, expected: Sequence[int]) -> None:
    """Raises a ValueError unless ``x`` has the expected shape."""
    if x.shape != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, got {list(x.shape)}")


def check_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raises unless ``x`` has the dtype (TypeError) and device (ValueError) of ``like``."""
    if x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype} as {like_name} is, got {x.dtype}")
    check_device(op, name, x, like_name, like)


def check_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raises a ValueError unless ``x`` is on the device of ``like``."""
    if x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as {like_name} is, got {x.device}")


def check_floating(op: str, name: str, x: Tensor) -> None:
    """Raises a TypeError unless ``x`` is of a floating-point dtype."""
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be of a floating-point dtype, got {x.dtype}")


def check_softcap(op: str, softcap: float | None) -> None:
    """Raises a ValueError unless the softcap is positive or absent."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")
