"""Counts the bytes that kernels load and store by running them in Triton's interpreter (``TRITON_INTERPRET=1``), and
makes the interpreter faster."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder


def patch_once() -> None:
    """Makes device functions twice as fast. The interpreter patches Triton's language at every call of a device
    function, although the launch has already patched it for kernels, and patches for Triton's own device functions
    persist. So one patch for each function is enough."""
    call, seen = InterpretedFunction.__call__, set()

    def call_unpatched(self, *args, **kwargs):
        if self.fn not in seen:
            seen.add(self.fn)
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call_unpatched


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
