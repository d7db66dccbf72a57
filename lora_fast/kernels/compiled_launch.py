"""Prepares a compiled kernel's launch once, so that later launches skip the work of Triton's JIT.

Triton's C launcher takes the grid, the stream, the function and the arguments. Before each launch Triton's JIT binds
and specialises the arguments, looks up the kernel, encodes tensor maps and calls hooks. The result of that work depends
on the signature of the call alone, so it is computed once and reused. Triton 3.6 builds a launcher for each signature
of a kernel; Triton 3.7 and later have one launcher for all signatures, which also takes the types of the arguments. The
driver receives the same bytes as from the JIT: tests/kernels/test_launch.py compares them. If Triton has neither
launcher, or if a kernel needs scratch memory, the public ``CompiledKernel.run`` is called instead, which costs more
host time.
"""

import itertools
from collections.abc import Callable
from functools import lru_cache
from inspect import getclosurevars, signature
from operator import itemgetter
from types import SimpleNamespace

import torch
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.runtime import driver

TENSOR_MAPS = 8192  # kept in all, by address; half a kilobyte each

_ENCODER_ARGUMENTS = len(signature(make_tensordesc_arg).parameters)  # three from Triton 3.9 on


def prepare(
    compiled, grid: tuple[int, ...], sizes: tuple[int, ...], matrices: tuple, places: tuple[int, ...] | None = None
) -> Callable:  # fmt: skip
    """Returns a function (stream, tensors, numbers) that launches a kernel.

    Args:
        compiled: Triton's compiled kernel, already loaded.
        sizes: the arguments after the numbers, which are the same for all launches.
        matrices: a ``launch.Matrix`` for each leading tensor that the kernel takes as a TMA descriptor.
        places: those of the kernel's tensors among the function's, which are all of them in order by default.
    """
    x, y, z = (*grid, 1, 1)[:3]
    n, data_ptr = len(matrices), torch.Tensor.data_ptr
    ordered: Callable = tuple if places is None else itemgetter(*places)
    launch, fixed = _c_launcher(compiled)
    if launch is None:
        run, fixed = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)

        def prepared(stream: int, tensors: tuple, numbers: tuple) -> None:
            tensors = ordered(tensors)
            described = [matrix.describe(tensor) for matrix, tensor in zip(matrices, tensors, strict=False)]
            run(x, y, z, stream, *fixed, *described, *tensors[n:], *numbers, *sizes)

    elif matrices:
        encodings = compiled.metadata.tensordesc_meta
        operands = tuple(_Operand(matrix, encoding) for matrix, encoding in zip(matrices, encodings, strict=True))

        def prepared(stream: int, tensors: tuple, numbers: tuple) -> None:
            addresses = ordered([*map(data_ptr, tensors)])
            described = _described(operands, *addresses[:n])
            launch(x, y, z, stream, *fixed, (*described, *addresses[n:], *numbers, *sizes))

    else:

        def prepared(stream: int, tensors: tuple, numbers: tuple) -> None:
            launch(x, y, z, stream, *fixed, (*ordered([*map(data_ptr, tensors)]), *numbers, *sizes))

    return prepared


def _c_launcher(compiled) -> tuple[Callable | None, tuple]:
    """Returns Triton's C launcher and its fixed arguments, or (None, ()) if this Triton's launcher is not known.

    The launcher is a function of grid, stream, the fixed arguments and a tuple of the arguments before the constexprs.
    """
    run, packed = compiled.run, compiled.packed_metadata
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None, ()  # Triton allocates scratch memory at each launch, which only ``CompiledKernel.run`` does
    n_constexprs = sum(parameter.is_constexpr for parameter in compiled.src.fn.params)  # the kernel's last parameters
    head = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "arg_annotations"):  # Triton 3.7 and later
        kinds = run.arg_annotations[: len(run.arg_annotations) - n_constexprs]
        return driver.active.utils.launch, (*head, packed, None, None, None, None, None, kinds, run.kernel_signature)
    # Triton 3.6 wraps the launcher of a kernel with tensor maps in a Python function that encodes them first.
    is_wrapped = hasattr(run.launch, "__closure__")
    launch = getclosurevars(run.launch).nonlocals.get("launcher") if is_wrapped else run.launch
    if launch is None:
        return None, ()
    constexprs = (None,) * n_constexprs

    def launch_unpacked(*arguments) -> None:
        *leading, tensors_and_numbers = arguments
        launch(*leading, *tensors_and_numbers, *constexprs)

    return launch_unpacked, (*head, None, None, packed, None, None, None)


class _Operand:
    """The shape, strides and Triton's encoding of a matrix that a kernel takes as a TMA descriptor, without its
    address."""

    def __init__(self, matrix, encoding: dict):
        self.shape, self.strides, self.encoding = list(matrix.shape), list(matrix.strides), encoding


@lru_cache(maxsize=TENSOR_MAPS)
def _described(operands: tuple[_Operand, ...], *addresses: int) -> tuple:
    """Returns the kernel arguments that describe the matrices at these addresses."""
    return tuple(itertools.chain.from_iterable(map(_encoded, operands, addresses)))


@lru_cache(maxsize=TENSOR_MAPS)
def _encoded(operand: _Operand, address: int) -> list:
    """Returns a matrix's tensor map, shape and strides."""
    base = SimpleNamespace(data_ptr=lambda: address)  # the encoder reads nothing else of the tensor
    matrix = SimpleNamespace(
        base=base, shape=operand.shape, strides=operand.strides, padding="zero", round_f32_to_tf32=False
    )
    return make_tensordesc_arg(matrix, operand.encoding, *(None,) * (_ENCODER_ARGUMENTS - 2))
