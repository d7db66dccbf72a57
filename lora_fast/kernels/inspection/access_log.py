"""Records the memory accesses of one launch and reports violations of the rules in sanitizer.py.

Memory    The elements that a launch may touch are numbered, so that numpy arrays hold the state of each element.
Barriers  An access is compared with the latest accesses of the same program. An access is after the last barrier if its
          number is larger than the number of accesses before that barrier.
Programs  Every access has the time of its program, counted in barriers, and a vector clock: the times of the other
          programs up to which their accesses have happened before it. Atomics pass vector clocks on, by element. Two
          accesses of different programs to one element are in order if the second one's clock includes the first.
"""

import ctypes
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

CONFLICTS = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}
SEVERAL = -1  # in place of a lane: more than one
NOT_KERNELS = (
    str(Path(triton.__file__).parent),
    *(str(Path(__file__).with_name(f"{name}.py")) for name in ("access_log", "interpreter", "sanitizer")),
)


class Finding(NamedTuple):
    """A violation of a rule by one or two lines of a kernel."""

    kernel: str
    kind: str
    lines: tuple[str, ...]  # the line of each access, each followed by the lines that it was called from
    programs: tuple[tuple[int, int, int], ...]
    n_lanes: int
    place: str  # the tensor of the first address, or the nearest one

    def __str__(self) -> str:
        programs = ", ".join(map(str, self.programs[:4])) + ", …" * (len(self.programs) > 4)
        words = [self.kind, " and ".join(self.lines), f"{self.n_lanes} lanes", f"programs {programs}", self.place]
        return f"{self.kernel}: {'; '.join(filter(None, words))}"


class Memory:
    """Numbers the elements of some tensors. The elements are stored in runs of bytes without gaps."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]):
        merged = [[0, 0, 1, "no tensor"]]
        for run in sorted(run for name, tensor in tensors for run in _runs(name, tensor)):
            if run[0] < merged[-1][1]:  # two views of the same memory
                merged[-1][1] = max(merged[-1][1], run[1])
            else:
                merged.append(list(run))
        *numbers, self.names = zip(*merged, strict=True)
        self.starts, self.ends, self.sizes = (np.array(column, dtype=np.int64) for column in numbers)
        self.first = np.cumsum([0, *(self.ends - self.starts) // self.sizes])  # number of each run's first element

    def find(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of the elements at these addresses, and whether each address is that of an element of
        ``size`` bytes."""
        run = np.maximum(np.searchsorted(self.starts, addresses, "right") - 1, 0)
        offsets = addresses - self.starts[run]
        inside = (offsets >= 0) & (addresses + size <= self.ends[run]) & (self.sizes[run] == size)
        return self.first[run] + offsets // size, inside & (offsets % size == 0)

    def near(self, address: int) -> str:
        """Returns the tensor nearest to an address and its distance, in words."""
        before, after = self.starts - address, address - self.ends + 1
        run = int(np.argmin(np.maximum(before, after)))
        side = "before" if before[run] > 0 else "after" if after[run] > 0 else "inside"
        return f"{max(before[run], after[run], 0)} bytes {side} {self.names[run]}"

    def name(self, element: int) -> str:
        return self.names[int(np.searchsorted(self.first, element, "right")) - 1]

    def read(self) -> list[np.ndarray]:
        """Returns the bits of all elements, run by run."""
        runs = zip(self.starts.tolist(), self.ends.tolist(), self.sizes.tolist(), strict=True)
        return [np.frombuffer(ctypes.string_at(start, end - start), f"u{size}") for start, end, size in runs]

    def write(self, content: list[np.ndarray]) -> None:
        for start, bits in zip(self.starts.tolist(), content, strict=True):
            ctypes.memmove(start, bits.tobytes(), bits.nbytes)


def _runs(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, int, int, str]]:
    """Returns the start and end of each run, the size of an element, and the tensor in words."""
    size = n_bytes = tensor.element_size()
    starts = np.array([tensor.data_ptr()])
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if len(starts) == 1 and stride * size == n_bytes:
            n_bytes *= length
        elif length != 1 and stride != 0:
            starts = (starts + size * stride * np.arange(length)[:, None]).ravel()
    strides = "" if tensor.is_contiguous() else f", strides {tensor.stride()}"
    words = f"{name}: {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}{strides}"
    return ((start, start + n_bytes, size, words) for start in starts.tolist() if tensor.numel())


VectorClock = dict[int, int]  # program → time: the program's accesses before that time have happened


