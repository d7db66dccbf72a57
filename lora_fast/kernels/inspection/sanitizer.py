"""Checks the memory accesses of kernels. Inside ``checked`` every launch runs in Triton's interpreter
(``TRITON_INTERPRET=1``) with a log of its accesses.

Bounds    Every address is that of an element of an argument, or of a tensor whose address is in an argument
          (``launch.report_addresses``). Memory between the rows of a view does not belong to the view.
Lanes     A masked load has a value (``other``) for its masked lanes. Lanes of a store that share an address store the
          same value.
Barriers  A program is many threads. It passes a barrier before it loads what it has stored, and before it stores over
          what other lanes have loaded or stored.
Programs  Programs run in any order. No program touches what another one writes unless atomics order them: an atomic
          that releases orders all before the last barrier that precedes it, one that acquires orders all after the
          next barrier. Clocks of all programs are passed on, so chains of atomics count. A second run, with the
          programs in another order, must leave the same bytes in all tensors.
Limits    Programs run one after another, so a program that waits for a later one never ends. Barriers that the compiler
          inserts are not known here. The interpreter does not pass on ``other=0`` of a scalar load, so scalar loads are
          not checked for it.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch.utils.weak import TensorWeakRef
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launch
from .access_log import CONFLICTS, Finding, Log

WARP, DEFAULT_WARPS = 32, 4
OPERATIONS = (
    "set_grid_idx", "create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas",
    "create_barrier",
)  # fmt: skip


class Summary(NamedTuple):
    """The number of elements that a launch loaded, stored and used in atomics."""

    kernel: str
    n_programs: int
    loads: int
    stores: int
    atomics: int


class Report(NamedTuple):
    """The findings and the launches inside a ``checked`` context, filled as the launches run."""

    findings: list[Finding]
    launches: list[Summary]


class Checker:
    """Wraps operations of the interpreter. Each wrapper takes the original operation as its first argument."""

    def __init__(self, shuffle_seed: int):
        self.report, self.shuffle_seed = Report([], []), shuffle_seed
        self.at_address: dict[int, list[TensorWeakRef]] = {}  # what ``launch.report_addresses`` has reported
        self.log: Log | None = None
        self.next_program: Iterator | None = None

    def watch(self, holder: torch.Tensor | int, tensors: list[torch.Tensor]) -> None:
        self.at_address[_address(holder)] = [TensorWeakRef(tensor) for tensor in tensors]

    def call(self, call, executor: GridExecutor, *args, **options) -> None:
        """Runs a launch with a log, then once more with its programs in another order."""
        tensors = self._tensors(dict(zip(executor.arg_names, args, strict=False)) | options)
        log = self.log = Log(executor.fn, tensors, WARP * options.get("num_warps", DEFAULT_WARPS))
        before = log.memory.read()
        try:
            call(executor, *args, **options)
            log.check_programs()
            if len(log.programs) > 1 and not log.findings:
                result, self.log = log.memory.read(), None
                log.memory.write(before)
                self.next_program = iter(random.Random(self.shuffle_seed).sample(log.programs, len(log.programs)))
                call(executor, *args, **options)
                log.check_result(result)
                log.memory.write(result)
        finally:
            self.log = self.next_program = None
        self.report.findings.extend(log.findings.values())
        counts = (log.counts[kind] for kind in CONFLICTS)
        self.report.launches.append(Summary(executor.fn.__name__, len(log.programs), *counts))

    def _tensors(self, arguments: dict) -> Iterator[tuple[str, torch.Tensor]]:
        """Returns all tensors that a launch may touch, with their names."""
        for name, argument in arguments.items():
            argument = argument.base if isinstance(argument, TensorDescriptor) else argument
            if isinstance(argument, torch.Tensor):
                yield name, argument
            for i, reference in enumerate(self.at_address.get(_address(argument), ())):
                if (tensor := reference()) is not None:
                    yield f"{name}[{i}]", tensor

    def set_grid_idx(self, set_grid_idx, builder, *program: int) -> None:
        if self.log is not None:
            self.log.begin(program)
        set_grid_idx(builder, *(program if self.next_program is None else next(self.next_program)))

    def create_masked_load(self, load, builder, pointers, mask, other, *hints, **options) -> TensorHandle:
        if self.log is not None:
            mask = self.log.access("load", pointers, mask, other)
        return load(builder, pointers, mask, other, *hints, **options)

    def create_masked_store(self, store, builder, pointers, values, mask, *hints):
        if self.log is not None:
            mask = self.log.access("store", pointers, mask, values)
        return store(builder, pointers, values, mask, *hints)

    def create_atomic_rmw(self, atomic, builder, operation, pointers, values, mask, semantics, scope) -> TensorHandle:
        if self.log is not None:
            mask = self.log.access("atomic", pointers, mask, semantics=_between_programs(semantics, scope))
        return atomic(builder, operation, pointers, values, mask, semantics, scope)

    def create_atomic_cas(self, atomic, builder, pointers, expected, values, semantics, scope) -> TensorHandle:
        if self.log is not None:
            every = TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1)
            self.log.access("atomic", pointers, every, semantics=_between_programs(semantics, scope))
        return atomic(builder, pointers, expected, values, semantics, scope)

    def create_barrier(self, barrier, builder):
        if self.log is not None:
            self.log.barrier()
        return barrier(builder)


def _between_programs(semantics, scope) -> str:
    """Returns the memory semantics of an atomic between programs, which is empty if its scope is one program."""
    return "" if scope.name == "CTA" else semantics.name


def _address(argument) -> int | None:
    """Returns the address of a tensor, or a number that may be an address."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return argument if isinstance(argument, int) else None


@contextmanager
def checked(shuffle_seed: int = 0) -> Iterator[Report]:
    """Checks every launch inside the context. ``shuffle_seed`` determines the order of programs in the second run."""
    checker = Checker(shuffle_seed)
    replaced = [(InterpreterBuilder, name, getattr(checker, name)) for name in OPERATIONS]
    replaced.append((GridExecutor, "__call__", checker.call))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for (owner, name, replacement), (*_, original) in zip(replaced, originals, strict=True):
        setattr(owner, name, _wrap(replacement, original))
    launch.address_watchers.append(checker.watch)
    try:
        yield checker.report
    finally:
        launch.address_watchers.remove(checker.watch)
        for original in originals:
            setattr(*original)


def _wrap(replacement: Callable, original: Callable) -> Callable:
    return lambda *args, **options: replacement(original, *args, **options)
