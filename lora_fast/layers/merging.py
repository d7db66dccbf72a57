"""Merges adapters into parameters and takes them out again, bit for bit and in any order.

Several layers may hold one parameter (tied embeddings, replicated layers), and several adapters may be merged into it.
A ``MergedParameter`` therefore belongs to the parameter: it keeps the parameter's original values and the term of every
adapter that is merged. The parameter's values are always computed from both, with one rounding, so that they do not
depend on the order in which adapters were merged and taken out.

Others may change a parameter while it is merged: PEFT's own arithmetic in a layer that is not fused, an optimizer,
``load_state_dict``. Its original is then out of date. A fingerprint of the values that were set here shows such a
change, however it was made (``_version`` does not count changes of ``.data``). From then on adapters are subtracted, as
PEFT does.

Each merged layer holds its ``MergedParameter`` objects; the parameter knows nothing of them, and ``_known`` finds the
object of a parameter without keeping it alive. Copies and pickles of a merged model have copies of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks
from ..kernels.grouping import group_by
from .terms import Term, fingerprint, merged_weight, without_terms

KEEP_ORIGINALS = ("host", "device")
CHANGED = "weight changed by others while it was merged"


class Key:
    """The identity of one merged adapter within a ``MergedParameter``, which deepcopy and pickle preserve."""


class MergedParameter:
    """A parameter with everything that is merged into it.

    Attributes:
        parameter: (d_out, d_in) or (d_out,).
        original: the parameter's values without any adapter, in the host's memory or on the parameter's device.
        terms: the merged adapters' terms as they were when they were merged; None for one that PEFT's arithmetic has
            merged over them.
        is_changed: whether others have changed the parameter's values, as ``look`` has found.
    """

    is_changed = False
    _seal: tuple[torch.dtype, Tensor] | None = None  # dtype and fingerprint of the values that were set here

    def __init__(self, parameter: nn.Parameter):
        self.parameter, self.original = parameter, parameter.data
        self.terms: dict[Key, Term | None] = {}

    @staticmethod
    def of(parameter: nn.Parameter) -> MergedParameter:
        """Returns the object of the parameter, a new one where nothing is merged."""
        known = _known.get(id(parameter))
        return known if known is not None and known.parameter is parameter else MergedParameter(parameter)

    def sum(self, terms: Iterable[Term]) -> Tensor:
        """Returns the original plus the terms, in the parameter's present dtype and on its present device."""
        return merged_weight(self.unmerged(), terms)

    def unmerged(self) -> Tensor:
        """Returns the original in the parameter's present dtype and on its present device."""
        return self.original.to(self.parameter.device, self.parameter.dtype, non_blocking=True)

    def look(self) -> bool:
        """Returns whether others have changed the parameter's values since they were set here. Another dtype is that of
        a conversion, which ``follow`` follows."""
        is_readable = unmergeable_parameter(self.parameter) is None
        if self._seal is not None and is_readable and self.parameter.dtype is self._seal[0]:
            seal = self._seal[1]
            self.is_changed |= not torch.equal(fingerprint(self.parameter.data).to(seal.device), seal)
        return self.is_changed

    def seal(self) -> None:
        """Takes the parameter's present values as set here."""
        is_readable = bool(self.terms) and unmergeable_parameter(self.parameter) is None
        self._seal = (self.parameter.dtype, fingerprint(self.parameter.data)) if is_readable else None

    def restorable(self, keys: Container[Key] = ()) -> bool:
        """Returns whether the values without some adapters are known: others have not changed the present ones, and
        what is left are terms."""
        return not self.look() and all(term is not None for key, term in self.terms.items() if key not in keys)

    def add(self, terms: list[Term], value: Tensor, keep_originals: str) -> list[Key]:
        """Merges adapters. ``value`` is the sum of all terms, the present ones and these."""
        if not self.terms and keep_originals == "host" and is_on_accelerator(self.original):
            self.original = to_host(self.original)
        elif not self.terms and self._is_shared():
            self.original = self.original.clone()
        added: dict[Key, Term | None] = {Key(): term.copied() for term in terms}
        self.set(self.terms | added, value)
        return list(added)

    def without(self, keys: set[Key]) -> tuple[dict[Key, Term | None], Tensor]:
        """Returns the terms that are left when some adapters are taken out, and the parameter's values then."""
        left = {key: term for key, term in self.terms.items() if key not in keys}
        return left, self.sum(filter(None, left.values())) if left else self.unmerged()

    def set(self, terms: dict[Key, Term | None], value: Tensor) -> None:
        """Sets the merged terms and the parameter's values."""
        if self._is_shared():
            self.parameter.data.copy_(value)
        else:  # assigning .data keeps the parameter's identity, on which optimizers rely
            self.parameter.data = value
        self.terms = terms
        if terms:
            _known[id(self.parameter)] = self
        else:
            _known.pop(id(self.parameter), None)
        self.seal()

    def _is_shared(self) -> bool:
        """Returns whether other processes may read the parameter's memory (``model.share_memory()``), so that new
        values belong there."""
        return self.parameter.is_cpu and self.parameter.is_shared()

    def follow(self, apply: Callable[[Tensor], Tensor]) -> None:
        """Changes the original's dtype as nn.Module's conversions have changed the parameter's. Its place stays, so
        that moving a model to a GPU does not move originals there."""
        self.original = self.original.to(apply(self.original.new_empty(0)).dtype)
        self.seal()

    def __setstate__(self, state: dict[str, Any]) -> None:  # deepcopy and pickle
        self.__dict__.update(state)
        _known[id(self.parameter)] = self


