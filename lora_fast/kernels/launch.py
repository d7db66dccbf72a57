"""Helpers shared by all launchers: prepared launches and the plans that keep them, argument checks, row-contiguous
views, the device guard and the dropout arguments.

Names: a *tall* matrix has a row for each token and as many columns as the layer is wide (x, dy); a *thin* one has r
columns (S, dS).
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from . import device, tiles
from .limits import LARGEST_RANK

MOST_REGISTERS = 255  # a thread can have
REGISTERS = 1 << 16  # a multiprocessor has


class LaunchError(RuntimeError):
    """Raised if a kernel cannot run on this device. The message names the kernel, what it needs, the device's limit and
    a remedy."""


class Matrix(NamedTuple):
    """The description of a matrix that a kernel takes as a TMA descriptor: shape (rows, columns), strides in elements,
    the block that one copy moves and, for a Gluon kernel, the block's layout in shared memory."""

    shape: tuple[int, int]
    strides: tuple[int, int]
    block: tuple[int, int]
    layout: object | None = None

    def describe(self, tensor: torch.Tensor):
        """Returns the descriptor of the tensor: Gluon's if there is a layout, else Triton's."""
        sizes = list(self.shape), list(self.strides), list(self.block)
        if self.layout is None:
            return TensorDescriptor(tensor, *sizes)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(tensor, *sizes, self.layout)


class Launch:
    """A launch of a kernel with everything that is constant for one signature of a call.

    A kernel's parameters have this order: tensors (those taken as TMA descriptors, ``matrices``, first), numbers that
    change from call to call, sizes and strides, constexprs. ``options`` holds the constexprs and the compiler's options
    by name. ``places`` has the place of each tensor of the kernel among those of a call, if a call has each tensor once
    and the kernel takes some of them several times.

    ``go(stream, tensors, numbers)`` launches. If ``stream`` is None, the launch goes through Triton's JIT on the
    current stream. Otherwise the first call compiles and loads the kernel and replaces ``go`` by a function that calls
    Triton's C launcher with the same arguments (compiled_launch.py).
    """

    __slots__ = ("go", "grid", "kernel", "matrices", "options", "places", "sizes")

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        sizes: tuple[int, ...],
        options: dict,
        matrices: tuple[Matrix, ...] = (),
        places: tuple[int, ...] | None = None,
    ):
        self.kernel, self.grid, self.sizes, self.options, self.matrices = kernel, grid, sizes, options, matrices
        self.places = places
        self.go = self._first

    def _first(self, stream: int | None, tensors: tuple, numbers: tuple) -> None:
        """Launches through Triton's JIT, or replaces ``go`` and calls it. Several threads may prepare one launch at the
        same time. Each replaces ``go`` by a function that does the same."""
        if stream is None:
            # The interpreter's copies to and from the host are no ops for a mode such as selective checkpointing.
            unseen = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()
            with self._named_errors(tensors), on_device(tensors[0]), unseen:
                self.kernel[self.grid](*self._arguments(tensors, numbers), **self.options)
        else:
            self.go = self._prepare(self._load(tensors, numbers, self.options), tensors, numbers)
            self.go(stream, tensors, numbers)

    def _arguments(self, tensors: tuple, numbers: tuple) -> tuple:
        if self.places is not None:
            tensors = tuple([tensors[i] for i in self.places])
        described = [matrix.describe(tensor) for matrix, tensor in zip(self.matrices, tensors, strict=False)]
        return *described, *tensors[len(described) :], *numbers, *self.sizes

    def _load(self, tensors: tuple, numbers: tuple, options: dict):
        """Returns the compiled kernel, loaded on the device.

        Triton stores a kernel's launcher before it has loaded the module and releases the GIL while it loads. Another
        thread would then launch a function that does not exist yet, so one thread at a time loads on a device. The lock
        is not held while a kernel is compiled or launched, because a launch may wait for the device.
        """
        with self._named_errors(tensors):
            compiled = self.kernel.warmup(*self._arguments(tensors, numbers), grid=self.grid, **options)
            with _loading.setdefault(tensors[0].get_device(), threading.RLock()):
                run = compiled.run  # this property loads the module
            if isinstance(run, partial):
                run()  # raises the error of an earlier load, in whose place Triton has stored this function
        return compiled

    def _prepare(self, compiled, tensors: tuple, numbers: tuple):
        """Returns the function that calls the C launcher.

        ptxas may let a kernel spill registers to fit one more block on a multiprocessor. Such a kernel is compiled
        again with all the registers that a thread can have. It is loaded now, because loading fails once a CUDA graph
        is being captured.
        """
        from .compiled_launch import prepare

        if compiled.n_spills and takes_more_registers(compiled, self.options):
            compiled = self._load(tensors, numbers, self.options | {"maxnreg": MOST_REGISTERS})
        return prepare(compiled, self.grid, self.sizes, self.matrices, self.places)

    @contextmanager
    def _named_errors(self, tensors: tuple):
        """Raises LaunchError in place of Triton's error if the kernel needs more shared memory or threads than the
        device has."""
        try:
            yield
        except OutOfResources as error:
            raise LaunchError(self._too_large(error, device.get(tensors[0].device))) from error

    def _too_large(self, error: OutOfResources, card: device.Device) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        unit = "bytes of " if error.name == "shared memory" else ""
        return (
            f"lora_fast: {self.kernel.__name__} ({options}) needs {error.required} {unit}{error.name} a block, "
            f"{card.name} (sm_{card.arch}) allows {error.limit}: choose a smaller rank, remove a measured tile "
            "(lora-fast tune --clear), or run plain torch (lf.set_backend('torch'))"
        )


