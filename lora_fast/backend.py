"""Chooses the implementation that runs: the Triton kernels or their plain-torch twins. Nothing falls back silently."""

from __future__ import annotations

import os
import threading
import weakref
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from . import checks

BACKENDS = ("auto", "triton", "torch")
_chosen = checks.choice(os.environ.get("LORA_FAST_BACKEND", "auto"), "LORA_FAST_BACKEND", BACKENDS)


class set_backend:
    """Sets the backend: ``lf.set_backend("torch")``, or for a block only ``with lf.set_backend("torch"): ...``.

    It is set for all threads, because autograd runs the backward of a GPU's ops, and with activation checkpointing
    their second forward, in a thread of its own. Where the blocks of several threads overlap, the one that began last
    holds, and after the last of them has ended the backend is the one from before the first.

    Args:
        name: ``"auto"`` (Triton on CUDA tensors, torch elsewhere), ``"triton"`` or ``"torch"``. Triton on CPU tensors
            needs ``TRITON_INTERPRET=1`` in the environment before the first call.

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
    """Returns whether the Triton kernels compute on this tensor.

    Raises:
        BackendError: Triton is chosen, by name or because the tensor is on a GPU, and cannot run.
    """
    if _chosen != "triton" and (_chosen == "torch" or not tensor.is_cuda):
        return False
    if not tensor.is_cuda and not interpreting():
        raise checks.BackendError(
            f"backend 'triton' on {tensor.device} tensors: expected a CUDA device, or TRITON_INTERPRET=1 set before "
            "Python starts; lf.set_backend('auto') uses plain torch here"
        )
    if tensor.dtype == torch.float64:  # the kernels accumulate in float32
        raise checks.BackendError(
            "backend 'triton' with float64: expected float16, bfloat16 or float32; lf.set_backend('torch') computes it"
        )
    return True


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
