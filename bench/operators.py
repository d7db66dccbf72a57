"""Counts what a call does on a GPU without one: launches and bytes of torch's operators, and of our kernels in Triton's
interpreter (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_fast.kernels.inspection import interpreter

NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
NO_LAUNCH |= {"promote_types", "randint", "_local_scalar_dense"}  # the last two draw our seed, on a GPU on the host
OVERWRITING = {"copy_", "fill_", "zero_"}  # operators that do not read what they write into


class Operators(TorchDispatchMode):
    """Counts the operators that launch a kernel on a GPU, and the bytes of their operands, each operand once. Views and
    allocations are no launches. An operator of a library counts once."""

    looks_inside = True  # of this library's ops (ops/observers.py)
    count, bytes = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = operator(*args, **kwargs), operator.overloadpacket.__name__
        is_view = any(
            argument.alias_info and not argument.alias_info.is_write for argument in operator._schema.arguments
        )
        if not is_view and name not in NO_LAUNCH:
            self.count += 1
            self.bytes += _bytes((args[1:] if name in OVERWRITING else args, kwargs)) + _bytes(result)
        return result


def counted(call: Callable[[], object]) -> tuple[int, int]:
    """Returns the launches of a call, and the bytes that they move: of torch's operators each operand once, of our
    kernels what the interpreter loads and stores."""
    with interpreter.traffic() as ours, Operators() as operators:
        call()
    return operators.count + len(ours.launches), operators.bytes + ours.total


def _bytes(tree: object) -> int:
    """Returns the bytes of the elements of the tensors in ``tree``, those of a broadcast dimension once."""
    return sum(_elements(leaf) * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _elements(tensor: Tensor) -> int:
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return tensor.numel() and math.prod(sizes)
