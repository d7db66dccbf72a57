"""Makes the ops visible to those who look at torch's calls: dispatch modes and profilers.

A dispatch mode (``torch.utils.flop_counter.FlopCounterMode``, selective checkpointing, a log of all calls) sees the
products of a layer's torch twins, but not what a kernel computes. While a mode is active, kernels therefore run within
the registered ops. A profiler gets a range with the op's name.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C._profiler import _RecordFunctionFast

# Looked up once, because attribute accesses cost host time in every layer's call.
modes, profiled = torch._C._len_torch_dispatch_stack, torch.autograd._profiler_enabled


def named(name: str) -> AbstractContextManager:
    """Returns a context that a profiler shows under this name."""
    return _RecordFunctionFast(name) if profiled() else nullcontext()
