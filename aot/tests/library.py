# SPDX-License-Identifier: Apache-2.0
"""The functions and structures of aot/lora_fast.h for Python, by ctypes, and the stub of the driver."""

import ctypes
from contextlib import contextmanager
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_ubyte,
    c_uint,
    c_uint64,
    c_ulonglong,
    c_void_p,
)

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NO_DRIVER, BAD_ARGUMENT, MISALIGNED, NO_ARCH, NO_KERNEL = -1, -2, -3, -4, -5


class Kernel(Structure):
    _fields_ = [(name, c_char_p) for name in ("key", "params", "constants")]
    _fields_ += [("arch", c_int), ("is_ptx", c_int), ("code", c_void_p)]

    @property
    def form(self) -> str:
        """Returns the device code's form: "sm_90" or "ptx_90"."""
        return f"{'ptx' if self.is_ptx else 'sm'}_{self.arch}"

    def runs_on(self, arch: int) -> bool:
        """Returns whether a card of an arch runs the machine code: its own, or an earlier arch's of its family."""
        of_family = self.arch // 10 == arch // 10 and self.arch <= arch
        return not self.is_ptx and (self.arch == arch if self.arch == 90 else of_family)


class Sized(Structure):
    """A structure whose first field is its size."""

    def __init__(self, *values, **fields):
        super().__init__(ctypes.sizeof(type(self)), *values, **fields)


class Layer(Sized):
    _fields_ = [("size", c_size_t), *((name, c_int) for name in ("n_tokens", "d_in", "d_out", "r", "dtype", "adapter"))]
    _fields_ += [("scaling", c_float), ("drop_level", c_int), ("seed", c_int64), ("device_seed", c_void_p)]
    _fields_ += [(name, c_int64) for name in ("ld_x", "ld_y", "ld_dx", "ld_dy", "ld_weight")]
    _fields_ += [("accumulate", c_int)]


class Adapter(Structure):
    _fields_ = [("a", c_void_p), ("b", c_void_p), ("r", c_int64), ("scaling", c_float), ("reserved", c_int)]


class Batch(Sized):
    _fields_ = [("size", c_size_t)]
    _fields_ += [(name, c_int) for name in ("n_rows", "d_in", "d_out", "n_adapters", "r", "dtype", "adapter")]
    _fields_ += [("ld_x", c_int64), ("ld_y", c_int64)]
    _fields_ += [(name, c_void_p) for name in ("adapters", "rows", "ends")]


class Factor(Structure):
    _fields_ = [("tensors", c_void_p * 4), ("d", c_int64), ("d_in", c_int64), ("is_a", c_int), ("index", c_int)]


class Group(Sized):
    _fields_ = [("size", c_size_t)]
    _fields_ += [
        (name, c_int) for name in ("op", "dtype", "r", "n_factors", "n_rows", "flat", "n_programs", "chunk", "planned")
    ]
    _fields_ += [("bytes", c_size_t), ("device", c_void_p)]


class StepWork(Sized):
    _fields_ = [("size", c_size_t)]
    _fields_ += [(name, c_void_p) for name in ("additive", "matrices", "scale_p", "scale_g", "grams", "keys")]


class CayleyPair(Structure):
    _fields_ = [(name, c_void_p) for name in ("free_a", "free_b", "scale", "inverse", "result_a", "result_b")]
    _fields_ += [(name, c_void_p) for name in ("result_scale", "grad_a", "grad_b")]
    _fields_ += [("d_in", c_int64), ("d_out", c_int64)]


class CayleyGroup(Sized):
    _fields_ = [("size", c_size_t)]
    _fields_ += [(name, c_int) for name in ("dtype", "r", "n_pairs", "backward")]
    _fields_ += [("n_programs", c_int * 2), ("chunk", c_int * 2), ("planned", c_int)]
    _fields_ += [("bytes", c_size_t), ("workspace", c_size_t)]
    _fields_ += [("device", c_void_p)]


class Note(Structure):
    _fields_ = [("function", c_void_p), ("code", c_void_p), ("name", c_char_p), ("grid", c_uint * 3)]
    _fields_ += [("block", c_uint * 3), ("shared", c_uint), ("count", c_uint), ("stack", c_uint)]
    _fields_ += [("stream", c_uint64)]
    _fields_ += [("sizes", c_uint * 96), ("values", (c_ubyte * 128) * 96)]

    def argument(self, i: int) -> bytes:
        return bytes(self.values[i][: self.sizes[i]])


class TensorMap(Structure):
    """A tensor map as the stub writes it, in place of the driver's encoding of a matrix."""

    _fields_ = [(name, c_uint64) for name in ("address", "type", "rank", "swizzle", "promotion", "fill")]
    _fields_ += [(name, c_uint64 * 2) for name in ("sizes", "strides", "box")]


