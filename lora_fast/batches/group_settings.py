"""The settings of a parameter group: their checks, and their conversion to numbers of Python."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks

NUMBERS = {"lr", "betas", "eps", "weight_decay"}
VARIANTS = {"maximize": False, "amsgrad": False, "differentiable": False, "decoupled_weight_decay": True}
SETTINGS = (*sorted(NUMBERS), *VARIANTS)  # the keys of a group on which a step depends


def check(group: dict) -> None:
    """Converts the numbers of a group, as ``converted`` does.

    Raises:
        ArgumentError: a number out of range, or a variant of AdamW that the optimizer does not have.
    """
    check_variants(group)
    for name in sorted(NUMBERS & group.keys()):
        value = group[name] = converted(name, group[name])
        if name == "betas":
            checks.betas(value)
        else:
            checks.nonnegative(checks.plain_number(value), name)  # reads a tensor, which no step does


def converted(name: str, value: Any) -> Any:
    """Returns a setting as a number or numbers of Python, which numpy's and one-element tensors become. A learning rate
    that is a tensor becomes a view of it without dimensions, which a step does not read on the host.

    Raises:
        ArgumentError: a value of another kind.
    """
    if name == "lr" and isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.view(()) if value.dim() else value
    if name == "betas":
        numbers = tuple(map(checks.plain_number, value)) if isinstance(value, (tuple, list)) else ()
        if len(numbers) != 2 or not all(isinstance(beta, checks.NUMBERS) for beta in numbers):
            raise checks.ArgumentError(name, "two numbers from 0 to below 1", checks.shown(value))
        return numbers
    number = checks.plain_number(value)
    if not isinstance(number, checks.NUMBERS) or isinstance(number, bool):
        raise checks.ArgumentError(name, "a number", checks.shown(value))
    return number


def check_variants(group: dict) -> None:
    """Raises ArgumentError for settings of torch's AdamW whose results this optimizer does not compute. Those that
    change no result (foreach, fused, capturable) may have any value."""
    for name, expected in VARIANTS.items():
        value = checks.plain_number(group.get(name, expected))
        if not isinstance(value, (*checks.NUMBERS, type(None))) or bool(value) != expected:
            raise checks.ArgumentError(name, f"{expected} (LoRAAdamW has no other)", checks.shown(value))
