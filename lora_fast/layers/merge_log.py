"""Records which frozen weights training has changed and, on request, the terms that were added to them.

After a merge during training, W += b diag(residual_scale) a (ScaLoRA), the adapter no longer describes the model by
itself. A mark on the module that holds the weight records that the weight has changed. The adapter's layer (the same
module, or PEFT's layer around it) holds the terms. PEFT's ``merge_and_unload`` removes the adapter layer and with it
the terms, which would be incomplete anyway; the mark on the base layer stays. Both survive deepcopy, pickle and
``torch.save(model)``; neither is in a ``state_dict``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import checks
from ..kernels.records import Scaled
from ..ops.pairs import lost_terms

KEEP = ("weights", "terms")
MARK, TERMS = "changed_base", "changed_by"  # attributes of the weight's holder and of the adapter's layer

Term = tuple[Tensor, Tensor]  # b diag(residual_scale) (d_out, r), a (r, d_in)


@dataclass
class Terms:
    """The terms of every merge into one weight, in order, on the CPU."""

    terms: list[Term]
    _copying_from: set[torch.device] = field(default_factory=set)

    def add(self, terms: list[Term]) -> None:
        """Appends terms. Copies from a GPU go into pinned memory asynchronously. Another thread may call ``arrived``
        meanwhile: a device is noted before its terms are appended, and never removed."""
        for b, a in terms:
            if b.is_cuda:
                self._copying_from.add(b.device)
            # Copies also from the CPU.
            self.terms.append((b.to("cpu", non_blocking=True, copy=True), a.to("cpu", non_blocking=True, copy=True)))

    def arrived(self) -> list[Term]:
        """Returns the terms up to now after waiting for their copies."""
        terms = list(self.terms)
        for device in tuple(self._copying_from):
            torch.cuda.synchronize(device)
        return terms

    def __getstate__(self) -> dict:  # deepcopy and pickle read the terms
        return {"terms": self.arrived(), "_copying_from": set()}


def holder(layer: nn.Module) -> nn.Module:
    """Returns the module that holds the layer's frozen weight: PEFT's base layer, or the layer itself."""
    get_base_layer = getattr(layer, "get_base_layer", None)
    return layer if get_base_layer is None else get_base_layer()


def is_changed(module: nn.Module) -> bool:
    """Returns whether the module is marked: its own weight has changed."""
    return MARK in module.__dict__


def kept_terms(layer: nn.Module) -> list[Term] | None:
    """Returns all terms that were added to the layer's changed weight; None if they were not all kept."""
    return getattr(layer, TERMS).arrived() if TERMS in layer.__dict__ else None


def mark(layer: nn.Module, terms: list[Term] | None = None) -> None:
    """Marks the layer's frozen weight as changed, by these terms, or, with None, by terms that were not all kept."""
    setattr(holder(layer), MARK, True)
    layer.__dict__.pop(TERMS, None)
    if terms is not None:
        setattr(layer, TERMS, Terms(terms))


@torch.no_grad()
def record(
    layer: nn.Module | None,
    a: Tensor,
    b: Tensor,
    residual_scale: Tensor,
    keep: str = "weights",
    scaled: Scaled | None = None,
) -> None:
    """Records that b diag(residual_scale) a is added to the layer's frozen weight, or, with ``scaled``, what a product
    of 16-bit factors loses by that scaling (``scalora_solution.lost_terms``).

    It must be called at every merge, before or after it, with the a and b of that product. With ``keep="weights"`` it
    launches nothing on a device, so that a CUDA graph may capture the merge. Terms are kept as long as every merge into
    this weight has kept them.

    Args:
        layer: the adapter's layer (``Pair.layer``). None, for a pair of bare tensors, records nothing.
        a: (r, d_in). b: (d_out, r). residual_scale: (r,). scaled: of this pair.
        keep: "weights" records only the mark; the weight is then saved whole. "terms" also keeps the term in the CPU's
            memory, r (d_out + d_in) numbers a merge, or twice as many for 16-bit factors. Terms restore a 16-bit weight
            only to its rounding.

    Raises:
        ArgumentError: ``keep="terms"`` while a CUDA graph is captured, whose replays run no Python and would not be
            recorded.
    """
    assert keep in KEEP, keep
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
        getattr(layer, TERMS).add(lost_terms(a, b, residual_scale, scaled))
