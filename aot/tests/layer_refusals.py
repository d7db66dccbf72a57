# SPDX-License-Identifier: Apache-2.0
"""The check ``refusals`` of the layer and of batches, of devices and of the driver: every status with its message, and
nothing launched by a call that fails."""

import ctypes
import itertools
import os
from collections.abc import Iterator
from ctypes import byref, c_int, c_int32, c_size_t, c_void_p

from library import BAD_ARGUMENT, DTYPES, MISALIGNED, NO_ARCH, NO_KERNEL, Adapter, Batch, Layer, Library, Stub

SOME = 1 << 20  # an address; no call here reads memory
UNKNOWN, INVALID_CONTEXT = 999, 201  # CUDA's errors: what the stub's failing call returns, and without a context
LITTLE = 16 << 10  # bytes of shared memory
LARGEST, BEYOND = 1 << 30, (1 << 30) + 16
# The pointers of every function that takes a layer, in order.
LAYER_FUNCTIONS = {
    "project": ("x", "a", "s"), "linear": ("x", "weight", "bias", "s", "b", "y"), "add_to_y": ("s", "b", "y"),
    "add_adapter": ("x", "a", "b", "s", "y", "workspace"), "grad_s_b": ("dy", "s", "b", "ds", "db", "workspace"),
    "grad_a": ("x", "ds", "da", "workspace"), "grad_x": ("dy", "weight", "ds", "a", "dx"),
    "add_to_dx": ("ds", "a", "dx"),
}  # fmt: skip
BATCH_FUNCTIONS = {"batch_project": ("x", "s"), "batch_add_to_y": ("s", "y")}
OPTIONAL = {"bias", "workspace"}  # may be NULL, the workspace of add_adapter at least
# field → values that are refused, with what was expected. A multiple of 16 is expected of the last ones.
SIZES = {"n_tokens": [(-1, "0 to 2^30"), (LARGEST + 1, "0 to 2^30")]}
SIZES |= {name: [(value, "1 to 2^30") for value in (0, -16, BEYOND, 2**31 - 1)] for name in ("d_in", "d_out")}
SIZES |= {"r": [(value, "1 to 256") for value in (0, -1, 257, 2**31 - 1)]}
SIZES |= {"dtype": [(3, "a lora_fast_dtype"), (2**31 - 1, "a lora_fast_dtype")], "accumulate": [(2, "0 or 1")]}
SIZES |= {"adapter": [(3, "layer.dtype or LORA_FAST_FLOAT32")]}
SIZES |= {"drop_level": [(-1, "0 to 65536"), (65537, "0 to 65536")]}
WIDTHS = {"ld_x": 64, "ld_y": 96, "ld_dx": 64, "ld_dy": 96, "ld_weight": 64}
SIZES |= {name: [(v, "0, or the row's length to 2^30") for v in (48, -16, BEYOND, 1 << 62)] for name in WIDTHS}
UNEVEN = {"d_in": 72, "d_out": 104, **{name: width + 8 for name, width in WIDTHS.items()}}


def layer_of(library: Library, **fields) -> Layer:
    """Returns a layer that the library has kernels for, but for some fields."""
    dtype, r = library.built("dtypes")[0], library.built("ranks")[0]
    layer = Layer(67, 64, 96, r, dtype, dtype, 2.0)
    for name, value in fields.items():
        setattr(layer, name, value)
    return layer


def batch_of(library: Library, **fields) -> Batch:
    dtype, r = library.built("dtypes")[0], library.built("ranks")[0]
    batch = Batch(67, 64, 96, 3, r, dtype, dtype, 0, 0, SOME, SOME, SOME)
    for name, value in fields.items():
        setattr(batch, name, value)
    return batch


def call(library: Library, name: str, structure, pointers: dict[str, int | None]) -> tuple[int, str]:
    """Returns status and message of a call."""
    function = getattr(library.library, f"lora_fast_{name}")
    status = function(None if structure is None else byref(structure), *map(c_void_p, pointers.values()), None)
    return status, library.message if status else ""


def has(library: Library, name: str) -> bool:
    """Returns whether the library has the kernels of a function of a layer for the first dtype and rank."""
    op = "add_parts_to_y" if name == "add_adapter" else name
    dtype, r = DTYPES[library.built("dtypes")[0]], library.built("ranks")[0]
    start = f"{op} {str(dtype).removeprefix('torch.')} r{r} "
    return any(kernel.key.decode().split(" ", 1)[1].startswith(start) for kernel in library.kernels)