_loading: dict[int, threading.RLock] = {}  # by device
MAX_PLANS = 4096  # kept in each dictionary of plans; a plan takes a few kilobytes
_plans_lock = threading.Lock()
_runtime = knobs.runtime
_INTERPRETED = _runtime.interpret


def by_jit() -> bool:
    """Returns whether every launch must go through Triton's JIT: in the interpreter, inside ``tiles.assume``, and while
    a launch hook is set (by a profiler). No plan is kept then."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return (
        _INTERPRETED
        or tiles.is_assumed()
        or (enter is not None and bool(getattr(enter, "calls", True)))  # a chain of hooks, a function, or None
        or (leave is not None and bool(getattr(leave, "calls", True)))
    )


def stream_of(tensor: torch.Tensor) -> int | None:
    """Returns the current stream of the tensor's device, or None if launches go through Triton's JIT."""
    return None if by_jit() else device.stream(tensor)


def alignments(tensors: Iterable[torch.Tensor]) -> tuple[bool, ...]:
    """Returns which tensors start at a multiple of 16 bytes. Triton compiles other code for those, so a plan's key
    contains this."""
    return tuple([tensor.data_ptr() % 16 == 0 for tensor in tensors])


def keep_plan(plans: dict, key: tuple, plan):
    """Keeps a plan and drops the oldest ones beyond ``MAX_PLANS``. Returns the plan with this key, which is another
    plan if another thread was first."""
    with _plans_lock:
        while len(plans) >= MAX_PLANS:
            del plans[next(iter(plans))]
        return plans.setdefault(key, plan)


def plan(plans: dict, key: tuple, stream: int | None, make: Callable):
    """Returns the plan with this key, made by ``make`` if there is none. Without a stream (``by_jit``) it always makes
    one and keeps none."""
    if stream is None:
        return make()
    known = plans.get(key)
    return keep_plan(plans, key, make()) if known is None else known


_plans: dict[tuple, Launch] = {}


def launch(
    kernel, grid: tuple[int, ...], tensors: tuple, numbers: tuple, sizes: tuple[int, ...], options: dict
) -> None:
    """Launches a kernel on the first tensor's device, which must be current, and keeps the ``Launch`` for the next call
    with the same signature."""
    stream = stream_of(tensors[0])
    if stream is None:
        Launch(kernel, grid, sizes, options).go(None, tensors, numbers)
        return
    dtypes = tuple([tensor.dtype for tensor in tensors])
    key = kernel, grid, sizes, tuple(options.values()), device.index(tensors[0]), dtypes, alignments(tensors)
    plan(_plans, key, stream, lambda: Launch(kernel, grid, sizes, options)).go(stream, tensors, numbers)


def takes_more_registers(compiled, options: dict) -> bool:
    """Returns whether a multiprocessor has ``MOST_REGISTERS`` for each thread of the kernel and ``options`` have set
    fewer or none."""
    has_fewer = options.get("maxnreg", 0) < MOST_REGISTERS
    return has_fewer and compiled.metadata.num_warps * 32 * MOST_REGISTERS <= REGISTERS


# The kernels' description of a dropout mask, which is never stored: (seed, in_memory, drop_level). If in_memory is 1,
# seed is the address of the seed on the device. An element is kept if its random 16-bit number is at least drop_level.
DropoutMask = tuple[int, int, int]
NO_MASK: DropoutMask = (0, 0, 0)


def draw_mask(x: torch.Tensor, dropout_p: float, seed: int | torch.Tensor) -> DropoutMask:
    """Returns the description from which the kernels compute the dropout mask of x.

    Twin: ``reference.linear.philox_mask``.

    A seed in a tensor is a 0-d int64 on the device. The caller keeps it alive until the launches that read it are done.
    """
    level = round((1 << 16) * dropout_p)
    if not isinstance(seed, torch.Tensor):
        return seed, 0, level
    report_addresses(seed.data_ptr(), [seed])
    return seed.data_ptr(), 1, level


# Called with the tensors that a kernel reaches through addresses in memory. The sanitizer adds one.
address_watchers: list[Callable[[torch.Tensor | int, list[torch.Tensor]], None]] = []


def report_addresses(holder: torch.Tensor | int, tensors: Iterable[torch.Tensor]) -> None:
    """Calls the ``address_watchers`` with the tensors whose addresses are in ``holder``, an argument of the next
    launch: either a table of addresses or one address as a number."""
    if address_watchers:
        tensors = list(tensors)
        for watch in address_watchers:
            watch(holder, tensors)


def thin_dtype(tall: torch.Tensor, factor: torch.Tensor, rounded: bool) -> torch.dtype:
    """Returns the dtype of S (tall x, factor a) or of dS (tall dy, factor b): the wider of both dtypes, at most
    float32. If factors are ``rounded`` to tall's dtype, as under autocast, it is tall's dtype."""
    if rounded or tall.dtype is factor.dtype:
        return tall.dtype
    wide = torch.promote_types(tall.dtype, factor.dtype)
    return torch.float32 if wide is torch.float64 else wide


def is_wide(tall: torch.Tensor, thin: torch.Tensor) -> bool:
    """Returns whether a factor, S or dS has more bits than the activations. Kernels use other tiles in that case."""
    return thin.element_size() > tall.element_size()


def allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """Returns a function that allocates contiguous tensors of this shape."""
    # empty_strided with known strides takes the least host time.
    strides = torch.empty(shape, dtype=dtype, device="meta").stride()
    return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)


def contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the matrix itself if its rows are contiguous (with any distance between rows), else a contiguous copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def check_square(name: str, matrices: torch.Tensor) -> tuple[int, int]:
    """Returns n and r of square matrices.

    Raises:
        AssertionError: matrices are not float32 (n, r, r) with r from 1 to ``LARGEST_RANK``.
    """
    n, *sides = matrices.shape
    is_square = len(sides) == 2 and sides[0] == sides[1] and 1 <= sides[0] <= LARGEST_RANK
    assert is_square and matrices.dtype is torch.float32, (
        f"{name}: expected float32 (n, r, r), r from 1 to {LARGEST_RANK}, got {matrices.dtype} {tuple(matrices.shape)}"
    )
    return n, sides[0]


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises AssertionError unless the tensor is contiguous with this shape and dtype."""
    assert tuple(tensor.shape) == shape and tensor.dtype is dtype and tensor.is_contiguous(), (
        f"{name}: expected contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}, "
        f"strides {tensor.stride()}"
    )


