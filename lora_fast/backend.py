"""Chooses the implementation that runs: the Triton kernels or their plain-torch twins. Nothing falls back silently:
where a GPU or another accelerator cannot run the kernels, the backend "auto" warns once and runs the twins."""

from __future__ import annotations

import os
import threading
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from . import checks, platforms, regions

BACKENDS = ("auto", "triton", "torch")
_process = checks.choice(os.environ.get("LORA_FAST_BACKEND", "auto"), "LORA_FAST_BACKEND", BACKENDS)


class _Thread(threading.local):
    name: str | None = None  # the backend of the thread's innermost block


_thread = _Thread()


class set_backend:
    """Sets the backend: ``lf.set_backend("torch")`` for the process, ``with lf.set_backend("torch"): ...`` for a block
    of the thread that runs it.

    A block changes nothing for other threads, except for the threads in which ``nn.DataParallel`` runs the replicas
    that the block makes. Inside a block a call without ``with`` changes nothing for the block's thread before the block
    ends. Backward uses the backend of its forward, and a region under activation checkpointing that runs again uses
    the backends of its first run, in whichever thread and block they run.

    Args:
        name: ``"auto"`` (Triton on the CUDA devices that the kernels run on, torch elsewhere), ``"triton"`` or
            ``"torch"``. Triton on CPU tensors needs ``TRITON_INTERPRET=1`` in the environment before the first call.

    Raises:
        ArgumentError: an unknown name.
    """

    # Only the statement that follows the constructor shows whether a call is a block. Until a setting is entered,
    # shown or released, which Python does at once with a result that is not kept, it therefore holds in its own thread
    # alone.
    _open = False

    def __init__(self, name: str):
        self.name = checks.choice(name, "backend", BACKENDS)
        self._outer, self._owner = [_thread.name], threading.get_ident()
        _thread.name, self._open = self.name, True

    def __enter__(self) -> set_backend:
        if self._open:
            self._open = False
        else:  # it has been entered before
            self._outer.append(_thread.name)
        _thread.name = self.name
        return self

    def __exit__(self, *error) -> None:
        _thread.name = self._outer.pop()

    def __del__(self) -> None:
        self._set_process()

    def __repr__(self) -> str:
        self._set_process()  # an interactive session shows a result and keeps it
        return f"set_backend({self.name!r})"

    def _set_process(self) -> None:
        global _process
        if self._open:
            self._open, _process = False, self.name
            if threading.get_ident() == self._owner:
                _thread.name = self._outer.pop()


_lock = threading.Lock()  # for the warnings; nn.DataParallel calls the layers of each GPU in a thread


def chosen() -> str:
    """Returns the name of the backend that is set for this thread."""
    return _thread.name or _process


def chosen_by_block() -> str | None:
    """Returns the name of the backend that a block of this thread has set, or None outside all blocks."""
    return _thread.name


def interpreting() -> bool:
    """Returns whether the environment turns Triton's interpreter on; Triton accepts "true" and "on", too."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def uses_triton(tensor: torch.Tensor) -> bool:
    """Returns whether the Triton kernels compute on this tensor. Every call of a layer asks, so the answer about a GPU
    is cached by its index.

    Raises:
        BackendError: Triton is chosen by name and cannot run on the tensor's device, or it runs there and cannot
            compute in the tensor's dtype.
    """
    name = _thread.name or _process
    if name == "torch":
        return False
    if tensor.is_cuda:
        obstacle = platforms.gpu_obstacle(tensor.get_device())
    elif name == "auto" and (tensor.is_cpu or tensor.is_meta):
        return False
    else:
        obstacle = _obstacle_outside_cuda(tensor.device.type)
    if obstacle is not None:
        if name == "triton":
            raise checks.BackendError(_refusal(tensor.device, obstacle))
        _warn_once(tensor.device.type, tensor.device.index or 0)
        return False
    if tensor.dtype == torch.float64:  # the kernels accumulate in float32
        raise checks.BackendError(
            "backend 'triton' with float64: expected float16, bfloat16 or float32; lf.set_backend('torch') computes it"
        )
    return True


def forward_uses_triton(tensor: torch.Tensor) -> bool:
    """Returns what ``uses_triton`` returns. In a checkpointed region that runs again, it is what this call returned in
    the region's first run, because the two backends draw different dropout masks."""
    if not regions.inside():
        return uses_triton(tensor)
    return regions.same_again("backends", lambda: uses_triton(tensor))


def _obstacle_outside_cuda(device_type: str) -> platforms.Obstacle | None:
    """Returns what prevents the kernels from running on a device that is no CUDA device. Triton's interpreter runs them
    on a CPU."""
    if device_type != "cpu":
        return platforms.obstacle(torch.device(device_type))
    if interpreting():
        return platforms.triton_obstacle()
    return platforms.Obstacle("expected a CUDA device, or TRITON_INTERPRET=1 set before Python starts")


_obstacle_outside_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as platforms.gpu_obstacle


def _refusal(device: torch.device, obstacle: platforms.Obstacle) -> str:
    also = ", or" if obstacle.remedy else ";"
    return f"backend 'triton' on {device} tensors: {obstacle}{also} lf.set_backend('torch') runs plain torch here"


_warned_of: dict[tuple[str, int], str] = {}  # type and index of a device → the warning about it


def _warn_once(device_type: str, index: int) -> None:
    """Warns that plain torch runs on a device, unless another device has had the same warning."""
    if (device_type, index) in _warned_of:
        return
    text = _fallback_text(torch.device(device_type, index))
    with _lock:
        is_new = text not in _warned_of.values()
        _warned_of[device_type, index] = text
    if is_new:
        warnings.warn(f"{text}. lf.set_backend('torch') chooses it without this warning", stacklevel=2)


_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as platforms.gpu_obstacle


def fallback(device: torch.device) -> str | None:
    """Returns a sentence that says why the backend "auto" runs plain torch on an accelerator, or None where it does not
    or where nobody expects kernels, as on a CPU."""
    if chosen() != "auto" or device.type in ("cpu", "meta") or platforms.obstacle(device) is None:
        return None
    return _fallback_text(device)


def _fallback_text(device: torch.device) -> str:
    return f"lora_fast runs plain torch on {device.type}, not its Triton kernels: {platforms.obstacle(device)}"


def ops(family: str, tensor: torch.Tensor) -> ModuleType:
    """Returns the module that computes a family of ops ("linear", "dora", "experts", "batched", "pairs" or "cayley") on
    this tensor: the kernels (``lora_fast.kernels.<family>``) or their torch twins
    (``lora_fast.ops.reference.<family>``).
    Both modules have the same functions with the same arguments.

    Raises:
        BackendError: under the conditions of ``uses_triton``.
    """
    return load_ops(family, uses_triton(tensor))


@cache
def load_ops(family: str, triton: bool) -> ModuleType:
    """Returns one of the two modules of a family. Triton is imported only where its kernels run."""
    return import_module(f".{'kernels' if triton else 'ops.reference'}.{family}", __package__)


def is_capturing(device: torch.device) -> bool:
    """Returns whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
