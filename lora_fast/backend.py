"""Chooses the implementation that runs: the Triton kernels or their plain-torch twins. Nothing falls back silently:
where a GPU or another accelerator cannot run the kernels, the backend "auto" warns once and runs the twins."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from . import checks, platforms

BACKENDS = ("auto", "triton", "torch")
_chosen = checks.choice(os.environ.get("LORA_FAST_BACKEND", "auto"), "LORA_FAST_BACKEND", BACKENDS)


class set_backend:
    """Sets the backend: ``lf.set_backend("torch")``, or for a block only ``with lf.set_backend("torch"): ...``.

    It is set for all threads, because autograd runs the backward of a GPU's ops, and with activation checkpointing
    their second forward, in a thread of its own. Where the blocks of several threads overlap, the one that began last
    holds, and after the last of them has ended the backend is the one from before the first.

    Args:
        name: ``"auto"`` (Triton on the CUDA devices that the kernels run on, torch elsewhere), ``"triton"`` or
            ``"torch"``. Triton on CPU tensors needs ``TRITON_INTERPRET=1`` in the environment before the first call.

    Raises:
        ArgumentError: an unknown name.
    """

    def __init__(self, name: str):
        global _chosen
        name = checks.choice(name, "backend", BACKENDS)
        with _lock:
            self._before, _chosen = _chosen, name
            _settings[:] = [*map(weakref.ref, _alive()), weakref.ref(self)]

    def __enter__(self) -> set_backend:
        return self

    def __exit__(self, *error) -> None:
        global _chosen
        with _lock:
            settings = _alive()
            if self not in settings:  # it has ended before
                return
            i = settings.index(self)
            if i + 1 < len(settings):  # a block of another thread began later and still runs
                settings[i + 1]._before = self._before
            else:
                _chosen = self._before
            _settings[:] = map(weakref.ref, settings[:i] + settings[i + 1 :])


_lock = threading.Lock()
# In the order in which they were made. A block holds its setting while it runs; nothing holds that of a plain call.
_settings: list[weakref.ref[set_backend]] = []


def _alive() -> list[set_backend]:
    settings = [reference() for reference in _settings]
    return [setting for setting in settings if setting is not None]


def chosen() -> str:
    """Returns the name of the backend that is set."""
    return _chosen


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
    if _chosen == "torch":
        return False
    if tensor.is_cuda:
        obstacle = platforms.gpu_obstacle(tensor.get_device())
    elif _chosen == "auto" and (tensor.is_cpu or tensor.is_meta):
        return False
    else:
        obstacle = _obstacle_outside_cuda(tensor.device.type)
    if obstacle is not None:
        if _chosen == "triton":
            raise checks.BackendError(_refusal(tensor.device, obstacle))
        _warn_once(tensor.device.type, tensor.device.index or 0)
        return False
    if tensor.dtype == torch.float64:  # the kernels accumulate in float32
        raise checks.BackendError(
            "backend 'triton' with float64: expected float16, bfloat16 or float32; lf.set_backend('torch') computes it"
        )
    return True


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
_lock = threading.Lock()  # nn.DataParallel calls the layers of each GPU in a thread


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
    if _chosen != "auto" or device.type in ("cpu", "meta") or platforms.obstacle(device) is None:
        return None
    return _fallback_text(device)


def _fallback_text(device: torch.device) -> str:
    return f"lora_fast runs plain torch on {device.type}, not its Triton kernels: {platforms.obstacle(device)}"


def ops(family: str, tensor: torch.Tensor) -> ModuleType:
    """Returns the module that computes a family of ops ("linear", "pairs" or "cayley") on this tensor: the kernels
    (``lora_fast.kernels.<family>``) or their torch twins (``lora_fast.ops.reference.<family>``). Both modules have the
    same functions with the same arguments.

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
