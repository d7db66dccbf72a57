"""Measures memory by counting the storages of tensors. The figure is the same on every device and in every run, unlike
the size of a process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def distinct_bytes(tensors: Iterable[object]) -> int:
    """Returns the bytes of the storages behind the tensors among ``tensors``, each storage counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class PeakBytes(TorchDispatchMode):
    """Counts the storages created while it is active. ``peak`` is the most bytes of them alive at once.

    It does not see what an operator allocates and frees internally, as casts within an operation on two dtypes on a
    CPU, memory of NumPy, as the dropout masks of the torch ops on a CPU, and a storage that is resized.
    """

    looks_inside = True  # of this library's ops (ops/observers.py)

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # an operator may return its argument or a view of it: that storage is not new
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage._cdata in self._known or storage._cdata in given:
            return
        self._known.add(storage._cdata)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._alive -= size


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Returns the most bytes that one call allocates beside those allocated before it.

    On CUDA the allocator counts; elsewhere ``PeakBytes`` does, which cannot look into compiled code.
    """
    if device.type != "cuda":
        with PeakBytes() as memory:
            call()
        return memory.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def saved_bytes(
    forward: Callable[[], object],
    excluded: Iterable[Tensor],
    extra: Callable[[object], Iterable[Tensor]] = lambda result: (),
) -> int:
    """Returns the bytes of the distinct storages that one forward call keeps for backward.

    Args:
        excluded: tensors whose storages are not counted, such as parameters.
        extra: from the forward's result, tensors that the graph keeps outside autograd's saved tensors.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in known:
            # No backward follows. A tensor with a grad_fn in this list would keep the graph alive for good.
            kept.append(tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        result = forward()
    return distinct_bytes([*kept, *extra(result)])


def saved_for_backward(model: torch.nn.Module, batch: dict[str, Tensor]) -> int:
    """Returns the bytes that one forward pass of a model keeps for backward, parameters and buffers not counted.

    The figure is deterministic, and the random state is restored afterwards.
    """
    device = next(model.parameters()).device
    gpus = [device] if device.type == "cuda" else []  # without a list, torch warns where there are several GPUs
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.random.fork_rng(gpus):
        return saved_bytes(lambda: model(**batch), (*model.parameters(), *model.buffers()))
