"""Counts the bytes that kernels load and store by running them in Triton's interpreter (``TRITON_INTERPRET=1``), and
makes the interpreter faster."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from . import operators


def patch_once() -> None:
    """Makes the interpreter faster, with the same results: it repeats much work that depends on types alone."""
    _patch_language_once()
    _remember_shapes()
    _accept_equal_dtypes()
    _remember_dtypes()
    operators.patch()


def _patch_language_once() -> None:
    """The interpreter patches Triton's language at every call of a device function, although the launch has already
    patched it for kernels, and patches for Triton's own device functions persist. So one patch for each function is
    enough."""
    call, seen = InterpretedFunction.__call__, set()

    def call_unpatched(self, *args, **kwargs):
        if self.fn not in seen:
            seen.add(self.fn)
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call_unpatched


def _remember_shapes() -> None:
    """Triton checks, counts and prints a shape for each type that an operation makes, and compares the shapes of two
    blocks element by element, each as an object."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    broadcast = TritonSemantic.broadcast_impl_value
    of_types: dict[tuple, dict] = {}
    of_scalars = tl.tuple([]), tl.constexpr(1)

    def make_known_type(self, element_ty, shape):
        key = element_ty.name, *[getattr(size, "value", size) for size in shape]
        if key not in of_types:
            make_type(self, element_ty, shape)
            of_tensors = tl.tuple([tl.constexpr(size) for size in self.shape]), tl.constexpr(self.numel)
            of_types[key] = vars(self) | {"of_tensors": of_tensors}
        self.__dict__.update(of_types[key], element_ty=element_ty)

    def make_known_tensor(self, handle, type):
        known = getattr(type, "of_tensors", None) if type.is_block() else of_scalars
        if known is None:  # a type from before these patches
            return make_tensor(self, handle, type)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known

    def broadcast_blocks(self, lhs, rhs):
        if not (lhs.type.is_block() and rhs.type.is_block()):
            return broadcast(self, lhs, rhs)
        left, right = lhs.type.shape.values, rhs.type.shape.values
        if left == right:
            return lhs, rhs
        if len(left) != len(right) or any(a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)):
            return broadcast(self, lhs, rhs)  # which adds dimensions, or raises an error
        shape = [max(sizes) for sizes in zip(left, right, strict=True)]
        return expanded(self, lhs, left, shape), expanded(self, rhs, right, shape)

    def expanded(self, block, sizes, shape):
        if sizes == shape:
            return block
        return self.tensor(self.builder.create_broadcast(block.handle, shape), tl.block_type(block.dtype, shape))

    tl.block_type.__init__, tl.tensor.__init__ = make_known_type, make_known_tensor
    TritonSemantic.broadcast_impl_value = broadcast_blocks


def _accept_equal_dtypes() -> None:
    """Triton checks and casts both operands of each operation."""
    check, numbers = TritonSemantic.binary_op_type_checking_impl, (tl.float32, tl.float64, tl.int32, tl.int64)
    names = {dtype.name for dtype in numbers}

    def check_others(self, lhs, rhs, *args, **kwargs):
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor) and lhs.dtype.name == rhs.dtype.name in names:
            return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, *args, **kwargs)

    TritonSemantic.binary_op_type_checking_impl = check_others


def _remember_dtypes() -> None:
    """The interpreter lists all dtypes to translate one to numpy's."""
    translate, known = interpreter._get_np_dtype, {}

    def translate_once(dtype):
        if dtype.name not in known:
            known[dtype.name] = translate(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = translate_once


@dataclass
class Traffic:
    """The bytes that launches loaded and stored, and the names of the launched kernels in order."""

    loaded: int = 0
    stored: int = 0
    launches: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextmanager
def traffic():
    """Counts the launches inside the context in the ``Traffic`` that it yields. Masked elements do not count."""
    counted = Traffic()
    builder, function = InterpreterBuilder, InterpretedFunction
    load, store, run = builder.create_masked_load, builder.create_masked_store, function.run

    def counting_load(self, ptrs, mask, *args, **kwargs):
        counted.loaded += _bytes(ptrs, mask)
        return load(self, ptrs, mask, *args, **kwargs)

    def counting_store(self, ptrs, value, mask, *args, **kwargs):
        counted.stored += _bytes(ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    def counting_run(self, *args, **kwargs):
        counted.launches.append(self.__name__)
        return run(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store, function.run = counting_load, counting_store, counting_run
    try:
        yield counted
    finally:
        builder.create_masked_load, builder.create_masked_store, function.run = load, store, run


def _bytes(ptrs, mask) -> int:
    return int(np.count_nonzero(mask.data)) * (ptrs.get_element_ty().primitive_bitwidth // 8)