def of_pointers(library: Library, name: str, structure, kind: str, names: tuple[str, ...]) -> Iterator[tuple]:
    """Yields name, struct, pointers, and the expected status and message after the function's name."""
    good = dict.fromkeys(names, SOME)
    yield name, None, good, BAD_ARGUMENT, f"{kind}: expected an address, got NULL"
    yield name, structure, good, 0, ""
    for pointer in names:
        if pointer not in OPTIONAL or (pointer == "workspace" and name != "add_adapter"):
            yield name, structure, good | {pointer: None}, BAD_ARGUMENT, f"{pointer}: expected an address, got NULL"
        if name != "add_adapter" or pointer != "workspace":  # which it does not need here
            text = f"{pointer}: expected a multiple of 16, got {SOME + 8:#x}"
            yield name, structure, good | {pointer: SOME + 8}, MISALIGNED, text
            text = f"{pointer}: expected an address below 2^63, got {2**64 - 16:#x}"
            yield name, structure, good | {pointer: 2**64 - 16}, BAD_ARGUMENT, text


def of_layers(library: Library) -> Iterator[tuple]:
    for name, names in LAYER_FUNCTIONS.items():
        if not has(library, name):
            continue
        good = dict.fromkeys(names, SOME)
        yield from of_pointers(library, name, layer_of(library), "layer", names)
        for field, values in SIZES.items():
            for value, expected in values:
                text = f"layer.{field}: expected {expected}, got {value}"
                if field == "n_tokens" and name in ("grad_s_b", "grad_a"):
                    text = text.replace("0 to", "1 to")
                yield name, layer_of(library, **{field: value}), good, BAD_ARGUMENT, text
        for field, value in UNEVEN.items():
            text = f"layer.{field}: expected a multiple of 16, got {value}"
            yield name, layer_of(library, **{field: value}), good, MISALIGNED, text
        text = "layer.device_seed: expected a multiple of 8, got 0x4"
        yield name, layer_of(library, device_seed=4), good, MISALIGNED, text
        size = ctypes.sizeof(Layer)
        for wrong in (0, size - 8, 2**64 - 1):
            text = f"layer.size: expected the struct's size, {size}, got {wrong}"
            yield name, layer_of(library, size=wrong), good, BAD_ARGUMENT, text
        if name in ("grad_s_b", "grad_a"):
            text = "layer.n_tokens: expected 1 to 2^30, got 0"
            yield name, layer_of(library, n_tokens=0), good, BAD_ARGUMENT, text
        if name == "grad_s_b":
            layer = layer_of(library)
            layer.n_tokens = min(LARGEST, (2**31 - 1) // layer.r)
            text = f"sizes: expected at most 2^31 - 2^16 numbers in ds, da and db, got {layer.n_tokens * layer.r}"
            yield (name, layer, good, *((BAD_ARGUMENT, text) if layer.r > 1 else (0, "")))


def of_batches(library: Library) -> Iterator[tuple]:
    for name, names in BATCH_FUNCTIONS.items():
        if not has(library, name.removesuffix("_to_y")):
            continue
        good = dict.fromkeys(names, SOME)
        yield from of_pointers(library, name, batch_of(library), "batch", names)
        for field in ("adapters", "rows", "ends"):
            text = f"batch.{field}: expected an address, got NULL"
            yield name, batch_of(library, **{field: None}), good, BAD_ARGUMENT, text
            text = f"batch.{field}: expected a multiple of 16, got {SOME + 4:#x}"
            yield name, batch_of(library, **{field: SOME + 4}), good, MISALIGNED, text
        for value in (0, -1, 1025, 2**31 - 1):
            text = f"batch.n_adapters: expected 1 to 1024, got {value}"
            yield name, batch_of(library, n_adapters=value), good, BAD_ARGUMENT, text
        for field in ("d_in", "d_out"):
            text = f"batch.{field}: expected 1 to 2^30, got {BEYOND}"
            yield name, batch_of(library, **{field: BEYOND}), good, BAD_ARGUMENT, text
            text = f"batch.{field}: expected a multiple of 16, got 72"
            yield name, batch_of(library, **{field: 72}), good, MISALIGNED, text
        text = "batch.ld_x: expected 0, or the row's length to 2^30, got 48"
        yield name, batch_of(library, ld_x=48), good, BAD_ARGUMENT, text


def of_host(library: Library) -> None:
    """Checks the functions that work in host memory alone."""
    c, rows, ends = library.library, (c_int32 * 4)(), (c_int32 * 2)()
    adapters = (Adapter * 3)(*[Adapter(SOME, SOME, 1, 1.0)] * 3)
    assert c.lora_fast_sort_rows(4, 2, (c_int32 * 4)(1, -1, 0, 1), rows, ends) == 0
    assert ([*rows], [*ends]) == ([2, 0, 3, 1], [1, 3]), ([*rows], [*ends])
    assert c.lora_fast_sort_rows(4, 2, (c_int32 * 4)(1, -1, 2, 1), rows, ends) == BAD_ARGUMENT
    assert library.message == "lora_fast_sort_rows: indices: expected -1 to n_adapters - 1, got 2"
    assert ([*rows], [*ends]) == ([2, 0, 3, 1], [1, 3]), "a refused call has written"
    assert c.lora_fast_sort_rows(4, 2, rows, rows, ends) == BAD_ARGUMENT
    assert library.message.startswith("lora_fast_sort_rows: rows: expected other memory than indices, got ")
    batch = batch_of(library)
    assert c.lora_fast_check_adapters(byref(batch), adapters) == 0, library.message
    adapters[1].r = batch.r + 1
    assert c.lora_fast_check_adapters(byref(batch), adapters) == BAD_ARGUMENT
    assert library.message == f"lora_fast_check_adapters: adapters[1].r: expected 1 to batch.r, got {batch.r + 1}"
    newer = (ctypes.c_ubyte * (ctypes.sizeof(Layer) + 16)).from_buffer_copy(bytes(layer_of(library)) + bytes(16))
    c_size_t.from_buffer(newer).value = len(newer)
    size = c_size_t()
    assert c.lora_fast_workspace(newer, byref(size)) in (0, NO_KERNEL), library.message
    newer[-1] = 1
    assert c.lora_fast_workspace(newer, byref(size)) == BAD_ARGUMENT
    assert "expected 0 in fields that are newer than this library" in library.message, library.message
    adapters[1].r, adapters[2].b = 1, SOME + 8
    assert c.lora_fast_check_adapters(byref(batch), adapters) == MISALIGNED
    assert library.message == f"lora_fast_check_adapters: adapters[2].b: expected a multiple of 16, got {SOME + 8:#x}"
    of_results(library)
    for error in (*range(-300, 1200), 2**31 - 1, -(2**31)):
        assert library.library.lora_fast_error_name(error), error


def of_results(library: Library) -> None:
    """Checks the functions that store a result in host memory."""
    layer, result = layer_of(library), c_int(77)
    for name, *arguments in (("workspace", None), ("adapter_workspace", None), ("faster", 0, None)):
        assert getattr(library.library, f"lora_fast_{name}")(byref(layer), *arguments) == BAD_ARGUMENT, name
        argument = "strategy" if name == "faster" else "bytes"
        assert library.message == f"lora_fast_{name}: {argument}: expected an address, got NULL", library.message
    assert library.library.lora_fast_faster(byref(layer), 2, byref(result)) == BAD_ARGUMENT
    assert library.message == "lora_fast_faster: backward: expected 0 or 1, got 2" and result.value == 77


def of_devices(library: Library, stub: Stub, arch: int) -> int:
    """Checks cards without kernels, cards with less shared memory than kernels need, and contexts. Returns how many
    kernels were refused for their shared memory."""
    layer, pointers = layer_of(library), dict.fromkeys(LAYER_FUNCTIONS["project"], SOME)
    on_card(library, stub, 70)
    text = f"lora_fast_project: this device is sm_70; the library was built for{archs_of(library)}"
    assert call(library, "project", layer, pointers) == (NO_ARCH, text)
    assert library.library.lora_fast_load(-1) == NO_ARCH
    on_card(library, stub, arch)
    assert call(library, "project", layer_of(library, r=255), pointers)[0] == NO_KERNEL
    padded = library.library.lora_fast_padded_rank(255)
    text = f"rank 255 was not built, rank {padded} was" if padded else f"rank 255, options 2 on sm_{arch}"
    assert text in library.message, library.message
    stub.library.cuCtxSetCurrent(None)
    status, text = call(library, "project", layer, pointers)
    assert (status, text) == (
        INVALID_CONTEXT,
        "lora_fast_project: the current CUDA context: CUDA_ERROR_INVALID_CONTEXT",
    )
    stub.library.cuCtxSetCurrent(c_void_p(0x10))
    return refused_for_memory(library, stub, arch)


def refused_for_memory(library: Library, stub: Stub, arch: int) -> int:
    on_card(library, stub, arch), stub.set("shared", LITTLE)
    names, refused = [name for name in LAYER_FUNCTIONS if has(library, name)], 0
    for r, dtype, name in itertools.product(library.built("ranks"), library.built("dtypes"), names):
        for adapter, drop_level in itertools.product({dtype, 0}, (0, 1)):
            layer = layer_of(library, r=r, dtype=dtype, adapter=adapter, drop_level=drop_level)
            status, text = call(library, name, layer, dict.fromkeys(LAYER_FUNCTIONS[name], SOME))
            if status == NO_KERNEL:
                assert f" r{r} " in text, text
                assert f"bytes of shared memory a block, this device (sm_{arch}) has {LITTLE}" in text, text
                refused += 1
    stub.set("shared", 0)
    assert refused, "no kernel needs much shared memory"
    return refused


def archs_of(library: Library) -> str:
    return "".join(f" sm_{arch}" for arch in library.built("archs"))


def on_card(library: Library, stub: Stub, arch: int) -> None:
    """Gives the library another card, which it learns of after it has forgotten the one before."""
    assert library.library.lora_fast_unload() == 0, library.message
    stub.set("arch", arch)


def of_driver(library: Library, stub: Stub, arch: int) -> int:
    """Lets every call of the driver fail that the first call of a function makes. Returns how many failed."""
    on_card(library, stub, arch)
    failures = 0
    for name, names in LAYER_FUNCTIONS.items():
        if not has(library, name):
            continue
        arguments, n = (layer_of(library), dict.fromkeys(names, SOME)), 0
        while True:
            n, before = n + 1, stub.counter("launches")
            on_card(library, stub, arch), stub.set("fail_after", n)
            status, text = call(library, name, *arguments)
            if not stub.failed_now():
                assert status == 0 and n > 4, f"{name} makes {n - 1} calls of the driver"
                break
            assert status == UNKNOWN and text.startswith("lora_"), (name, stub.failed, status, text)
            launched = stub.counter("launches") - before
            assert launched == 0 or stub.failed == "cuLaunchKernel", f"{name}: {launched} launches, then {stub.failed}"
            assert call(library, name, *arguments)[0] == 0, f"after {stub.failed}: {library.message}"
            failures += 1
    return failures


def first_call_fails(library: Library, stub: Stub) -> None:
    """Checks, in a process of its own, a driver that cannot be initialised."""
    child = os.fork()
    if child == 0:
        stub.set("fail_after", 1)
        got = [call(library, "project", layer_of(library), dict.fromkeys("xas", SOME)) for _ in range(2)]
        os._exit(0 if got == [(UNKNOWN, "lora_fast_project: cuInit: CUDA_ERROR_UNKNOWN")] * 2 else 1)
    assert os.waitpid(child, 0)[1] == 0, "a driver without a GPU is not reported"


def check(library: Library, stub: Stub, arch: int) -> str:
    """Makes every call and returns what was checked."""
    stub.set("noting", 0)
    first_call_fails(library, stub)
    rows, calls = [*of_layers(library), *of_batches(library)], 0
    for name, structure, pointers, status, text in rows:
        if not status and not has(library, name):
            continue
        before = stub.counter("launches")
        expected = status, f"lora_fast_{name}: {text}" if status else ""
        got = call(library, name, structure, pointers)
        assert got == expected, f"expected {expected}, got {got}"
        assert not status or stub.counter("launches") == before, f"{name} has launched, {text}"
        calls += 1
    of_host(library)
    refused = of_devices(library, stub, arch)
    failures = of_driver(library, stub, arch)
    return f"{calls} refusals, {failures} failures of the driver, {refused} kernels too large for a card"
