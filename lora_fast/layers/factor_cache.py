"""The factors (a, b) of norm-bounded layers: computed for many layers at once, kept while no parameter changes.

With gradients, every call computes anew and makes one autograd node for all its layers. Without, values are kept until
a parameter changes, as its version counter and address show. They are not kept past a call with gradients, because an
optimizer may change parameters behind the counters (as ``p.data.copy_`` does); nor past ``train()`` and ``eval()``. A
layer that activation checkpointing runs again, during backward, gets the values of its first run and its own node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import cayley as cayley_op
from ..ops.cayley import Free, Values

SAVED_STATE = (
    "free_a",
    "free_b",
    "free_scale",
)  # the parameters that a layer's factors depend on; bound and power besides


@dataclass(eq=False)
class CachedFactors:
    """One layer's values, and what they were computed from.

    Attributes:
        values: a (r, d_in), b (d_out, r), Wi (r, r), scale (r,).
        sources: each parameter's memory, held so that no other tensor gets its address, and version.
        trained: computed with gradients.
    """

    values: tuple[Tensor, Tensor, Tensor, Tensor]
    sources: list[tuple[Tensor, int]]
    bound: float
    trained: bool

    def fits(self, layer) -> bool:
        """Whether the layer's parameters and bound are still those."""
        parameters = _parameters(layer)
        return self.bound == layer.bound and all(
            p.data_ptr() == memory.data_ptr() and not p.is_inference() and p._version == version
            for p, (memory, version) in zip(parameters, self.sources, strict=True)
        )


def cached_factors(layers: Sequence) -> list[tuple[Tensor, Tensor]]:
    """a (r, d_in) and b (d_out, r), the scales folded in, of each layer (with ``SAVED_STATE``, ``bound``, ``power`` and
    a place ``kept``), all on one device; differentiable where gradients are enabled and the layer trains."""
    if torch.compiler.is_compiling():
        return list(zip(*cayley_op.factors(_free(layers)), strict=True))
    grad, recomputed = torch.is_grad_enabled(), torch._C._current_graph_task_id() != -1
    trained = [grad and any(p.requires_grad for p in _parameters(layer)) for layer in layers]
    stale = [
        (layer, trains)
        for layer, trains in zip(layers, trained, strict=True)
        if not _is_valid(layer, trains, recomputed)
    ]
    if stale:
        _recompute(*zip(*stale, strict=True))
    found = [layer.kept.values[:2] for layer in layers]
    live = [i for i, trains in enumerate(trained) if trains]
    if live:
        members = [layers[i] for i in live]
        values = Values(*(list(part) for part in zip(*(layer.kept.values for layer in members), strict=True)))
        for i, *pair in zip(live, *cayley_op.attach(_free(members), values), strict=True):
            found[i] = tuple(pair)
    return found


def _is_valid(layer, trains: bool, recomputed: bool) -> bool:
    kept = layer.kept
    return kept is not None and (recomputed or not (trains or kept.trained)) and kept.fits(layer)


def _recompute(layers: Sequence, trained: Sequence[bool]) -> None:
    for layer in layers:
        layer.kept = None  # before new values take memory
    values = cayley_op.compute(_free(layers))
    for layer, trains, *own in zip(layers, trained, *values, strict=True):
        sources = [(p.detach(), -1 if p.is_inference() else p._version) for p in _parameters(layer)]
        layer.kept = CachedFactors(tuple(own), sources, layer.bound, trains)


def _parameters(layer) -> list[Tensor]:
    return [getattr(layer, name) for name in SAVED_STATE]


def _free(layers: Sequence) -> Free:
    lists = zip(*(_parameters(layer) for layer in layers), strict=True)
    return Free(*map(list, lists), [layer.bound for layer in layers], [layer.power for layer in layers])
