"""Checks of the built library, which ctest runs.

contents    Every function of the header is exported, the table has the archs it was built for, and without a GPU a
            launch returns an error with a name.
launches    With a stub of libcuda that records launches: kernel, grid, block and every argument are those of the Python
            launchers; tables are those of kernels/pointer_table.py, cayley/addresses.py and pairs/add_low_rank.py,
            number for number; the cubin is what Python's launch compiles to.
reference   On a GPU: each op returns the bits of the Python launcher (exit code 77: no GPU, skipped).
"""

import argparse
import ctypes
import dataclasses
import os
import re
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # launches are recorded, not interpreted
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of build.py

import torch
from launch_cases import N_TOKENS, Case, embedded, layer_case
from library import BAD_ARGUMENT, MISALIGNED, NO_ARCH, NO_DRIVER, NO_KERNEL, Kernel, Library, Note, Refused

from compiling import LENGTHS, name_of_code
from embedded import as_embedded
from lora_fast.kernels.inspection import compiler
from lora_fast.kernels.launch import MOST_REGISTERS
from lora_fast.kernels.limits import LARGEST_RANK

SKIPPED = 77
SIZES = {"p": 8, "l": 8, "d": 8, "i": 4, "f": 4}  # bytes of a parameter, by kind


def contents(library: Library, archs: list[str]) -> None:
    header = Path(__file__).resolve().parents[1].joinpath("lora_fast.h").read_text(encoding="utf-8")
    functions = set(re.findall(r"(lora_fast_\w+)\(", header))
    assert len(functions) >= 20, functions
    for name in functions:
        getattr(library.library, name)
    embedded_archs = {kernel.arch for kernel in library.kernels}
    assert embedded_archs == {int(arch) for arch in archs}, f"built for {archs}, has {embedded_archs}"
    for kernel in library.kernels:
        assert ctypes.string_at(kernel.cubin, 4) == b"\x7fELF", kernel.key
    case, config = layer_case(library, torch.device("cpu"), torch.bfloat16, 16, "bfloat16")
    t, s = case.tensors, torch.empty(N_TOKENS, 16, dtype=torch.bfloat16)
    status = library.status("project", config, t["x"], t["a"], s)
    assert status < 0 or library.error_name(status).startswith("CUDA_ERROR"), status
    print(f"{len(library.kernels)} kernels; a launch here: {library.error_name(status)}")
    assert library.status("project", config, t["x"][:, 1:], t["a"], s) == MISALIGNED
    assert library.status("project", config, None, t["a"], s) == BAD_ARGUMENT
    config.r = 0
    assert library.status("project", config, t["x"], t["a"], s) == BAD_ARGUMENT
    assert [library.error_name(code) for code in (0, NO_DRIVER, 1 << 20)][:2] == ["LORA_FAST_OK", "LORA_FAST_NO_DRIVER"]


def launches(path: str, arch: int, stub_path: str, cubins: Path) -> None:
    stub = ctypes.CDLL(stub_path, mode=ctypes.RTLD_GLOBAL)  # the library finds it as libcuda.so.1
    card, count = (ctypes.c_int.in_dll(stub, name) for name in ("stub_arch", "stub_count"))
    card.value, notes = arch, (Note * 64).in_dll(stub, "stub_notes")
    library, checked = Library(path), 0
    rows = {kernel.cubin: kernel for kernel in library.kernels}
    for name, case in embedded(library, torch.device("cpu"), arch):
        count.value = 0
        with as_embedded(arch):
            with compiler.recorded() as expected:
                theirs = case.python(case.tensors)
            mine = case.c(case.tensors)
        recorded = notes[: count.value]
        assert [note.name.decode() for note in recorded] == [e.kernel.__name__ for e in expected], name
        for i, (note, launch) in enumerate(zip(recorded, expected, strict=True)):
            results = {x.data_ptr(): y.data_ptr() for x, y in zip(theirs, mine, strict=True)}
            where = f"{name}: {note.name.decode()}"
            compare(where, case, i, note, rows[note.cubin], launch, results)
            assert is_cubin_of(launch, arch, note.cubin, cubins), f"{where}: not what Python's launch compiles to"
            checked += 1
    assert checked, f"nothing embedded for sm_{arch}"
    if arch == 80:
        card.value = 86
        fit_or_are_refused(library, count)
    too_large = LARGEST_RANK + 1
    case, config = layer_case(library, torch.device("cpu"), torch.bfloat16, too_large, "bfloat16")
    s = torch.empty(N_TOKENS, too_large, dtype=torch.bfloat16)
    assert library.status("project", config, case.tensors["x"], case.tensors["weight"], s) == NO_KERNEL
    card.value = 70
    assert library.status("project", config, case.tensors["x"], case.tensors["weight"], s) == NO_ARCH
    print(f"sm_{arch}: {checked} launches as from Python")