_interpreter = threading.RLock()


def on_device(tensor: torch.Tensor):
    """Returns a context in which launches go to the tensor's device. In Triton's interpreter, which keeps the running
    program in globals, one thread at a time is in such a context."""
    if _INTERPRETED:
        return _interpreter
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def is_on_device(number: float | torch.Tensor, torch_device: torch.device) -> bool:
    """Returns whether a number is a tensor on this device. Kernels read such a tensor, because reading it on the host
    would synchronise."""
    return isinstance(number, torch.Tensor) and number.device == torch_device


_MATMUL = torch.backends.cuda.matmul
_HAS_FP32_PRECISION = hasattr(_MATMUL, "fp32_precision")


def tf32(tensor: torch.Tensor) -> bool:
    """Returns whether torch multiplies this tensor in TF32, as set by ``torch.backends.cuda.matmul.fp32_precision``.
    Torch raises if ``allow_tf32`` is read after that was set, so only older versions of torch read ``allow_tf32``."""
    if tensor.dtype is not torch.float32:
        return False
    return _MATMUL.fp32_precision == "tf32" if _HAS_FP32_PRECISION else _MATMUL.allow_tf32


def precision(tensor: torch.Tensor) -> str:
    """Returns the ``input_precision`` for dots: "tf32" only for float32 tensors and if torch allows it, else "ieee"."""
    return "tf32" if tf32(tensor) else "ieee"
