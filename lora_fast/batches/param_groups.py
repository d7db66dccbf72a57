"""The parameters of an optimizer's groups: their names, their checks, and LoRAPlus's groups for lora_B."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from .. import checks
from .pairs import Pair
from .trained import Named


def is_pair(entry: object) -> bool:
    """Returns whether an entry of a parameter group is a pair, and not a named parameter (str, Tensor)."""
    return isinstance(entry, Pair) or (isinstance(entry, (tuple, list)) and not (entry and isinstance(entry[0], str)))


def check_parameters(named: list[tuple], argument: str, trained: Collection[int]) -> None:
    """Raises ArgumentError unless every entry is a name with a parameter that torch's optimizers take and that is in no
    group yet. ``trained`` are the ids of those that are."""
    seen = set(trained)
    for i, entry in enumerate(named):
        p = entry[1] if len(entry) == 2 else None
        _check_parameter(p, f"{argument}[{i}]", entry)
        if id(p) in seen:
            raise checks.ArgumentError(
                f"{argument}[{i}]", "a tensor of its own", "a parameter that is in a group already"
            )
        seen.add(id(p))


def _check_parameter(p: Any, argument: str, entry: object) -> None:
    if not isinstance(p, Tensor) or not p.is_leaf or p.dtype not in checks.FLOATS or p.is_sparse:
        expected = "a pair, or a leaf tensor of a floating dtype, with or without a name"
        got = "a view of another tensor" if isinstance(p, Tensor) and not p.is_leaf else checks.shown(entry)
        raise checks.ArgumentError(argument, expected, got)


def named_groups(groups: Any, named: list[Named], frozen: Iterable[Named]) -> list[dict]:
    """Returns torch's parameter groups with the names of their parameters.

    Args:
        groups: dicts of params and settings, as a user gives them. They may also contain a model's
            frozen parameters, as torch's optimizers do, and those of others, such as a loss.
        named: all trained parameters of the model. frozen: its others.

    Raises:
        ArgumentError: another form, or a trained parameter that is in no group or in two.
    """
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, dict) for group in groups):
        raise checks.ArgumentError("groups", "a list of dicts with the key params", checks.shown(groups))
    left = {id(p): (name, p) for name, p in named}
    placed: set[int] = set()
    known = {id(p): (name, p) for name, p in frozen}
    result = []
    for i, group in enumerate(groups):
        params = group.get("params")
        if not isinstance(params, (Tensor, Iterable)) or isinstance(params, (str, bytes, dict, set)):
            raise checks.ArgumentError(f"groups[{i}]['params']", "an ordered list of parameters", checks.shown(params))
        entries = []
        for j, entry in enumerate([params] if isinstance(params, Tensor) else params):
            p = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
            argument = f"groups[{i}]['params'][{j}]"
            if not isinstance(p, Tensor) or id(p) in placed:
                raise checks.ArgumentError(argument, "a parameter, each of them once", checks.shown(entry))
            if p.requires_grad:
                _check_parameter(p, argument, entry)
            placed.add(id(p))
            entries.append(left.pop(id(p), known.get(id(p), (f"groups[{i}].{j}", p))))
        result.append({**group, "params": entries})
    if left:
        names = checks.shown([name for name, _ in left.values()])
        raise checks.ArgumentError("groups", "every trained parameter of the model", f"none with {names}")
    return result


def split_for_lora_plus(group: dict, added: list[Pair], lr: float | Tensor, ratio: float | None) -> list[dict]:
    """Returns a group of named parameters as the groups that the optimizer has: with LoRAPlus's ratio one of its own
    for the lora_B among them, at ratio times the learning rate.

    Args:
        lr: the learning rate of a group that has none.
    """
    # torch takes names in all groups or in none, and looks for them in empty groups, too.
    group = {"param_names": [], "methods": [], **group}
    if ratio is None:
        return [group]
    ids = {id(pair.b) for pair in added}
    parts: list[list[Named]] = [[], []]
    for entry in group["params"]:
        parts[id(entry[1]) in ids].append(entry)
    lr = group.get("lr", lr)
    settings = ({**group, "params": part, "lr": rate} for part, rate in zip(parts, (lr, lr * ratio), strict=True))
    return [part for part in settings if part["params"]] or [group]
