"""Computes the factors (a, b) of all norm-bounded layers in one call and caches them until a parameter changes.

With gradients, every call recomputes the values and makes one autograd node for all its layers. Without gradients,
cached values stay valid until the version counter or the address of a parameter changes. Values of a call with
gradients are not reused by later calls, because an optimizer may change parameters without their version counters (as
``p.data.copy_`` does). ``train()`` and ``eval()`` clear the cache. A layer that activation checkpointing runs again
during backward gets the values of its first run and an autograd node of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import cayley as cayley_op
from ..ops.cayley import Free, Values

SAVED_STATE = ("free_a", "free_b", "free_scale")  # a layer's factors depend on these, its bound and its power


@dataclass(eq=False)
class CachedFactors:
    """The cache of one layer.

    Attributes:
        values: a (r, d_in), b (d_out, r), Wi (r, r), scale (r,).
        sources: each parameter's memory, which is held so that no other tensor gets its address, and its version.
        bound: the layer's bound when the values were computed.
        trained: whether the values were computed for a call with gradients.
    """

    values: tuple[Tensor, Tensor, Tensor, Tensor]
    sources: list[tuple[Tensor, int]]
    bound: float
    trained: bool

    def matches(self, layer) -> bool:
        """Returns whether the layer's parameters and bound are those that the values were computed from."""
        parameters = _parameters(layer)
        return self.bound == layer.bound and all(
            p.data_ptr() == memory.data_ptr() and not p.is_inference() and p._version == version
            for p, (memory, version) in zip(parameters, self.sources, strict=True)
        )


def cached_factors(layers: Sequence) -> list[tuple[Tensor, Tensor]]:
    """Returns a (r, d_in) and b (d_out, r), with the scales folded into b, of each layer. They are differentiable where
    gradients are enabled and the layer trains.

    Args:
        layers: on one device; each has the attributes of ``SAVED_STATE``, ``bound``, ``power`` and ``cache``.
    """
    if torch.compiler.is_compiling():
        return list(zip(*cayley_op.factors(_free(layers)), strict=True))
    # The id of the running backward, or -1: a forward inside a backward is activation checkpointing's second run.
    rerun = torch._C._current_graph_task_id() != -1
    grad = torch.is_grad_enabled()
    trained = [grad and any(p.requires_grad for p in _parameters(layer)) for layer in layers]
    stale = [
        (layer, trains) for layer, trains in zip(layers, trained, strict=True) if not _is_valid(layer, trains, rerun)
    ]
    if stale:
        _recompute(*zip(*stale, strict=True))
    pairs = [layer.cache.values[:2] for layer in layers]
    indices = [i for i, trains in enumerate(trained) if trains]
    if indices:
        training = [layers[i] for i in indices]
        values = Values(*(list(part) for part in zip(*(layer.cache.values for layer in training), strict=True)))
        for i, *pair in zip(indices, *cayley_op.attach(_free(training), values), strict=True):
            pairs[i] = tuple(pair)
    return pairs


def _is_valid(layer, trains: bool, rerun: bool) -> bool:
    """Returns whether the layer's cache can be used by this call."""
    cache = layer.cache
    return cache is not None and (rerun or not (trains or cache.trained)) and cache.matches(layer)


def _recompute(layers: Sequence, trained: Sequence[bool]) -> None:
    """Computes the values of the layers and caches them."""
    for layer in layers:
        layer.cache = None  # frees the old values before the new ones are allocated
    values = cayley_op.compute(_free(layers))
    for layer, trains, *parts in zip(layers, trained, *values, strict=True):
        # An inference tensor has no version counter; -1 never matches.
        sources = [(p.detach(), -1 if p.is_inference() else p._version) for p in _parameters(layer)]
        layer.cache = CachedFactors(tuple(parts), sources, layer.bound, trains)


def _parameters(layer) -> list[Tensor]:
    return [getattr(layer, name) for name in SAVED_STATE]


def _free(layers: Sequence) -> Free:
    a, b, scales = map(list, zip(*(_parameters(layer) for layer in layers), strict=True))
    return Free(a, b, scales, [layer.bound for layer in layers], [layer.power for layer in layers])
