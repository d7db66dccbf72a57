"""Run by ctest on the built library.

contents    every function of the header is exported, the table holds the archs it was built for, and without a GPU a
            launch returns an error with a name
launches    with a stub of libcuda that notes launches: kernel, grid, block and every argument are those of the Python
            launchers, and tables are those of kernels/table.py, moving.py and merge.py, number for number
reference   on a GPU: each op has the bits of the Python launcher (77: no GPU, skipped)
"""

import argparse
import ctypes
import os
import re
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # launches are recorded, not interpreted

import torch
from cases import N_TOKENS, Case, embedded, layer_case
from library import BAD_ARGUMENT, MISALIGNED, NO_ARCH, NO_DRIVER, NO_KERNEL, Kernel, Library, Note

from lora_fast.kernels import compiled, tiles

SKIPPED = 77


def contents(library: Library, archs: list[str]) -> None:
    header = Path(__file__).resolve().parents[1].joinpath("lora_fast.h").read_text(encoding="utf-8")
    functions = set(re.findall(r"(lora_fast_\w+)\(", header))
    assert len(functions) >= 20, functions
    for name in functions:
        getattr(library.library, name)
    held = {kernel.arch for kernel in library.kernels}
    assert held == {int(arch) for arch in archs}, f"built for {archs}, holds {held}"
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


def launches(path: str, arch: int, stub_path: str) -> None:
    stub = ctypes.CDLL(stub_path, mode=ctypes.RTLD_GLOBAL)  # is libcuda.so.1 from now on
    ctypes.c_int.in_dll(stub, "stub_arch").value = arch
    count, notes = ctypes.c_int.in_dll(stub, "stub_count"), (Note * 64).in_dll(stub, "stub_notes")
    library, checked = Library(path), 0
    rows = {kernel.cubin: kernel for kernel in library.kernels}
    for name, case in embedded(library, torch.device("cpu"), arch):
        count.value = 0
        with tiles.assume(arch=arch, strategy="fused", tma=False):
            with compiled.recorded() as expected:
                theirs = case.python(case.tensors)
            mine = case.c(case.tensors)
        made = notes[: count.value]
        assert [note.name.decode() for note in made] == [e.kernel.__name__ for e in expected], name
        for i, (note, launch) in enumerate(zip(made, expected, strict=True)):
            results = {x.data_ptr(): y.data_ptr() for x, y in zip(theirs, mine, strict=True)}
            compare(f"{name}: {note.name.decode()}", case, i, note, rows[note.cubin], launch, results)
            checked += 1
    assert checked, f"nothing embedded for sm_{arch}"
    case, config = layer_case(library, torch.device("cpu"), torch.bfloat16, 3, "bfloat16")
    s = torch.empty(N_TOKENS, 3, dtype=torch.bfloat16)
    assert library.status("project", config, case.tensors["x"], case.tensors["weight"], s) == NO_KERNEL
    ctypes.c_int.in_dll(stub, "stub_arch").value = 70
    assert library.status("project", config, case.tensors["x"], case.tensors["weight"], s) == NO_ARCH
    print(f"sm_{arch}: {checked} launches as from Python")


def compare(
    name: str, case: Case, i: int, note: Note, kernel: Kernel, launch: compiled.Launch, results: dict[int, int]
) -> None:
    """Grid, warps and every argument. ``results``: addresses of Python's results → of C's."""
    table = case.tables[i % len(case.tables)] if case.tables else {}
    grid = (*launch.grid, 1, 1)[:3]
    assert tuple(note.grid) == grid, f"{name}: grid {tuple(note.grid)}, from Python {grid}"
    assert tuple(note.block) == (32 * launch.options.get("num_warps", 4), 1, 1), name
    params = [param.split(":") for param in kernel.params.decode().split()]
    assert note.count == len(params) + 2, name
    for (param, kind), slot in zip(params, note.values, strict=False):
        value, where = launch.arguments[param], f"{name}: {param}"
        if param in table:
            address, contents = table[param]
            assert slot == address, where
            if contents is not None:
                assert [results.get(x, x) for x in value.flatten().tolist()] == contents, f"{where}: the tables differ"
        elif kind == "p":
            expected = case.own[i].get(param, value) if case.own else value
            assert slot == expected.data_ptr(), where
            assert expected.nbytes >= value.nbytes, f"{where}: room for {expected.nbytes} bytes, needs {value.nbytes}"
        elif kind == "f":
            assert ctypes.c_float.from_buffer_copy(ctypes.c_uint(slot)).value == ctypes.c_float(value).value, where
        else:
            assert slot == value, f"{where}: {slot}, from Python {value}"


def reference(path: str) -> None:
    """The bits of the Python launchers, which the test suite holds to the plain-torch twins."""
    if not torch.cuda.is_available():
        print("no GPU")
        sys.exit(SKIPPED)
    device = torch.device("cuda")
    library = Library(path, torch.cuda.current_stream().cuda_stream)
    major, minor = torch.cuda.get_device_capability()
    arch = max((k.arch for k in library.kernels if k.arch // 10 == major and k.arch <= 10 * major + minor), default=0)
    checked = 0
    for name, case in embedded(library, device, arch):
        copy = {key: None if t is None else t.clone() for key, t in case.tensors.items()}
        with tiles.assume(strategy="fused", tma=False):
            expected = case.python(copy)
        got = case.c(case.tensors)
        torch.cuda.synchronize()
        for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(mine, theirs), f"{name}: result {i} is not what Python's launch gives"
        checked += 1
    assert checked, f"nothing embedded for sm_{major}{minor}"
    print(f"{checked} ops with the bits of the Python launchers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="liblora_fast.so")
    parser.add_argument("what", choices=("contents", "launches", "reference"))
    parser.add_argument("more", nargs="*", help="contents: the archs; launches: the arch and the stub")
    options = parser.parse_args()
    if options.what == "contents":
        contents(Library(options.library), options.more)
    elif options.what == "launches":
        launches(options.library, int(options.more[0]), options.more[1])
    else:
        reference(options.library)


if __name__ == "__main__":
    main()
