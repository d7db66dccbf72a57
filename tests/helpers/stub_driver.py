"""Runs Triton's real launch path on a machine without a GPU. Its JIT, its C launcher and our launch plans call a driver
of our own (aot/tests/stub_cuda.c) that has the limits of a real card, rejects the launches that the card would reject,
and records the others.

CPU tensors stand in for tensors on the card, and kernels compute nothing. ``install`` changes this process permanently.
It must be called in a process of its own, before Triton is used and without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "aot" / "tests" / "stub_cuda.c"
COMPILER = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
MOST, SLOTS, LARGEST = 1024, 96, 128  # as in the C file
MULTIPROCESSOR_COUNT, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 16, 97  # of cuda.h's CUdevice_attribute


class Note(ctypes.Structure):
    """A launch as the C file records it."""

    _fields_ = [("function", ctypes.c_void_p), ("code", ctypes.c_void_p), ("name", ctypes.c_char_p)]
    _fields_ += [("grid", ctypes.c_uint * 3)]
    _fields_ += [("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("count", ctypes.c_uint)]
    _fields_ += [("stack", ctypes.c_uint), ("stream", ctypes.c_uint64), ("sizes", ctypes.c_uint * SLOTS)]
    _fields_ += [("values", (ctypes.c_ubyte * LARGEST) * SLOTS)]


class Launched(NamedTuple):
    """A launch that the driver received. ``arguments`` are the bytes of each parameter."""

    kernel: str
    function: int
    cubin: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stack: int  # bytes of a thread, where spilled registers are stored
    stream: int
    arguments: tuple[bytes, ...]


class Stub:
    """The stub driver of this process."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.device, self.stream = 0, 0  # the current ones
        self.card = None

    def _variable(self, name: str, kind):
        return kind.in_dll(self.library, f"stub_{name}")

    def counter(self, name: str) -> int:
        """Returns the number of "launches", or of "loads" of modules, so far."""
        return self._variable(name, ctypes.c_ulonglong).value

    def set_card(self, arch: int) -> None:
        from lora_fast.kernels import device

        self._variable("arch", ctypes.c_int).value = arch
        self.card = device.CARDS[arch]
        limits = self._attribute(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN), self._attribute(MULTIPROCESSOR_COUNT)
        assert limits == self.card[2:], f"sm_{arch}: {limits} in the C file, {self.card} in kernels/device.py"

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        assert self.library.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
        return value.value

    def record(self, launches: bool) -> None:
        """Turns the recording of launches on or off."""
        self._variable("noting", ctypes.c_int).value = launches

    @contextmanager
    def recorded(self):
        """Records the launches inside the context. They are in the list that it yields once the context has ended."""
        count, launches = self._variable("count", ctypes.c_int), []
        count.value = 0
        self.record(True)
        try:
            yield launches
        finally:
            self.record(False)
            notes = (Note * MOST).in_dll(self.library, "stub_notes")[: count.value]
            launches += [_launched(note) for note in notes]

    @contextmanager
    def capturing(self):
        """Behaves as if a stream were captured, so that loading a module is an error."""
        flag = self._variable("capturing", ctypes.c_int)
        flag.value = 1
        try:
            yield
        finally:
            flag.value = 0


def _launched(note: Note) -> Launched:
    arguments = tuple(bytes(note.values[i][: note.sizes[i]]) for i in range(note.count))
    where = tuple(note.grid), tuple(note.block), note.shared, note.stack, note.stream
    return Launched(note.name.decode(), note.function, note.code, *where, arguments)


def build(folder: Path) -> Path:
    """Compiles libcuda.so.1 into the folder and returns its path. This needs a C compiler; cuda.h is part of Triton."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    options = ["-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-isystem", str(include)]
    path = folder / "libcuda.so.1"
    subprocess.run([COMPILER, *options, str(SOURCE), "-o", str(path)], check=True)
    return path


@lru_cache
def load() -> ctypes.CDLL:
    """Loads the stub as this process's libcuda.so.1. On a machine with the real driver this must happen before torch is
    imported: a CUDA build of torch loads libcuda.so.1, and the first library loaded under a name is used for all."""
    folder = Path(tempfile.mkdtemp(prefix="stub-driver-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(build(folder)), mode=ctypes.RTLD_GLOBAL)


def install(arch: int) -> Stub:
    """Gives this process a card of this arch, with CPU tensors as its memory. Returns the stub."""
    os.environ.pop("TRITON_INTERPRET", None)
    stub = Stub(load())

    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from lora_fast import backend
    from lora_fast.kernels import device

    stub.set_card(arch)
    stub.record(False)
    cuda = CudaDriver()
    cuda.get_current_device = lambda: stub.device
    cuda.get_current_stream = lambda index: stub.stream
    cuda.get_device_capability = lambda index=None: divmod(stub.card.arch, 10)
    driver.set_active(cuda)
    device.get = lambda torch_device: stub.card
    device.index = lambda tensor: stub.device
    device.stream = lambda tensor: stub.stream
    backend.uses_triton = lambda tensor: backend.chosen() != "torch"
    return stub
