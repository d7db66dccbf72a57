"""Makes the ops visible to those who look at torch's calls: dispatch modes and profilers.

A dispatch mode (``torch.utils.flop_counter.FlopCounterMode``, selective checkpointing, a log of all calls) sees the
products of a layer's torch twins, but not what a kernel computes. While a mode is active, kernels therefore run within
the registered ops, unless the mode has ``looks_inside = True``, as meters of what an op itself does. A profiler gets a
range with the op's name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._C._dynamo import eval_frame
from torch._C._profiler import _RecordFunctionFast
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# Looked up once, because attribute accesses cost host time in every layer's call.
modes, profiled = torch._C._len_torch_dispatch_stack, torch.autograd._profiler_enabled
_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
P = ParamSpec("P")
R = TypeVar("R")


def sees_ops() -> bool:
    """Returns whether a mode is active that is to see the registered ops."""
    return modes() > 0 and not all(getattr(mode, "looks_inside", False) for mode in _get_current_dispatch_mode_stack())


def named(name: str) -> AbstractContextManager:
    """Returns a context that a profiler shows under this name."""
    return _RecordFunctionFast(name) if profiled() else nullcontext()


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Returns the function, which torch.compile then does not begin to compile where it is called from outside of a
    graph.

    torch.compile does not compile a call under a mode of a user. It would begin again in the functions inside, where
    the mode is hidden from the kernels, and compile those that launch them. torch.compiler.disable does the same, but
    takes a second at import and time at every call.
    """
    eval_frame.set_code_exec_strategy(function.__code__, _SKIP)
    return function


def shown(function: Callable[P, R]) -> Callable[P, R]:
    """Returns the function such that a profiler shows its calls as ``lora_fast::`` and its name."""
    name = f"lora_fast::{function.__name__}"

    @wraps(function)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        with named(name):
            return function(*args, **keywords)

    return run
