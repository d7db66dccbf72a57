# SPDX-License-Identifier: Apache-2.0
"""The check ``refusals``: calls of the step, its algebra and Cayley's transform with a wrong argument return a status
and a message that names the argument, and launch nothing."""

import ctypes
from collections.abc import Iterator
from ctypes import byref, c_float, c_int64, c_void_p

from library import BAD_ARGUMENT, MISALIGNED, NO_KERNEL, CayleyGroup, CayleyPair, Factor, Group, Library, StepWork, Stub

SOME, MISPLACED = c_void_p(256), c_void_p(260)  # no call here reads memory
GRAM, STEP, TRANSFORM, MERGE = range(4)
R = 16
NONE, ZERO = None, c_float(0.0)


def group(op: int = STEP, dtype: int = 0, r: int = R, n_factors: int = 2, n_rows: int = 2, flat: int = 0) -> Group:
    return Group(op, dtype, r, n_factors, n_rows, flat)


def factors(d=64, d_in=64, is_a=1, index=1, tensors=(256,) * 4) -> ctypes.Array:
    """Returns two factors, of which the second has these sizes."""
    return (Factor * 2)(
        Factor((c_void_p * 4)(*[256] * 4), 64, 64, 0, 0), Factor((c_void_p * 4)(*tensors), d, d_in, is_a, index)
    )


def planned(library: Library, group: Group) -> Group:
    """Returns the group with its table's size and an address, of no memory."""
    status = library.library.lora_fast_plan(byref(group), factors())
    assert status == 0, library.message
    group.device = SOME.value
    return group


def of_groups(library: Library) -> Iterator[tuple]:
    """Yields status, the message after the function's name, the function's name and arguments, as all that follows."""
    address = "expected an address, got NULL"
    for verb, more in (("plan", ()), ("fill", (SOME,))):
        yield BAD_ARGUMENT, f"group: {address}", verb, NONE, factors(), *more
        yield BAD_ARGUMENT, f"factors: {address}", verb, group(), NONE, *more
        yield BAD_ARGUMENT, "group.op: expected a lora_fast_op, got 4", verb, group(op=4), factors(), *more
        yield BAD_ARGUMENT, "group.dtype: expected a lora_fast_dtype, got 3", verb, group(dtype=3), factors(), *more
        yield BAD_ARGUMENT, "group.r: expected 1 to 256, got 257", verb, group(r=257), factors(), *more
        for n in (0, -1, 2**31 - 1):
            yield (
                BAD_ARGUMENT,
                f"group.n_factors: expected 1 to 2^26, got {n}",
                verb,
                group(n_factors=n),
                factors(),
                *more,
            )
        yield BAD_ARGUMENT, "group.n_rows: expected 1 to 2^30, got 0", verb, group(n_rows=0), factors(), *more
        yield BAD_ARGUMENT, "group.flat: expected 0, or 1 for a STEP, got 2", verb, group(flat=2), factors(), *more
        yield BAD_ARGUMENT, "factors.d: expected 1 to 2^30, got 0", verb, group(), factors(d=0), *more
        yield MISALIGNED, "factors.d: expected a multiple of 16, got 8", verb, group(), factors(d=8), *more
        yield BAD_ARGUMENT, "factors.is_a: expected 0 or 1, got 2", verb, group(), factors(is_a=2), *more
        for i in (-1, 2):
            text = f"factors.index: expected 0 to group.n_rows - 1, got {i}"
            yield BAD_ARGUMENT, text, verb, group(), factors(index=i), *more
        yield BAD_ARGUMENT, "factors.index: expected each once, got 0", verb, group(), factors(index=0), *more
        tensors = factors(tensors=(256, 256, 0, 256))
        yield BAD_ARGUMENT, f"factors.tensors[2]: {address}", verb, group(), tensors, *more
        tensors = factors(tensors=(256, 256, 256, 264))
        yield MISALIGNED, "factors.tensors[3]: expected a multiple of 16, got 0x108", verb, group(), tensors, *more
    yield NO_KERNEL, "nothing was built for this dtype and rank 255", "plan", group(r=255), factors()
    yield BAD_ARGUMENT, f"host: {address}", "fill", planned(library, group()), factors(), NONE
    plan_of = "expected what lora_fast_plan sets for these factors"
    yield BAD_ARGUMENT, f"group.bytes: {plan_of}, got 0", "fill", group(), factors(), SOME
    yield BAD_ARGUMENT, "group.n_programs: expected what lora_fast_plan sets, got 0", "gram_workspace", group(), SOME
    yield BAD_ARGUMENT, f"bytes: {address}", "gram_workspace", planned(library, group()), NONE
    fewer = planned(library, group())
    fewer.n_factors = 1
    text = f"group.bytes: expected what lora_fast_plan sets, got {fewer.bytes}"
    yield BAD_ARGUMENT, text, "gram_workspace", fewer, SOME
    other = planned(library, group())
    other.n_rows += 1
    text = "group.planned: expected the op, dtype, r, n_factors, n_rows and flat that lora_fast_plan was given"
    yield BAD_ARGUMENT, f"{text}, got {other.planned}", "gram_workspace", other, SOME


