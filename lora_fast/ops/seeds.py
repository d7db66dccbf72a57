"""Seeds of random numbers. They come from where torch takes the numbers themselves, the device's default generator.

On a GPU, the seed is computed on the host from the generator's seed and offset, and the offset is advanced, so that
nothing is launched and nothing waits for the device.

A region under ``torch.utils.checkpoint`` has to draw the same seeds when it runs again. torch restores the states of
the CPU's generator and of those of the devices of the region's arguments. That is not enough where threads share the
CPU's generator (``nn.DataParallel``, autograd's thread of each device) or where a region continues on another device.
Each region therefore remembers the seeds of its first run, in an attribute of the object that torch keeps for it: the
frame of a region without reentrant autograd, which the closures of its saved-tensor hooks contain, and the ctx of a
reentrant one. The generator is advanced in every run, because other draws of the region follow ours. With a version
of torch in which these objects differ, the seed is the generator's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import ReferenceType

import torch
from torch.utils import checkpoint

SEEDS = 1 << 62
_CPU = torch.device("cpu")
_LOW = (1 << 64) - 1
_advancing = threading.Lock()
# Looked up once, because attribute accesses cost host time in every layer's call.
_hooks: Any = torch._C._autograd
_top_hooks, _in_backward, _outside_functions = (
    _hooks._top_saved_tensors_default_hooks,
    torch._C._current_graph_task_id,
    torch._C._is_fwd_grad_enabled,  # False in the forward of an autograd.Function and in inference mode alone
)
_Frame: Any = getattr(checkpoint, "_CheckpointFrame", ())
_REENTRANT = checkpoint.CheckpointFunction
_REENTRANT_FORWARD: Any = _REENTRANT.forward


def draw(device: torch.device) -> int:
    """Returns a seed, from 0 to 2⁶²-1, of the device's default generator. In a checkpointed region that runs again it
    is the seed of the region's first run. It is not for a stream that a CUDA graph captures, which would repeat it."""
    if device.type == "cuda":
        seed = from_offset(torch.cuda.default_generators[device.index])
    else:
        seed = int(torch.randint(SEEDS, (), dtype=torch.int64, device=_CPU).item())
    if _top_hooks(False) is None and _in_backward() == -1 and _outside_functions():
        return seed  # outside every checkpointed region
    for region, run in _regions():
        memory = region.__dict__.setdefault("_lora_fast_seeds", _Memory())
        seed = memory.first_run(seed) if run is None else memory.later_run(seed, run)
    return seed


def from_offset(generator: torch.Generator) -> int:
    """Returns a seed for the current offset of a GPU's generator, and advances the offset."""
    with _advancing:
        offset = generator.get_offset()
        generator.set_offset(offset + 4)  # a multiple of 4, as torch requires
    # The constants and the finaliser are those of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    z = generator.initial_seed() * 0xD1342543DE82EF95 + offset * 0x9E3779B97F4A7C15 & _LOW
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _LOW
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _LOW
    return (z ^ z >> 31) >> 2


class _Memory:
    """The seeds that the first run of a region drew, and how many of them its current later run has used."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.run: object = None
        self.used = 0

    def first_run(self, seed: int) -> int:
        self.seeds.append(seed)
        return seed

    def later_run(self, seed: int, run: object) -> int:
        if self.run != run:  # the graph was kept, and this is another backward
            self.run, self.used = run, 0
        self.used += 1
        return self.seeds[self.used - 1] if self.used <= len(self.seeds) else seed


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
