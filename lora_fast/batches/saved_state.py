"""Checks that a saved state fits an optimizer, before any of it is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layers.find import bare_name
from . import group_settings
from .batch import MOMENTS, NO_STATE, Shapes

ARGUMENT = "state_dict"
ADAMW_KEYS = {"amsgrad", "maximize", "foreach", "capturable", "differentiable"}  # of torch's groups, not of ours


def check_form(state_dict: object) -> None:
    """Raises ArgumentError unless the value has the form of an optimizer's ``state_dict``."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        got = (
            f"the keys {checks.shown(list(state_dict))}"
            if isinstance(state_dict, Mapping)
            else checks.shown(state_dict)
        )
        raise checks.ArgumentError(ARGUMENT, "an optimizer's state_dict, with the keys state and param_groups", got)
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise checks.ArgumentError(f"{ARGUMENT}['state']", "a dict of the state of each parameter", checks.shown(state))
    if not isinstance(groups, Sequence) or not all(isinstance(group, Mapping) for group in groups):
        raise checks.ArgumentError(f"{ARGUMENT}['param_groups']", "a list of dicts", checks.shown(groups))
    for i, group in enumerate(groups):
        argument = f"{ARGUMENT}['param_groups'][{i}]"
        if missing := sorted({"params", *group_settings.NUMBERS} - group.keys()):
            raise checks.ArgumentError(
                argument, f"the keys {', '.join(missing)}", f"the keys {', '.join(map(str, group))}"
            )
        for name in ("params", "param_names", "methods"):
            value = group.get(name, [])
            if not isinstance(value, (list, tuple)) or not all(isinstance(entry, (int, str)) for entry in value):
                raise checks.ArgumentError(f"{argument}['{name}']", "a list of numbers or names", checks.shown(value))
        memory = group.get("method_state", {})
        if not isinstance(memory, Mapping) or not all(
            isinstance(x, Tensor) and x.numel() == 1 for x in memory.values()
        ):
            expected = "a dict of tensors of one element"
            raise checks.ArgumentError(f"{argument}['method_state']", expected, checks.shown(memory))


def check(groups: list[dict], state_dict: Mapping[str, Any], shapes: dict[int, Shapes]) -> None:
    """Raises ArgumentError unless the saved groups have the same parameters, in the same order, the same methods and
    settings in range, and the state of every parameter is whole and has its shapes.

    Args:
        groups: the optimizer's own.
        state_dict: what is loaded, in the form that ``check_form`` accepts.
        shapes: the shapes of the states of paired parameters, by id. Other parameters have AdamW's moments.
    """
    saved, state = state_dict["param_groups"], state_dict["state"]
    sizes, saved_sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in saved]
    if sizes != saved_sizes:
        expected = f"groups of {sizes} parameters (which the optimizer's groups and methods, as LoRAPlus, decide)"
        raise checks.ArgumentError(ARGUMENT, expected, str(saved_sizes))
    indices = [i for group in saved for i in group["params"]]
    if len(set(indices)) < len(indices) or not state.keys() <= set(indices):
        expected = f"the state of {len(indices)} different parameters, those of its groups"
        raise checks.ArgumentError(ARGUMENT, expected, f"that of {checks.shown(list(state))}")
    for group, other in zip(groups, saved, strict=True):
        _check_group(group, other)
        names = group.get("param_names", [f"{ARGUMENT}['state'][{i!r}]" for i in other["params"]])
        for name, p, i in zip(names, group["params"], other["params"], strict=True):
            default: Shapes = {moment: (tuple(p.shape), p.dtype) for moment in MOMENTS}
            _check_state(name, state.get(i, NO_STATE), shapes.get(id(p), default))


def is_of_adamw(groups: list[Mapping]) -> bool:
    """Returns whether AdamW without methods has saved these groups. torch's keeps keys of groups that it has loaded,
    such as our methods, and has keys that ours have not."""
    return not any(group.get("methods") for group in groups) or any(group.keys() >= ADAMW_KEYS for group in groups)


