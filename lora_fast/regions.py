"""The regions under ``torch.utils.checkpoint`` in which a call runs, and what their first runs have decided.

A region has to draw the same seeds and use the same backend when it runs again, in backward. torch restores the states
of the CPU's generator and of those of the devices of the region's arguments. That is not enough where threads share the
CPU's generator (``nn.DataParallel``, autograd's thread of each device) or where a region continues on another device,
and torch knows nothing of the backend. Each region therefore remembers the decisions of its first run, in an attribute
of the object that torch keeps for it: the frame of a region without reentrant autograd, which the closures of its
saved-tensor hooks contain, and the ctx of a reentrant one. With a version of torch in which these objects differ,
nothing is remembered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeVar
from weakref import ReferenceType

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

T = TypeVar("T")
# Looked up once, because attribute accesses cost host time in every layer's call.
_hooks: Any = torch._C._autograd
_top_hooks, _in_backward, _outside_functions = (
    _hooks._top_saved_tensors_default_hooks,
    torch._C._current_graph_task_id,
    torch._C._is_fwd_grad_enabled,  # False in the forward of an autograd.Function and in inference mode alone
)
_Frame: Any = getattr(checkpoint, "_CheckpointFrame", ())
_SELECTIVE: Any = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
_modes = torch._C._len_torch_dispatch_stack
_REENTRANT = checkpoint.CheckpointFunction
_REENTRANT_FORWARD: Any = _REENTRANT.forward


def inside() -> bool:
    """Returns whether the caller may run in a checkpointed region. Outside of all regions it returns False."""
    return _top_hooks(False) is not None or _in_backward() != -1 or not _outside_functions()


def in_function() -> bool:
    """Returns whether the caller runs in the forward of an autograd.Function, which its backward may run again, as
    reentrant checkpointing does, or in a backward."""
    return _in_backward() != -1 or not _outside_functions()


def same_again(subject: str, decide: Callable[[], T]) -> T:
    """Returns what ``decide`` returns. In a checkpointed region that runs again it returns what this call returned in
    the region's first run. Every run of a region must make its calls about a subject in the same order."""
    decided: list[T] = []
    for region, run in _regions():
        memory = region.__dict__.setdefault(f"_lora_fast_{subject}", _Memory())
        if run is None:
            decided = decided or [decide()]
            memory.values.append(decided[0])
        else:
            decided = memory.of_later_run(run) or decided
    return decided[0] if decided else decide()


def true_again(subject: str, value: bool) -> bool:
    """Returns the value, or, in a checkpointed region that runs again, this call's value in the region's first run.
    First runs remember True alone, so calls with False, which are the usual ones, need not ask in a first run."""
    runs_again = any(run is not None for _, run in _regions())
    return same_again(subject, lambda: value and not runs_again)


@contextmanager
def unseen():
    """Hides the ops of the block from selective checkpointing, which would use their results again. That is for ops
    whose results are changed in place, and for those that a later run may leave out."""
    modes = _get_current_dispatch_mode_stack() if _modes() else []
    if any(isinstance(mode, _SELECTIVE) for mode in modes):
        with _disable_current_modes(), ExitStack() as stack:
            for mode in modes:  # the others see them
                if not isinstance(mode, _SELECTIVE):
                    stack.enter_context(mode)
            yield
    else:
        yield


class _Memory:
    """The values that the first run of a region decided, and how many of them its current later run has used."""

    def __init__(self) -> None:
        self.values: list = []
        self.run: object = None
        self.used = 0

    def of_later_run(self, run: object) -> list:
        """Returns the next value in a list, or an empty list if the first run decided no more."""
        if self.run != run:  # the graph was kept, and this is another backward
            self.run, self.used = run, 0
        self.used += 1
        return self.values[self.used - 1 : self.used]


def _regions() -> list[tuple[Any, object]]:
    """Returns the objects of all checkpointed regions that the caller runs in, each with None in the region's first run
    and with what identifies the run in a later one. Regions in their first run come last, so that an inner region which
    an outer one runs again remembers the outer one's seeds."""
    regions: list[tuple[Any, object]] = [region for pack in _pack_hooks() if (region := _region_of(pack))]
    # The region that runs again may be one whose saved tensors the ctx of a reentrant region asks for; that one has not
    # begun its own second run then.
    if _in_backward() != -1 and all(run is None for _, run in regions):
        node: Any = torch._C._current_autograd_node()
        if getattr(node, "_forward_cls", None) is _REENTRANT:
            regions.append((node, _in_backward()))
    if not _outside_functions() and not torch.is_inference_mode_enabled():
        stack: FrameType | None = sys._getframe()
        while stack is not None:
            if stack.f_code is _REENTRANT_FORWARD.__code__:
                regions.append((stack.f_locals["ctx"], None))
            stack = stack.f_back
    return sorted(regions, key=lambda region: region[1] is None)


def _pack_hooks() -> list[Callable]:
    """Returns the pack functions of all saved-tensor hooks of this thread. torch shows only those on top."""
    hooks: list[tuple] = []
    if not _hooks._saved_tensors_hooks_is_enabled():
        return []
    while pair := _top_hooks(False):
        hooks.append(pair)
        _hooks._pop_saved_tensors_default_hooks()
    for pair in reversed(hooks):
        _hooks._push_saved_tensors_default_hooks(*pair)
    return [pack for pack, _ in hooks]


def _region_of(pack: Callable) -> tuple[Any, object] | None:
    """Returns the frame in the closure of a checkpoint's pack function, with None in the first run, where the closure
    contains the frame itself, and with the function in a later run, where it contains a weak reference."""
    pack = getattr(pack, "_torchdynamo_orig_callable", pack)
    for cell in getattr(pack, "__closure__", None) or ():
        content = cell.cell_contents
        if isinstance(content, ReferenceType):
            content, run = content(), pack
        else:
            run = None
        if isinstance(content, _Frame):
            return content, run
    return None
