"""The search of ``lora-fast tune``. For each op of each layer shape it runs all candidates, compares their results,
times those that agree with the default, and chooses one that is clearly faster than the default.

It calls the launchers of the layer, which write only into new tensors, so that timed calls do not change their inputs.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import linear, tiles, tuned
from ...kernels.linear.four_bit import four_bit_grad_x, four_bit_linear, four_bit_strategy, takes
from ...kernels.records import FourBit, NestedScales
from ...measure.clock import Clock, flush_cache, turns

GAIN = 0.02  # share of the default's time that a choice must save; less is noise
ROUNDS, WARM_UP = 20, 3

Timer = Callable[[list[Callable[[], object]]], list[float]]


@dataclass(frozen=True)
class Shape:
    """The shape of a layer, ``d_in`` → ``d_out`` with rank ``r``, and of its input of ``n_tokens`` tokens. With
    ``four_bit`` the GEMMs over an NF4 weight are searched, too."""

    n_tokens: int
    d_in: int
    d_out: int
    r: int
    dropout: float
    dtype: torch.dtype
    four_bit: bool = False


@dataclass(frozen=True)
class Case:
    """An op on one shape. ``key`` is its key in kernels/tuned.py. ``candidates`` are the tables that could be added to
    tuned.py; the first one is empty, which means the default."""

    key: tuned.Key
    call: Callable[[], Tensor | tuple[Tensor, Tensor]]
    candidates: list[tuned.Table]


@dataclass(frozen=True)
class Outcome:
    """The result of a search.

    Attributes:
        default, best: seconds of the default and of the fastest candidate.
        choice: the table of the fastest candidate; empty for the default.
        tried: number of candidates that were timed.
        failed: number of candidates that did not run on this device or gave another result.
    """

    key: tuned.Key
    default: float
    best: float
    choice: tuned.Table
    tried: int
    failed: int


def cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Yields the five ops of a layer of this shape, on random tensors."""
    n, d_in, d_out, r, dtype = shape.n_tokens, shape.d_in, shape.d_out, shape.r, shape.dtype
    generator = torch.Generator(device).manual_seed(0)

    def make(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32, device=device).to(kind)

    x, dy, s = make(n, d_in), make(n, d_out), make(n, r, kind=torch.float32)
    weight, a, b = make(d_out, d_in), make(r, d_in, kind=torch.float32), make(d_out, r, kind=torch.float32)
    keep = linear.draw_mask(x, shape.dropout, seed=1) if shape.dropout else None
    limits, size = tiles.limits(device), dtype.itemsize
    wide = size == 2  # the factors and S are wider than x: inject_ and PEFT create float32 factors
    project = "project" + "_short" * (n <= tiles.SHORT)

    def tiled(op: str, row: str, width_in: int, width_out: int, call) -> Case:
        key = tuned.key(op, dtype, n, width_in, width_out, r)
        return Case(key, call, [{}] + [{key: tile} for tile in tiles.candidates(row, size, limits, r)[1:]])

    def gemm(forward: bool, left: Tensor, width: int, call) -> Case:
        dropout = keep is not None and not forward
        name, tma = tiles.gemm(forward, dropout), tiles.uses_tma(left, weight, width)
        key = tuned.key(name, dtype, n, left.shape[1], width, r)
        tile_key = key._replace(op=name + ("_tma" if tma else "_pointer"))
        row = "linear" + "_tma" * tma + "_dropout" * dropout
        gemms = ["cublas"] + ["gluon"] * tiles.takes_gluon(left, weight, width)
        others: list[tuned.Table] = [{key: other} for other in gemms]
        fused: list[tuned.Table] = [{key: "fused", tile_key: tile} for tile in tiles.candidates(row, size, limits, r)]
        return Case(key, call, [{}, *others, *fused])

    yield tiled(project, project + "_wide" * wide, d_in, 0, lambda: linear.project(x, a, keep))
    yield gemm(True, x, d_out, lambda: linear.linear(x, weight, None, s, b, 1.0))
    yield tiled("grad_s_b", tiles.grad_s_b_row(dtype, wide), 0, d_out, lambda: linear.grad_s_b(dy, s, b, 1.0))
    yield tiled("grad_a", "grad_a" + "_wide" * wide, d_in, 0, lambda: linear.grad_a(x, s, a, keep))
    yield gemm(False, dy, d_in, lambda: linear.grad_x(dy, weight, s, a, keep))


