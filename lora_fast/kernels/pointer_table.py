"""Many tensors in one launch: a table of addresses and sizes in device memory, and a map from programs to tiles.

Math      A factor is seen as d rows of r rank columns, whichever way it is stored: b (d_out, r) as it is, a (r, d_in)
          as its transpose. Kernels walk tiles [BLOCK_D, BLOCK_R] and branch once per program, on the side.
Grid      One program per (tensor, chunk of d). The tile map holds (tensor, chunk) for every program. The programs of a
          tensor follow each other; those of E experts alternate.
Shapes    entries int64 (n_tensors, COLUMNS): up to three addresses of tensors of one shape, d, r, side, index (the
          tensor's row in the launch's other arguments: step counts, r×r matrices, results), and whether the tensor
          rests: its programs then have no rows, so they neither read nor change it, and sums over it are 0. All tensors
          of one column share a dtype (a pointer type is a constexpr). Ranks may differ. UNIFORM_R is the rank where all
          agree (a constexpr that lets the compiler vectorise b), else 0. EXPERTS: b is one of E factors (d_out, r) that
          are interleaved in one (d_out, r, E).
Owners    A batch of the optimizer owns its tables as long as its tensors keep their addresses. Gradients move at every
          step (``zero_grad(set_to_none=True)``), so their addresses are a separate list, a ``DeviceAddresses``. When
          the list has changed, a few kilobytes are copied from pinned memory, asynchronously; the host does not wait.
          Functions that take lists of tensors cache the last ``CACHE_SIZE`` tables of a kind and device, found by their
          addresses and the current stream. Launches on one stream are ordered, so they may share a table's counters;
          launches on two streams may not, and the second might run before the table has been copied.
Capture   A CUDA graph bakes addresses into tables, as it does into kernel arguments. Run the step once on the tensors
          to be captured (static gradients, set_to_none=False) before the capture. A new address while capturing is an
          error, because its copy would read host memory at every replay. Whatever a graph has used is never freed.
          Tensors that may move between captures have a list of their own (cayley/addresses.py).
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import device
from .device import to_device
from .grouping import group_by
from .launch import Launch, report_addresses

ADDRESSES = 3
D, R, SIDE, INDEX, RESTS = (tl.constexpr(column) for column in range(3, 8))
COLUMNS = tl.constexpr(8)  # rows start at multiples of 64 bytes
SIDE_A = tl.constexpr(1)
BLOCKS = 16  # arrivals that a kernel may count for each tensor: 4 × 4 blocks of 64 at rank 256
CACHE_SIZE = 32  # tables of each kind; one is a few kilobytes
SMALL_CACHE_SIZE = 4096  # of a kind of which every layer of a model has its own, some hundred bytes each
ALIGNMENT = 16  # bytes: the widest load of a thread

TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# ---- On the device


@triton.jit
def load_entry(entries, i_tensor, COLUMN: tl.constexpr):
    return tl.load(entries + i_tensor * COLUMNS + COLUMN)


@triton.jit
def tensor_at(entries, i_tensor, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the pointer to a tensor of the table. ALIGNED: the tensor, and every row of an a, starts at a multiple of
    16 bytes."""
    return pointer_at(entries + i_tensor * COLUMNS + COLUMN, DTYPE, ALIGNED)


