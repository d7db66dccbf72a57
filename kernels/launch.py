"""What every launcher needs: one launch with all that stays the same from call to call, checks, row-contiguous views,
the device guard, the dropout arguments."""

import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from triton import knobs
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from . import device, tiles
from .limits import LARGEST_RANK

MOST_REGISTERS = 255  # of a thread
REGISTERS = 1 << 16  # of a multiprocessor


class LaunchError(RuntimeError):
    """A kernel that cannot run on this device: names the kernel, what it needs, the limit, and what to change."""


class Matrix(NamedTuple):
    """How a kernel sees a tensor that it gets as a TMA descriptor: rows × columns, its strides, and the block of one
    copy; for a Gluon kernel, the block's layout in shared memory."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    block: tuple[int, int]
    layout: object | None = None

    def of(self, tensor: torch.Tensor):
        """Triton's descriptor, or Gluon's."""
        sizes = list(self.shape), list(self.strides), list(self.block)
        if self.layout is None:
            return TensorDescriptor(tensor, *sizes)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(tensor, *sizes, self.layout)


class Launch:
    """One launch of a kernel, with all that stays the same while the signature of a call does.

    A kernel's parameters come in this order: tensors, those that are TMA descriptors (``matrices``) first; numbers that
    change from call to call; sizes and strides; constexprs, which are in ``options`` by name, with the compiler's own.

    ``go(stream, tensors, numbers)`` launches. Without a stream that is through Triton's JIT, on the current one. With a
    stream it is so the first time, and from then on ``go`` is a function that calls Triton's C launcher with the same
    arguments (compiled_launch.py).
    """

    __slots__ = ("go", "grid", "kernel", "matrices", "options", "sizes")

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        sizes: tuple[int, ...],
        options: dict,
        matrices: tuple[Matrix, ...] = (),
    ):
        self.kernel, self.grid, self.sizes, self.options, self.matrices = kernel, grid, sizes, options, matrices
        self.go = self._first

    def _first(self, stream: int | None, tensors: tuple, numbers: tuple) -> None:
        compiled = self._by_jit(tensors, numbers)
        if stream is not None:
            self.go = self._prepare(compiled, tensors, numbers)

    def _by_jit(self, tensors: tuple, numbers: tuple, launch: bool = True):
        """The compiled kernel, launched or only loaded.

        Raises:
            LaunchError: the device has too little of something.
        """
        n = len(self.matrices)
        described = [matrix.of(tensor) for matrix, tensor in zip(self.matrices, tensors, strict=False)]
        arguments = *described, *tensors[n:], *numbers, *self.sizes
        try:
            if launch:
                return self.kernel[self.grid](*arguments, **self.options)
            compiled = self.kernel.warmup(*arguments, grid=self.grid, **self.options)
            _ = compiled.run  # loads it
            return compiled
        except OutOfResources as error:
            raise LaunchError(self._too_large(error, device.of(tensors[0].device))) from error

    def _prepare(self, compiled, tensors: tuple, numbers: tuple):
        """From now on the C launcher. Where ptxas has let a kernel spill to fit one more block on a multiprocessor, the
        same kernel with all the registers that a thread can have (it is loaded now: a graph may be captured next)."""
        from .compiled_launch import prepare

        if compiled.n_spills and takes_more_registers(compiled, self.options):
            self.options = self.options | {"maxnreg": MOST_REGISTERS}
            compiled = self._by_jit(tensors, numbers, launch=False)
        return prepare(compiled, self.grid, self.sizes, self.matrices)

    def _too_large(self, error: OutOfResources, found: device.Device) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        unit = "bytes of " if error.name == "shared memory" else ""
        return (
            f"lora_fast: {self.kernel.__name__} ({options}) needs {error.required} {unit}{error.name} a block, "
            f"{found.name} (sm_{found.arch}) allows {error.limit}: choose a smaller rank, remove a measured tile "
            "(lora-fast tune --clear), or run plain torch (lf.set_backend('torch'))"
        )


KEPT = 4096  # plans of a kind, the oldest go first; one is a few kilobytes
_keeping = threading.Lock()
_runtime = knobs.runtime
_INTERPRETED = _runtime.interpret


def by_jit() -> bool:
    """Whether every launch has to go through Triton's JIT: in the interpreter, while ``tiles.assume`` holds, and while
    a launch hook is set (a profiler's). Nothing is kept then."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return (
        _INTERPRETED
        or tiles.is_assumed()
        or (enter is not None and bool(getattr(enter, "calls", True)))  # a chain of hooks, a function, or None
        or (leave is not None and bool(getattr(leave, "calls", True)))
    )


def stream_of(tensor: torch.Tensor) -> int | None:
    """The current stream of the tensor's device, or None where launches go through Triton's JIT."""
    return None if by_jit() else device.stream(tensor)


def alignments(tensors: Iterable[torch.Tensor]) -> tuple[bool, ...]:
    """Returns which tensors start at a multiple of 16 bytes. A compiled kernel may depend on that, not on more."""
    return tuple([tensor.data_ptr() % 16 == 0 for tensor in tensors])


def keep_plan(plans: dict, key: tuple, plan):
    """Keeps a plan, in place of the oldest one where there are too many. Returns the plan that has the key: another
    thread may have been first."""
    with _keeping:
        while len(plans) >= KEPT:
            del plans[next(iter(plans))]
        return plans.setdefault(key, plan)