def taken_over(
    groups: list[dict], state_dict: Mapping[str, Any], shapes: dict[int, Shapes], restarts: bool
) -> tuple[dict[str, Any], str]:
    """Returns the state of AdamW without methods as one of an optimizer with its own, and what there is to tell of it.
    AdamW's moments are taken over. Other states of methods begin as 0.

    Args:
        groups, state_dict, shapes: as for ``check``, which the result is for.
        restarts: whether a method replaces AdamW. If it has states that AdamW has not, its moments are others, too, and
            its pairs begin anew.
    """
    saved, state = state_dict["param_groups"], dict(state_dict["state"])
    methods: list[str] = next((group["methods"] for group in groups if group.get("methods")), [])
    anew = []
    for group, other in zip(groups, saved, strict=False):  # ``check`` refuses groups of other sizes
        names = group.get("param_names", [""] * len(group["params"]))
        for name, p, i in zip(names, group["params"], other["params"], strict=False):
            entry, layout = state.get(i, NO_STATE), shapes.get(id(p))
            if layout is None or entry.keys() != {"step", *MOMENTS}:
                continue
            missing = layout.keys() - entry.keys()
            if missing and restarts:
                anew.append(name)
                del state[i]
            else:
                begun = {key: torch.zeros(layout[key][0], dtype=layout[key][1], device=p.device) for key in missing}
                state[i] = {key: value for key, value in entry.items() if key == "step" or key in layout} | begun
    note = f"LoRAAdamW: the state is AdamW's; {', '.join(methods)} begin at this step" if methods else ""
    if anew:
        note += f"; its moments cannot be taken over for {checks.shown(anew)}, which begin anew"
    for other in saved:
        group_settings.check_variants(dict(other))
    kept = ({k: v for k, v in other.items() if k not in (*ADAMW_KEYS, "method_state")} for other in saved)
    renamed = [{**other, "methods": group.get("methods", [])} for other, group in zip(kept, groups, strict=False)]
    return {**state_dict, "state": state, "param_groups": [*renamed, *saved[len(groups) :]]}, note


def placed_as(value: Tensor, p: Any) -> Tensor:
    """Returns a saved moment whole or sharded, as the parameter is. Every process of a sharded model or state must call
    this."""
    is_sharded = hasattr(p, "placements")
    if hasattr(value, "full_tensor") and not is_sharded:
        return value.full_tensor()
    if is_sharded and not hasattr(value, "placements") and value.dim() > 0:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    return value


def _check_group(group: dict, saved: Mapping) -> None:
    methods, saved_methods = group.get("methods", []), saved.get("methods", [])
    if methods != saved_methods:
        raise checks.ArgumentError(ARGUMENT, f"methods {methods}", f"{saved_methods}")
    names = group.get("param_names", [])
    saved_names = saved.get("param_names", names)
    if len(names) != len(saved_names):
        raise checks.ArgumentError(ARGUMENT, f"the names of {len(names)} parameters", f"{len(saved_names)} names")
    for name, theirs in zip(names, saved_names, strict=True):
        if _as_ours(name) != _as_ours(str(theirs)):
            raise checks.ArgumentError(ARGUMENT, f"parameter {name} in this place", theirs)
    group_settings.check(dict(saved))


def _as_ours(name: str) -> str:
    """Returns the name of a factor as the optimizer calls it where it is the model's own, which torch's AdamW saves for
    ``model.named_parameters()``."""
    return re.sub(r"\.(lora_[AB])\.([^.]+)\.weight$", r".\2.\1", bare_name(name))


def _check_state(name: str, state: Mapping, shapes: Shapes) -> None:
    """Raises ArgumentError unless a parameter's state is empty, or has its step count and exactly the states of
    ``shapes``."""
    if "max_exp_avg_sq" in state:
        raise checks.ArgumentError(ARGUMENT, "a state without amsgrad", "max_exp_avg_sq")
    if not state:
        return
    expected = {"step", *shapes}
    if state.keys() != expected:
        names = ", ".join(sorted(expected))
        raise checks.ArgumentError(ARGUMENT, f"{names} for {name}", ", ".join(map(str, state)))
    step = state["step"]
    count = checks.plain_number(step) if not isinstance(step, Tensor) or step.dtype != torch.bool else step
    if isinstance(count, bool) or not isinstance(count, checks.NUMBERS) or not 0 <= count < math.inf:
        raise checks.ArgumentError(ARGUMENT, f"a number of steps for {name}", checks.shown(count))
    for key, (shape, _) in shapes.items():
        value = state[key]
        if not isinstance(value, Tensor) or value.dtype not in checks.FLOATS or value.layout != torch.strided:
            raise checks.ArgumentError(ARGUMENT, f"moments of a floating dtype ({key} of {name})", checks.shown(value))
        if value.shape != torch.Size(shape) or value.is_meta:
            got = "a tensor on meta" if value.is_meta else f"{tuple(value.shape)}"
            raise checks.ArgumentError(ARGUMENT, f"moments of shape {tuple(shape)} ({key} of {name})", got)
