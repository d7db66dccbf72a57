"""``--method`` and ``--method-options``: a name and ``key=value,…`` become instances from ``lora_fast.methods``."""

from __future__ import annotations

from dataclasses import MISSING, fields

from .. import checks, methods
from ..checks import ArgumentError

# ScaLoRA is not among them: it changes the frozen weights, which an adapter's files do not hold.
METHODS = {
    "lora": None,
    "lora+": methods.LoRAPlus,
    "scale-reg": methods.ScaleReg,
    "scaled-adamw": methods.ScaledAdamW,
    "ilora": methods.ILoRA,
    "pilora": methods.PiLoRA,
    "balora": methods.BaLoRA,
    "lora-rite": methods.LoRARITE,
}


def build(name: str, options: str | None) -> list:
    """What ``LoRAAdamW(methods=…)`` takes; empty for plain LoRA.

    Raises:
        ArgumentError: an unknown method, an option that it does not have, or a value out of range.
    """
    kind = METHODS[checks.choice(name, "--method", tuple(METHODS))]
    known = {} if kind is None else {field.name: field.default for field in fields(kind)}
    values = {}
    for item in filter(None, (part.strip() for part in (options or "").split(","))):
        key, equals, text = item.partition("=")
        if key not in known or not equals:
            raise ArgumentError("--method-options", describe(name), repr(item))
        values[key] = _value(text)
    try:
        return [] if kind is None else [kind(**values)]
    except ArgumentError as error:
        raise ArgumentError(f"--method-options {error.argument}", error.expected, error.got) from None


def describe(name: str) -> str:
    """The options of a method with their defaults, as they are typed."""
    kind = METHODS[name]
    known = () if kind is None else [f"{f.name}={f.default}" for f in fields(kind) if f.default is not MISSING]
    return f"{', '.join(known)} of {name}" if known else f"none: {name} has no options"


def _value(text: str) -> bool | int | float | str:
    if text in ("True", "true", "False", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