class Access(NamedTuple):
    """An access of one program to memory."""

    kind: str
    program: int
    lines: str
    time: int  # barriers that the program has passed
    visible: VectorClock  # accesses of other programs that have happened before


class Latest:
    """The number of the latest access of one kind to each element, counted from 1, and its lane."""

    def __init__(self, n_elements: int):
        self.number, self.lane = np.zeros(n_elements, np.int32), np.zeros(n_elements, np.int64)

    def update(self, number: int, elements: np.ndarray, lanes: np.ndarray, n_before_barrier: int) -> None:
        several = (self.number[elements] > n_before_barrier) & (self.lane[elements] != lanes)
        self.number[elements], self.lane[elements] = number, lanes
        several |= self.lane[elements] != lanes  # within this access
        self.lane[elements[several]] = SEVERAL


class Log:
    """Records the accesses of one launch and its findings. Programs are numbered in the order in which they run."""

    def __init__(self, kernel: Callable, tensors: Iterable[tuple[str, torch.Tensor]], n_threads: int):
        self.kernel, self.memory, self.n_threads = kernel, Memory(tensors), n_threads
        n_elements = int(self.memory.first[-1])
        self.programs: list[tuple[int, int, int]] = []
        self.accesses: list[Access] = []
        self.elements: list[np.ndarray] = []  # of each access
        self.latest = {kind: Latest(n_elements) for kind in CONFLICTS}
        self.lowest, self.highest = np.full(n_elements, 1 << 30), np.full(n_elements, -1)  # programs that touch it
        self.bits = np.zeros(n_elements, np.uint64)
        self.released: dict[int, VectorClock] = {}  # by element
        self.shapes: dict[tuple[int, ...], int] = {}
        self.findings: dict[tuple, Finding] = {}
        self.counts = Counter()

    def begin(self, program: tuple[int, int, int]) -> None:
        self.program = len(self.programs)
        self.programs.append(program)
        self.time, self.n_before_barrier = 0, len(self.accesses)
        self.visible = self.acquired = {}

    def barrier(self) -> None:
        self.time, self.n_before_barrier, self.visible = self.time + 1, len(self.accesses), self.acquired

    def access(self, kind: str, pointers: TensorHandle, mask, values=None, semantics: str = "") -> TensorHandle:
        """Records and checks an access. Returns the mask of its lanes that are in bounds."""
        shape, lines, n_lanes = pointers.data.shape, self._lines(), pointers.data.size
        lanes = np.flatnonzero(np.broadcast_to(np.asarray(mask.data), shape))
        addresses = pointers.data.ravel()[lanes].astype(np.int64)
        elements, inside = self.memory.find(addresses, max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        if kind == "load" and values is None and len(lanes) < n_lanes > 1:
            place = self.memory.near(int(pointers.data.flat[0]))
            self.add("masked load without other", (lines,), n_lanes - len(lanes), place)
        if not inside.all():
            place = self.memory.near(int(addresses[~inside][0]))
            self.add(f"{kind} out of bounds", (lines,), np.count_nonzero(~inside), place)
            lanes, elements = lanes[inside], elements[inside]
        if kind == "store":
            self._check_values(lines, elements, np.broadcast_to(values.data, shape).ravel()[lanes])
        # A program that acquires an atomic comes after it even without a barrier, so its time is that before the last
        # barrier.
        self.accesses.append(Access(kind, self.program, lines, self.time - (kind == "atomic"), self.visible))
        self.elements.append(elements.astype(np.int32))
        # Lanes of blocks with other shapes may belong to other threads, so a lane's number contains the shape.
        numbered = lanes + (self.shapes.setdefault(shape, len(self.shapes)) << 40)
        self._check_barriers(kind, elements, numbered, small=n_lanes < self.n_threads)
        self.lowest[elements], self.highest[elements] = np.minimum(self.lowest[elements], self.program), self.program
        self.counts[kind] += len(elements)
        for element in elements.tolist() if kind == "atomic" else ():
            released = self.released.get(element, {})
            if "ACQUIRE" in semantics:
                self.acquired = _joined(self.acquired, released)
            if "RELEASE" in semantics:
                self.released[element] = _joined(released, self.visible, {self.program: self.time})
        allowed = np.zeros(shape, dtype=bool)
        allowed.flat[lanes] = True
        return TensorHandle(allowed, tl.int1)

    def _lines(self) -> str:
        """Returns the line that makes an access and the lines that it was called from, up to the kernel's."""
        frame, lines = sys._getframe(2), []
        while frame is not None:
            if not frame.f_code.co_filename.startswith(NOT_KERNELS):
                lines.append((frame.f_code.co_filename, frame.f_lineno))
            frame = None if frame.f_code is self.kernel.__code__ else frame.f_back
        return _in_words(tuple(lines))

    def _check_values(self, lines: str, elements: np.ndarray, values: np.ndarray) -> None:
        bits = values.view(f"u{values.itemsize}")
        self.bits[elements] = bits
        differ = self.bits[elements] != bits
        if differ.any():
            place = self.memory.name(elements[differ][0])
            self.add("different values for one address", (lines,), np.count_nonzero(differ), place)

    def _check_barriers(self, kind: str, elements: np.ndarray, lanes: np.ndarray, small: bool) -> None:
        """Checks an access against the accesses of the same program since its last barrier.

        A store to an element that the same lane has loaded is in order. If the two belong to different threads, the
        value reaches the store through a shuffle or a barrier, which comes after the load. This does not hold for
        scalars and for tiles with fewer lanes than the program has threads (``small``), where several threads load a
        lane and one stores it. A store to an element that the same lane has stored is in order, because all stores have
        one layout. A load of an element that the same lane has stored is not in order, because the compiler may give
        loads another layout.
        """
        for earlier in CONFLICTS[kind]:
            numbers, same_lane = self.latest[earlier].number[elements], self.latest[earlier].lane[elements] == lanes
            unordered = numbers > self.n_before_barrier
            if kind == "store" and (earlier == "store" or (earlier == "load" and not small)):
                unordered &= ~same_lane
            for number in np.unique(numbers[unordered]).tolist():
                these = unordered & (numbers == number)
                lines = self.accesses[number - 1].lines, self.accesses[-1].lines
                place = self.memory.name(elements[these][0])
                self.add(f"{kind} after {earlier} without a barrier", lines, np.count_nonzero(these), place)
        self.latest[kind].update(len(self.accesses), elements, lanes, self.n_before_barrier)

    def check_programs(self) -> None:
        """Checks the accesses of different programs to the same element."""
        written = (self.latest["store"].number > 0) | (self.latest["atomic"].number > 0)
        shared = written & (self.lowest < self.highest)
        if not shared.any():
            return
        kept = [elements[shared[elements]] for elements in self.elements]
        elements, numbers = np.concatenate(kept), np.repeat(np.arange(len(kept)), list(map(len, kept)))
        order = np.lexsort((numbers, elements))
        elements, numbers = elements[order], numbers[order]
        starts = np.flatnonzero(np.diff(elements, prepend=-1))
        groups = defaultdict(list)  # accesses → the elements that all of these touch: few groups for many elements
        for element, group in zip(elements[starts].tolist(), np.split(numbers, starts[1:]), strict=True):
            groups[tuple(dict.fromkeys(group.tolist()))].append(element)
        for group, touched in groups.items():
            for first, second in combinations([self.accesses[number] for number in group], 2):
                conflict = first.program != second.program and second.kind in CONFLICTS[first.kind]
                if conflict and first.time >= second.visible.get(first.program, -1):
                    kind, place = f"{first.kind} and {second.kind} of two programs", self.memory.name(touched[0])
                    self.add(kind, (first.lines, second.lines), len(touched), place, (first.program, second.program))

    def check_result(self, result: list[np.ndarray]) -> None:
        """Compares the memory after a run in another order with that after the first run."""
        for name, bits, others in zip(self.memory.names, result, self.memory.read(), strict=True):
            if n_different := np.count_nonzero(bits != others):
                kind, programs = "result that depends on the order of programs", range(len(self.programs))
                self.add(kind, (), n_different, name, programs)

    def add(self, kind: str, lines: tuple[str, ...], n_lanes: int, place: str, programs: Iterable[int] = ()) -> None:
        key = kind, lines or place
        finding = self.findings.get(key, Finding(self.kernel.__name__, kind, lines, (), 0, place))
        identifiers = (self.programs[program] for program in programs or (self.program,))
        programs = tuple(dict.fromkeys((*finding.programs, *identifiers)))
        self.findings[key] = finding._replace(programs=programs, n_lanes=finding.n_lanes + int(n_lanes))


@lru_cache(maxsize=4096)
def _in_words(lines: tuple[tuple[str, int], ...]) -> str:
    return " from ".join(f"{Path(file).parent.name}/{Path(file).name}:{line}" for file, line in lines)


def _joined(*clocks: VectorClock) -> VectorClock:
    programs = {program for clock in clocks for program in clock}
    return {program: max(clock.get(program, 0) for clock in clocks) for program in programs}
