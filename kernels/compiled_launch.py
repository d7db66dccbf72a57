"""A compiled kernel's launch, with what Triton's JIT finds out at every call found out once.

Triton's C launcher takes grid, stream, function and arguments. What its JIT does before (bind and specialise the
arguments, look the kernel up, encode tensor maps, call hooks) follows from the signature of a call. Triton 3.6 builds a
launcher for each signature of a kernel; 3.7 and later have one for all, which is also told the arguments' types. The
driver gets the same bytes either way: tests/kernels/test_launch.py compares them. Where a later Triton has neither, or
a kernel needs scratch memory, its public ``CompiledKernel.run`` is called instead, which costs the host more.
"""

import itertools
from collections.abc import Callable
from functools import lru_cache
from inspect import getclosurevars, signature
from types import SimpleNamespace

from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.runtime import driver

TENSOR_MAPS = 8192  # kept in all, by address; half a kilobyte each

_ENCODER_ARGUMENTS = len(signature(make_tensordesc_arg).parameters)  # three from Triton 3.9 on


def prepare(compiled, grid: tuple[int, ...], sizes: tuple[int, ...], matrices: tuple) -> Callable:
    """A function (stream, tensors, numbers) that launches. ``matrices`` are how the first of the tensors are
    described."""
    x, y, z = (*grid, 1, 1)[:3]
    n = len(matrices)
    launch, fixed = _c_launcher(compiled)
    if launch is None:
        run, fixed = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)

        def prepared(stream: int, tensors: tuple, numbers: tuple) -> None:
            described = [matrix.of(tensor) for matrix, tensor in zip(matrices, tensors, strict=False)]
            run(x, y, z, stream, *fixed, *described, *tensors[n:], *numbers, *sizes)

    elif matrices:
        operands = tuple(_Operand(*both) for both in zip(matrices, compiled.metadata.tensordesc_meta, strict=True))

        def prepared(stream: int, tensors: tuple, numbers: tuple) -> None:
            addresses = [tensor.data_ptr() for tensor in tensors]
            described = _described(operands, *addresses[:n])
            launch(x, y, z, stream, *fixed, (*described, *addresses[n:], *numbers, *sizes))

    else:

        def prepared(stream: int, tensors: tuple, numbers: tuple) -> None:
            launch(x, y, z, stream, *fixed, (*[tensor.data_ptr() for tensor in tensors], *numbers, *sizes))

    return prepared


def _c_launcher(compiled) -> tuple[Callable | None, tuple]:
    """Triton's C launcher, a function of grid, stream, what is ``fixed``, and a tuple of the arguments before the
    constexprs; None where it is not as we know it."""
    run, packed = compiled.run, compiled.packed_metadata
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None, ()
    n_constexprs = sum(parameter.is_constexpr for parameter in compiled.src.fn.params)  # the kernel's last parameters
    head = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "arg_annotations"):  # Triton 3.7 and later
        kinds = run.arg_annotations[: len(run.arg_annotations) - n_constexprs]
        return driver.active.utils.launch, (*head, packed, None, None, None, None, None, kinds, run.kernel_signature)
    encodes = hasattr(run.launch, "__closure__")  # a function of Triton's that encodes tensor maps, then launches
    launch = getclosurevars(run.launch).nonlocals.get("launcher") if encodes else run.launch
    if launch is None:
        return None, ()
    constexprs = (None,) * n_constexprs
    one_by_one = lambda *given: launch(*given[:-1], *given[-1], *constexprs)
    return one_by_one, (*head, None, None, packed, None, None, None)


class _Operand:
    """A matrix that a kernel gets as a TMA descriptor, but for its address, and how Triton encodes that."""

    def __init__(self, matrix, encoding: dict):
        self.shape, self.strides, self.encoding = list(matrix.shape), list(matrix.strides), encoding


@lru_cache(maxsize=TENSOR_MAPS)
def _described(operands: tuple[_Operand, ...], *addresses: int) -> tuple:
    """The arguments that stand for matrices at these addresses."""
    return tuple(itertools.chain.from_iterable(map(_encoded, operands, addresses)))


@lru_cache(maxsize=TENSOR_MAPS)
def _encoded(operand: _Operand, address: int) -> list:
    """A matrix's tensor map, shape and strides."""
    base = SimpleNamespace(data_ptr=lambda: address)
    matrix = SimpleNamespace(
        base=base, shape=operand.shape, strides=operand.strides, padding="zero", round_f32_to_tf32=False
    )
    return make_tensordesc_arg(matrix, operand.encoding, *(None,) * (_ENCODER_ARGUMENTS - 2))
