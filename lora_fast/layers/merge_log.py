"""Frozen weights that training has changed: which ones, and, if that was asked for, what was added to them.

A merge during training, W += b diag(rest) a (ScaLoRA), leaves an adapter that no longer describes the model by itself.
The module that holds the weight remembers that it has changed; the adapter's layer (the same module, or PEFT's around
it) remembers by which terms. So PEFT's ``merge_and_unload`` takes the terms away, which then no longer tell all, and
leaves the fact. Both go through deepcopy, pickle and ``torch.save(model)``; no ``state_dict`` shows them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import checks

KEEP = ("weights", "terms")
FACT, TERMS = "changed_base", "changed_by"  # attributes of the weight's holder, of the adapter's layer

Term = tuple[Tensor, Tensor]  # b diag(rest) (d_out, r), a (r, d_in)


@dataclass
class Terms:
    """What every merge into one weight has added, in order, on the CPU."""

    terms: list[Term]
    _copying_from: set[torch.device] = field(default_factory=set)

    def add(self, a: Tensor, b: Tensor, rest: Tensor) -> None:
        """One more. From a GPU the copies go into pinned memory and are not waited for."""
        if b.is_cuda:
            self._copying_from.add(b.device)
        kept_b = (b * rest).to("cpu", b.dtype, non_blocking=True)
        self.terms.append((kept_b, a.to("cpu", non_blocking=True, copy=True)))

    def arrived(self) -> list[Term]:
        """``terms``, once all copies are there."""
        for device in self._copying_from:
            torch.cuda.synchronize(device)
        self._copying_from.clear()
        return self.terms

    def __getstate__(self) -> dict:  # deepcopy and pickle read the terms
        return {"terms": self.arrived(), "_copying_from": set()}


def holder(layer: nn.Module) -> nn.Module:
    """The module whose own parameter the layer's frozen weight is: inside a PEFT layer, else itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def is_changed(module: nn.Module) -> bool:
    """Whether the module's own weight has changed."""
    return FACT in module.__dict__


def kept_terms(layer: nn.Module) -> list[Term] | None:
    """All that was added to the layer's changed weight; None: only the weight itself can tell what it has become."""
    return getattr(layer, TERMS).arrived() if TERMS in layer.__dict__ else None


def mark(layer: nn.Module, terms: list[Term] | None = None) -> None:
    """Note that the layer's frozen weight has changed: by these terms, or, with None, as only it can tell."""
    setattr(holder(layer), FACT, True)
    layer.__dict__.pop(TERMS, None)
    if terms is not None:
        setattr(layer, TERMS, Terms(terms))


@torch.no_grad()
def record(layer: nn.Module | None, a: Tensor, b: Tensor, rest: Tensor, keep: str = "weights") -> None:
    """Note that the layer's frozen weight is about to get, or just got, b diag(rest) a; a and b as in that product.

    Call it at every merge. With ``keep="weights"`` only the first call does anything, on no device, so a CUDA graph may
    capture the merge. Terms are kept as long as every merge into this weight kept them.

    Args:
        layer: the adapter's layer (``Pair.layer``); None (a pair of bare tensors) has nowhere to note it.
        a: (r, d_in). b: (d_out, r). rest: (r,).
        keep: "weights": nothing but the fact: the weight is saved whole. "terms": (b diag(rest), a) too, in the
            adapter's dtype and the CPU's memory: r (d_out + d_in) numbers a merge. They give back a 16-bit weight only
            to its rounding.

    Raises:
        ArgumentError: terms while a CUDA graph is captured: its replays run no Python and would go unrecorded.
    """
    checks.choice(keep, "keep", KEEP)
    if layer is None:
        return
    if keep == "terms" and a.is_cuda and torch.cuda.is_current_stream_capturing():
        raise checks.ArgumentError("keep", "'weights' in a CUDA graph (a replay cannot keep terms)", "'terms'")
    if keep == "weights":
        mark(layer)
        return
    if not is_changed(holder(layer)):
        mark(layer, [])
    if TERMS in layer.__dict__:
        getattr(layer, TERMS).add(a, b, rest)
