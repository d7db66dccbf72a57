"""Measures memory by counting the storages of tensors. The figure is the same on every device and in every run, unlike
the size of a process."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def distinct_bytes(tensors: Iterable[object]) -> int:
    """Returns the bytes of the storages behind the tensors among ``tensors``, each storage counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def parts(tensor: Tensor) -> list[Tensor]:
    """Returns the plain tensors that hold the data of a tensor: itself, unless its class is a wrapper as torchao's."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def stored(tensor: Tensor) -> list[Tensor]:
    """Returns the plain tensors that hold a parameter or buffer, with the scales that bitsandbytes keeps beside it."""
    scales = [getattr(tensor, "SCB", None)]
    state = getattr(tensor, "quant_state", None)
    while state is not None:  # the second one describes the scales, where these are quantised too
        scales += state.absmax, state.code, state.offset
        state = state.state2
    return [*parts(tensor), *(scale for scale in scales if isinstance(scale, Tensor))]


def stored_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes that hold a model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    # where the first forward of bitsandbytes' 8-bit layers moves the scales
    scales = [getattr(vars(module).get("state"), "SCB", None) for module in model.modules()]
    return distinct_bytes([*scales, *(part for tensor in tensors for part in stored(tensor))])


def elements(tensor: Tensor) -> int:
    """Returns the number of elements of a parameter before it was quantised. bitsandbytes stores two in a byte."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else math.prod(state.shape)


def weight_bytes(model: torch.nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """Returns the bytes of a model's frozen parameters and its buffers as they are stored, and the bytes that they
    would take if every frozen parameter were a plain tensor of ``dtype``."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = sum(elements(parameter) for parameter in model.parameters() if not parameter.requires_grad)
    plain = frozen * dtype.itemsize + distinct_bytes(model.buffers())
    return stored_bytes(model) - distinct_bytes(trained), plain


def _parts_in(tree: object) -> list[Tensor]:
    return [part for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) for part in parts(leaf)]


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
        given = {part.untyped_storage()._cdata for part in _parts_in((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for part in _parts_in(result):
            self._count(part.untyped_storage(), given)
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
    extra: Callable[[Any], Iterable[Tensor]] = lambda result: (),
) -> int:
    """Returns the bytes of the distinct storages that one forward call keeps for backward.

    Args:
        excluded: tensors whose storages are not counted, such as parameters.
        extra: from the forward's result, tensors that the graph keeps outside autograd's saved tensors.
    """
    known = {part.untyped_storage().data_ptr() for tensor in excluded for part in stored(tensor)}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> None:
        # No backward follows. A tensor with a grad_fn in this list would keep the graph alive for good.
        kept.extend(part.detach() for part in parts(tensor) if part.untyped_storage().data_ptr() not in known)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        result = forward()
    for tensor in extra(result):
        keep(tensor)
    return distinct_bytes(kept)


def saved_for_backward(model: torch.nn.Module, batch: dict[str, Tensor]) -> int:
    """Returns the bytes that one forward pass of a model keeps for backward, parameters and buffers not counted.

    The figure is deterministic, and the random state is restored afterwards.
    """
    device = next(model.parameters()).device
    gpus = [device] if device.type == "cuda" else []  # without a list, torch warns where there are several GPUs
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.random.fork_rng(gpus):
        weights = (*model.parameters(), *model.buffers())
        return saved_bytes(lambda: model(**batch), weights, lambda result: _attributes_of_nodes(result.loss))


def _attributes_of_nodes(result: Tensor) -> list[Tensor]:
    """Returns the tensors that the nodes of a graph keep as plain attributes, as those of bitsandbytes do."""
    assert result.grad_fn is not None, "the result was computed with gradients"
    nodes, seen = [result.grad_fn], {result.grad_fn}
    for node in nodes:  # which grows meanwhile
        following = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= following
        nodes += following
    values = tree_leaves([vars(node) for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction)])
    return [value for value in values if isinstance(value, Tensor)]