# id of a parameter → its object, which holds the parameter, so that no other one gets the id.
_known: weakref.WeakValueDictionary[int, MergedParameter] = weakref.WeakValueDictionary()


class Merged:
    """The adapters that a layer has merged.

    Attributes:
        places: name of an adapter → the parameters that it is merged into, and its keys there.
        keep_originals: where the last merge kept the originals.
    """

    def __init__(self) -> None:
        self.places: dict[str, list[tuple[MergedParameter, Key]]] = {}
        self.keep_originals = "host"

    @torch.inference_mode(False)  # else a later forward could not save the merged weight for its backward pass
    def merge(
        self,
        additions: dict[str, list[tuple[nn.Parameter, Term]]],
        keep_originals: str | None = None,
        check: Callable[[Tensor], None] = lambda value: None,
    ) -> None:
        """Merges adapters into their parameters. Every sum is computed, and given to ``check``, before the first
        parameter changes."""
        self.keep_originals = keep_originals or self.keep_originals
        rows = [(name, parameter, term) for name, pairs in additions.items() for parameter, term in pairs]
        sums = []
        for group in group_by(rows, lambda row: id(row[1])).values():
            target, terms = MergedParameter.of(group[0][1]), [term for _, _, term in group]
            value = target.sum([*filter(None, target.terms.values()), *terms])
            check(value)
            sums.append((target, [name for name, _, _ in group], terms, value))
        for target, names, terms, value in sums:
            for name, key in zip(names, target.add(terms, value, self.keep_originals), strict=True):
                self.places.setdefault(name, []).append((target, key))

    def restorable(self, parameters: Iterable[Tensor | None], names: Iterable[str] | None = None) -> bool:
        """Returns whether ``unmerge`` gives the parameters' values without these adapters, all by default. Otherwise
        they are to be subtracted.

        Args:
            parameters: those that the layer holds now.

        Raises:
            ArgumentError: the layer holds another parameter than the one merged into, or one without data or of another
                shape.
        """
        if reason := self.lost(parameters):
            raise checks.ArgumentError("weight", "the parameter that the adapter was merged into", reason)
        return all(target.restorable(keys) for target, keys in self._keys(names))

    @torch.inference_mode(False)
    def unmerge(self, names: Iterable[str] | None = None) -> None:
        """Takes adapters out of the parameters, all of them by default, where that is ``restorable``."""
        names = list(self.places if names is None else names)
        results = [(target, target.without(keys)) for target, keys in self._keys(names)]
        for target, (left, value) in results:
            target.set(left, value)
        for name in names:
            del self.places[name]

    @torch.inference_mode(False)
    def subtract(self, term: Term) -> None:
        """Takes the one adapter of a layer out of its parameter by subtracting its present term, as PEFT does."""
        (target,) = self.targets()
        value = without_terms(target.parameter.data, [self._with_scale(term)])
        self.release()
        target.set(target.terms, value)

    def release(self) -> list[MergedParameter]:
        """Removes the adapters from the records of their parameters, which it returns, and does not change values:
        whoever calls it subtracts the adapters."""
        rows = self._keys()
        for target, keys in rows:
            target.set({key: term for key, term in target.terms.items() if key not in keys}, target.parameter.data)
        self.places.clear()
        return [target for target, _ in rows]

    def cover(self, targets: list[MergedParameter], names: list[str]) -> None:
        """Records adapters that PEFT's arithmetic has merged over what is merged into these parameters. The originals
        come back when all are taken out."""
        for target in targets:
            keys = {name: Key() for name in names}
            target.set(target.terms | dict.fromkeys(keys.values()), target.parameter.data)
            for name, key in keys.items():
                self.places.setdefault(name, []).append((target, key))

    def estimate(self, term: Term) -> Tensor:
        """Returns the values of the parameter of a layer with one adapter without any adapter, where others have
        changed them: all terms are subtracted, of the layer's own adapter the present one."""
        ((target, keys),) = self._keys()
        others = [other for key, other in target.terms.items() if other is not None and key not in keys]
        return without_terms(target.parameter.data, [self._with_scale(term), *others])

    def _with_scale(self, term: Term) -> Term:
        """Returns the present term of a layer with one adapter, with the scale by which it was merged."""
        ((target, key),) = self.places[""]
        merged = target.terms[key]
        return term if merged is None else term._replace(scale=merged.scale)

    def is_changed(self) -> bool:
        """Returns whether others have changed a parameter while it was merged."""
        return any([target.look() for target in self.targets()])

    def forget(self) -> None:
        """Forgets the originals: what is merged stays merged."""
        self.places.clear()

    def lost(self, parameters: Iterable[Tensor | None]) -> str | None:
        """Returns why the adapters cannot be taken out of the parameters that the layer holds now, or None."""
        held = {id(parameter) for parameter in parameters}
        return next((reason for target in self.targets() if (reason := lost(target, held))), None)

    def targets(self) -> list[MergedParameter]:
        """Returns the parameters that the layer's adapters are merged into."""
        return [target for target, _ in self._keys()]

    def _keys(self, names: Iterable[str] | None = None) -> list[tuple[MergedParameter, set[Key]]]:
        """Returns the parameters that adapters are merged into, all by default, each with the adapters' keys there."""
        rows = [place for name in (self.places if names is None else names) for place in self.places[name]]
        groups = group_by(rows, lambda place: id(place[0])).values()
        return [(group[0][0], {key for _, key in group}) for group in groups]

    def follow(self, apply: Callable[[Tensor], Tensor]) -> None:
        """Changes the originals as ``apply``, of ``nn.Module._apply``, has changed the parameters."""
        for target in self.targets():
            target.follow(apply)


