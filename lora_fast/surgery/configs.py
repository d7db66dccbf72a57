"""The configs of ``inject_``, one for each parametrisation."""

from __future__ import annotations

import functools
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import nn

from .. import checks
from ..layers.base import AdapterLinear
from ..layers.dora_linear import DoRALinear
from ..layers.lora import LoRALinear
from ..layers.nb_lora import NBLoRALinear, check_bound_ratio
from ..layers.sing_lora import SingLoRALinear
from . import targets

PEFT_NAMES = {"lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init"}  # PEFT's → a field's
Config = TypeVar("Config", bound="AdapterConfig")


class AdapterConfig:
    """Base of frozen dataclasses whose fields are ``target_modules`` and the arguments of the layer's ``from_linear``,
    which are checked on construction.

    Attributes:
        layer: the class of the layers.
        SELECTING: fields that are no arguments of the layer's.
    """

    layer: type[AdapterLinear]
    SELECTING: ClassVar[tuple[str, ...]] = ("target_modules", "use_dora")
    r: int
    target_modules: str | list[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        self.check()
        targets.check(self.target_modules)

    def check(self) -> None:
        """Raises ArgumentError if the layer's constructor refuses the settings, by a trial on the meta device."""
        self.layer(self.r, 1, device="meta", **self.layer_settings())

    def layer_settings(self, name: str = "") -> dict:
        """Returns the arguments of ``from_linear`` of the layer with this name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.SELECTING}

    def left_alone(self, model: nn.Module, candidates: dict[str, nn.Module]) -> dict[str, str]:
        """Returns the name of each candidate that gets no adapter → the reason."""
        return targets.left_alone(model, candidates, self.target_modules)


def takes_peft_names(config: type[Config]) -> type[Config]:
    """Lets the constructor of a config take PEFT's names of its fields, too (``PEFT_NAMES``).

    Raises:
        ArgumentError: from the constructor, a field under both names, or a value of PEFT's that no field has.
    """
    own_init: Any = config.__init__
    names = [field.name for field in fields(config)]

    @functools.wraps(own_init)
    def init(self, *args, **settings) -> None:
        for name, field in PEFT_NAMES.items():
            if name in settings and field in names:
                value = settings.pop(name)
                if field in settings or field in names[: len(args)]:
                    raise checks.ArgumentError(name, f"nothing beside {field}, its other name", checks.shown(value))
                settings[field] = _own_init(value) if field == "init" else value
        own_init(self, *args, **settings)

    config.__init__ = init  # type: ignore[method-assign]
    return config


def _own_init(init_lora_weights: object) -> str:
    """Returns the name of an initialisation that PEFT calls so."""
    if init_lora_weights is True:
        return "kaiming"
    if init_lora_weights == "gaussian":
        return "gaussian"
    expected = "True or 'gaussian' (for others, lf.inject_ takes a peft.LoraConfig)"
    raise checks.ArgumentError("init_lora_weights", expected, checks.shown(init_lora_weights))


@takes_peft_names
@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """Plain adapters for ``inject_`` (Hu et al., arXiv 2106.09685; see ``LoRALinear``). PEFT's names ``lora_alpha``,
    ``lora_dropout`` and ``init_lora_weights`` (True or ``"gaussian"``) are accepted as well; ``inject_`` also takes a
    ``peft.LoraConfig``.

    Args:
        r: rank, 1 to 256.
        alpha: scale of the adapter; its product is scaled by alpha / r, or alpha / sqrt(r) with ``use_rslora``.
        dropout: probability that an element of a layer's input is dropped on the way to the adapter, in training only.
        target_modules: ``"all-linear"`` (every nn.Linear but the output embeddings), a list of module names or ends of
            names (``["q_proj", "v_proj"]``), or a regular expression for whole names, as in PEFT.
        use_rslora: rank-stabilised scaling (Kalajdzievski, arXiv 2312.03732).
        init: initialisation of lora_A, ``"kaiming"`` or ``"gaussian"``; lora_B starts at 0.
        use_dora: also train the norm of each row of the adapted weight (see ``DoRALinear``).

    Raises:
        ArgumentError: a value out of range, or a field under both of its names.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = targets.ALL_LINEAR
    use_rslora: bool = False
    init: str = "kaiming"
    use_dora: bool = False

    @property
    def layer(self) -> type[LoRALinear]:  # type: ignore[override]
        return DoRALinear if self.use_dora else LoRALinear

    def check(self) -> None:
        checks.flag(self.use_dora, "use_dora")
        super().check()


@takes_peft_names
@dataclass(frozen=True)
class NBLoRAConfig(AdapterConfig):
    """Norm-bounded adapters for ``inject_`` ("Norm-Bounded Low-Rank Adaptation"; see ``NBLoRALinear``).

    Args:
        r: rank, 1 to 256 and at most each layer's d_in.
        norm: ``"spectral"``, ``"frobenius"`` or ``"nuclear"``.
        bound: upper bound on the norm of each layer's ΔW. None means 1, √r or r, in the order of the norms.
        bound_ratio: instead of ``bound``, each layer's bound as a multiple of its frozen weight's own norm (the nuclear
            and spectral norms of a large model's weights take minutes).
        learn_scale: train the shares of the bound that the singular values get.
        dropout (or PEFT's name ``lora_dropout``), target_modules: as in LoRAConfig.

    Raises:
        ArgumentError: a value out of range.
    """

    layer = NBLoRALinear

    r: int = 16
    norm: str = "nuclear"
    bound: float | None = None
    bound_ratio: float | None = None
    learn_scale: bool = True
    dropout: float = 0.0
    target_modules: str | list[str] = targets.ALL_LINEAR

    def check(self) -> None:
        settings = self.layer_settings()
        ratio = settings.pop("bound_ratio")
        self.layer(self.r, 1, device="meta", **settings)
        if ratio is not None:
            check_bound_ratio(ratio, self.bound)


@takes_peft_names
@dataclass(frozen=True)
class SingLoRAConfig(AdapterConfig):
    """Adapters of one matrix for ``inject_`` (SingLoRA; see ``SingLoRALinear``).

    Args:
        r: rank, 1 to 256.
        alpha: scale of the adapter, or PEFT's name ``lora_alpha``; its product is scaled by alpha / r.
        ramp_steps: optimizer steps of the adapter's warm-up (``lf.count_steps_``); 0 for none.
        dropout (or ``lora_dropout``), target_modules: as in LoRAConfig.

    Raises:
        ArgumentError: a value out of range.
    """

    layer = SingLoRALinear

    r: int = 16
    alpha: float = 16
    ramp_steps: int = 100
    dropout: float = 0.0
    target_modules: str | list[str] = targets.ALL_LINEAR
