"""Many tensors in one launch: a table of addresses and sizes in device memory, and a map from programs to tiles.

Math      A factor is seen as d rows of r rank columns, whichever way it is stored: b (d_out, r) as it lies, a (r, d_in)
          as its transpose. Kernels walk tiles [BLOCK_D, BLOCK_R] and branch once, per program, on the side.
Grid      one program per (tensor, chunk of d): the tile map holds (tensor, chunk) for every program. The programs of a
          tensor follow each other, those of E experts in turns.
Shapes    entries int64 (n_tensors, COLUMNS): up to three addresses, of tensors of one shape, d, r, side, index (the
          tensor's row in whatever else the kernel takes: step counts, r×r matrices, results). All tensors of one
          column share a dtype (a pointer type is a constexpr). Ranks may differ; R is the rank where all agree (a
          constexpr that lets the compiler vectorise b), else 0. EXPERTS: b is one of E factors (d_out, r) that lie
          interleaved in one (d_out, r, E).
Owners    An optimizer's group owns a table for as long as its tensors stay where they are. Gradients move at every step
          (``zero_grad(set_to_none=True)``): their addresses are a list apart, a ``Mirror``, copied again when it has
          changed: a few kilobytes from pinned memory, asynchronously; the host does not wait. Functions that are handed
          lists keep the last ``KEPT`` tables of a kind, found by comparing addresses.
Capture   in a CUDA graph addresses are baked into tables, as they would be into kernel arguments, so run the step once
          on the tensors to be captured (static gradients, set_to_none=False) before; a new address while capturing is
          an error, for the copy it needs would read host memory at every replay. What a graph has used is kept for
          good. Tensors that move in a graph, too, are listed apart (cayley/addresses.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .grouping import group_by
from .launch import Launch, report_addresses

ADDRESSES = 3
D, R, SIDE, INDEX = (tl.constexpr(column) for column in range(3, 7))
COLUMNS = tl.constexpr(8)  # the last is spare: rows start at multiples of 64 bytes
SIDE_A = tl.constexpr(1)
BLOCKS = 16  # arrivals that a kernel may count for each tensor: 4 × 4 blocks of 64 at rank 256
KEPT = 32  # of each kind; one is a few kilobytes
ALIGNMENT = 16  # bytes

TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# ---- On the device


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
def sizes(entries, i_tensor, IS_A: tl.constexpr, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr):
    """d and r of a tensor of the table."""
    d = entry(entries, i_tensor, D)
    if ALIGNED and IS_A:
        d = d // 8 * 8  # as it is; the compiler forgets tl.multiple_of on a load
    if UNIFORM_R == 0:
        r = entry(entries, i_tensor, R)
    else:
        r = UNIFORM_R
    return d, r


@triton.jit
def flat_sizes(entries, i_tensor, ALIGNED: tl.constexpr):
    """Returns numel and 1: for elementwise work a tensor of the table counts as numel rows of rank 1."""
    numel = entry(entries, i_tensor, D) * entry(entries, i_tensor, R)
    if ALIGNED:
        numel = numel // 8 * 8  # as in ``sizes``
    return numel, 1


@triton.jit
def offsets(i_d, i_r, d, r, IS_A: tl.constexpr, EXPERTS: tl.constexpr = 1):
    """Where element (i_d, i_r) of a factor lies: int64 [BLOCK_D, BLOCK_R]."""
    if IS_A:
        result = i_r[None, :].to(tl.int64) * d + i_d[:, None]
    else:
        result = (i_d[:, None] * r + i_r[None, :]) * EXPERTS
    return result


@triton.jit
def programs_of(d, CHUNK: tl.constexpr):
    """Returns how many programs a tensor of d rows has. One without elements has one, which writes its results."""
    return tl.maximum(tl.cdiv(d, CHUNK), 1).to(tl.int32)


# ---- On the host


class Tiles(NamedTuple):
    """``pairs``: int32 (programs, 2) on the device, the tensor and the chunk of every program."""

    pairs: torch.Tensor
    programs: int


class Table:
    """Factors of one combination of dtypes on one device, all of them aligned or none.

    Args:
        columns: up to three lists of contiguous tensors; the first are the factors, the others fit them.
        is_a: whether a factor's rank is its first dimension.
        members: the places of the factors in those lists.
        indices: the rows of these in whatever else kernels take, of experts the first row.
        experts: E, of every factor: a parameter (E·r, d_in) or (d_out, r·E) is E rows of the table.
        aligned: whether every tensor, and every row of an a, starts at a multiple of 16 bytes, and ends at one.

    Attributes:
        entries: int64 (n, COLUMNS) on the device. counters: zeros, ``BLOCKS`` for each row: kernels that count arrivals
            leave them at zero.
        dtypes: of the columns. r_max: the largest rank. uniform_r: the rank, or 0 where they differ.
        plans: launches on this table, by what they do.
    """

    def __init__(
        self,
        columns: Sequence[list[torch.Tensor]],
        is_a: list[bool],
        members: list[int],
        indices: Sequence[int],
        experts: int,
        aligned: bool,
    ):
        first = columns[0][members[0]]
        self.device, self.members, self.experts, self.aligned = first.device, members, experts, aligned
        self.dtypes = tuple(column[members[0]].dtype for column in columns)
        self._d_r = [_d_r(columns[0][i].shape, is_a[i], experts) for i in members]
        ranks = {r for _, r in self._d_r}
        self.r_max, self.uniform_r = max(ranks), ranks.pop() if len(ranks) == 1 else 0
        rows = []
        for i, (d, r) in zip(members, self._d_r, strict=True):
            starts = [addresses(column[i], is_a[i], experts) for column in columns]
            for expert, places in enumerate(zip(*starts, strict=True)):
                unused = [0] * (ADDRESSES - len(columns))
                rows.append([*places, *unused, d, r, int(is_a[i]), indices[i] + expert, 0])
        self.entries = to_device(rows, torch.int64, self.device)
        self.counters = torch.zeros(BLOCKS * len(rows), dtype=torch.int32, device=self.device)
        self._is_a = [is_a[i] for i in members]
        self._beside = Mirror(self.device)
        self._tiles: dict[tuple[int, bool], Tiles] = {}
        self.plans: dict[tuple, Launch] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def column(self, i: int) -> "Listed":
        """The table with one of its own columns beside the factors."""
        return Listed(self, self.entries.view(-1)[i:], self.dtypes[i], COLUMNS.value)

    def beside(self, gradients: list[torch.Tensor]) -> "Listed":
        """Returns the table with the gradients beside it. ``gradients``: contiguous, of all factors of the columns."""
        if len(self.members) < len(gradients):
            gradients = [gradients[i] for i in self.members]
        gradients = self._as_kernels_take_them(gradients)
        if self.experts == 1:
            places = [g.data_ptr() for g in gradients]
        else:
            both = zip(gradients, self._is_a, strict=True)
            places = [place for g, side in both for place in addresses(g, side, self.experts)]
        listed = self._beside.of(places)
        report_addresses(listed, gradients)
        return Listed(self, listed, gradients[0].dtype, held=gradients)

    def _as_kernels_take_them(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the gradients in one dtype, and aligned where the table is, copied where they are not."""
        dtypes = [g.dtype for g in gradients]
        if dtypes.count(dtypes[0]) < len(dtypes) or dtypes[0] not in TL_DTYPE:
            gradients = [g.float() for g in gradients]
        if self.aligned and any([g.data_ptr() % ALIGNMENT for g in gradients]):
            gradients = [g if is_aligned(g) else g.clone() for g in gradients]
        return gradients

    def tiles(self, chunk: int, flat: bool = False) -> Tiles:
        """The map for programs that take ``chunk`` rows of d; ``flat``: for elementwise work, of which a tensor counts
        as numel rows of rank 1."""
        if (chunk, flat) not in self._tiles:
            check_not_captured()
            pairs = []
            for i, (d, r) in enumerate(self._d_r):
                for i_chunk in range(max(1, triton.cdiv(d * r if flat else d, chunk))):
                    pairs += [(i * self.experts + expert, i_chunk) for expert in range(self.experts)]
            self._tiles[chunk, flat] = Tiles(to_device(pairs, torch.int32, self.device), len(pairs))
        return self._tiles[chunk, flat]