def of_launches(library: Library) -> Iterator[tuple]:
    address, aligned = "expected an address, got NULL", "expected a multiple of 16, got 0x104"
    step, unplaced = planned(library, group()), planned(library, group())
    unplaced.device = None
    grams = StepWork(grams=SOME.value)

    def calls(status: int, text: str, *changes) -> tuple:
        arguments = [step, SOME, 1, SOME, grams, SOME]
        for i, value in changes:
            arguments[i] = value
        return status, text, "adamw_step", *arguments, NONE

    yield calls(BAD_ARGUMENT, f"group.device: {address}", (0, unplaced))
    yield calls(BAD_ARGUMENT, f"hyper: {address}", (1, NONE))
    yield calls(BAD_ARGUMENT, "hyper_rows: expected 1 or group.n_rows, got 3", (2, 3))
    yield calls(MISALIGNED, f"steps: {aligned}", (3, MISPLACED))
    yield calls(BAD_ARGUMENT, f"workspace: {address}", (5, NONE))
    yield calls(BAD_ARGUMENT, "group.flat: expected 1 for this work, got 0", (4, NONE))
    flat = planned(library, group(flat=1))
    yield calls(BAD_ARGUMENT, "group.flat: expected 0 for this work, got 1", (0, flat))
    for name in ("additive", "matrices", "scale_p", "scale_g", "grams", "keys"):
        yield calls(MISALIGNED, f"work.{name}: {aligned}", (4, StepWork(**{name: MISPLACED.value})))
    one = StepWork(scale_p=SOME.value)
    yield calls(BAD_ARGUMENT, "work.scale_g: expected an address with work.scale_p, else NULL, got 0", (4, one))
    small, size = StepWork(), ctypes.sizeof(StepWork)
    small.size -= 8
    yield calls(BAD_ARGUMENT, f"work.size: expected the struct's size, {size}, got {size - 8}", (4, small))
    yield BAD_ARGUMENT, "group.op: expected LORA_FAST_TRANSFORM, got 1", "transform", step, SOME, 0, NONE, NONE, NONE
    yield BAD_ARGUMENT, "group.op: expected LORA_FAST_GRAM, got 1", "gram", step, SOME, SOME, NONE
    merge = (step, SOME, 0, c_int64(0), NONE, NONE)
    yield BAD_ARGUMENT, "group.op: expected LORA_FAST_MERGE, got 1", "merge", *merge


def of_numbers_of_matrices() -> Iterator[tuple]:
    for n in (-1, 2**31 - 1):
        text = f"n: expected 0 to 2^30, got {n}"
        yield BAD_ARGUMENT, text, "small_workspace", n, R, SOME
        yield BAD_ARGUMENT, text, "imbalance", n, R, *[SOME] * 5, ZERO, SOME, NONE
        yield BAD_ARGUMENT, text, "scale_reg", n, R, *[SOME] * 4, ZERO, ZERO, SOME, NONE
        yield BAD_ARGUMENT, text, "spd_solve", n, R, 1, SOME, SOME, ZERO, SOME, SOME, SOME, NONE
        yield BAD_ARGUMENT, text, "spd_inverse", n, R, SOME, ZERO, SOME, SOME, SOME, NONE
        yield BAD_ARGUMENT, text, "small_inverse", n, R, SOME, SOME, SOME, NONE
        yield BAD_ARGUMENT, text, "scalora_workspace", n, R, SOME
        yield BAD_ARGUMENT, text, "scalora_solve", n, R, SOME, 0, SOME, SOME, SOME, SOME, NONE
        yield BAD_ARGUMENT, text, "scalora_scales", n, R, *[SOME] * 4, ZERO, ZERO, SOME, SOME, SOME, NONE


