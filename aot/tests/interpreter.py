# SPDX-License-Identifier: Apache-2.0
"""Computes the launches of liblora_fast.so on tensors in host memory: the stub of the driver hands each launch over,
and Triton's interpreter runs the package's kernel of that name.

Everything is as the machine code has it. A row of the library's table tells the types of the parameters and the
constants; values are the bytes that the library passed. So a kernel that was compiled for another dtype than the
memory's gives wrong numbers here, as it would on a GPU.
"""

import ctypes
import importlib
import pkgutil
import re
import threading

import torch
import triton.language as tl
from library import Kernel, Library, Note, Stub, TensorMap
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast import kernels
from lora_fast.kernels.inspection import interpreter

OPTIONS = {"num_warps", "num_stages", "maxnreg"}  # constants that are no arguments
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
TYPES |= {"i32": torch.int32, "i64": torch.int64, "u8": torch.uint8, "u1": torch.bool, "i1": torch.bool}
SCALARS = {"fp32": ctypes.c_float, "fp64": ctypes.c_double, "i32": ctypes.c_int32, "i64": ctypes.c_int64}
ENCODED = {6: torch.float16, 9: torch.bfloat16, 7: torch.float32}  # CUtensorMapDataType → dtype
SCRATCH_POINTERS = 2
SWIZZLED = 128  # bytes of a row that one copy moves at most


class Interpreter:
    """Runs each launch of the library in Triton's interpreter. ``executed`` has the rows of the table that ran."""

    def __init__(self, library: Library, stub: Stub):
        interpreter.patch_once()
        self.executed: set[int] = set()
        self._failure: Exception | None = None
        self._one_at_a_time = threading.Lock()  # Triton's interpreter has one state
        self._kernels = _jit_kernels()
        self._rows: dict[int, list[int]] = {}
        for i, row in enumerate(library.kernels):
            self._rows.setdefault(row.code, []).append(i)
        self._library, self._hook = library, stub.on_launch(self._launched)

    def check(self) -> None:
        """Raises the error of a launch since the last check."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _launched(self, note: Note) -> None:
        try:
            rows = self._rows[note.code]
            with self._one_at_a_time:
                self._run(self._library.kernels[rows[0]], note)
                self.executed |= set(rows)
        except Exception as error:  # C, which called this, cannot pass it on
            self._failure = self._failure or error

    def _run(self, row: Kernel, note: Note) -> None:
        arguments, place = {}, 0
        for param in row.params.decode().split():
            name, kind = param.split(":")
            if kind.startswith("tensordesc"):
                arguments[name] = _descriptor(kind, [note.argument(place + i) for i in range(5)])
                place += 5
            else:
                arguments[name] = _argument(kind, note.argument(place))
                place += 1
        assert place + SCRATCH_POINTERS == note.count, f"{note.name}: {note.count} parameters, the table has {place}"
        arguments |= constants_of(row)
        self._kernels[note.name.decode()][tuple(note.grid)](**arguments)


def constants_of(row: Kernel) -> dict:
    """Returns the constants that are arguments of the kernel."""
    words = (word.split("=") for word in row.constants.decode().split())
    return {name: _constant(name, text) for name, text in words if name not in OPTIONS}


def _constant(name: str, text: str):
    if name == "PRECISION":
        return text
    if text == "None":
        return None
    return tl.str_to_ty(text, None) if text in TYPES else int(text)


def _argument(kind: str, memory: bytes):
    if kind.startswith("*"):
        return _at(int.from_bytes(memory, "little"), TYPES[kind[1:]])
    kind = SCALARS[kind]
    assert len(memory) == ctypes.sizeof(kind)
    return kind.from_buffer_copy(memory).value


def _at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor of one element at the address, or of none where it is null."""
    if not address:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def _descriptor(kind: str, arguments: list[bytes]) -> TensorDescriptor:
    """Returns the matrix of a tensor map, which two sizes and two strides follow."""
    tensor_map = TensorMap.from_buffer_copy(arguments[0])
    dtype = ENCODED[tensor_map.type]
    element, sizes = re.fullmatch(r"tensordesc<(\w+)\[([\d,]+)\].*>", kind).groups()
    block = [int(size) for size in sizes.split(",")]
    box = [block[0], min(block[1], SWIZZLED // dtype.itemsize)]  # several copies move a wider block
    assert TYPES[element] is dtype and [*tensor_map.box][::-1] == box, f"{kind}: encoded {dtype} {[*tensor_map.box]}"
    shape = [*tensor_map.sizes][::-1]
    strides = [tensor_map.strides[1] // dtype.itemsize, 1]
    passed = [int.from_bytes(memory, "little") for memory in arguments[1:]]
    assert passed == shape + strides, f"{kind}: the map has {shape}, {strides}, the arguments are {passed}"
    return TensorDescriptor(_at(tensor_map.address, dtype), shape, strides, block)


def _jit_kernels() -> dict[str, InterpretedFunction]:
    """Returns the package's kernels by name."""
    by_name = {}
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, InterpretedFunction) and name.endswith("_kernel"):
                by_name[name] = value
    return by_name
