"""Tells which layers are computed together, and makes the layers that can be siblings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import checks
from ..layers.fallback import Fallback
from ..layers.find import adapter_layers, is_of_parameter
from ..layers.groups import Siblings
from .change_report import Report


@dataclass
class GroupReport(Report):
    """The result of ``groups``.

    Attributes:
        groups: the names of the layers of each group, in the order in which they were called.
    """

    groups: list[tuple[str, ...]] = field(default_factory=list)


def groups(model: nn.Module) -> GroupReport:
    """Returns the groups that the model's calls so far have shown: layers of one parent that were called with the same
    tensor, as q, k and v of an attention. A group is computed as one op (``lora_linear_group``) once a backward has
    shown that all of it take part, and without gradients from the second call on.

    Args:
        model: any module with adapter layers, after ``inject_`` or ``fuse_`` and a call.

    Returns:
        The layers in groups, and the reasons of all others.

    Raises:
        ArgumentError: not a module.
    """
    layers = adapter_layers(checks.module(model))
    names: dict[int, str] = {}
    for name, layer in layers.items():
        names.setdefault(id(layer), name)
    report = GroupReport("grouped")
    known = dict.fromkeys(getattr(layer, "siblings", None) for layer in layers.values())
    for siblings in filter(None, known):
        for members in siblings.met_groups():
            if all(id(layer) in names for layer in members):
                report.groups.append(tuple(names[id(layer)] for layer in members))
    for group in report.groups:
        report.changed |= {name: f"with {', '.join(other for other in group if other != name)}" for name in group}
    report.left = {name: _alone(layer) for name, layer in layers.items() if names[id(layer)] not in report.changed}
    sizes = Counter(map(len, report.groups))
    report.note = ", ".join(
        f"{count} group{'s' * (count > 1)} of {size}" for size, count in sorted(sizes.items(), reverse=True)
    )
    return report


def _alone(layer: Any) -> str:
    """Returns why a layer is in no group."""
    if not isinstance(layer, Fallback):
        return "not fused"
    if is_of_parameter(layer):
        return f"adapter of the parameter {layer.parameter_name!r}"
    if not layer.takes_siblings:
        return f"factors of a {type(layer).__name__}, which are computed"
    if layer.has_own_op:
        return "DoRA, of which each layer has an op of its own"
    if layer.siblings is None:
        return "group=False, or the only one of its parent"
    if id(layer) in layer.siblings.unfit:
        return "its calls do not follow those of the others as expected"
    return "its input is no other layer's" if layer.siblings.groups else "not called yet"


def pair_(model: nn.Module, layers: Collection[Any]) -> None:
    """Makes those of the layers siblings that are children of one module; with those, too, that already are."""
    for parent in model.modules():
        children = [child for child in parent.children() if isinstance(child, Fallback) and child.takes_siblings]
        new = [child for child in children if child in layers and child.siblings is None]
        if new and len(children) > 1:
            known = _siblings_of(children)
            for child in new:
                child.siblings = known


def _siblings_of(children: Iterable[Any]) -> Siblings:
    return next((child.siblings for child in children if child.siblings is not None), None) or Siblings()
