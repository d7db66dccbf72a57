# SPDX-License-Identifier: Apache-2.0
"""The check ``launches``: what the library asks of the driver, beside what Python's launchers would launch on the same
card: kernel, code, grid, warps, shared memory, constants and every argument with its type."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from case import Case
from launch_cases import embedded
from library import DTYPES, Kernel, Library, Note, Stub, TensorMap
from triton.runtime.jit import mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from compiling import LENGTHS, TARGETS, assembled_for, name_of_code
from embedded import as_embedded
from lora_fast.kernels.inspection import compiler
from lora_fast.kernels.launch import MOST_REGISTERS

SIZES = {"i32": 4, "i64": 8, "fp32": 4, "fp64": 8}
COMPILED = {"num_warps", "num_stages", "maxnreg"}  # constants that the compiler may have chosen
SWIZZLED = 128  # bytes of a row that one copy of a tensor map moves at most
ENCODED = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType


def launches(library: Library, stub: Stub, arch: int, codes: Path) -> str:
    """Compares every launch on a card of the arch. ``codes``: the folder where the build has written the code."""
    stub.set("arch", arch)
    checked = Checked(library, codes)
    for name, case in embedded(library, torch.device("cpu"), arch):
        with as_embedded(arch):
            with compiler.recorded() as expected:
                theirs = case.python(case.tensors)
            with stub.recorded() as notes:
                mine = case.c(case.tensors)
        assert [note.name.decode() for note in notes] == [each.kernel.__name__ for each in expected], name
        results = {x.data_ptr(): y.data_ptr() for x, y in zip(theirs, mine, strict=True)}
        for i, (note, launch) in enumerate(zip(notes, expected, strict=True)):
            try:
                checked.compare(case, i, note, launch, results)
            except AssertionError as error:
                error.add_note(f"in {name}: {note.name.decode()}")
                raise
    rows = [kernel for kernel in library.kernels if kernel.form == f"sm_{arch}"]
    missing = [row.key.decode() for row in rows if row.code not in checked.codes]
    missing = [key for key in missing if " sum " not in key]  # Python's sums never accumulate
    assert not missing, f"sm_{arch}: no case launches {missing}"
    assert checked.count, f"nothing is built for sm_{arch}"
    return f"sm_{arch}: {checked.count} launches as from Python"


class Checked:
    """Compares launches. ``codes``: the addresses of the code that they had."""

    def __init__(self, library: Library, folder: Path):
        self.rows: dict[int, list[Kernel]] = {}
        for row in library.kernels:
            self.rows.setdefault(row.code, []).append(row)
        self.folder, self.codes, self.count = folder, set(), 0

    def compare(self, case: Case, i: int, note: Note, launch: compiler.Launch, results: dict[int, int]) -> None:
        """``results``: addresses of Python's results → of C's."""
        assert tuple(note.grid) == (*launch.grid, 1, 1)[:3], f"grid {tuple(note.grid)}, from Python {launch.grid}"
        same = [row for row in self.rows[note.code] if _constants(row, launch) is None]
        assert same, _constants(self.rows[note.code][0], launch)
        row = same[0]
        if note.code not in self.codes:
            self._compare_code(note, row, launch)
        self._compare_arguments(case, i, note, row, launch, results)
        self.codes.add(note.code)
        self.count += 1

    def _compare_code(self, note: Note, row: Kernel, launch: compiler.Launch) -> None:
        """Compares the code, and what a launch of it needs, with what Python's launch compiles to."""
        with assembled_for(TARGETS.get(row.arch)):
            kernel, _ = compiler.compile_as_launched(launch, row.arch, LENGTHS)
        path = self.folder / f"{name_of_code(kernel, row.arch)}.cubin"
        assert path.exists(), "Python's launch compiles to other code than the library has"
        code = path.read_bytes()
        assert ctypes.string_at(note.code, len(code)) == code, f"other code than {path}"
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        assert (*note.block, note.shared) == (32 * warps, 1, 1, shared), f"{warps} warps, {shared} bytes shared"

    def _compare_arguments(self, case, i, note, row, launch, results) -> None:
        table = case.tables[i % len(case.tables)] if case.tables else {}
        memory, place, sizes = case.memory[i] if case.memory else {}, 0, list(note.sizes[: note.count])
        for param in row.params.decode().split():
            name, kind = param.split(":")
            value = launch.arguments[name]
            if isinstance(value, TensorDescriptor):
                compare_map(name, value, memory.get(name), [note.argument(place + j) for j in range(5)])
                place += 5
                continue
            slot = note.argument(place)
            assert len(slot) == SIZES.get(kind, 8), f"{name}:{kind} takes {len(slot)} bytes"
            assert _is_of_type(value, kind), f"{name}: {kind}, from Python {mangle_type(value)}"
            if name in table:
                compare_table(name, slot, *table[name], value, results)
            elif kind.startswith("*"):
                compare_address(name, slot, memory.get(name, value) if memory else value, value)
            else:
                compare_number(name, kind, slot, value)
            place += 1
        assert sizes[place:] == [8, 8], "Triton's two scratch pointers come last"


