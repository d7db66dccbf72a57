"""Selects the modules that ``target_modules`` names, and decides whether a layer of ours can replace each of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from torch import nn

from .. import checks
from ..layers.base import is_conv1d
from ..layers.find import ADAPTER_LAYERS
from ..layers.hooks import is_hooked
from ..quantized import family_of, reason_against, reason_against_unknown
from . import tasks
from .weight_reads import weight_reads

ALL_LINEAR = "all-linear"
HOOKED = "hooks, or a replaced forward, which a new layer would lose"


def check(target_modules: object, argument: str = "target_modules") -> None:
    """Raises ArgumentError unless it is "all-linear", a regular expression, or a non-empty collection of names."""
    expected = f"{ALL_LINEAR!r}, a regular expression, or a non-empty list of module names"
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            got = f"{checks.shown(target_modules)} ({error})"
            raise checks.ArgumentError(argument, expected, got) from None
        return
    if (
        not isinstance(target_modules, (list, tuple, set, frozenset))
        or not target_modules
        or not all(isinstance(name, str) and name for name in target_modules)
    ):
        raise checks.ArgumentError(argument, expected, checks.shown(target_modules))


def matches(target_modules: str | list[str], name: str) -> bool:
    """Returns whether the target names the module, as in PEFT: a string is a regular expression for the whole name, an
    entry of a list is the name or its end."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def candidates(model: nn.Module, target_modules: str | list[str]) -> dict[str, nn.Module]:
    """Returns name → module of every module that the target names; for "all-linear", of every one that looks linear."""
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        return {name: module for name, module in modules.items() if looks_linear(module)}
    return {name: module for name, module in modules.items() if matches(target_modules, name)}


def left_alone(model: nn.Module, modules: dict[str, nn.Module], target_modules: str | list[str]) -> dict[str, str]:
    """Returns the name of a candidate → why no layer of ours can replace it. A target that names no module is listed
    too."""
    reasons = {}
    # PEFT leaves the output embeddings out of "all-linear", too.
    everything = isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR
    head = getattr(model, "get_output_embeddings", lambda: None)() if everything else None
    is_task_of_peft = everything and tasks.task_type(model) in tasks.HEADS
    task_heads = tuple(f"{name}." for name in tasks.heads(model)) if is_task_of_peft else ()
    reads = weight_reads(model)
    for name, module in modules.items():
        reason = "output embeddings" if module is head else unsupported(module, reads)
        if task_heads and f"{name}.".startswith(task_heads):
            reason = "head of the task, which save_adapter saves whole; requires_grad_(True) trains it"
        if reason is not None:
            reasons[name] = reason
    if not isinstance(target_modules, str):
        for target in sorted(target_modules):
            if not any(matches([target], name) for name in modules):
                reasons[target] = "no module of this name"
    return reasons


def unsupported(module: nn.Module, reads: Mapping[nn.Module, str]) -> str | None:
    """Returns why no layer of ours can replace the module, or None if one can.

    Args:
        reads: the result of ``weight_reads`` for the model.
    """
    kind = type(module).__name__
    if isinstance(module, ADAPTER_LAYERS):
        return f"already a {kind}"
    if family_of(module) is not None:
        return HOOKED if is_hooked(module) else reason_against(module) or reads.get(module)
    if (reason := reason_against_unknown(module)) is not None:
        return reason
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized weight"
    # A subclass, as of quantised layers, may have another forward.
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"{kind}, {'a subclass of' if isinstance(module, nn.Linear) else 'not'} torch.nn.Linear"
    if is_hooked(module):
        return HOOKED
    if type(module.weight) is not nn.Parameter:
        return f"weight of type {type(module.weight).__name__}, not a plain parameter"
    if module.weight.dtype not in checks.FLOATS:
        return f"weight of dtype {module.weight.dtype}"
    return reads.get(module)


def looks_linear(module: nn.Module) -> bool:
    """Returns whether the module is an nn.Linear, transformers' Conv1D, or a leaf whose class name suggests a linear
    layer, such as quantised ones."""
    leaf = next(module.children(), None) is None
    return isinstance(module, nn.Linear) or is_conv1d(module) or (leaf and "Linear" in type(module).__name__)


def closest(model: nn.Module, target_modules: str | list[str]) -> str:
    """Returns the names of linear layers that are most similar to the target, for an error message."""
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)}
    names |= {name.rpartition(".")[2] for name in names}
    wanted = [target_modules] if isinstance(target_modules, str) else sorted(target_modules)
    near = [name for target in wanted for name in difflib.get_close_matches(target, sorted(names), n=2, cutoff=0.3)]
    return ", ".join(dict.fromkeys(near)) or ", ".join(sorted(names)[:4]) or "this model has no torch.nn.Linear"
