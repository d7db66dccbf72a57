"""``--method NAME[:KEY=VALUE,…]``: the methods that there are, what each does in one sentence, and reading a choice."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from torch import nn

from ... import checks, methods
from ...checks import ArgumentError
from ...layers.nb_lora import NORMS, NBLoRALinear
from ...layers.sing_lora import SingLoRALinear
from ...surgery.inject import NBLoRAConfig, SingLoRAConfig

RAMP = 0.25  # share of a run that leads SingLoRA's adapters in, if its steps are not given


@dataclass(frozen=True)
class NBLoRA:
    """Not an optimizer's method but adapters of another kind: the options of ``lf.NBLoRAConfig`` that are their own."""

    norm: str = NBLoRAConfig.norm
    bound: float | None = None
    bound_ratio: float | None = None
    learn_scale: bool = True

    def __post_init__(self):
        self.config(alpha=1.0, steps=1)

    def config(self, alpha: float, steps: int, **layers) -> NBLoRAConfig:
        """What ``inject_`` takes in a run of so many steps; ``layers``: r, dropout, target_modules."""
        return NBLoRAConfig(**asdict(self), **layers)

    def note(self, model: nn.Module) -> str:
        """What holds for the layers in the model, in words."""
        return limits(self.norm, [layer.bound for layer in model.modules() if isinstance(layer, NBLoRALinear)])


@dataclass(frozen=True)
class SingLoRA:
    """Adapters of another kind: the options of ``lf.SingLoRAConfig`` that are their own. ``ramp_steps`` None: a share
    of the run, RAMP."""

    ramp_steps: int | None = None

    def __post_init__(self):
        self.config(alpha=1.0, steps=1)

    def config(self, alpha: float, steps: int, **layers) -> SingLoRAConfig:
        """As NBLoRA's."""
        ramp_steps = math.ceil(RAMP * steps) if self.ramp_steps is None else self.ramp_steps
        return SingLoRAConfig(alpha=alpha, ramp_steps=ramp_steps, **layers)

    def note(self, model: nn.Module) -> str:
        """As NBLoRA's."""
        ramp_steps = next(layer.ramp_steps for layer in model.modules() if isinstance(layer, SingLoRALinear))
        return f"ΔW led in over the first {ramp_steps} steps" if ramp_steps else "ΔW in full from the first step"


METHODS = {  # name → class in lora_fast.methods, or of ADAPTERS, what it does
    "lora": (None, "AdamW on both factors, as they are."),
    "lora+": (methods.LoRAPlus, "AdamW with a higher learning rate for b than for a."),
    "scale-reg": (methods.ScaleReg, "Adds to the loss a pull of the two factors' mean squares towards each other."),
    "scaled-adamw": (methods.ScaledAdamW, "AdamW on gradients preconditioned by the other factor (Riemannian LoRA)."),
    "ilora": (methods.ILoRA, "After AdamW, a pull of a aᵀ towards r/d_out · bᵀb, outside the moments."),
    "pilora": (methods.PiLoRA, "Preconditioned gradients as in scaled-adamw, and the pull of ilora."),
    "scalora": (methods.ScaLoRA, "Every few steps scales rows of a and columns of b best for the full gradient, and "
                                 "merges the rest into the frozen weight."),
    "balora": (methods.BaLoRA, "After AdamW, replaces the factors by those of the same product with a aᵀ = bᵀb."),
    "lora-rite": (methods.LoRARITE, "An update of its own, the same however the product is split into factors."),
    "lora-muon": (methods.LoRAMuon, "An update of its own, without second moments: the product's momentum, "
                                    "orthogonalised."),
    "ref-lora": (methods.RefLoRA, "AdamW on the gradients that the balanced factors of the same product would have."),
    "nb-lora": (NBLoRA, "AdamW on free parameters whose Cayley transform gives a and b, so that the norm of their "
                        "product cannot exceed a bound."),
    "sing-lora": (SingLoRA, "AdamW on one matrix that is both factors, led in over the first ramp_steps steps: "
                            f"{RAMP:.0%} of the run, if not given."),
}  # fmt: skip
ADAPTERS = (NBLoRA, SingLoRA)  # adapters of our own layers, which PEFT does not have