def fit_or_are_refused(library: Library, count: ctypes.c_int) -> None:
    """Launches sm_80's kernels on a card with less shared memory, where the library refuses what the driver would."""
    for _, case in embedded(library, torch.device("cpu"), 80):
        count.value = 0
        try:
            case.c(case.tensors)
        except Refused as refusal:
            assert refusal.status == NO_KERNEL, refusal


def compare(
    name: str, case: Case, i: int, note: Note, kernel: Kernel, launch: compiler.Launch, results: dict[int, int]
) -> None:
    """Compares grid, warps and every argument. ``results``: addresses of Python's results → of C's."""
    table = case.tables[i % len(case.tables)] if case.tables else {}
    grid = (*launch.grid, 1, 1)[:3]
    assert tuple(note.grid) == grid, f"{name}: grid {tuple(note.grid)}, from Python {grid}"
    assert tuple(note.block) == (32 * launch.options.get("num_warps", 4), 1, 1), name
    params = [param.split(":") for param in kernel.params.decode().split()]
    assert list(note.sizes[: note.count]) == [SIZES[kind] for _, kind in params] + [8, 8], (
        name
    )  # Triton's two scratch pointers
    for (param, kind), size, memory in zip(params, note.sizes, note.values, strict=False):
        value, where = launch.arguments[param], f"{name}: {param}"
        slot = int.from_bytes(memory[:size], "little", signed=kind in "il")
        if param in table:
            address, contents = table[param]
            assert slot == address, where
            if contents is not None:
                assert [results.get(x, x) for x in value.flatten().tolist()] == contents, f"{where}: the tables differ"
        elif kind == "p":
            expected = case.memory[i].get(param, value) if case.memory else value
            if expected is None:
                assert slot == 0, where
                continue
            assert slot == expected.data_ptr(), where
            assert expected.nbytes >= value.nbytes, f"{where}: room for {expected.nbytes} bytes, needs {value.nbytes}"
        elif kind == "f":
            assert ctypes.c_float.from_buffer_copy(ctypes.c_uint(slot)).value == ctypes.c_float(value).value, where
        elif kind == "d":
            assert ctypes.c_double.from_buffer_copy(ctypes.c_uint64(slot)).value == value, where
        else:
            assert slot == value, f"{where}: {slot}, from Python {value}"


def is_cubin_of(launch: compiler.Launch, arch: int, address: int, cubins: Path) -> bool:
    """Returns whether the cubin at an address is the build's cubin of this launch, as it is or with more registers."""
    roomy = dataclasses.replace(launch, options=launch.options | {"maxnreg": MOST_REGISTERS})
    names = (name_of_code(compiler.compile_for(each, arch, LENGTHS), arch) for each in (launch, roomy))
    candidates = (path.read_bytes() for path in (cubins / f"{name}.cubin" for name in names) if path.exists())
    return any(ctypes.string_at(address, len(cubin)) == cubin for cubin in candidates)


def reference(path: str) -> None:
    """Compares results with those of the Python launchers, which the test suite compares with the torch twins."""
    if not torch.cuda.is_available():
        print("no GPU")
        sys.exit(SKIPPED)
    device = torch.device("cuda")
    library = Library(path, torch.cuda.current_stream().cuda_stream)
    major, minor = torch.cuda.get_device_capability()
    device_arch = 10 * major + minor
    arch = max((k.arch for k in library.kernels if k.arch // 10 == major and k.arch <= device_arch), default=0)
    checked = 0
    for name, case in embedded(library, device, arch):
        copy = {key: None if t is None else t.clone() for key, t in case.tensors.items()}
        try:
            got = case.c(case.tensors)
        except Refused as refusal:
            if refusal.status != NO_KERNEL or arch == device_arch:
                raise
            continue  # a kernel of sm_80 that needs more shared memory than this device has
        with as_embedded(arch):
            expected = case.python(copy)
        torch.cuda.synchronize()
        for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(mine, theirs), f"{name}: result {i} is not what Python's launch gives"
        checked += 1
    assert checked, f"nothing embedded for sm_{device_arch}"
    print(f"{checked} ops with the bits of the Python launchers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="liblora_fast.so")
    parser.add_argument("what", choices=("contents", "launches", "reference"))
    parser.add_argument("more", nargs="*", help="contents: the archs; launches: the arch, the stub, the cubins")
    options = parser.parse_args()
    if options.what == "contents":
        contents(Library(options.library), options.more)
    elif options.what == "launches":
        launches(options.library, int(options.more[0]), options.more[1], Path(options.more[2]))
    else:
        reference(options.library)


if __name__ == "__main__":
    main()
