# SPDX-License-Identifier: Apache-2.0
"""Checks of the built library, which ctest runs.

    check.py liblora_fast.so CHECK [ARCH] [--stub libcuda.so.1] [--codes FOLDER] [--example ilora.so] [--only PATTERN]

contents    Every function of the header is exported, the table has the archs it was built for, and without a GPU a
            launch returns an error with a name.
launches    With a stub of the driver that records launches: kernel, code, grid, block, every constant and every
            argument with its type are those of the Python launchers; tables are those of kernels/pointer_table.py,
            cayley/addresses.py and pairs/add_low_rank.py, number for number. The estimates are Python's, too.
interpret   Triton's interpreter computes a call of every kernel, typed as the machine code is: the layer's and batches'
            equal formulas in float64, all others have the bits of Python's launchers. A kernel with the types and
            constants of an earlier arch's is run for that arch.
refusals    Every status with its message; a call that fails launches nothing.
threads     The first calls in several threads at once.
unload      Everything that was loaded is unloaded.
ending      A thread may still call while the process exits.
graphs      A captured stream takes every launch after lora_fast_load, and parameters have the sizes of the code's; so
            do a later card's, which runs PTX.
ilora       aot/examples/ilora.c trains the bits that Python trains (exit code 77: its kernels are not built, skipped).
methods     A step of each method, called in C, has the bits of LoRAAdamW's (skipped likewise).
reference   On a GPU: each op returns the bits of the Python launcher (exit code 77: no GPU, skipped).
"""

import argparse
import ctypes
import importlib
import os
import re
import sys
from pathlib import Path

SKIPPED = 77
INTERPRETED = ("interpret", "threads", "graphs", "ilora", "methods")  # graphs: for its small sizes
NEED_ARCH = ("launches", "refusals", "unload", "ending", *INTERPRETED)


def contents(library, archs: list[int]) -> str:
    from library import NO_DRIVER, NO_KERNEL

    header = Path(__file__).resolve().parents[1].joinpath("lora_fast.h").read_text(encoding="utf-8")
    functions = set(re.findall(r"(lora_fast_\w+)\(", header))
    assert len(functions) >= 30, functions
    for name in functions:
        getattr(library.library, name)
    version = int("".join(f"{int(x):02}" for x in re.findall(r"define LORA_FAST_VERSION_\w+ (\d+)", header)))
    assert library.library.lora_fast_version() == version
    for name in ("archs", "dtypes", "ranks"):
        assert library.built(name) == sorted(set(library.built(name))), f"{name}: {library.built(name)}"
    assert library.built("archs") == archs and {k.arch for k in library.kernels} <= {*archs}, library.built("archs")
    for kernel in library.kernels:
        start = ctypes.string_at(kernel.code, 4)
        assert start == b"\x7fELF" or (kernel.is_ptx and start[:2] in (b"//", b".v")), kernel.key
    ranks = library.built("ranks")
    padded = [library.library.lora_fast_padded_rank(r) for r in (-1, 0, 1, ranks[-1], ranks[-1] + 1)]
    assert padded == [0, 0, ranks[0], ranks[-1], 0], padded
    status = library.library.lora_fast_load(-1)  # without the stub, so without a driver or with the machine's
    assert status < 0 or library.error_name(status).startswith("CUDA_ERROR") or not status, status
    assert [library.error_name(code) for code in (0, NO_DRIVER, NO_KERNEL, -99)] == [
        "LORA_FAST_OK", "LORA_FAST_NO_DRIVER", "LORA_FAST_NO_KERNEL", "unknown error",
    ]  # fmt: skip
    return f"{len(library.kernels)} kernels; loading them here: {library.error_name(status)}"


def reference(library) -> str:
    """Compares results with those of the Python launchers, which the test suite compares with the torch twins."""
    import torch
    from launch_cases import embedded
    from library import NO_KERNEL, Refused

    from embedded import as_embedded

    device, checked = torch.device("cuda"), 0
    library.stream = torch.cuda.current_stream().cuda_stream
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    built = max((k.arch for k in library.kernels if k.runs_on(arch)), default=0)
    for name, case in embedded(library, device, arch):
        copy = {key: None if t is None else t.clone() for key, t in case.tensors.items()}
        try:
            got = case.c(case.tensors)
        except Refused as refusal:
            if refusal.status != NO_KERNEL or built == arch:
                raise
            continue  # a kernel of an earlier arch that needs more shared memory than this device has
        with as_embedded(built):
            expected = case.python(copy)
        torch.cuda.synchronize()
        for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(mine, theirs), f"{name}: result {i} is not what Python's launch gives"
        checked += 1
    assert checked, f"nothing is built for sm_{arch}"
    return f"{checked} ops with the bits of the Python launchers"


def launches(library, stub, options) -> str:
    from estimates import estimates
    from launches import launches

    compared = launches(library, stub, options.arch, options.codes)
    return f"{compared}, {estimates(library, options.arch)} estimates"


def refusals(library, stub, arch: int) -> str:
    import layer_refusals
    import refusals

    of_layers = layer_refusals.check(library, stub, arch)
    return f"{of_layers}, {refusals.check(library, stub)} refusals of the step"


def run(options: argparse.Namespace) -> str:
    from library import Library, Stub

    if options.check == "contents":
        return contents(Library(options.library), options.archs)
    if options.check == "reference":
        import torch

        if not torch.cuda.is_available():
            print("no GPU")
            sys.exit(SKIPPED)
        return reference(Library(options.library))
    library = Library(options.library)  # finds the stub as libcuda.so.1 at its first call of the driver
    stub, arch = Stub(options.stub, options.arch), options.arch  # loaded later, so it ends later
    if options.check == "launches":
        return launches(library, stub, options)
    if options.check == "refusals":
        return refusals(library, stub, arch)
    if options.check in ("ilora", "methods"):
        module = importlib.import_module(options.check)
        if not module.is_built(library):
            print(f"not built for {', '.join(sorted(module.OPS))} at rank {module.R}")
            sys.exit(SKIPPED)
        more = [options.example] if options.check == "ilora" else []
        return module.compare(library, stub, arch, *more)
    if options.check == "interpret":
        import interpreted

        return interpreted.interpret(library, stub, arch, options.only)
    import lifetime

    return getattr(lifetime, options.check)(library, stub, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="liblora_fast.so")
    parser.add_argument("check", choices=("contents", "reference", *NEED_ARCH))
    parser.add_argument("archs", nargs="*", type=int, help="contents: the archs; others: the arch of the card")
    parser.add_argument("--stub", help="libcuda.so.1 of stub_cuda.c")
    parser.add_argument("--codes", type=Path, help="launches: the folder where build.py has written the code")
    parser.add_argument("--example", help="ilora: ilora.c as a shared library")
    parser.add_argument("--only", default="", help="interpret: a pattern of the kernels' names")
    options = parser.parse_args()
    if options.check in NEED_ARCH and (len(options.archs) != 1 or not options.stub):
        parser.error(f"{options.check}: expected an arch and --stub")
    options.arch = options.archs[0] if options.archs else 0
    os.environ.pop("TRITON_INTERPRET", None)
    if options.check in INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of build.py's modules
    print(run(options))


if __name__ == "__main__":
    main()