def lost(target: MergedParameter, held: set[int]) -> str | None:
    """Returns why the original cannot be restored: the ids of the parameters that the layer holds do not include the
    target's, or the target has no data or another shape."""
    if id(target.parameter) not in held:
        return "weight replaced or offloaded while it was merged"
    shapes = tuple(target.parameter.shape), tuple(target.original.shape)
    resized = f"weight of shape {shapes[0]} in place of {shapes[1]}, resized while it was merged"
    return unmergeable_parameter(target.parameter) or (resized if shapes[0] != shapes[1] else None)


def merged_parameters(parameters: Iterable[Tensor | None]) -> list[MergedParameter]:
    """Returns the objects of those parameters into which something is merged."""
    known = [_known.get(id(parameter)) for parameter in parameters]
    return [target for target in known if target is not None]


def unmergeable_parameter(parameter: Tensor | None) -> str | None:
    """Returns why nothing can be merged into a parameter, or None if something can."""
    if parameter is None:
        return "weight that is no parameter of its layer (sharded or computed)"
    if type(parameter) is not nn.Parameter:
        return f"weight of type {type(parameter).__name__}, not a plain parameter (sharded or quantised)"
    if parameter.dtype not in checks.FLOATS:
        return f"weight of dtype {parameter.dtype}"
    if parameter.is_meta or parameter.numel() == 0:
        return f"weight without its data on {parameter.device} (offloaded, sharded or not loaded)"
    if parameter.is_inference():
        return "weight made under torch.inference_mode"
    return None


def unmergeable(
    parameter: Tensor | None, shape: tuple[int, int], factors: Iterable[Tensor], scales: bool = False
) -> str | None:  # fmt: skip
    """Returns why an adapter cannot be merged into a weight of this shape, or None if it can.

    Args:
        factors: what is trained of the adapter.
        scales: whether it scales the weight, as DoRA does.
    """
    if reason := unmergeable_parameter(parameter):
        return reason
    assert parameter is not None
    if (len(parameter), parameter.numel() // len(parameter)) != shape:  # a vector has one column
        return f"weight of shape {tuple(parameter.shape)} in place of {shape} (sharded)"
    for factor in factors:
        if type(factor) not in checks.PLAIN or factor.device != parameter.device:
            got = f"{type(factor).__name__} on {factor.device}"
            return f"adapter that is a {got}, not a plain tensor on the weight's device {parameter.device}"
    target = MergedParameter.of(cast(nn.Parameter, parameter))
    if not target.restorable():
        return CHANGED if target.is_changed else "weight into which PEFT has merged another adapter"
    if target.terms and (scales or any(term.scale is not None for term in target.terms.values() if term)):
        return "DoRA, which scales the weight, beside another merged adapter"
    return None


def is_on_accelerator(tensor: Tensor) -> bool:
    """Returns whether the tensor is in another memory than the host's."""
    return tensor.device.type != "cpu"


def to_host(tensor: Tensor) -> Tensor:
    """Returns a copy in the host's memory, pinned where the host can pin as much."""
    try:
        kept = torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError:
        kept = torch.empty_like(tensor, device="cpu")
    return kept.copy_(tensor)
