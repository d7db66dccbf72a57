"""Many tensors in one launch: a table of addresses and sizes in device memory, and a map from programs to tiles.

Math      A factor is seen as d rows of r rank columns, whichever way it is stored: b (d_out, r) as it lies, a (r, d_in)
          as its transpose. Kernels walk tiles [BLOCK_D, BLOCK_R] and branch once, per program, on the side.
Grid      one program per (tensor, chunk of d): ``tiles`` holds (tensor, chunk) for every program.
Shapes    entries int64 (n_tensors, COLUMNS): up to four addresses, d, r, side, index (the tensor's row in whatever else
          the kernel takes: scalars, r×r matrices, results), first program, number of programs. All tensors of one
          column share a dtype (a pointer type is a constexpr): ``group`` makes one table, so one launch, per
          combination of dtypes, however many layers there are. Ranks may differ; R is the rank where all agree (a
          constexpr that lets the compiler vectorise b), else 0.
Caching   a table is kept by addresses, shapes and dtypes. A gradient that moves (``zero_grad(set_to_none=True)``) makes
          a new key: a few kilobytes are copied from pinned memory, asynchronously; the host does not wait. The caching
          allocator tends to hand the same addresses out again, so the last ``KEPT`` tables stay. The tile map depends
          on sizes alone. Capture in a CUDA graph: the addresses are baked into the table, as they would be into kernel
          arguments, so run the step once on the tensors to be captured (static gradients, set_to_none=False) before; a
          new address while capturing is an error, for the copy it needs would read host memory at every replay. What a
          graph has used is kept for good. Tensors that move in a graph, too, are listed apart (moving.py).
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import report_addresses

ADDRESSES = 4
D, R, SIDE, INDEX, FIRST, COUNT = (tl.constexpr(column) for column in range(4, 10))
COLUMNS = tl.constexpr(10)
SIDE_A = tl.constexpr(1)
BLOCKS = 16  # arrivals that a kernel may count for each tensor: 4 × 4 blocks of 64 at rank 256
KEPT = 32  # tables kept; one is a few kilobytes

TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def entry(entries, i_tensor, COLUMN: tl.constexpr):
    return tl.load(entries + i_tensor * COLUMNS + COLUMN)


@triton.jit
def tensor_at(entries, i_tensor, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to a tensor of the table. ALIGNED: it, and every row of an a, starts at a multiple of 16 bytes."""
    return pointer_at(entries + i_tensor * COLUMNS + COLUMN, DTYPE, ALIGNED)


