"""A machine in Python that runs kernels in Gluon, which has no interpreter.

The partitions of a program run in turns. A turn ends where a partition waits or arrives at a barrier. Asynchronous work
of the GPU (copies by TMA, products) is done as early or as late as waits and barriers allow, so a program with a
missing wait computes another result or raises ``Hazard``.

``launch`` replaces ``kernels.launch.Launch.go``. The machine implements the part of Gluon that
kernels/linear/gluon_gemm.py uses. It does not model layouts, nor the threads of a partition, which the compiler
synchronises (tests/linear/test_gluon_gemm.py checks that in the machine code).
"""

import builtins
import ctypes
import random
import threading
from types import FunctionType, SimpleNamespace

import numpy as np
import torch

from lora_fast.kernels.linear import gluon_gemm

NAMES = ("uint8", "uint32", "int32", "int64", "float16", "bfloat16", "float32")


class Hazard(AssertionError):
    """Raised if the kernel relies on an order that a GPU does not guarantee."""


# ---- Values


def stored(dtype: str) -> type:
    """Returns numpy's type for a dtype. 16-bit floats are stored as float32."""
    return np.float32 if "float" in dtype else getattr(np, dtype)


def rounded(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the numbers rounded to a dtype, still stored as float32."""
    if dtype in ("float16", "bfloat16"):
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(getattr(torch, dtype)).float().numpy()
    return numbers


class Value:
    """A block of numbers or one number, which Gluon calls a tensor."""

    def __init__(self, numbers, dtype: str):
        self._numbers, self.dtype = np.asarray(numbers, stored(dtype)), dtype
        self.pending = 0  # number of asynchronous products that are not yet added

    @property
    def numbers(self) -> np.ndarray:
        if self.pending:
            raise Hazard("an accumulator was used while a product was in flight")
        return self._numbers

    shape = property(lambda self: list(self._numbers.shape))
    type = property(lambda self: SimpleNamespace(layout=None, shape=self.shape))

    def to(self, dtype) -> "Value":
        if isinstance(dtype, PointerType):
            return Pointer(int(self))
        return Value(rounded(self.numbers.astype(stored(dtype)), dtype), dtype)

    def _with(self, other, operation, dtype: str | None = None) -> "Value":
        other = other if isinstance(other, Value) else Value(np.array(other).astype(stored(self.dtype)), self.dtype)
        wider = max(self.dtype, other.dtype, key=lambda name: stored(name)().itemsize)
        with np.errstate(over="ignore", invalid="ignore"):
            result = operation(self.numbers, other.numbers)
        return Value(result.astype(stored(dtype or wider)), dtype or wider)

    def __add__(self, other):
        return other + self if isinstance(other, Pointer) else self._with(other, np.add)

    __radd__ = __add__
    __sub__ = lambda self, other: self._with(other, np.subtract)
    __mul__ = lambda self, other: self._with(other, np.multiply)
    __rmul__ = __mul__
    __floordiv__ = lambda self, other: self._with(other, np.floor_divide)
    __mod__ = lambda self, other: self._with(other, np.remainder)
    __and__ = lambda self, other: self._with(other, np.bitwise_and)
    __or__ = lambda self, other: self._with(other, np.bitwise_or)
    __xor__ = lambda self, other: self._with(other, np.bitwise_xor)
    __lshift__ = lambda self, other: self._with(other, np.left_shift)
    __rshift__ = lambda self, other: self._with(other, np.right_shift)
    __lt__ = lambda self, other: self._with(other, np.less, "uint8")
    __gt__ = lambda self, other: self._with(other, np.greater, "uint8")
    __ge__ = lambda self, other: self._with(other, np.greater_equal, "uint8")
    __eq__ = lambda self, other: self._with(other, np.equal, "uint8")
    __ne__ = lambda self, other: self._with(other, np.not_equal, "uint8")
    __hash__ = None
    __int__ = __index__ = lambda self: int(self.numbers)
    __bool__ = lambda self: bool(self.numbers)
    __getitem__ = lambda self, key: Value(self.numbers[key], self.dtype)
    reshape = lambda self, shape: Value(self.numbers.reshape(shape), self.dtype)
    permute = lambda self, order: Value(self.numbers.transpose(order), self.dtype)


class PointerType:
    """The type of a pointer to int64."""


class Pointer:
    """An address or a block of addresses: of elements of a tensor, or of an int64 in memory."""

    def __init__(self, base: torch.Tensor | int, offsets: np.ndarray | int = 0):
        self.base, self.offsets = base, offsets

    def __add__(self, offsets: Value) -> "Pointer":
        return Pointer(self.base, self.offsets + offsets.numbers.astype(np.int64))

    def load(self, mask: Value | None, other: float) -> Value:
        if isinstance(self.base, int):
            return Value(ctypes.c_int64.from_address(self.base).value, "int64")
        kept = np.broadcast_to(True if mask is None else mask.numbers != 0, self.offsets.shape)
        start, count = self.base.storage_offset(), self.base.untyped_storage().nbytes() // self.base.element_size()
        places = start + self.offsets[kept]
        if places.size and not (places.min() >= 0 and places.max() < count):
            raise Hazard(f"a load of element {places.max()} of {count}")
        numbers = np.full(self.offsets.shape, other, np.float32)
        numbers[kept] = self.base.as_strided((count,), (1,), 0)[torch.from_numpy(places)].float().numpy()
        return Value(numbers, str(self.base.dtype).removeprefix("torch."))


class Descriptor:
    """A matrix that TMA reads and writes in blocks."""

    def __init__(self, described):
        self.base, self.size = described.base, described.shape
        self.strides = described.strides
        self.layout, self.dtype = described.layout, str(described.base.dtype).removeprefix("torch.")
        self.block_type = SimpleNamespace(shape=list(described.block_shape))

    def _block(self, origin: list) -> tuple[torch.Tensor, list[slice]]:
        whole = self.base.as_strided(self.size, self.strides)
        return whole, [slice(int(at), int(at) + n) for at, n in zip(origin, self.block_type.shape, strict=True)]

    def read(self, origin: list) -> np.ndarray:
        """Returns a block of the matrix, which is zero beyond the matrix's edges."""
        whole, place = self._block(origin)
        inside = whole[tuple(place)].float().numpy()
        block = np.zeros(self.block_type.shape, np.float32)
        block[: inside.shape[0], : inside.shape[1]] = inside
        return block

    def write(self, origin: list, block: np.ndarray) -> None:
        """Writes the part of a block that is inside the matrix."""
        whole, place = self._block(origin)
        part = whole[tuple(place)]
        part.copy_(torch.from_numpy(block[: part.shape[0], : part.shape[1]]))


# ---- Shared memory


class Allocation:
    """An allocation of shared memory. ``writers`` are the partitions that wrote to it without a fence since; the
    asynchronous units must not read such memory."""

    def __init__(self):
        self.writers = set()


class Memory:
    """A view of shared memory."""

    def __init__(self, machine: "Machine", dtype: str, numbers: np.ndarray, allocation: Allocation):
        self.machine, self.dtype, self.numbers, self.allocation = machine, dtype, numbers, allocation

    shape = property(lambda self: list(self.numbers.shape))
    layout = None

    def _view(self, numbers: np.ndarray) -> "Memory":
        return Memory(self.machine, self.dtype, numbers, self.allocation)

    def index(self, i) -> "Memory":
        if not 0 <= int(i) < len(self.numbers):
            raise Hazard(f"buffer {int(i)} of {len(self.numbers)}")
        return self._view(self.numbers[int(i)])

    def slice(self, start, length, dim: int = 0) -> "Memory":
        return self._view(self.numbers[(slice(None),) * dim + (slice(int(start), int(start) + int(length)),)])

    def permute(self, order) -> "Memory":
        return self._view(self.numbers.transpose(order))

    def store(self, value: Value) -> None:
        if value.dtype != self.dtype or value.shape != self.shape:
            raise Hazard(f"a store of {value.dtype} {value.shape} to {self.dtype} {self.shape}")
        self.numbers[...] = value.numbers
        self.allocation.writers.add(self.machine.current)

    def load(self, layout=None) -> Value:
        return Value(self.numbers.copy(), self.dtype)

    def seen(self) -> np.ndarray:
        """Returns the numbers as the asynchronous units read them.

        Raises:
            Hazard: a partition wrote to the memory without a fence.
        """
        if self.allocation.writers:
            raise Hazard(f"shared memory that {self.allocation.writers} wrote is read without a fence")
        return self.numbers


class Barrier:
    """An mbarrier. Its n-th phase ends when all threads have arrived and all bytes have been copied."""

    def __init__(self):
        self.phase, self.count, self.missing, self.bytes = 0, 0, 0, 0

    def arrive(self, count: int = 1) -> None:
        self.missing -= count
        if self.missing < 0:
            raise Hazard("more arrivals at a barrier than it counts")
        self.end_phase()

    def end_phase(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def passes(self, parity: int) -> bool:
        return self.phase % 2 != parity


# ---- The machine


class Machine:
    """The state of one program. ``late`` is the probability that asynchronous work is delayed when it could be done."""

    def __init__(self, program: int, n_programs: int, late: float, draw: random.Random):
        self.program, self.n_programs, self.late, self.draw = program, n_programs, late, draw
        self.current = "kernel"  # the partition that runs
        self.copies: list = []  # functions that make the copies in flight
        self.products: list[tuple] = []  # (accumulator, function) of the partition "multiply"
        self.stores: list = []
        self.turn = threading.Condition()
        self.waiting: dict[str, tuple[Barrier, int] | None] = {}  # the partitions that have not ended
        self.error: BaseException | None = None

    # -- partitions take turns

    def warp_specialize(self, partitions, warps, registers) -> None:
        names = [function.__name__ for function, _ in partitions]
        sizes = [self.warps, *warps]
        self.waiting = dict.fromkeys(names)
        self.warps_of = dict(zip(names, sizes, strict=True))
        threads = [threading.Thread(target=self._run, args=(function, arguments)) for function, arguments in partitions]
        self.current = None
        for thread in threads:
            thread.start()
        with self.turn:
            self._pass_on()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error
        self.current = "kernel"
        while self.copies:
            self.copies.pop(0)()

    def _run(self, function, arguments) -> None:
        try:
            with self.turn:
                self.turn.wait_for(lambda: self.error or self.current == function.__name__)
            if not self.error:
                function(*arguments)
        except BaseException as error:
            self.error = self.error or error
        with self.turn:
            del self.waiting[function.__name__]
            self._pass_on()

    def _pass_on(self) -> None:
        """Gives the turn to a partition that can run. Copies complete at random, or if no partition can run."""
        while not self.error and self.waiting:
            if self.copies and self.draw.random() > self.late:
                self.copies.pop(0)()
            ready = [name for name, wait in self.waiting.items() if wait is None or wait[0].passes(wait[1])]
            if ready:
                self.current = self.draw.choice(ready)
                break
            if not self.copies:
                self.error = Hazard(f"deadlock: {', '.join(self.waiting)} wait for barriers that nobody completes")
                break
            self.copies.pop(0)()
        self.turn.notify_all()

    def wait(self, barrier: "Barriers", parity) -> None:
        me = self.current
        if not hasattr(self, "warps_of"):
            raise Hazard("a wait outside partitions")
        with self.turn:
            self.waiting[me] = barrier.only, int(parity)
            self._pass_on()
            self.turn.wait_for(lambda: self.error or self.current == me)
            if self.error:
                raise self.error
            self.waiting[me] = None

    def arrive(self, barrier: "Barriers", count: int, pred=True) -> None:
        if pred:
            barrier.only.arrive(count)
            self.give_turn()

    def give_turn(self) -> None:
        """Lets other partitions run. They could run anywhere, but only after an arrival does it make a difference."""
        if self.waiting:
            self.wait(Barriers([Barrier()]), 1)  # a new barrier's wait for parity 1 passes at once

    # -- the asynchronous units

    def copy_in(self, source: Descriptor, origin, barrier: "Barriers", buffer: Memory) -> None:
        origin = [int(at) for at in origin]

        def copy():
            buffer.seen()
            buffer.numbers[...] = source.read(origin)
            barrier.only.bytes -= buffer.numbers.size * 2
            barrier.only.end_phase()

        self.copies.append(copy)

    def copy_out(self, target: Descriptor, origin, buffer: Memory) -> None:
        origin = [int(at) for at in origin]
        buffer.seen()
        self.stores.append(lambda: target.write(origin, buffer.numbers))
        if self.draw.random() > self.late:
            self.store_wait(0)

    def store_wait(self, pendings: int) -> None:
        while len(self.stores) > pendings:
            self.stores.pop(0)()

    def warpgroup_mma(self, left: Memory, right: Memory, accumulator: Value, is_async: bool = False) -> Value:
        left.seen(), right.seen()

        def product():
            with np.errstate(invalid="ignore"):
                accumulator._numbers = accumulator._numbers + left.numbers @ right.numbers

        accumulator.pending += 1
        self.products.append((accumulator, product))
        if not is_async or self.draw.random() > self.late:
            self.warpgroup_mma_wait(0, ())
        return accumulator

    def warpgroup_mma_wait(self, pendings: int, values: tuple):
        while len(self.products) > pendings:
            accumulator, product = self.products.pop(0)
            product()
            accumulator.pending -= 1
        return values[0] if values else None

    def fence(self) -> None:
        for allocation in self.allocations:
            allocation.writers.discard(self.current)

    # -- memory

    allocations: list

    def allocate(self, dtype: str, shape, layout) -> "Memory | Barriers":
        if layout == "barrier":
            return Barriers([Barrier() for _ in range(int(np.prod(shape)))])
        allocation = Allocation()
        self.allocations.append(allocation)
        junk = np.nan if "float" in dtype else 0xA5
        return Memory(self, dtype, np.full([int(n) for n in shape], junk, stored(dtype)), allocation)


class Barriers:
    """An array of barriers, or a view of one of them."""

    def __init__(self, barriers: list[Barrier]):
        self.barriers = barriers

    only = property(lambda self: self.barriers[0])

    def index(self, i) -> "Barriers":
        return Barriers([self.barriers[int(i)]])


def expect(barrier: Barriers, n_bytes: int) -> None:
    barrier.only.bytes += n_bytes
    barrier.only.arrive()


def init(barrier: Barriers, count: int) -> None:
    barrier.only.count = barrier.only.missing = count


def reinterpret(memory: Memory, dtype: str, shape: list, layout) -> Memory:
    return memory._view(memory.numbers.reshape(shape))


def language(machine: Machine) -> SimpleNamespace:
    """Returns the module ``gl`` of this machine."""
    integer = lambda number: number if isinstance(number, Value) else Value(number, "int32")
    numbers = lambda value: value.numbers if isinstance(value, Value) else value
    wide = lambda value: numbers(value).astype(np.uint64) if isinstance(value, Value) else np.uint64(value)
    layouts = ("BlockedLayout", "SliceLayout", "SwizzledSharedLayout", "NVMMADistributedLayout")
    return SimpleNamespace(
        **{name: name for name in NAMES},
        **{name: lambda *arguments: None for name in layouts},
        NVMMASharedLayout=SimpleNamespace(get_default_for=lambda shape, dtype: None),
        constexpr=None,
        pointer_type=lambda dtype: PointerType(),
        program_id=lambda axis: Value(machine.program, "int32"),
        num_programs=lambda axis: Value(machine.n_programs, "int32"),
        num_warps=lambda: int(machine.warps_of[machine.current]),
        cdiv=lambda a, b: integer(a).__add__(int(b) - 1) // int(b),
        minimum=lambda a, b: Value(min(int(a), int(b)), "int32"),
        static_range=lambda *bounds: builtins.range(*map(int, bounds)),
        arange=lambda start, end, layout: Value(np.arange(start, end), "int32"),
        zeros=lambda shape, dtype, layout: Value(np.zeros(shape), dtype),
        zeros_like=lambda value: Value(np.zeros(value.shape), value.dtype),
        umulhi=lambda a, b: Value((wide(a) * wide(b)) >> np.uint64(32), "uint32"),
        where=lambda mask, a, b: Value(np.where(numbers(mask), numbers(a), numbers(b)), integer(a).dtype),
        split=lambda value: (value[..., 0], value[..., 1]),
        convert_layout=lambda value, layout, assert_trivial: value,
        load=lambda pointer, mask=None, other=0.0: pointer.load(mask, other),
        allocate_shared_memory=machine.allocate,
        warp_specialize=machine.warp_specialize,
    )


def _names(machine: Machine) -> dict:
    """Returns the names of the kernel's module for this machine: plain functions in place of jit functions, and numbers
    in place of constexprs."""
    known = {name: getattr(value, "value", value) for name, value in vars(gluon_gemm).items()}
    known |= {
        "gl": language(machine),
        "mbarrier": SimpleNamespace(
            init=init, expect=expect, arrive=machine.arrive, wait=machine.wait, MBarrierLayout=lambda: "barrier"
        ),
        "tma": SimpleNamespace(store_wait=machine.store_wait),
        "copy_in": machine.copy_in,
        "copy_out": machine.copy_out,
        "reinterpret": reinterpret,
        "warpgroup_mma": machine.warpgroup_mma,
        "warpgroup_mma_wait": machine.warpgroup_mma_wait,
        "fence_async_shared": machine.fence,
        "range": lambda *bounds: (Value(i, "int32") for i in builtins.range(*map(int, bounds))),
    }
    for name, value in list(known.items()):
        if hasattr(value, "fn") and value.__module__ == gluon_gemm.__name__:
            known[name] = FunctionType(value.fn.__code__, known, value.fn.__name__)
    return known


def launch(launched, tensors: tuple, numbers: tuple, late: float, seed: int = 0, change=None) -> None:
    """Runs a launch on CPU tensors. ``change`` takes the names of the kernel's module and returns replacements, with
    which tests plant mistakes."""
    draw = random.Random(seed)
    options = dict(launched.options)
    warps = options.pop("num_warps")
    n = len(launched.matrices)
    described = [matrix.describe(tensor) for matrix, tensor in zip(launched.matrices, tensors, strict=False)]
    for program in range(launched.grid[0]):
        machine = Machine(program, launched.grid[0], late, draw)
        machine.allocations, machine.warps = [], warps
        names = _names(machine)
        if change:
            names |= change(names)
        arguments = list(map(Descriptor, described))
        arguments += [Pointer(tensor) for tensor in tensors[n:]]
        scaling, seed_of_mask, in_memory, drop_level = numbers
        arguments += [Value(scaling, "float32"), Value(seed_of_mask, "int64"), Value(in_memory, "int32")]
        arguments += [Value(drop_level, "int32"), *(Value(size, "int32") for size in launched.sizes)]
        names[launched.kernel.fn.__name__](*arguments, **options)