def plan(plans: dict, key: tuple, stream: int | None, make: Callable):
    """Returns the ``Launch``, or the object that holds one, that ``make`` makes. It is kept among ``plans`` where there
    is a stream."""
    if stream is None:
        return make()
    known = plans.get(key)
    return keep_plan(plans, key, make()) if known is None else known


_plans: dict[tuple, Launch] = {}


def launch(
    kernel, grid: tuple[int, ...], tensors: tuple, numbers: tuple, sizes: tuple[int, ...], options: dict
) -> None:
    """Launches on the first tensor's device, which is current: by a plan, kept by what the compiled kernel and the
    launch depend on."""
    stream = stream_of(tensors[0])
    if stream is None:
        Launch(kernel, grid, sizes, options).go(None, tensors, numbers)
        return
    dtypes = tuple([tensor.dtype for tensor in tensors])
    key = kernel, grid, sizes, tuple(options.values()), device.index(tensors[0]), dtypes, alignments(tensors)
    plan(_plans, key, stream, lambda: Launch(kernel, grid, sizes, options)).go(stream, tensors, numbers)


def takes_more_registers(compiled, options: dict) -> bool:
    """Whether a multiprocessor has ``MOST_REGISTERS`` for each of the kernel's threads, and nobody asked for fewer."""
    return "maxnreg" not in options and compiled.metadata.num_warps * 32 * MOST_REGISTERS <= REGISTERS


# A dropout mask that is never stored, as kernels take it: the seed, or its address on the device where it must not
# reach the host; 1 if it is an address; the drop level: an element is kept when its 16-bit number is at least that.
Keep = tuple[int, int, int]
NO_MASK: Keep = (0, 0, 0)


def draw_mask(x: torch.Tensor, dropout_p: float, seed: int | torch.Tensor) -> Keep:
    """Twin of ``reference.philox_mask``: the kernels make the mask of x where they need it. A seed in a tensor is a 0-d
    int64 on the device, and lives as long as the launches that read it."""
    level = round((1 << 16) * dropout_p)
    if not isinstance(seed, torch.Tensor):
        return seed, 0, level
    report_addresses(seed.data_ptr(), [seed])
    return seed.data_ptr(), 1, level


# Functions that want to know which tensors a kernel reaches by their addresses, such as the sanitizer's.
address_watchers: list[Callable[[torch.Tensor | int, list[torch.Tensor]], None]] = []


def report_addresses(holder: torch.Tensor | int, tensors: Iterable[torch.Tensor]) -> None:
    """Reports the tensors whose addresses the next launch gets in ``holder``: a table, or the address as a number."""
    if address_watchers:
        listed = list(tensors)
        for watch in address_watchers:
            watch(holder, listed)


def thin_dtype(tall: torch.Tensor, factor: torch.Tensor, rounded: bool) -> torch.dtype:
    """Of S, from x and a, and of dS, from dy and b: the wider of both, float32 at most; or tall's, where factors are
    ``rounded`` to it, as autocast does."""
    if rounded or tall.dtype is factor.dtype:
        return tall.dtype
    wide = torch.promote_types(tall.dtype, factor.dtype)
    return torch.float32 if wide is torch.float64 else wide


def is_wide(tall: torch.Tensor, thin: torch.Tensor) -> bool:
    """Whether a kernel loads a factor, S or dS in more bits than the activations', rounded or not: that takes tiles of
    its own."""
    return thin.element_size() > tall.element_size()


def allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """A function that allocates contiguous tensors, in the way that costs the host least."""
    strides = torch.empty(shape, device="meta").stride()
    return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix whose rows are contiguous; any leading dimension passes, anything else is copied."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def check_square(name: str, matrices: torch.Tensor) -> tuple[int, int]:
    """n and r of float32 (n, r, r), r from 1 to ``LARGEST_RANK``."""
    n, *sides = matrices.shape
    if len(sides) != 2 or sides[0] != sides[1] or not 1 <= sides[0] <= LARGEST_RANK or matrices.dtype != torch.float32:
        raise ValueError(
            f"lora_fast: {name}: expected float32 (n, r, r), r from 1 to {LARGEST_RANK}, "
            f"got {matrices.dtype} {tuple(matrices.shape)}"
        )
    return n, sides[0]


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"lora_fast: {name}: expected contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def on_device(tensor: torch.Tensor):
    """Launches go to the tensor's device, whichever is current."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def is_on_device(number: float | torch.Tensor, torch_device: torch.device) -> bool:
    """Whether a number is a tensor there, which must not come to the host; one on a CPU is read where it is used."""
    return isinstance(number, torch.Tensor) and number.device == torch_device


_MATMUL = torch.backends.cuda.matmul
_HAS_FP32_PRECISION = hasattr(_MATMUL, "fp32_precision")


def tf32(tensor: torch.Tensor) -> bool:
    """Whether torch's own products of it use TF32 (``torch.backends.cuda.matmul.fp32_precision``; torch refuses to read
    ``allow_tf32`` once that is set)."""
    if tensor.dtype is not torch.float32:
        return False
    return _MATMUL.fp32_precision == "tf32" if _HAS_FP32_PRECISION else _MATMUL.allow_tf32


def precision(tensor: torch.Tensor) -> str:
    """The ``input_precision`` of dots: as torch's own products of the tensor."""
    return "tf32" if tf32(tensor) else "ieee"