@triton.jit
def pointer_at(p_address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the pointer whose address is stored at ``p_address``."""
    pointer = tl.load(p_address).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_sizes(entries, i_tensor, IS_A: tl.constexpr, UNIFORM_R: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns d and r of a tensor of the table."""
    d = load_entry(entries, i_tensor, D)
    if ALIGNED and IS_A:
        d = d // 8 * 8  # d is a multiple of 8 already; the compiler forgets tl.multiple_of on a loaded value
    if UNIFORM_R == 0:
        r = load_entry(entries, i_tensor, R)
    else:
        r = UNIFORM_R
    return d, r


@triton.jit
def load_flat_sizes(entries, i_tensor, ALIGNED: tl.constexpr):
    """Returns numel and 1: for elementwise work a tensor of the table counts as numel rows of rank 1."""
    numel = load_entry(entries, i_tensor, D) * load_entry(entries, i_tensor, R)
    if ALIGNED:
        numel = numel // 8 * 8  # for the compiler, as in ``load_sizes``
    return numel, 1


@triton.jit
def chunk_end(entries, i_tensor, start, d, CHUNK: tl.constexpr):
    """Returns the end of the rows from ``start`` on that a program works on: none if the tensor rests."""
    rests = load_entry(entries, i_tensor, RESTS) != 0
    return tl.where(rests, start, tl.minimum(start + CHUNK, d))


@triton.jit
def tile_offsets(i_d, i_r, d, r, IS_A: tl.constexpr, EXPERTS: tl.constexpr = 1):
    """Returns the offset of element (i_d, i_r) of a factor: int64 [BLOCK_D, BLOCK_R]."""
    if IS_A:
        result = i_r[None, :].to(tl.int64) * d + i_d[:, None]
    else:
        result = (i_d[:, None] * r + i_r[None, :]) * EXPERTS
    return result


@triton.jit
def count_programs(d, CHUNK: tl.constexpr):
    """Returns the number of programs of a tensor of d rows. An empty tensor has one, which writes its results."""
    return tl.maximum(tl.cdiv(d, CHUNK), 1).to(tl.int32)


# ---- On the host


class TileMap(NamedTuple):
    """The tensor and the chunk of every program: ``tiles``, int32 (programs, 2), on the device."""

    tiles: torch.Tensor
    programs: int


class FactorTable:
    """Factors of one combination of dtypes on one device, either all aligned or none.

    Args:
        columns: up to three lists of contiguous tensors: the factors, then tensors of their shapes.
        is_a: whether a factor's rank is its first dimension.
        positions: the positions in those lists of the factors that the table holds.
        indices: each factor's row in the launch's other arguments; the first expert's row for experts.
        experts: E, of every factor: a parameter (E·r, d_in) or (d_out, r·E) has E rows in the table.
        aligned: whether every tensor, and every row of an a, starts and ends at a multiple of 16 bytes.

    Attributes:
        entries: int64 (n, COLUMNS) on the device.
        counters: int32 zeros, ``BLOCKS`` for each row. Kernels that count arrivals leave them at zero.
        dtypes: the dtype of each column.
        r_max: the largest rank.
        uniform_r: the rank, or 0 where ranks differ.
        plans: the launches on this table, by operation and options.
    """

    def __init__(
        self,
        columns: Sequence[list[torch.Tensor]],
        is_a: list[bool],
        positions: list[int],
        indices: Sequence[int],
        experts: int,
        aligned: bool,
    ):
        first = columns[0][positions[0]]
        self.device, self.positions, self.experts, self.aligned = first.device, positions, experts, aligned
        self.dtypes = tuple(column[positions[0]].dtype for column in columns)
        self._sizes = [_rows_and_rank(columns[0][i].shape, is_a[i], experts) for i in positions]
        ranks = {r for _, r in self._sizes}
        self.r_max, self.uniform_r = max(ranks), ranks.pop() if len(ranks) == 1 else 0
        rows = []
        for i, (d, r) in zip(positions, self._sizes, strict=True):
            columns_of_addresses = [expert_addresses(column[i], is_a[i], experts) for column in columns]
            for expert, addresses in enumerate(zip(*columns_of_addresses, strict=True)):
                unused = [0] * (ADDRESSES - len(columns))
                rows.append([*addresses, *unused, d, r, int(is_a[i]), indices[i] + expert, 0])
        self.entries = to_device(rows, torch.int64, self.device)
        self._rests = [False] * len(columns[0])
        self.counters = torch.zeros(BLOCKS * len(rows), dtype=torch.int32, device=self.device)
        self._is_a = [is_a[i] for i in positions]
        self._gradient_addresses = DeviceAddresses(self.device)
        self._tile_maps: dict[tuple[int, bool], TileMap] = {}
        self.plans: dict[tuple, Launch] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def set_resting(self, rests: list[bool]) -> None:
        """Sets which factors of the columns rest: launches on this table neither read nor change them until the next
        call. Their results are zero.

        Raises:
            RuntimeError: another choice than the last while a CUDA graph is captured.
        """
        if rests == self._rests:
            return
        check_not_captured()
        self._rests = rests
        rows = [int(rests[i]) for i in self.positions for _ in range(self.experts)]
        self.entries[:, RESTS.value].copy_(to_device(rows, torch.int64, self.device), non_blocking=True)

    def with_column(self, i: int) -> "TableWithGradients":
        """Returns the table with its own column i in the gradients' place."""
        return TableWithGradients(self, self.entries.view(-1)[i:], self.dtypes[i], COLUMNS.value)

    def with_gradients(self, gradients: list[torch.Tensor]) -> "TableWithGradients":
        """Returns the table with these gradients: contiguous tensors, one for each factor of the columns."""
        if len(self.positions) < len(gradients):
            gradients = [gradients[i] for i in self.positions]
        gradients = self._converted(gradients)
        if self.experts == 1:
            addresses = [g.data_ptr() for g in gradients]
        else:
            factors = zip(gradients, self._is_a, strict=True)
            addresses = [address for g, is_a in factors for address in expert_addresses(g, is_a, self.experts)]
        on_device = self._gradient_addresses.update(addresses)
        report_addresses(on_device, gradients)
        return TableWithGradients(self, on_device, gradients[0].dtype, tensors=gradients)

    def _converted(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the gradients in one dtype, and aligned where the table is. Only those that need it are copied."""
        dtypes = [g.dtype for g in gradients]
        if dtypes.count(dtypes[0]) < len(dtypes) or dtypes[0] not in TL_DTYPE:
            gradients = [g.float() for g in gradients]
        if self.aligned and any([g.data_ptr() % ALIGNMENT for g in gradients]):
            gradients = [g if is_aligned(g) else g.clone() for g in gradients]
        return gradients

    def tile_map(self, chunk: int, flat: bool = False) -> TileMap:
        """Returns the map for programs that take ``chunk`` rows of d. ``flat``: for elementwise work, where a tensor
        counts as numel rows of rank 1."""
        tile_map = self._tile_maps.get((chunk, flat))
        if tile_map is None:
            check_not_captured()
            tiles = []
            for i, (d, r) in enumerate(self._sizes):
                for i_chunk in range(max(1, triton.cdiv(d * r if flat else d, chunk))):
                    tiles += [(i * self.experts + expert, i_chunk) for expert in range(self.experts)]
            tile_map = TileMap(to_device(tiles, torch.int32, self.device), len(tiles))
            tile_map = self._tile_maps.setdefault((chunk, flat), tile_map)  # another thread may have been first
        return tile_map


class TableWithGradients(NamedTuple):
    """A table of factors and one more tensor for each factor: its gradient, or a column of the table in its place.

    Attributes:
        factors: the table.
        addresses: int64, on the device, ``stride`` numbers apart.
        dtype: of the tensors at these addresses.
        tensors: the tensors themselves, some of them copies. They live until the launches are made.
    """

    factors: FactorTable
    addresses: torch.Tensor
    dtype: torch.dtype
    stride: int = 1
    tensors: Sequence[torch.Tensor] = ()


def build_tables(
    columns: Sequence[list[torch.Tensor]],
    is_a: list[bool],
    indices: Sequence[int],
    experts: Sequence[int] | None = None,
    gradients: list[torch.Tensor] | None = None,
) -> list[FactorTable]:
    """Builds one table for each combination of dtypes, number of experts and alignment, in the order in which they
    first occur. ``gradients``: tensors that ``FactorTable.with_gradients`` will get; their dtypes and alignment count,
    too."""
    rows = list(zip(*columns, *([] if gradients is None else [gradients]), strict=True))

    def kind(i: int) -> tuple:
        n_experts = 1 if experts is None else experts[i]
        return n_experts, _is_row_aligned(rows[i], is_a[i], n_experts), *(t.dtype for t in rows[i])

    groups = group_by(range(len(rows)), kind)
    return [
        FactorTable(columns, is_a, positions, indices, n_experts, aligned)
        for (n_experts, aligned, *_), positions in groups.items()
    ]


def largest_rank(factors: list[torch.Tensor], is_a: list[bool]) -> int:
    """Returns the largest rank of a list of factors, 1 for an empty list."""
    return max((factor.shape[0 if side else 1] for factor, side in zip(factors, is_a, strict=True)), default=1)


def _rows_and_rank(shape: torch.Size, is_a: bool, experts: int) -> tuple[int, int]:
    """Returns d and r of one expert's factor."""
    ranks, d = shape if is_a else reversed(shape)
    return d, ranks // experts


def _is_row_aligned(tensors: Sequence[torch.Tensor], is_a: bool, experts: int) -> bool:
    d, r = _rows_and_rank(tensors[0].shape, is_a, experts)
    if d * r % 8 or (is_a and d % 8):
        return False
    interleaved = experts > 1 and not is_a  # such a b is read element by element, so its address does not matter
    return interleaved or all(is_aligned(t) for t in tensors)


def is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def expert_addresses(tensor: torch.Tensor, is_a: bool, experts: int) -> range:
    """Returns the address of each expert's factor in a parameter (E·r, d_in) or (d_out, r·E)."""
    start, size = tensor.data_ptr(), tensor.element_size()
    # An a's experts follow each other; a b's are interleaved, one element apart. A range needs a step above 0.
    step = max(size, tensor.numel() // experts * size) if is_a else size
    return range(start, start + experts * step, step)


def find_table(factors: list[torch.Tensor], is_a: list[bool]) -> FactorTable:
    """Returns the cached table of factors of one dtype, in their order, aligned where all are."""
    for factor in factors:
        _check(factor, factor, factors[0])
    key = [(side, t.shape, t.data_ptr(), t.dtype) for t, side in zip(factors, is_a, strict=True)]
    positions = list(range(len(factors)))

    def build() -> FactorTable:
        aligned = all(_is_row_aligned([factor], side, 1) for factor, side in zip(factors, is_a, strict=True))
        return FactorTable([factors], is_a, positions, positions, 1, aligned)

    table = cached("table", [factors[0].device, key], build)
    report_addresses(table.entries, factors)
    return table


def find_tables(
    columns: Sequence[list[torch.Tensor]],
    is_a: list[bool],
    gradients: list[torch.Tensor] | None = None,
    indices: list[int] | None = None,
) -> list[TableWithGradients]:
    """Returns the cached tables of lists of tensors, with the gradients, or with column 0 in their place. ``indices``:
    as in ``FactorTable``; by default the positions in the lists. Every tensor is checked at every call, because a
    tensor's strides may change at an address whose table is cached."""
    factors = columns[0]
    lists = [*columns] if gradients is None else [*columns, gradients]
    for tensors in zip(*lists, strict=True):
        for tensor in tensors:
            _check(tensor, tensors[0], factors[0])
    indices = indices or list(range(len(factors)))
    shapes = [(side, factor.shape) for side, factor in zip(is_a, factors, strict=True)]
    addresses = [(t.data_ptr(), t.dtype) for column in columns for t in column]
    gradient_kinds = [(is_aligned(t), t.dtype) for t in gradients or ()]  # their addresses are not part of a table
    key = [factors[0].device, indices, shapes, addresses, gradient_kinds]
    tables = cached("tables", key, lambda: build_tables(columns, is_a, indices, gradients=gradients))
    for table in tables:
        report_addresses(table.entries, (column[i] for column in columns for i in table.positions))
    return [table.with_column(0) if gradients is None else table.with_gradients(gradients) for table in tables]


def _check(tensor: torch.Tensor, factor: torch.Tensor, first: torch.Tensor) -> None:
    assert tensor.shape == factor.shape and tensor.device == first.device, (
        f"tensors of a factor: expected shape {tuple(factor.shape)} on {first.device}, "
        f"got {tuple(tensor.shape)} on {tensor.device}"
    )
    check_storage(tensor)


def check_dtype(tensor: torch.Tensor) -> None:
    assert tensor.dtype in TL_DTYPE, f"dtype: expected float16, bfloat16 or float32, got {tensor.dtype}"


def check_storage(tensor: torch.Tensor) -> None:
    check_dtype(tensor)
    assert tensor.is_contiguous(), (
        f"tensor of a grouped launch: expected contiguous, got strides {tensor.stride()} of shape {tuple(tensor.shape)}"
    )


class DeviceAddresses:
    """A list of addresses on the device. A changed list is copied to new memory, because launches made before may not
    have read the old one yet."""

    _last: tuple[list[int], torch.Tensor] | None  # replaced as a whole, so that threads never mix two lists

    def __init__(self, device: torch.device):
        self._device, self._last = device, None

    def update(self, addresses: list[int]) -> torch.Tensor:
        """Returns the addresses as int64 on the device, copied if they have changed.

        Raises:
            RuntimeError: addresses that differ from the last ones while a CUDA graph is captured.
        """
        last = self._last
        if last is None or addresses != last[0]:
            check_not_captured()
            self._last = last = addresses, to_device(addresses, torch.int64, self._device)
        if capturing():
            hold_for_graphs(last[1])
        return last[1]


def capturing() -> bool:
    """Returns whether launches go into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_not_captured() -> None:
    if capturing():
        raise RuntimeError(
            "lora_fast: a tensor of the step has moved since the last step, and a CUDA graph is being captured: "
            "run the step once on the tensors to be captured first, and keep their gradients where they are"
        )


Place = tuple[str, torch.device]
_recent: dict[Place, dict[tuple, Any]] = {}  # results of a kind on a device by their key, the last used last
_captured: dict[Place, dict[tuple, Any]] = {}  # what graphs read at every replay, by the key without the stream
_held_for_graphs: list[object] = []  # objects outside the caches that graphs read, too
# For these three; not held while a result is built. A finalizer that the garbage collector calls may enter it again.
_lock = threading.RLock()


def hold_for_graphs(owner: object) -> None:
    """Holds an object for good, because a CUDA graph reads its memory at every replay."""
    with _lock:
        if not any(owner is held for held in _held_for_graphs):
            _held_for_graphs.append(owner)


def cached(kind: str, key: list, build: Callable, most: int = CACHE_SIZE):
    """Returns what ``build`` returned for this key on the current stream. The result is kept until ``most`` others of
    its kind were used on its device since, or for good where a CUDA graph has used it.

    A capture has a stream of its own. It takes the result of any stream, on which the step has run before, from the
    calls outside graphs.

    Args:
        key: begins with the device. Its lists may have no lists in them.
    """
    place = kind, key[0]
    words = tuple([tuple(part) if type(part) is list else part for part in key])
    known = (device.stream_on(key[0]), *words)
    with _lock:
        found = _captured_result(place, words) if capturing() else _recent_result(place, known)
    if found is not None:
        return found
    check_not_captured()
    result = build()
    with _lock:
        found = _recent_result(place, known)  # another thread may have been first
        if found is not None:
            return found
        recent = _recent.setdefault(place, {})
        recent[known] = result
        while len(recent) > most:
            del recent[next(iter(recent))]
        return result


def _recent_result(place: Place, known: tuple) -> Any | None:
    """Returns the result with this key, now the last used one, or None. The caller holds the lock."""
    recent = _recent.get(place, {})
    if known in recent:
        recent[known] = recent.pop(known)
    return recent.get(known)


def _captured_result(place: Place, words: tuple) -> Any | None:
    """Returns the result with this key on any stream, from now on kept for good, or None. The caller holds the lock."""
    captured, recent = _captured.setdefault(place, {}), _recent.get(place, {})
    known = next((known for known in reversed(recent) if known[1:] == words), None)  # the last used first
    if words not in captured and known is not None:
        captured[words] = recent.pop(known)
    return captured.get(words)
