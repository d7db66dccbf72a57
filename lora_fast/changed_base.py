"""Frozen weights that training has changed: which layers, and, if that was asked for, what was added to them.

A merge during training, W += b diag(rest) a (ScaLoRA), leaves an adapter that no longer describes the model by itself.
The module that holds the weight remembers it, through deepcopy, pickle and ``torch.save(model)``; its ``state_dict``
stays as it was. What is saved of it: checkpoint.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import checks

KEEP = ("weights", "terms")
ATTRIBUTE = "changed_base"  # of the module that holds the weight

Term = tuple[Tensor, Tensor]  # b diag(rest) (d_out, r), a (r, d_in)


@dataclass
class ChangedBase:
    """What one module knows of its changed weight.

    Attributes:
        terms: what each merge added, in order, on the CPU; None where a merge was not kept, so that only the weight
            itself can tell what it has become.
    """

    terms: list[Term] | None = None
    _copying_from: set[torch.device] = field(default_factory=set)

    def add(self, a: Tensor, b: Tensor, rest: Tensor) -> None:
        """Keep a term. From a GPU the copies go into pinned memory and are not waited for."""
        if b.is_cuda:
            self._copying_from.add(b.device)
        kept_b = (b * rest).to("cpu", b.dtype, non_blocking=True)
        self.terms.append((kept_b, a.to("cpu", non_blocking=True, copy=True)))

    def kept(self) -> list[Term] | None:
        """``terms``, once they have arrived."""
        for device in self._copying_from:
            torch.cuda.synchronize(device)
        self._copying_from.clear()
        return self.terms

    def __getstate__(self) -> dict:  # deepcopy and pickle read the terms
        return {"terms": self.kept(), "_copying_from": set()}


def of(module: nn.Module) -> ChangedBase | None:
    """What is known of the module's own weight; None: unchanged."""
    return getattr(module, ATTRIBUTE, None)


def mark(module: nn.Module, terms: list[Term] | None = None) -> None:
    """Note that the module's own weight has changed, by these terms or, with None, in a way that it alone can tell."""
    setattr(module, ATTRIBUTE, ChangedBase(terms))


@torch.no_grad()
def record(layer: nn.Module | None, a: Tensor, b: Tensor, rest: Tensor, keep: str = "weights") -> None:
    """Note that ``layer.weight += b diag(rest) a`` is about to happen, or just has; a and b as in that product.

    Call it at every merge. With ``keep="weights"`` only the first call does anything, on no device, so a CUDA graph may
    capture the merge. Terms are kept as long as every merge into this weight kept them.

    Args:
        layer: the module that holds the weight (``Pair.layer``); None (a pair of bare tensors) has nowhere to note it.
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
    if of(layer) is None:
        mark(layer, [] if keep == "terms" else None)
    known = of(layer)
    if keep == "weights":
        known.terms = None
    elif known.terms is not None:
        known.add(a, b, rest)