def of_algebra() -> Iterator[tuple]:
    address, rank = "expected an address, got NULL", "r: expected 1 to 256, got 257"
    yield BAD_ARGUMENT, "r: expected 1 to 256, got 2147483647", "small_workspace", 1, 2**31 - 1, SOME
    yield BAD_ARGUMENT, f"bytes: {address}", "small_workspace", 1, R, NONE
    yield BAD_ARGUMENT, rank, "imbalance", 1, 257, *[SOME] * 5, ZERO, SOME, NONE
    yield BAD_ARGUMENT, rank, "small_inverse", 1, 257, SOME, SOME, SOME, NONE
    rates = (c_void_p(264), c_void_p(4))  # a multiple of 8, and none
    text = "lr_b: expected a multiple of 8, got 0x4"
    yield MISALIGNED, text, "imbalance", 1, R, SOME, SOME, SOME, *rates, ZERO, SOME, NONE
    yield BAD_ARGUMENT, f"lr_a: {address}", "imbalance", 1, R, SOME, SOME, SOME, NONE, SOME, ZERO, SOME, NONE
    yield BAD_ARGUMENT, "k: expected 1 to 2^30, got 0", "spd_solve", 1, R, 0, SOME, SOME, ZERO, SOME, SOME, SOME, NONE
    text = "k: expected r k at most 2^31 - 1, got 1073741824"
    yield BAD_ARGUMENT, text, "spd_solve", 1, R, 1 << 30, SOME, SOME, ZERO, SOME, SOME, SOME, NONE
    yield BAD_ARGUMENT, f"workspace: {address}", "spd_inverse", 1, 128, SOME, ZERO, SOME, SOME, NONE, NONE
    yield BAD_ARGUMENT, "r: expected 1 to 128, got 129", "scalora_solve", 1, 129, SOME, 0, *[SOME] * 4, NONE
    text = "solver: expected a lora_fast_solver, got 4"
    yield BAD_ARGUMENT, text, "scalora_solve", 1, R, SOME, 4, *[SOME] * 4, NONE
    text = "n: expected n r at most 2^31 - 1, got 1073741824"
    yield BAD_ARGUMENT, text, "scalora_scales", 1 << 30, R, *[SOME] * 4, ZERO, ZERO, SOME, SOME, SOME, NONE
    yield 0, "", "imbalance", 0, R, *[NONE] * 5, ZERO, NONE, NONE
    yield 0, "", "spd_solve", 0, R, 1, NONE, NONE, ZERO, NONE, NONE, NONE, NONE
    yield 0, "", "scalora_solve", 0, R, NONE, 0, *[NONE] * 4, NONE


def of_cayley() -> Iterator[tuple]:
    address = "expected an address, got NULL"
    names = [name for name, _ in CayleyPair._fields_]

    def pairs(**changes: int) -> ctypes.Array:
        return (CayleyPair * 1)(CayleyPair(**({name: 256 for name in names} | changes)))

    def of_pair(backward: int = 0, **changes: int) -> tuple:
        return "cayley_plan", CayleyGroup(0, R, 1, backward), pairs(**changes)

    yield BAD_ARGUMENT, f"group: {address}", "cayley_plan", NONE, pairs()
    yield BAD_ARGUMENT, f"pairs: {address}", "cayley_plan", CayleyGroup(0, R, 1, 0), NONE
    yield BAD_ARGUMENT, "group.backward: expected 0 or 1, got 2", "cayley_plan", CayleyGroup(0, R, 1, 2), pairs()
    yield BAD_ARGUMENT, "group.n_pairs: expected 1 to 2^25, got 0", "cayley_plan", CayleyGroup(0, R, 0, 0), pairs()
    text = "group.n_pairs: expected 3 n_pairs r^2 at most 2^31 - 1, got 16777216"
    yield BAD_ARGUMENT, text, "cayley_plan", CayleyGroup(0, R, 1 << 24, 0), pairs()
    yield BAD_ARGUMENT, f"group.device: {address}", "cayley", CayleyGroup(0, R, 1, 0), SOME, NONE
    yield BAD_ARGUMENT, "pairs.d_in: expected group.r to 2^30, got 8", *of_pair(d_in=8)
    yield MISALIGNED, "pairs.d_out: expected a multiple of 16, got 24", *of_pair(d_out=24)
    yield BAD_ARGUMENT, f"pairs.scale: {address}", *of_pair(scale=0)
    yield MISALIGNED, "pairs.result_a: expected a multiple of 16, got 0x108", *of_pair(result_a=264)
    yield BAD_ARGUMENT, f"pairs.grad_a: {address}", *of_pair(backward=1, grad_a=0)


def check(library: Library, stub: Stub) -> int:
    """Makes every call and returns their number. The group of a step and Cayley's pairs need their kernels."""
    keys = {kernel.key.decode().split(" ", 1)[1] for kernel in library.kernels}
    has = lambda start: any(key.startswith(f"{start} float32 r{R} ") for key in keys)
    rows = [*of_numbers_of_matrices(), *of_algebra()]
    if has("adamw_step"):
        rows += [*of_groups(library), *of_launches(library)]
    if has("cayley"):
        rows += of_cayley()
    before = stub.counter("launches")
    for status, text, name, *arguments in rows:
        arguments = [byref(value) if isinstance(value, ctypes.Structure) else value for value in arguments]
        got = getattr(library.library, f"lora_fast_{name}")(*arguments)
        message = library.message if status else ""
        expected = f"lora_fast_{name}: {text}" if status else ""
        assert (got, message) == (status, expected), f"expected {status}, {expected}, got {got}, {message}"
    assert stub.counter("launches") == before, "a refused call has launched something"
    return len(rows)
