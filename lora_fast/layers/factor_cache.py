"""Computes the factors (a, b) of all norm-bounded layers in one call and caches them until a parameter changes.

With gradients, every call recomputes the values and makes one autograd node for all its layers. Without gradients,
cached values stay valid on their stream until a parameter changes. On a CPU the parameters' values are compared.
Elsewhere, where that would wait for the device, their version counters and addresses are, which ``p.data.copy_`` does
not change. Values of a call with gradients are not reused by later calls, because an optimizer may change parameters in
that way. ``train()`` and ``eval()`` clear the cache. A layer that activation checkpointing runs again during backward
gets the values of its first run and an autograd node of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import device
from ..ops import cayley as cayley_op
from ..ops import composite
from ..ops.cayley import Free, Values
from ..regions import unseen

SAVED_STATE = ("free_a", "free_b", "free_scale")  # a layer's factors depend on these, its bound and its power


@dataclass(eq=False)
class CachedFactors:
    """The cache of one layer.

    Attributes:
        values: a (r, d_in), b (d_out, r), Wi (r, r), scale (r,).
        sources: each parameter's memory, which is held so that no other tensor gets its address, and its version. On a
            CPU it is a copy.
        bound: the layer's ``applied_bound`` when the values were computed. It depends on autocast, too.
        trained: whether the values were computed for a call with gradients.
        stream: the stream on which they were computed. They may not be there yet for a call on another one.
    """

    values: tuple[Tensor, ...]
    sources: list[tuple[Tensor, int]]
    bound: float
    trained: bool
    stream: int

    def matches(self, layer) -> bool:
        """Returns whether the layer's parameters and bound are those that the values were computed from, on the current
        stream."""
        parameters = _parameters(layer)
        current = self.bound == layer.applied_bound and self.stream == device.stream_on(parameters[0].device)
        return current and all(_is_same(p, *source) for p, source in zip(parameters, self.sources, strict=True))


def _is_same(parameter: Tensor, memory: Tensor, version: int) -> bool:
    """Returns whether the parameter has the values of a cache's source."""
    if parameter.is_cpu:
        with unseen():
            return parameter.dtype is memory.dtype and memory.is_cpu and torch.equal(parameter, memory)
    is_counted = not parameter.is_inference() and parameter._version == version
    return is_counted and parameter.data_ptr() == memory.data_ptr()


def cached_factors(layers: Sequence) -> list[tuple[Tensor, Tensor]]:
    """Returns a (r, d_in) and b (d_out, r), with the scales folded into b, of each layer. They are differentiable where
    gradients are enabled and the layer trains.

    Args:
        layers: on one device; each has the attributes of ``SAVED_STATE``, ``applied_bound``, ``power`` and ``cache``.
    """
    parameters = [p for layer in layers for p in _parameters(layer)]
    if torch.compiler.is_compiling() or composite.reason_for_parameters(parameters) is not None:
        return list(zip(*cayley_op.factors(_free(layers)), strict=True))
    # The id of the running backward, or -1: a forward inside a backward is activation checkpointing's second run.
    rerun = torch._C._current_graph_task_id() != -1
    grad = torch.is_grad_enabled()
    trained = [grad and any(p.requires_grad for p in _parameters(layer)) for layer in layers]
    # Each cache is read once: another thread may replace it at any time.
    valid = [_valid_cache(layer, trains, rerun) for layer, trains in zip(layers, trained, strict=True)]
    stale = [i for i, cache in enumerate(valid) if cache is None]
    computed = iter(_recompute([layers[i] for i in stale], [trained[i] for i in stale]) if stale else ())
    caches = [cache or next(computed) for cache in valid]
    pairs: list[tuple[Tensor, Tensor]] = [(cache.values[0], cache.values[1]) for cache in caches]
    indices = [i for i, trains in enumerate(trained) if trains]
    if indices:
        values = Values(*(list(part) for part in zip(*(caches[i].values for i in indices), strict=True)))
        for i, a, b in zip(indices, *cayley_op.attach(_free([layers[i] for i in indices]), values), strict=True):
            pairs[i] = a, b
    return pairs


def _valid_cache(layer, trains: bool, rerun: bool) -> CachedFactors | None:
    """Returns the layer's cache if this call can use it."""
    cache = layer.cache
    return cache if cache is not None and (rerun or not (trains or cache.trained)) and cache.matches(layer) else None


def _recompute(layers: Sequence, trained: Sequence[bool]) -> list[CachedFactors]:
    """Computes the values of the layers and caches them."""
    for layer in layers:
        layer.cache = None  # frees the old values before the new ones are allocated
    free, stream = _free(layers), device.stream_on(layers[0].free_a.device)
    # Versions are read before the values are computed: a change by another thread after this makes the cache invalid.
    # An inference tensor has no version counter; -1 never matches.
    sources = [[_source(p) for p in _parameters(layer)] for layer in layers]
    rows = zip(zip(*cayley_op.compute(free), strict=True), sources, free.bounds, trained, strict=True)
    caches = [CachedFactors(values, source, bound, trains, stream) for values, source, bound, trains in rows]
    for layer, cache in zip(layers, caches, strict=True):
        layer.cache = cache
    return caches


def _source(parameter: Tensor) -> tuple[Tensor, int]:
    with unseen():
        memory = parameter.detach().clone() if parameter.is_cpu else parameter.detach()
    return memory, -1 if parameter.is_inference() else parameter._version


def _parameters(layer) -> list[Tensor]:
    return [getattr(layer, name) for name in SAVED_STATE]


def _free(layers: Sequence) -> Free:
    a, b, scales = map(list, zip(*(_parameters(layer) for layer in layers), strict=True))
    return Free(a, b, scales, [layer.applied_bound for layer in layers], [layer.power for layer in layers])
