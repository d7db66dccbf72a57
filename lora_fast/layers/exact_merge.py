"""ExactMerge: merging for PEFT's layers with one rounding and originals that are restored bit for bit.

A fused layer has it. So has an adapted embedding that shares its weight with a fused layer (tied embeddings), because
PEFT's own merge adds to the weight and subtracts from it: the sum would be rounded, and it would be lost, or stay for
ever, where the other layer restores an original.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .hooks import offloads
from .merging import Merged, merged_parameters, unmergeable
from .terms import Term


class ExactMerge:
    """Replaces ``merge`` and ``unmerge`` of a LoRA layer of PEFT, the next base class.

    Attributes:
        shares_weight_with: names of modules of other kinds that merge into the same weight by PEFT's arithmetic, so
            that this layer does the same; empty as a rule. ``fuse_`` sets it.
    """

    shares_weight_with: str = ""
    lora_variant: Any
    merged_adapters: list[str]

    def merge_terms(self, adapter: str) -> list[tuple[nn.Parameter, Term]] | str:
        """Returns what an adapter adds to which parameters of the base layer, or why it is no sum of products."""
        raise NotImplementedError

    def scales(self, adapter: str) -> bool:
        """Returns whether an adapter scales the weight, as DoRA does."""
        return False

    def merge_scale(self, adapter: str) -> Tensor | None:
        """Returns the scale of an adapter that has one, for the weight without adapters, and keeps what PEFT's
        arithmetic needs to take it out."""
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges as PEFT does, but with one rounding: all merged adapters are added to the original weight, which is
        kept, that of a GPU in the host's memory. Where that is not possible, PEFT's own merge runs."""
        layer: Any = self
        names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in self._factors()]
        if not names:
            return
        places = self._exactly_merged().places
        is_recorded = all(name in places for name in self.merged_adapters)
        if is_recorded and self.inexact_together(names) is None:
            self.merge_exactly(names, safe_merge=safe_merge)
            return
        # Over recorded merges PEFT's is recorded, too; a bias that lora_bias changes may have no record.
        is_recorded &= not any(layer.lora_bias.get(name) for name in names)
        is_recorded &= not any(target.look() for target in merged_parameters(self._held()))
        super().merge(safe_merge, names)  # type: ignore[misc]
        if is_recorded:  # PEFT may have taken out adapters meanwhile and merged them again
            self._exactly_merged().cover(merged_parameters(self._held()), names)

    def merge_exactly(self, names: list[str], keep_originals: str | None = None, safe_merge: bool = False) -> None:
        """Merges adapters that are not merged, none of which is ``inexact``, into their weights."""

        def check(value: Tensor) -> None:
            if safe_merge and not torch.isfinite(value).all():
                raise ValueError(f"NaNs detected in the merged weights. One of {', '.join(names)} seems to be broken")

        additions: Any = {name: self.merge_terms(name) for name in names}
        for name in names:
            if (scale := self.merge_scale(name)) is not None:
                ((parameter, term),) = additions[name]
                additions[name] = [(parameter, term._replace(scale=scale))]
        self._exactly_merged().merge(additions, keep_originals, check)
        self.merged_adapters.extend(names)

    def unmerge(self, names: list[str] | None = None) -> None:
        """Restores the weight from before ``merge``, bit for bit, or, with names, as before these adapters' merge. A
        weight that others have changed since then, or that accelerate has offloaded, is restored by PEFT's arithmetic.

        Raises:
            ArgumentError: the weight was replaced or resized, or has lost its data, since then.
        """
        layer: Any = self
        merged, released = self._exactly_merged(), []
        is_recorded = all(name in merged.places for name in self.merged_adapters)
        # Offloaded after the merge: what accelerate has loaded here is the merged weight.
        if offloads(layer.get_base_layer()) or not (merged.restorable(self._held(), names) and is_recorded):
            released = merged.release()
        if self.merged_exactly:
            merged.unmerge(names)
            for name in self.merged_adapters:
                if name not in merged.places:
                    layer._caches.pop(f"{name}-weight_norm", None)  # of ``merge_scale``
            self.merged_adapters[:] = [name for name in self.merged_adapters if name in merged.places]
            return
        super().unmerge()  # type: ignore[misc]
        for target in released:
            target.seal()  # other layers' adapters may be left

    def inexact(self, adapter: str) -> str | None:
        """Returns why only PEFT's own arithmetic merges an adapter, or None if it is restored bit for bit."""
        layer: Any = self
        if self.shares_weight_with:
            return f"weight shared with {self.shares_weight_with}, which PEFT merges"
        if offloads(layer.get_base_layer()):
            return "weight offloaded by accelerate"
        terms = self.merge_terms(adapter)
        if isinstance(terms, str):
            return terms
        scales = self.scales(adapter)
        reasons = (unmergeable(parameter, _sum_shape(term), term[:2], scales) for parameter, term in terms)
        return next((reason for reason in reasons if reason), None)

    def inexact_together(self, names: list[str]) -> str | None:
        """Returns why only PEFT's own arithmetic merges these adapters, or None."""
        if len(names) > 1 and any(map(self.scales, names)):
            return "DoRA, which scales the weight, beside another active adapter"
        return next((reason for name in names if (reason := self.inexact(name))), None)

    @property
    def merged_exactly(self) -> bool:
        return bool(self._exactly_merged().places)

    def not_unmergeable(self) -> str | None:
        """Returns why the original weight cannot be restored, or None if it can."""
        if not self.merged_exactly:
            return "merged by PEFT, which keeps no original" if self.merged_adapters else "not merged"
        return self._exactly_merged().lost(self._held())

    def original_weight(self) -> Tensor | None:
        """Returns the base layer's weight without any adapter, None where it is not known: PEFT has merged and kept no
        original, or others have changed the merged weight."""
        layer: Any = self
        weight = layer.get_base_layer().weight
        if not self.merged_exactly:
            return None if self.merged_adapters else weight
        if self._exactly_merged().is_changed():
            return None
        kept = (target for target in self._exactly_merged().targets() if target.parameter is weight)
        return next((target.original.to(weight.dtype) for target in kept), None)

    def _apply(self, fn, recurse: bool = True):
        self._exactly_merged().is_changed()  # by others, before this change
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._exactly_merged().follow(fn)
        return self

    def _exactly_merged(self) -> Merged:
        """Returns the record of the layer, whose class was changed after its construction."""
        return self.__dict__.setdefault("_merged", Merged())

    def _held(self) -> list[nn.Parameter | None]:
        layer: Any = self
        return list(layer.get_base_layer()._parameters.values())

    def _factors(self) -> Any:
        """Returns the adapters' names, as a container."""
        return self.lora_A  # type: ignore[attr-defined]