class Listed(NamedTuple):
    """A table, and what lies beside each of its factors, such as its gradient: int64 addresses, ``stride`` apart, of
    tensors in ``dtype``. ``held``: these tensors; some are copies, which live until the launches are made."""

    table: Table
    addresses: torch.Tensor
    dtype: torch.dtype
    stride: int = 1
    held: Sequence[torch.Tensor] = ()


def tables(
    columns: Sequence[list[torch.Tensor]],
    is_a: list[bool],
    indices: Sequence[int],
    experts: Sequence[int] | None = None,
    beside: list[torch.Tensor] | None = None,
) -> list[Table]:
    """One for each combination of dtypes and number of experts, and one more for what of it is not aligned, in the
    order in which they first occur. ``beside``: tensors of the factors that ``Table.beside`` will get."""
    rows = list(zip(*columns, *([] if beside is None else [beside]), strict=True))

    def kind(i: int) -> tuple:
        n_experts = 1 if experts is None else experts[i]
        return n_experts, _is_aligned(rows[i], is_a[i], n_experts), *(t.dtype for t in rows[i])

    places = group_by(range(len(rows)), kind)
    return [Table(columns, is_a, members, indices, *kinds[:2]) for kinds, members in places.items()]


def largest_rank(factors: list[torch.Tensor], is_a: list[bool]) -> int:
    """R of a list of factors; 1 of an empty one."""
    return max((factor.shape[0 if side else 1] for factor, side in zip(factors, is_a, strict=True)), default=1)


