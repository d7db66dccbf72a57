# SPDX-License-Identifier: Apache-2.0
"""The checks ``threads``, ``unload``, ``ending`` and ``graphs``: when kernels are loaded and unloaded."""

import _ctypes
import ctypes
import itertools
import os
import threading
from ctypes import c_void_p

import torch
from formulas import LayerCall
from interpreter import Interpreter
from launch_cases import CASES, layer_calls, options_of
from layer_refusals import INVALID_CONTEXT, call, has, layer_of, on_card
from library import BAD_ARGUMENT, DTYPES, Kernel, Library, Note, Stub

THREADS, CAPTURE_UNSUPPORTED = 8, 900
LATER = 130  # an arch of the future, which runs PTX
SIZES = {"i32": 4, "fp32": 4}  # of parameters; others take 8 bytes
OPS = ("project", "linear", "add_to_y", "grad_s_b", "grad_a", "grad_x", "add_to_dx")


def layer_ops(library: Library) -> list[str]:
    ops = [op for op in OPS if has(library, op)]
    return ops if has(library, "grad_s_b") and has(library, "grad_a") else [op for op in ops if "grad_" not in op]


def threads(library: Library, stub: Stub, arch: int) -> str:
    """Makes the first calls in several threads at once; Triton's interpreter computes their results, one at a time."""
    stub.set("arch", arch), stub.set("noting", 0), stub.set("load_time", 20_000)
    interpreter, barrier, errors = Interpreter(library, stub), threading.Barrier(THREADS), []
    dtype, r, ops = DTYPES[library.built("dtypes")[0]], library.built("ranks")[0], layer_ops(library)

    def run(n_tokens: int) -> None:
        try:
            layer = LayerCall(library, dtype, dtype, r, n_tokens)
            barrier.wait()
            for op in ops:
                getattr(layer, op)()
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(60 + i,)) for i in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    interpreter.check()
    assert not errors, errors
    loads, kernels = stub.counter("loads"), {library.kernels[i].code for i in interpreter.executed}
    assert loads >= len(kernels) and loads <= len(interpreter.executed), f"{loads} loads of {len(kernels)} kernels"
    return f"{THREADS} threads: {stub.counter('launches')} launches, {loads} loads"


def unload(library: Library, stub: Stub, arch: int) -> str:
    """Checks that everything that was loaded is unloaded, by the function and by dlclose, and that it loads again."""
    stub.set("arch", arch)
    loaded = lambda: stub.counter("loads") - stub.counter("unloads")
    arguments = "project", layer_of(library), dict.fromkeys("xas", 1 << 20)
    for _ in range(2):
        assert call(library, *arguments) == (0, "") and loaded() == 1
        assert call(library, *arguments) == (0, "") and loaded() == 1, "loaded twice"
        assert library.library.lora_fast_load(-1) == 0, library.message
        count = loaded()
        assert count > 1
        assert library.library.lora_fast_unload() == 0 and loaded() == 0
    assert library.library.lora_fast_unload() == 0 and loaded() == 0
    assert call(library, *arguments) == (0, "")
    stub.set("fail_after", 1)
    assert library.library.lora_fast_unload() == 999
    assert library.message == "lora_fast_unload: cuLibraryUnload: CUDA_ERROR_UNKNOWN", library.message
    assert call(library, *arguments) == (0, "") and library.library.lora_fast_load(0) == 0
    before = loaded()
    _ctypes.dlclose(library.library._handle)
    assert before == count + 1 and loaded() == 1, f"{loaded() - 1} of {before - 1} are loaded after dlclose"
    return f"sm_{arch}: {count} kernels are unloaded by lora_fast_unload and by dlclose"


def ending(library: Library, stub: Stub, arch: int) -> str:
    """Ends the process, and makes a call after the library's destructor has run, as other threads of an engine may."""
    stub.set("arch", arch)
    arguments = "project", layer_of(library), dict.fromkeys("xas", 1 << 20)
    assert call(library, *arguments) == (0, "")

    def at_end() -> None:
        unloaded, got = stub.counter("unloads"), call(library, *arguments)
        ok = unloaded == 1 and got == (0, "")
        os.write(1, f"sm_{arch}: at exit {unloaded} kernel is unloaded, then a call returns {got}\n".encode())
        os._exit(0 if ok else 1)

    hook = stub.at_end(at_end)
    ctypes.CDLL(None).exit(1)  # at_end, which the hook calls, exits with 0
    return str(hook)


def graphs(library: Library, stub: Stub, arch: int) -> str:
    """Checks that a captured stream takes every launch after lora_fast_load, and none before."""
    stub.set("arch", arch)
    arguments = "project", layer_of(library), dict.fromkeys("xas", 1 << 20)
    stub.set("capturing", 1)
    text = "lora_fast_project: cuLibraryLoadData: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    assert call(library, *arguments) == (CAPTURE_UNSUPPORTED, text), library.message
    assert stub.counter("launches") == 0
    stub.set("capturing", 0)
    contexts(library, stub)
    count = captured(library, stub, arch)
    if library.library.lora_fast_ptx_arch():
        count += captured(library, stub, LATER)
    return f"sm_{arch}: {count} launches in a captured stream after {stub.counter('loads')} loads"


def captured(library: Library, stub: Stub, arch: int) -> int:
    """Captures a call of every kernel that runs on a card, and returns the number of launches."""
    on_card(library, stub, arch)
    assert library.library.lora_fast_load(-1) == 0, library.message
    stub.set("capturing", 1)
    rows = [k for k in library.kernels if (k.is_ptx if arch == LATER else k.runs_on(arch))]
    loads, launches = stub.counter("loads"), stub.counter("launches")
    for name in sorted({row.key.decode().split(" ", 1)[1] for row in rows}):
        op, dtype, r, options = options_of(name)
        if op in CASES:
            more = layer_calls(options)[0] if "adapter" in options else {}
            case = CASES[op](library, torch.device("cpu"), dtype, r, **options, **more)
            with stub.recorded() as notes:
                case.c(case.tensors)
            for note in notes:
                check_sizes(note, next(row for row in rows if row.code == note.code))
    assert stub.counter("loads") == loads
    stub.set("capturing", 0)
    return stub.counter("launches") - launches


def check_sizes(note: Note, row: Kernel) -> None:
    """Checks that the code takes the parameters that the table tells, and two pointers to scratch memory."""
    sizes = []
    for param in row.params.decode().split():
        kind = param.split(":")[1]
        sizes += [128, 4, 4, 8, 8] if kind.startswith("tensordesc") else [SIZES.get(kind, 8)]
    assert list(note.sizes[: note.count]) == [*sizes, 8, 8], row.key.decode()


def contexts(library: Library, stub: Stub) -> None:
    """Checks which context kernels are loaded in: the current one, or a device's primary context, which is released."""
    load = library.library.lora_fast_load
    for device in (-2, 64, 1 << 30):
        assert load(device) == BAD_ARGUMENT
        assert library.message == f"lora_fast_load: device: expected -1 to 63, got {device}"
    for current, device in itertools.product((None, 0x10), (0, 1)):
        stub.library.cuCtxSetCurrent(c_void_p(current))
        assert load(device) == 0 and stub.retained == 0, library.message
    stub.library.cuCtxSetCurrent(None)
    assert load(-1) == INVALID_CONTEXT
    stub.library.cuCtxSetCurrent(c_void_p(0x10))
    assert library.library.lora_fast_unload() == 0 and stub.counter("loads") == stub.counter("unloads")