def box_of(block: list[int], dtype: torch.dtype) -> list[int]:
    """Returns the box, columns first, that one copy moves of a block (rows, columns): at most 128 bytes of a row."""
    return [min(block[1], 128 // dtype.itemsize), block[0]]


class Stub:
    """The driver of stub_cuda.c, which liblora_fast.so finds as libcuda.so.1 once it is loaded."""

    MOST, HOOK = 1024, CFUNCTYPE(None, POINTER(Note))

    def __init__(self, path: str, arch: int = 80):
        self.library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        self.set("arch", arch)

    def _variable(self, name: str, kind):
        return kind.in_dll(self.library, f"stub_{name}")

    def set(self, name: str, value: int) -> None:
        """Sets "arch", "capturing", "noting", "fail_after" or "load_time"."""
        self._variable(name, c_int).value = value

    def counter(self, name: str) -> int:
        """Returns the number of "launches", "loads" or "unloads" so far."""
        return self._variable(name, c_ulonglong).value

    @property
    def retained(self) -> int:
        return self._variable("retained", c_int).value

    @property
    def failed(self) -> str:
        """Returns the name of the call that failed by fail_after."""
        return (self._variable("failed", c_char_p).value or b"").decode()

    def failed_now(self) -> bool:
        """Returns whether a call has failed since fail_after was set, and lets no later one fail."""
        failed = self._variable("fail_after", c_int).value == 0
        self.set("fail_after", 0)
        return failed

    @contextmanager
    def recorded(self):
        """Records the launches inside the context. They are in the list that it yields once the context has ended."""
        count, notes = self._variable("count", c_int), []
        count.value = 0
        yield notes
        notes += (Note * self.MOST).in_dll(self.library, "stub_notes")[: count.value]

    def on_launch(self, function):
        """Sets the function that every launch calls with its note. The caller keeps the returned object."""
        hook = self.HOOK(lambda note: function(note.contents)) if function else self.HOOK()
        self._variable("on_launch", c_void_p).value = ctypes.cast(hook, c_void_p).value
        return hook

    def at_end(self, function):
        """Sets the function that is called when the process ends. The caller keeps the returned object."""
        hook = CFUNCTYPE(None)(function)
        self._variable("at_end", c_void_p).value = ctypes.cast(hook, c_void_p).value
        return hook


class Refused(Exception):
    """A status other than 0."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Library:
    """liblora_fast.so. Tensors are passed as their addresses; a status other than 0 raises ``Refused``."""

    def __init__(self, path: str, stream: int | None = None):
        self.library, self.stream = ctypes.CDLL(path), stream
        self.library.lora_fast_error_name.restype = c_char_p
        self.library.lora_fast_error_message.restype = c_char_p
        self.library.lora_fast_kernels.restype = POINTER(Kernel)
        self.kernels = self.built("kernels")

    def built(self, name: str) -> list:
        """Returns what lora_fast_kernels, archs, dtypes or ranks return."""
        function, count = getattr(self.library, f"lora_fast_{name}"), c_int()
        if name != "kernels":
            function.restype = POINTER(c_int)
        return function(byref(count))[: count.value]

    def status(self, name: str, *arguments) -> int:
        return getattr(self.library, f"lora_fast_{name}")(*map(_argument, arguments), c_void_p(self.stream))

    def error_name(self, status: int) -> str:
        return self.library.lora_fast_error_name(status).decode()

    @property
    def message(self) -> str:
        return self.library.lora_fast_error_message().decode()

    def __call__(self, name: str, *arguments) -> None:
        status = self.status(name, *arguments)
        if status:
            raise Refused(f"{self.error_name(status)}: {self.message}", status)

    def host(self, name: str, *arguments) -> None:
        """Calls a function that takes no stream."""
        status = getattr(self.library, f"lora_fast_{name}")(*map(_argument, arguments))
        if status:
            raise Refused(f"{self.error_name(status)}: {self.message}", status)

    def workspace(self, name: str, *arguments) -> int:
        """Returns the size that the function of workspace of this name stores."""
        size = c_size_t()
        self.host(f"{name}workspace", *arguments, size)
        return size.value

    def group(self, op: int, dtype: torch.dtype, r: int, n_rows: int, factors: list[Factor], flat=False) -> tuple:
        """Returns the group, and its table as bytes in host memory."""
        group = Group(op, DTYPES.index(dtype), r, len(factors), n_rows, int(flat))
        return group, self._filled("", group, (Factor * len(factors))(*factors))

    def cayley_group(self, dtype: torch.dtype, r: int, backward: int, pairs: list[CayleyPair]) -> tuple:
        """Returns the group of a Cayley transform, and its table as bytes in host memory."""
        group = CayleyGroup(DTYPES.index(dtype), r, len(pairs), backward)
        return group, self._filled("cayley_", group, (CayleyPair * len(pairs))(*pairs))

    def _filled(self, prefix: str, group: Structure, rows) -> torch.Tensor:
        plan, fill = (getattr(self.library, f"lora_fast_{prefix}{verb}") for verb in ("plan", "fill"))
        assert plan(byref(group), rows) == 0
        host = torch.zeros(group.bytes, dtype=torch.uint8)
        assert fill(byref(group), rows, c_void_p(host.data_ptr())) == 0
        return host


def _argument(value):
    if isinstance(value, torch.Tensor):
        return c_void_p(value.data_ptr())
    if isinstance(value, Structure | c_size_t):
        return byref(value)
    if isinstance(value, float):
        return c_float(value)
    return c_void_p(None) if value is None else value