@triton.jit
def pointer_at(p_address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer whose address is in memory."""
    pointer = tl.load(p_address).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def sizes(entries, i_tensor, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr):
    """d and r of a tensor of the table."""
    d = entry(entries, i_tensor, D)
    if ALIGNED:
        d = d // 8 * 8  # as it is; the compiler forgets tl.multiple_of on a load
    if UNIFORM_R == 0:
        r = entry(entries, i_tensor, R)
    else:
        r = UNIFORM_R
    return d, r


@triton.jit
def offsets(i_d, i_r, d, r, IS_A: tl.constexpr):
    """Where element (i_d, i_r) of a factor lies: int64 [BLOCK_D, BLOCK_R]."""
    if IS_A:
        result = i_r[None, :].to(tl.int64) * d + i_d[:, None]
    else:
        result = i_d[:, None] * r + i_r[None, :]
    return result


class Table(NamedTuple):
    """What a grouped launch needs."""

    entries: torch.Tensor
    tiles: torch.Tensor
    counters: torch.Tensor  # zeros, BLOCKS for each tensor: kernels that count arrivals leave them at zero
    programs: int
    dtypes: tuple[torch.dtype, ...]
    uniform_r: int
    aligned: bool


class Factor(NamedTuple):
    """One row: up to four tensors of one shape, with rank first (``a``) or last, and the row's index."""

    tensors: tuple[torch.Tensor, ...]
    is_a: bool
    index: int

    @property
    def d_r(self) -> tuple[int, int]:
        rows, columns = self.tensors[0].shape
        return (columns, rows) if self.is_a else (rows, columns)


_tables: OrderedDict = OrderedDict()
_captured: dict = {}  # what CUDA graphs read at every replay


def capturing() -> bool:
    """Whether launches go into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def group(factors: list[Factor], chunk: int, flat: bool = False) -> list[Table]:
    """A table for each combination of dtypes, in the order in which they first occur. ``chunk``: rows of d that one
    program takes. ``flat``: for elementwise work, a tensor counts as numel rows of rank 1."""
    by_dtypes: dict[tuple, list[Factor]] = {}
    for factor in factors:
        by_dtypes.setdefault(tuple(t.dtype for t in factor.tensors), []).append(factor)
    return [_table(tuple(members), chunk, flat) for members in by_dtypes.values()]


def _table(factors: tuple[Factor, ...], chunk: int, flat: bool) -> Table:
    key = chunk, flat, factors[0].tensors[0].device, tuple(
        [(f.is_a, f.index, f.tensors[0].shape, *[(t.data_ptr(), t.dtype) for t in f.tensors]) for f in factors]
    )  # fmt: skip
    table = kept(key, lambda: _build(factors, chunk, flat))
    report_addresses(table.entries, (t for f in factors for t in f.tensors))
    return table


def kept(key: tuple, build: Callable):
    """What ``build`` makes for a key, made once and kept until ``KEPT`` others were used since; for good where a CUDA
    graph has used it."""
    if key in _captured:
        return _captured[key]
    if key not in _tables:
        if capturing():
            raise RuntimeError(
                "lora_fast: a tensor of the step has moved since the last step, and a CUDA graph is being captured: "
                "run the step once on the tensors to be captured first, and keep their gradients where they are"
            )
        _tables[key] = build()
        while len(_tables) > KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    if capturing():
        _captured[key] = _tables.pop(key)
        return _captured[key]
    return _tables[key]


def _build(factors: tuple[Factor, ...], chunk: int, flat: bool) -> Table:
    _check(factors)
    device = factors[0].tensors[0].device
    shapes = [(f.tensors[0].numel(), 1) if flat else f.d_r for f in factors]
    tiles, first, count = tile_map(tuple(d for d, _ in shapes), chunk, device)
    rows = []
    for i, (factor, (d, r)) in enumerate(zip(factors, shapes, strict=True)):
        addresses = [t.data_ptr() for t in factor.tensors] + [0] * (ADDRESSES - len(factor.tensors))
        rows.append([*addresses, d, r, int(factor.is_a and not flat), factor.index, first[i], count[i]])
    ranks = {r for _, r in shapes}
    aligned = all(t.data_ptr() % 16 == 0 for f in factors for t in f.tensors) and all(d % 8 == 0 for d, _ in shapes)
    dtypes = tuple(t.dtype for t in factors[0].tensors)
    uniform_r = ranks.pop() if len(ranks) == 1 else 0
    counters = torch.zeros(BLOCKS * len(rows), dtype=torch.int32, device=device)
    return Table(to_device(rows, torch.int64, device), tiles, counters, len(tiles), dtypes, uniform_r, aligned)


def _check(factors: tuple[Factor, ...]) -> None:
    for factor in factors:
        first = factor.tensors[0]
        for tensor in factor.tensors:
            if tensor.shape != first.shape or tensor.device != factors[0].tensors[0].device:
                raise ValueError(
                    f"lora_fast: the tensors of a factor need one shape and all factors one device, got "
                    f"{tuple(tensor.shape)} on {tensor.device} beside {tuple(first.shape)} on {first.device}"
                )
            check_storage(tensor)


def check_storage(tensor: torch.Tensor) -> None:
    if tensor.dtype not in TL_DTYPE:
        raise ValueError(f"lora_fast: expected float16, bfloat16 or float32, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"lora_fast: a grouped launch needs contiguous tensors, got strides {tensor.stride()} "
            f"of shape {tuple(tensor.shape)}"
        )


@lru_cache(maxsize=64)
def tile_map(lengths: tuple[int, ...], chunk: int, device: torch.device) -> tuple[torch.Tensor, list, list]:
    """(tensor, chunk) of every program, the first program of every tensor and how many it has. A tensor without
    elements still has one, so that its results are written."""
    count = [max(1, triton.cdiv(d, chunk)) for d in lengths]
    first = [0]
    for n in count[:-1]:
        first.append(first[-1] + n)
    pairs = [(i, chunk_of) for i, n in enumerate(count) for chunk_of in range(n)]
    return to_device(pairs, torch.int32, device), first, count


def to_device(rows: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Small numbers from the host: through pinned memory, so that the host need not wait."""
    host = torch.tensor(rows, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
