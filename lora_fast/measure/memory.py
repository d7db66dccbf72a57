"""Memory by counting tensors' storages: the same figure on every device and in every run, unlike a process's size."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def distinct_bytes(tensors: Iterable[object]) -> int:
    """Bytes of the storages behind the tensors among ``tensors``, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class PeakBytes(TorchDispatchMode):
    """The most bytes that were alive at once of all storages made while it is open: ``peak``. What an operation
    allocates and frees inside itself is not seen."""

    def __init__(self):
        super().__init__()
        self.peak = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
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


def saved_for_backward(model: torch.nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes of all distinct storages that one forward pass keeps for backward, the model's own tensors not counted.

    Deterministic. Leaves the random state as it was.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> None:  # no backward follows; a hook's own tensor may keep the graph alive for good
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.detach())

    device = next(model.parameters()).device
    gpus = [device] if device.type == "cuda" else []  # of several others, unasked, it would warn
    with torch.random.fork_rng(gpus), torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        model(**{name: tensor.to(device) for name, tensor in batch.items()})
    return distinct_bytes(kept)
