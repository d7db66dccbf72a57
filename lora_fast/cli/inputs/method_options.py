"""Parses ``--method NAME[:KEY=VALUE,…]``. Lists the methods, with one sentence about each."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from ... import checks, methods
from ...checks import ArgumentError
from ...layers.nb_lora import NORMS, NBLoRALinear
from ...layers.sing_lora import SingLoRALinear
from ...surgery.inject import NBLoRAConfig, SingLoRAConfig

RAMP = 0.25  # share of a run that is SingLoRA's ramp, unless ramp_steps is given


@dataclass(frozen=True)
class NBLoRA:
    """Norm-bounded adapters, which replace LoRA's. The fields are the options that ``lf.NBLoRAConfig`` has and LoRA has
    not."""

    norm: str = NBLoRAConfig.norm
    bound: float | None = None
    bound_ratio: float | None = None
    learn_scale: bool = True

    def __post_init__(self):
        self.config(alpha=1.0, steps=1)  # its constructor checks the values

    def config(self, alpha: float, steps: int, **options) -> NBLoRAConfig:
        """Returns the configuration for ``inject_`` in a run of ``steps`` steps. ``options`` contains r, dropout and
        target_modules; ``alpha`` has no meaning for these adapters."""
        return NBLoRAConfig(**asdict(self), **options)

    def note(self, model: nn.Module) -> str:
        """Returns a sentence about the bounds of the model's layers."""
        return describe_bounds(self.norm, [layer.bound for layer in model.modules() if isinstance(layer, NBLoRALinear)])


@dataclass(frozen=True)
class SingLoRA:
    """Adapters with one matrix for both factors, which replace LoRA's. The field is the option that
    ``lf.SingLoRAConfig`` has and LoRA has not; None sets the ramp to the share RAMP of the run."""

    ramp_steps: int | None = None

    def __post_init__(self):
        self.config(alpha=1.0, steps=1)  # its constructor checks the values

    def config(self, alpha: float, steps: int, **options) -> SingLoRAConfig:
        """Returns the configuration for ``inject_`` in a run of ``steps`` steps. ``options`` contains r, dropout and
        target_modules."""
        ramp_steps = math.ceil(RAMP * steps) if self.ramp_steps is None else self.ramp_steps
        return SingLoRAConfig(alpha=alpha, ramp_steps=ramp_steps, **options)

    def note(self, model: nn.Module) -> str:
        """Returns a sentence about the ramp of the model's layers."""
        ramp_steps = next(layer.ramp_steps for layer in model.modules() if isinstance(layer, SingLoRALinear))
        return (
            f"ΔW ramps up over the first {ramp_steps} steps"
            if ramp_steps
            else "ΔW has its full scale from the first step"
        )


METHODS: dict[str, tuple[type | None, str]] = {  # name → (class in lora_fast.methods or in ADAPTERS, what it does)
    "lora": (None, "Plain LoRA, with AdamW on both factors."),
    "lora+": (methods.LoRAPlus, "AdamW with a higher learning rate for b than for a."),
    "scale-reg": (methods.ScaleReg, "Adds a loss on the difference between the two factors' mean squares."),
    "scaled-adamw": (methods.ScaledAdamW, "AdamW on gradients preconditioned by the other factor (Riemannian LoRA)."),
    "ilora": (methods.ILoRA, "After AdamW's update, moves a aᵀ towards r/d_out · bᵀb, which the moments do not see."),
    "pilora": (methods.PiLoRA, "Combines the preconditioned gradients of scaled-adamw with the regulariser of ilora."),
    "scalora": (methods.ScaLoRA, "Every few steps, rescales the rows of a and the columns of b to follow the full "
                                 "gradient best, and merges the change of the product into the frozen weight."),
    "balora": (methods.BaLoRA, "After AdamW's update, replaces the factors by those of the same product with "
                               "a aᵀ = bᵀb."),
    "lora-rite": (methods.LoRARITE, "Replaces AdamW by an update that does not depend on how the product is split "
                                    "into factors."),
    "lora-muon": (methods.LoRAMuon, "Replaces AdamW by the orthogonalised momentum of the product, without second "
                                    "moments."),
    "ref-lora": (methods.RefLoRA, "AdamW on the gradients that the balanced factors of the same product would have."),
    "nb-lora": (NBLoRA, "AdamW on free parameters. Their Cayley transform gives a and b, so that the norm of the "
                        "product cannot exceed a bound."),
    "sing-lora": (SingLoRA, "AdamW on one matrix that gives both factors. Its scale ramps up over the first "
                            f"ramp_steps steps, by default {RAMP:.0%} of the run."),
}  # fmt: skip
ADAPTERS = (NBLoRA, SingLoRA)  # kinds of adapters that PEFT does not have


