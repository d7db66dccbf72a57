# SPDX-License-Identifier: Apache-2.0
"""The check ``interpret``: the interpreter computes a call in C of every row of the library's table for an arch."""

import re
import time
from collections.abc import Callable, Iterator
from functools import partial

import algebra_cases
import torch
from batch_formulas import BatchCall
from case import Case
from formulas import LayerCall, padded
from interpreter import Interpreter, constants_of
from launch_cases import CASES, options_of
from library import Library, Stub

from lora_fast.kernels import tiles

# op of the table → function of LayerCall
LAYER = {op: op for op in ("project", "linear", "grad_x", "add_to_y", "add_to_dx", "grad_s_b", "grad_a")}
LAYER |= {"project_parts": "add_adapter", "add_parts_to_y": "add_adapter"}
WHOLE_LAYER = ("project", "linear", "grad_s_b", "grad_a", "grad_x")
BATCHED = {"batch_project": "project", "batch_add": "add_to_y"}  # op → function of BatchCall
SUMS = ("grad_s_b", "grad_a")  # ops with a second launch
PROGRESS_INTERVAL = 5  # seconds


def calls_of(op: str, options: dict) -> list[dict]:
    """Returns the calls of a layer's op: one token, few, and so many that a gradient is the sum of several parts; rows
    with and without gaps, seeds by value and in memory."""
    dropout = bool(options.get("dropout"))
    if options.get("tokens") == "few":  # d_in such that S is split
        return [{"n_tokens": 1, "d_in": 4096, "d_out": 64}, {"n_tokens": 2, "d_in": 4096, "d_out": 64, "gap": 48}]
    if options.get("tokens") == "many":
        return [{"n_tokens": tiles.SHORT + 1, "gap": 48, "dropout": dropout}]
    calls = [{"n_tokens": 67}, {"n_tokens": 1100, "gap": 48, "in_memory": dropout, "accumulate": True}]
    if op not in SUMS:
        calls[1]["n_tokens"] = 130
    return [{"n_tokens": 1, "dropout": dropout}, *({**call, "dropout": dropout} for call in calls)]


def runs(library: Library, rows: set[int], only: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields the name and a function for every call to check."""
    names = sorted({library.kernels[i].key.decode().split(" ", 1)[1] for i in rows})
    has = {options_of(name)[:3] for name in names}
    for _, dtype, r in sorted((kind for kind in has if kind[0] == "linear"), key=str):
        if all((op, dtype, r) in has for op in WHOLE_LAYER) and re.search(only, "padded"):
            yield f"padded {dtype} r{r}", partial(padded, library, dtype, r)
    for name in names:
        if not re.search(only, name):
            continue
        op, dtype, r, options = options_of(name)
        if op in LAYER:
            bias = {"bias": bool(options["bias"])} if "bias" in options else {}
            for call in calls_of(op, options):
                layer = LayerCall(library, dtype, getattr(torch, options["adapter"]), r, **call, **bias)
                yield f"{name} {call}", getattr(layer, LAYER[op])
        elif op in BATCHED:
            for call in batches_of(op, options):
                batch = BatchCall(library, dtype, getattr(torch, options["adapter"]), r, **call)
                yield f"{name} {call}", getattr(batch, BATCHED[op])
        elif op in CASES:
            if op in algebra_cases.CASES and r >= 16:
                r = r // 2 + 4  # the kernels of a class of ranks serve every rank of it; a smaller one takes less time
            case = CASES[op](library, torch.device("cpu"), dtype, r, **options)
            yield name, partial(compare_bits, case)


def batches_of(op: str, options: dict) -> list[dict]:
    if options["tokens"] == "many":
        return [{"n_tokens": (tiles.SHORT if op == "batch_project" else tiles.FEW) + 1, "gap": 48}]
    return [{"n_tokens": 1}, {"n_tokens": 67}, {"n_tokens": 130, "gap": 48}]


def compare_bits(case: Case) -> None:
    copy = {key: None if t is None else t.clone() for key, t in case.tensors.items()}
    got = case.c(case.tensors)
    for i, (mine, theirs) in enumerate(zip(got, case.python(copy), strict=True)):
        same = mine.dtype is theirs.dtype and bytes(mine.contiguous().view(-1).view(torch.uint8)) == bytes(
            theirs.contiguous().view(-1).view(torch.uint8)
        )
        assert same, f"result {i} has other bits than Python's launch gives"


def rows_to_run(library: Library, arch: int) -> set[int]:
    """Returns the rows of an arch whose types and constants no earlier arch has: the interpreter would compute the same
    for the others. The code for a later arch (PTX) has those of its machine code."""
    new, known = set(), set()
    for i, kernel in sorted(enumerate(library.kernels), key=lambda row: row[1].arch):
        meaning = kernel.key, kernel.params, tuple(constants_of(kernel).items())
        if kernel.arch == arch and not kernel.is_ptx and meaning not in known:
            new.add(i)
        elif kernel.arch < arch:
            known.add(meaning)
    return new


def interpret(library: Library, stub: Stub, arch: int, only: str) -> str:
    """Runs every call on a card of the arch and returns what was run."""
    stub.set("noting", 0)
    interpreter, count, last_report = Interpreter(library, stub), 0, time.monotonic()
    rows = rows_to_run(library, arch)
    with tiles.assume(arch=arch):
        for name, run in runs(library, rows, only):
            try:
                try:
                    run()
                finally:
                    interpreter.check()  # the error of a launch comes before that of its result
            except Exception as error:
                error.add_note(f"in sm_{arch}: {name}")
                raise
            count += 1
            if time.monotonic() - last_report > PROGRESS_INTERVAL:
                done = len(interpreter.executed & rows)
                print(f"sm_{arch}: {count} calls, {done} of {len(rows)} kernels", flush=True)
                last_report = time.monotonic()
    missing = [library.kernels[i].key.decode() for i in sorted(rows - interpreter.executed)]
    assert only or not missing, f"sm_{arch}: no call has run {missing}"
    same = sum(kernel.form == f"sm_{arch}" for kernel in library.kernels) - len(rows)
    return f"sm_{arch}: {count} calls have run {len(rows & interpreter.executed)} kernels; {same} are an earlier arch's"