def four_bit_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Yields the two GEMMs of a layer of this shape over an NF4 weight with double quantisation, unless the kernel does
    not take it. The default is bitsandbytes' product and one launch that adds the adapter's part."""
    from bitsandbytes import functional, matmul_4bit

    n, d_in, d_out, r, dtype = shape.n_tokens, shape.d_in, shape.d_out, shape.r, shape.dtype
    generator = torch.Generator(device).manual_seed(0)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float32, device=device)
    x, dy, s = make(n, d_in).to(dtype), make(n, d_out).to(dtype), make(n, r)
    a, b, dropout = make(r, d_in), make(d_out, r), shape.dropout > 0
    keep = linear.draw_mask(dy, shape.dropout, seed=1) if dropout else None
    packed, state = functional.quantize_4bit(make(d_out, d_in).to(dtype), compress_statistics=True, quant_type="nf4")
    nested = NestedScales(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    weight = FourBit(packed, state.code, state.absmax, state.blocksize, (d_out, d_in), nested)
    if not takes(x, weight):
        return

    def forward() -> Tensor:
        if four_bit_strategy("forward", x, weight, r, False) == "fused":
            return four_bit_linear(x, weight, None, s, b, 1.0)
        return torch.addmm(matmul_4bit(x, packed, state), s.to(dtype), b.to(dtype).t())

    def backward() -> Tensor:
        if four_bit_strategy("backward", dy, weight, r, dropout) == "fused":
            return four_bit_grad_x(dy, weight, s, a, keep)
        with tiles.assume(strategy="cublas"):
            return linear.grad_x(dy, functional.dequantize_4bit(packed, state), s, a, keep)

    for is_forward, left, width, call in ((True, x, d_out, forward), (False, dy, d_in, backward)):
        masked = dropout and not is_forward
        name, tma = tiles.four_bit_op(is_forward, masked), tiles.uses_tma(left, left, width)
        key = tuned.key(name, dtype, n, left.shape[1], width, r)
        tile_key = key._replace(op=name + ("_tma" if tma else "_pointer"))
        row = "four_bit" + "_tma" * tma + "_dropout" * masked
        found = tiles.candidates(row, dtype.itemsize, tiles.limits(device), r)
        yield Case(key, call, [{}, *({key: "fused", tile_key: tile} for tile in found)])


def search_all(
    shapes: list[Shape],
    device: torch.device,
    table: tuned.Table,
    timer: Timer,
    before_case: Callable[[tuned.Key], None],
    after_shape: Callable[[], None],
) -> list[Outcome]:
    """Searches every case of every shape and stores the choices in ``table``. Cases that shapes share are searched
    once. Calls ``before_case`` with the key of each case, and ``after_shape`` after each shape."""
    outcomes: dict[tuned.Key, Outcome] = {}
    for shape in shapes:
        for case in itertools.chain(cases(shape, device), four_bit_cases(shape, device) if shape.four_bit else ()):
            if case.key not in outcomes:
                before_case(case.key)
                outcomes[case.key] = search(case, timer)
                remember(table, case, outcomes[case.key])
        after_shape()
    return list(outcomes.values())


def search(case: Case, timer: Timer) -> Outcome:
    """Times all candidates that run and agree with the default, and chooses the fastest."""
    expected = _results(case, {})
    working = [{}, *(choice for choice in case.candidates[1:] if _agrees(case, choice, expected))]
    seconds = timer([_bound(case, choice) for choice in working])
    best = min(range(len(working)), key=seconds.__getitem__)
    if seconds[best] > (1 - GAIN) * seconds[0]:
        best = 0  # the default
    failed = len(case.candidates) - len(working)
    return Outcome(case.key, seconds[0], seconds[best], working[best], len(working), failed)


def remember(table: tuned.Table, case: Case, outcome: Outcome) -> None:
    """Replaces all entries of the case in ``table`` by the outcome's choice."""
    for choice in case.candidates:
        for key in choice:
            table.pop(key, None)
    table |= outcome.choice


def _bound(case: Case, choice: tuned.Table) -> Callable[[], object]:
    def call():
        with tuned.using(choice):
            return case.call()

    return call


def _results(case: Case, choice: tuned.Table) -> tuple[Tensor, ...]:
    results = _bound(case, choice)()
    return results if isinstance(results, tuple) else (results,)


def _agrees(case: Case, choice: tuned.Table, expected: tuple[Tensor, ...]) -> bool:
    """Returns whether the candidate runs on this device and gives the results of the default."""
    try:
        results = _results(case, choice)
    except Exception:  # a tile may need more shared memory or registers than the device has, or fail to compile
        return False
    return all(_close(result, other, case.key) for result, other in zip(results, expected, strict=True))


def _close(result: Tensor, expected: Tensor, key: tuned.Key) -> bool:
    """Returns whether two results agree in relative L2. Allows half a unit in the last place for the rounding of each
    result, and eps √n for the order of a float32 sum of n numbers. A wrong result exceeds this by far."""
    summed = max(key.tokens, key.d_in, key.d_out)
    allowed = torch.finfo(getattr(torch, key.dtype)).eps + torch.finfo(torch.float32).eps * summed**0.5
    return bool((result.double() - expected.double()).norm() <= allowed * expected.double().norm())


def time_on_gpu(calls: list[Callable[[], object]]) -> list[float]:
    """Returns the median seconds of each call on the current CUDA device. The calls take turns, so that a change of
    clock rate affects all of them, and L2 is overwritten before each."""
    device = torch.device("cuda")
    clocks: list[list[Clock]] = [[] for _ in calls]
    for turn, i in turns(range(len(calls)), ROUNDS, WARM_UP):
        flush_cache(device)
        clock = Clock(device)
        calls[i]()
        clock.mark()
        if turn >= 0:
            clocks[i].append(clock)  # read at the end, so that the host does not wait between the calls
    return [statistics.median(clock.seconds()[0] for clock in readings) for readings in clocks]