@dataclass(frozen=True)
class Choice:
    """A parsed ``--method``.

    Attributes:
        text: the option as it was typed.
        name: a key of METHODS.
        instances: the argument of ``LoRAAdamW(methods=…)``; empty for plain LoRA and for adapters of another kind.
        lr: the learning rate among the method's options, or None.
        adapters: the options of adapters that replace LoRA's, or None.
    """

    text: str
    name: str
    instances: tuple
    lr: float | None
    adapters: NBLoRA | SingLoRA | None = None

    @property
    def sentence(self) -> str:
        """A sentence about what the method does."""
        return METHODS[self.name][1]

    @property
    def changes_base(self) -> bool:
        """True if the method changes the frozen weights."""
        return any(isinstance(method, methods.ScaLoRA) for method in self.instances)

    @property
    def options(self) -> str:
        """All options of the method with their values, as Python code."""
        return repr(self.adapters or self.instances[0]) if self.adapters or self.instances else "no options"


def has_own_layers(text: str) -> bool:
    """Returns whether a ``--method`` trains adapters that PEFT does not have."""
    return METHODS.get(text.partition(":")[0], (None,))[0] in ADAPTERS


def read(text: str) -> Choice:
    """Parses the value of a ``--method`` such as ``ilora:lam=0.1,lr=5e-4``.

    Raises:
        ArgumentError: the method is unknown, has no such option, or a value is out of range.
    """
    name, _, options = text.partition(":")
    kind = METHODS[checks.choice(name, "--method", tuple(METHODS))][0]
    known = {"lr"} | ({field.name for field in fields(kind)} if kind else set())
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = item.partition("=")
        if key not in known or not equals or key in values:
            raise ArgumentError("--method", f"{name}:KEY=VALUE,… with {describe(name)}", repr(text))
        values[key] = _value(value)
    lr = values.pop("lr", None)
    try:
        if lr is not None:
            checks.positive(lr, "lr")
        if kind in ADAPTERS:
            return Choice(text, name, (), lr, kind(**values))
        return Choice(text, name, (kind(**values),) if kind else (), lr)
    except ArgumentError as error:
        raise ArgumentError(f"--method {name}:{error.argument}", error.expected, error.got) from None


def describe_bounds(norm: str, bounds: list[float]) -> str:
    """Returns a sentence about the bounds of all layers."""
    low, high = f"{min(bounds):.4g}", f"{max(bounds):.4g}"
    return f"{norm.capitalize()} norm of each ΔW at most {low if low == high else f'{low} to {high}'}"


def with_bounds(
    texts: tuple[str, ...], norm: str | None, bound: float | None, bound_ratio: float | None
) -> tuple[str, ...]:
    """Returns the methods with --norm, --bound and --bound-ratio moved into the options of every nb-lora that does not
    set them itself.

    Raises:
        ArgumentError: a value is out of range, both bounds are given, or no method takes an option.
    """
    if norm is not None:
        checks.choice(norm, "--norm", tuple(NORMS))
    if bound is not None:
        checks.positive(bound, "--bound")
    if bound_ratio is not None:
        checks.positive(bound_ratio, "--bound-ratio")
    if bound is not None and bound_ratio is not None:
        raise ArgumentError("--bound-ratio", "either --bound or --bound-ratio", "both")
    given = ("--norm", norm, ["norm"]), ("--bound", bound, ["bound", "bound_ratio"])
    for flag, value, keys in (*given, ("--bound-ratio", bound_ratio, ["bound_ratio", "bound"])):
        if value is not None:
            previous, texts = texts, tuple(_with_option(text, keys, value) for text in texts)
            if texts == previous:
                expected = f"a --method nb-lora that leaves {' and '.join(sorted(keys))} open"
                raise ArgumentError(flag, expected, f"--method {' '.join(texts)}")
    return texts


def _with_option(text: str, keys: list[str], value: object) -> str:
    """Returns ``text`` with ``value`` for the first key, if the method is nb-lora and has none of the keys yet."""
    name, _, options = text.partition(":")
    items = [item for item in options.split(",") if item.strip()]
    if name != "nb-lora" or any(item.partition("=")[0].strip() in keys for item in items):
        return text
    return f"{name}:{','.join([*items, f'{keys[0]}={value}'])}"


def describe(name: str) -> str:
    """Returns the options of a method with their defaults, as they are typed."""
    kind = METHODS[name][0]
    options = [] if kind is None else [f"{field.name}={field.default}" for field in fields(kind)]
    return ", ".join([*options, "lr=(that of --lr)"])


def overview() -> str:
    """Returns every method with its options, in Markdown, for --help."""
    rows = (f"- `{name}`: {sentence}\n\n    {describe(name)}" for name, (_, sentence) in METHODS.items())
    return "**Methods and their options**\n\n" + "\n\n".join(rows)


def _value(text: str) -> bool | int | float | str | None:
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