def _d_r(shape: torch.Size, is_a: bool, experts: int) -> tuple[int, int]:
    ranks, d = shape if is_a else reversed(shape)
    return d, ranks // experts


def _is_aligned(tensors: Sequence[torch.Tensor], is_a: bool, experts: int) -> bool:
    d, r = _d_r(tensors[0].shape, is_a, experts)
    if d * r % 8 or (is_a and d % 8):
        return False
    return not (is_a or experts == 1) or all(is_aligned(t) for t in tensors)  # experts' b are read by the element


def is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def addresses(tensor: torch.Tensor, is_a: bool, experts: int) -> range:
    """Returns the address of each expert's factor in a parameter (E·r, d_in) or (d_out, r·E)."""
    start, size = tensor.data_ptr(), tensor.element_size()
    step = max(size, tensor.numel() // experts * size) if is_a else size
    return range(start, start + experts * step, step)


def whole(factors: list[torch.Tensor], is_a: list[bool]) -> Table:
    """One table of factors of one dtype, in their order; aligned where all are. Checks and keeps as ``listed`` does."""
    for factor in factors:
        _check(factor, factor, factors[0])
    places = [(side, t.shape, t.data_ptr(), t.dtype) for t, side in zip(factors, is_a, strict=True)]
    members = list(range(len(factors)))

    def build() -> Table:
        aligned = all(_is_aligned([factor], side, 1) for factor, side in zip(factors, is_a, strict=True))
        return Table([factors], is_a, members, members, 1, aligned)

    table = kept("whole", [factors[0].device, places], build)
    report_addresses(table.entries, factors)
    return table


def listed(
    columns: Sequence[list[torch.Tensor]],
    is_a: list[bool],
    beside: list[torch.Tensor] | None = None,
    indices: list[int] | None = None,
) -> list[Listed]:
    """Tables of what a function was handed, with what lies beside. ``indices``: those of ``Table``, or the places in
    the lists. Every tensor is checked at every call; tables are kept.

    Raises:
        ValueError: a tensor that is not contiguous, of another shape than its factor, on another device, or neither
            float16, bfloat16 nor float32.
    """
    factors = columns[0]
    lists = [*columns] if beside is None else [*columns, beside]
    for tensors in zip(*lists, strict=True):
        for tensor in tensors:
            _check(tensor, tensors[0], factors[0])
    indices = indices or list(range(len(factors)))
    shapes = [(side, factor.shape) for side, factor in zip(is_a, factors, strict=True)]
    places = [(t.data_ptr(), t.dtype) for column in columns for t in column]
    moving = [(is_aligned(t), t.dtype) for t in beside or ()]
    key = [factors[0].device, indices, shapes, places, moving]
    built = kept("factors", key, lambda: tables(columns, is_a, indices, beside=beside))
    for table in built:
        report_addresses(table.entries, (column[i] for column in columns for i in table.members))
    return [table.column(0) if beside is None else table.beside(beside) for table in built]


def _check(tensor: torch.Tensor, factor: torch.Tensor, first: torch.Tensor) -> None:
    if tensor.shape != factor.shape or tensor.device != first.device:
        raise ValueError(
            f"lora_fast: the tensors of a factor need one shape and all factors one device, got "
            f"{tuple(tensor.shape)} on {tensor.device} beside {tuple(factor.shape)} on {first.device}"
        )
    check_storage(tensor)


def check_dtype(tensor: torch.Tensor) -> None:
    if tensor.dtype not in TL_DTYPE:
        raise ValueError(f"lora_fast: expected float16, bfloat16 or float32, got {tensor.dtype}")


def check_storage(tensor: torch.Tensor) -> None:
    check_dtype(tensor)
    if not tensor.is_contiguous():
        raise ValueError(
            f"lora_fast: a grouped launch needs contiguous tensors, got strides {tensor.stride()} "
            f"of shape {tuple(tensor.shape)}"
        )


class Mirror:
    """Addresses that the host knows and the device reads: copied again when they have changed, to another place, for
    what was launched before may still read the old ones."""

    def __init__(self, device: torch.device):
        self._device, self._addresses, self._on_device = device, None, None

    def of(self, addresses: list[int]) -> torch.Tensor:
        """int64, on the device.

        Raises:
            RuntimeError: others than the last while a CUDA graph is captured.
        """
        if addresses != self._addresses:
            check_not_captured()
            self._addresses, self._on_device = addresses, to_device(addresses, torch.int64, self._device)
        if capturing():
            keep_for_good(self._on_device)
        return self._on_device


def capturing() -> bool:
    """Whether launches go into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_not_captured() -> None:
    if capturing():
        raise RuntimeError(
            "lora_fast: a tensor of the step has moved since the last step, and a CUDA graph is being captured: "
            "run the step once on the tensors to be captured first, and keep their gradients where they are"
        )


_recent: dict[str, list[tuple[list, object]]] = {}
_captured: dict[str, list[tuple[list, object]]] = {}  # those that CUDA graphs read at every replay
_held: list[object] = []  # by CUDA graphs, too, but found by other ways


def keep_for_good(used: object) -> None:
    """Holds an object whose memory a CUDA graph reads at every replay."""
    if not any(used is held for held in _held):
        _held.append(used)


def kept(kind: str, places: list, build: Callable):
    """Returns the object that ``build`` makes for these places. It is made once and kept until ``KEPT`` others of its
    kind were used since; for good where a CUDA graph has used it."""
    recent, captured = _recent.setdefault(kind, []), _captured.setdefault(kind, [])
    for entries in (captured, recent):
        for i, (key, result) in enumerate(entries):
            if key == places:
                if entries is recent:
                    (captured if capturing() else recent).insert(0, recent.pop(i))
                return result
    check_not_captured()
    result = build()
    recent.insert(0, (places, result))
    del recent[KEPT:]
    return result


def to_device(rows: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Small numbers from the host: through pinned memory, so that the host need not wait."""
    host = torch.tensor(rows, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