@dataclass(frozen=True)
class Choice:
    """One ``--method``, read.

    Attributes:
        text: as typed. name: of METHODS.
        instances: what ``LoRAAdamW(methods=…)`` takes; empty for plain LoRA and for adapters of another kind.
        lr: the learning rate if the method was given one of its own.
        adapters: of another kind than LoRA's, or None.
    """

    text: str
    name: str
    instances: tuple
    lr: float | None
    adapters: NBLoRA | SingLoRA | None = None

    @property
    def sentence(self) -> str:
        return METHODS[self.name][1]

    @property
    def options(self) -> str:
        """All of them with their values, as Python."""
        return repr(self.adapters or self.instances[0]) if self.adapters or self.instances else "no options"


def has_own_layers(text: str) -> bool:
    """Whether a ``--method`` trains adapters that PEFT's layers do not have."""
    return METHODS.get(text.partition(":")[0], (None,))[0] in ADAPTERS


def read(text: str) -> Choice:
    """``ilora:lam=0.1,lr=5e-4`` → its Choice.

    Raises:
        ArgumentError: an unknown method, an option that it does not have, or a value out of range.
    """
    name, _, options = text.partition(":")
    kind = METHODS[checks.choice(name, "--method", tuple(METHODS))][0]
    known = {"lr"} | ({field.name for field in fields(kind)} if kind else set())
    values = {}
    for item in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = item.partition("=")
        if key not in known or not equals or key in values:
            raise ArgumentError("--method", f"{name}:KEY=VALUE,… with {describe(name)}", repr(text))
        values[key] = _value(value)
    lr = values.pop("lr", None)
    try:
        if lr is not None:
            checks.positive(lr, "lr")
        made = () if kind is None else (kind(**values),)
        return Choice(text, name, (), lr, *made) if kind in ADAPTERS else Choice(text, name, made, lr)
    except ArgumentError as error:
        raise ArgumentError(f"--method {name}:{error.argument}", error.expected, error.got) from None


def limits(norm: str, bounds: list[float]) -> str:
    """The bounds of all layers, in words."""
    low, high = f"{min(bounds):.4g}", f"{max(bounds):.4g}"
    return f"{norm.capitalize()} norm of each ΔW at most {low if low == high else f'{low} to {high}'}"


def with_bounds(
    texts: tuple[str, ...], norm: str | None, bound: float | None, bound_ratio: float | None
) -> tuple[str, ...]:
    """The methods, with --norm, --bound and --bound-ratio among the options of every nb-lora without its own:
    from here on nothing else carries them.

    Raises:
        ArgumentError: a value out of range, both bounds, or an option that no method takes.
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
            before, texts = texts, tuple(_with_option(text, keys, value) for text in texts)
            if texts == before:
                expected = f"a --method nb-lora that leaves {' and '.join(sorted(keys))} open"
                raise ArgumentError(flag, expected, f"--method {' '.join(texts)}")
    return texts


def _with_option(text: str, keys: list[str], value: object) -> str:
    """``text`` with the first key's value, if it is nb-lora and has none of the keys."""
    name, _, options = text.partition(":")
    items = [item for item in options.split(",") if item.strip()]
    if name != "nb-lora" or any(item.partition("=")[0].strip() in keys for item in items):
        return text
    return f"{name}:{','.join([*items, f'{keys[0]}={value}'])}"


def describe(name: str) -> str:
    """The options of a method with their defaults, as they are typed."""
    kind = METHODS[name][0]
    own = [] if kind is None else [f"{field.name}={field.default}" for field in fields(kind)]
    return ", ".join([*own, "lr=(that of --lr)"])


def overview() -> str:
    """Every method with its options, in Markdown, for --help."""
    rows = (f"- `{name}` {sentence}\n\n    {describe(name)}" for name, (_, sentence) in METHODS.items())
    return "**Methods and their options**\n\n" + "\n\n".join(rows)


def _value(text: str) -> bool | int | float | str | None:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