class ExactLoraEmbedding(ExactMerge, lora.Embedding):
    """A ``peft.tuners.lora.Embedding`` that shares its weight with a fused layer. Its forward is PEFT's."""

    lora_embedding_A: Any
    lora_embedding_B: Any

    def merge_terms(self, adapter: str) -> list[tuple[nn.Parameter, Term]] | str:
        base: Any = self.get_base_layer()
        if adapter in self.lora_variant:
            return "adapter that is more than scaling · b a"
        a, b = self.lora_embedding_B[adapter].mT, self.lora_embedding_A[adapter].mT
        scaling = merge_scaling(self.scaling[adapter])
        if scaling is None:
            return f"scaling of type {type(self.scaling[adapter]).__name__}"
        return [(base.weight, Term(a, b, scaling))]

    def _factors(self) -> Any:
        return self.lora_embedding_A

    def _get_name(self) -> str:
        return lora.Embedding.__name__  # as PEFT prints it


def merge_scaling(scaling: Any) -> float | None:
    """Returns a scaling as a number, which waits for the device of a tensor; None where it is no single number."""
    try:
        return float(scaling)
    except (TypeError, ValueError, RuntimeError):
        return None


def _sum_shape(term: Term) -> tuple[int, int]:
    return len(term.b), term.a.shape[1]