def _constants(row: Kernel, launch: compiler.Launch) -> str | None:
    """Returns what differs between the constants of a row and those of a launch, or None."""
    if row.key.decode().split(" ")[0] != launch.kernel.__name__:
        return f"{row.key.decode()}, from Python {launch.kernel.__name__}"
    mine = dict(word.split("=") for word in row.constants.decode().split())
    theirs = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
    theirs |= {name: value for name, value in launch.arguments.items() if value is None}
    words = {name: _text(value) for name, value in (theirs | launch.options).items()}
    if mine.get("maxnreg") == str(MOST_REGISTERS):  # it was compiled again with all of them
        words.pop("maxnreg", None)
    differences = {name: (mine.get(name), word) for name, word in words.items() if mine.get(name) != word}
    differences |= {name: (word, None) for name, word in mine.items() if name not in words and name not in COMPILED}
    return f"{row.key.decode()}: constants (C's, Python's) {differences}" if differences else None


def _text(value) -> str:
    return str(int(value)) if isinstance(value, bool) else "".join(str(value).split())


def _is_of_type(value, kind: str) -> bool:
    """Returns whether a parameter of this type takes a value of Python's launch."""
    if isinstance(value, torch.Tensor) or value is None:
        return value is None or mangle_type(value) == kind
    if isinstance(value, float):
        return kind in ("fp32", "fp64")
    return kind == "i64" or (kind == "i32" and -(2**31) <= value < 2**31)


def compare_table(name: str, slot: bytes, address: int, contents: Sequence | None, theirs: torch.Tensor, results):
    """Compares a part of a table number for number. The tables name results of their own."""
    assert int.from_bytes(slot, "little") == address, name
    if contents is not None:
        assert [results.get(x, x) for x in theirs.flatten().tolist()] == contents, f"{name}: the tables differ"


def compare_address(name: str, slot: bytes, mine: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    """Compares a pointer with C's memory, which has the dtype and at least the size of Python's."""
    address = int.from_bytes(slot, "little")
    if mine is None:
        assert address == 0, name
        return
    assert address == mine.data_ptr(), name
    is_scratch = mine.dtype is torch.uint8
    assert is_scratch or mine.dtype is theirs.dtype, f"{name}: {mine.dtype}, from Python {theirs.dtype}"
    assert mine.nbytes >= theirs.nbytes, f"{name}: room for {mine.nbytes} bytes, needs {theirs.nbytes}"


def compare_number(name: str, kind: str, slot: bytes, value) -> None:
    if kind.startswith("fp"):
        number = {"fp32": ctypes.c_float, "fp64": ctypes.c_double}[kind]
        assert number.from_buffer_copy(slot).value == number(value).value, f"{name}, from Python {value}"
    else:
        number = int.from_bytes(slot, "little", signed=True)
        assert number == value, f"{name}: {number}, from Python {value}"


def compare_map(name: str, theirs: TensorDescriptor, mine: torch.Tensor | None, slots: list[bytes]) -> None:
    """Compares a tensor map, and the sizes and strides behind it, with Python's descriptor."""
    tensor_map = TensorMap.from_buffer_copy(slots[0])
    base, bytes_of = theirs.base if mine is None else mine, theirs.base.dtype.itemsize
    assert base.dtype is theirs.base.dtype and base.dtype in DTYPES
    got = tensor_map.address, tensor_map.type, [*tensor_map.sizes], [*tensor_map.strides], [*tensor_map.box]
    strides = [0, theirs.strides[0] * bytes_of]
    box = [min(theirs.block_shape[1], SWIZZLED // bytes_of), theirs.block_shape[0]]
    expected = base.data_ptr(), ENCODED[base.dtype], [*theirs.shape][::-1], strides, box
    assert got == expected, f"{name}: the tensor map has {got}, from Python {expected}"
    swizzle = {32: 1, 64: 2, SWIZZLED: 3}[box[0] * bytes_of]
    assert tensor_map.swizzle == swizzle, f"{name}: swizzle {tensor_map.swizzle}"
    numbers = [int.from_bytes(slot, "little") for slot in slots[1:]]
    assert numbers == [*theirs.shape, *theirs.strides], f"{name}: {numbers} behind the map"
