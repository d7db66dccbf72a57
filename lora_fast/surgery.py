"""Model surgery, in place: fused layers into a plain model or into an existing PEFT model.

Every function plans first, then acts: an error leaves the model as it was, and the report names every layer changed
and, for every other candidate, the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from . import checks, targets
from .layers import OURS, fused_class, peft_layers
from .linear import INITS, LoRALinear
from .nb_linear import NORMS, NBLoRALinear, share_factors_
from .progress import bar
from .report import Report
from .sing_linear import SingLoRALinear


@dataclass(frozen=True)
class LoRAConfig:
    """What ``inject_`` puts in (Hu et al., arXiv 2106.09685).

    Args:
        r: rank, 1 to 256.
        alpha: scale of the adapter; its product is scaled by alpha / r, or alpha / sqrt(r) with ``use_rslora``.
        dropout: probability of dropping an element of a layer's input on the adapter's way, in training only.
        target_modules: ``"all-linear"`` (every nn.Linear but the output embeddings), a list of module names or ends of
            names (``["q_proj", "v_proj"]``), or a regular expression for whole names; as in PEFT.
        use_rslora: rank-stabilised scaling (Kalajdzievski, arXiv 2312.03732).
        init: of lora_A, ``"kaiming"`` or ``"gaussian"``; lora_B starts at 0.

    Raises:
        ArgumentError: a value out of range.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = targets.ALL_LINEAR
    use_rslora: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        checks.rank(self.r)
        checks.positive(self.alpha, "alpha")
        checks.probability(self.dropout)
        targets.check(self.target_modules)
        if not isinstance(self.use_rslora, bool):
            raise checks.ArgumentError("use_rslora", "True or False", repr(self.use_rslora))
        checks.choice(self.init, "init", INITS)

    def layer_settings(self) -> dict:
        """The keyword arguments of ``LoRALinear.from_linear``."""
        return {name: getattr(self, name) for name in ("r", "alpha", "dropout", "use_rslora", "init")}


@dataclass(frozen=True)
class NBLoRAConfig:
    """Norm-bounded adapters for ``inject_`` ("Norm-Bounded Low-Rank Adaptation"; see ``NBLoRALinear``).

    Args:
        r: rank, 1 to 256 and at most each layer's d_in.
        norm: ``"spectral"``, ``"frobenius"`` or ``"nuclear"``.
        bound: on the norm of each layer's ΔW; None: 1, √r or r.
        bound_ratio: instead of ``bound``, each layer's bound as a multiple of its frozen weight's own norm (the nuclear
            and spectral norms of a large model's weights take minutes).
        learn_scale: train how the bound is shared out among the singular values.
        dropout, target_modules: as in LoRAConfig.

    Raises:
        ArgumentError: a value out of range.
    """

    r: int = 16
    norm: str = "nuclear"
    bound: float | None = None
    bound_ratio: float | None = None
    learn_scale: bool = True
    dropout: float = 0.0
    target_modules: str | list[str] = targets.ALL_LINEAR

    def __post_init__(self) -> None:
        checks.rank(self.r)
        checks.choice(self.norm, "norm", tuple(NORMS))
        for name in ("bound", "bound_ratio"):
            if getattr(self, name) is not None:
                checks.positive(getattr(self, name), name)
        if self.bound is not None and self.bound_ratio is not None:
            raise checks.ArgumentError("bound_ratio", "None where bound is given", repr(self.bound_ratio))
        checks.flag(self.learn_scale, "learn_scale")
        checks.probability(self.dropout)
        targets.check(self.target_modules)

    def layer_settings(self) -> dict:
        """The keyword arguments of ``NBLoRALinear.from_linear``."""
        names = ("r", "norm", "bound", "bound_ratio", "learn_scale", "dropout")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SingLoRAConfig:
    """Adapters of one matrix for ``inject_`` (SingLoRA; see ``SingLoRALinear``).

    Args:
        r: rank, 1 to 256.
        alpha: scale of the adapter; its product is scaled by alpha / r.
        ramp_steps: optimizer steps that lead the adapter in (``lf.count_steps_``); 0: it counts from the start.
        dropout, target_modules: as in LoRAConfig.

    Raises:
        ArgumentError: a value out of range.
    """

    r: int = 16
    alpha: float = 16
    ramp_steps: int = 100
    dropout: float = 0.0
    target_modules: str | list[str] = targets.ALL_LINEAR

    def __post_init__(self) -> None:
        checks.rank(self.r)
        checks.positive(self.alpha, "alpha")
        if self.ramp_steps != 0:
            checks.count(self.ramp_steps, "ramp_steps")
        checks.probability(self.dropout)
        targets.check(self.target_modules)

    def layer_settings(self) -> dict:
        """The keyword arguments of ``SingLoRALinear.from_linear``."""
        return {name: getattr(self, name) for name in ("r", "alpha", "ramp_steps", "dropout")}


LAYERS = {LoRAConfig: LoRALinear, NBLoRAConfig: NBLoRALinear, SingLoRAConfig: SingLoRALinear}


def inject_(
    model: nn.Module,
    config: LoRAConfig | NBLoRAConfig | SingLoRAConfig,
    *,
    allow_empty: bool = False,
    progress: bool = True,
) -> Report:
    """Replace linear layers of a plain model by the config's adapter layers over the same weights, and freeze
    everything but the adapters. The model then computes all norm-bounded layers' factors at once before each forward.

    Only layers whose type is exactly ``torch.nn.Linear``, on any device (meta included), with plain parameters and no
    hooks are replaced; others that ``config.target_modules`` names are left alone, with the reason in the report. A
    weight tied to another module's may be adapted (it is frozen and only read). Adapters are float32 over 16-bit
    weights, else in the weight's dtype.

    Args:
        model: any module that contains nn.Linear layers.
        config: what to put in, and where.
        allow_empty: accept that no layer fits; the model then stays as it is.
        progress: show a bar on stderr (tqdm's) if it takes more than two seconds, as the norms of large weights do.

    Raises:
        ArgumentError: nothing to replace (with the closest names), a model that is itself a linear layer or already
            has PEFT layers. The model is then unchanged.
    """
    kind = LAYERS.get(type(config))
    if kind is None:
        raise checks.ArgumentError(
            "config", "an lf.LoRAConfig, lf.NBLoRAConfig or lf.SingLoRAConfig", type(config).__name__
        )
    check_plain(model)
    found = targets.candidates(model, config.target_modules)
    report = Report("injected", left=targets.left_alone(model, found, config.target_modules))
    report.changed = {name: f"{kind.__name__}(r={config.r})" for name in found if name not in report.left}
    if not report.changed and not allow_empty:
        near = targets.closest(model, config.target_modules)
        expected = f"at least one torch.nn.Linear, by a regular expression or a list of name ends (closest: {near})"
        got = f"{config.target_modules!r}" + (f"; left {report.reasons()}" if report.left else "")
        raise checks.ArgumentError("target_modules", expected, got)
    replace_(model, {name: (kind, config.layer_settings()) for name in report.changed}, progress)
    return report


def check_plain(model: object) -> None:
    """Raises ArgumentError unless it is a module, without PEFT layers, whose inner layers can be replaced."""
    if isinstance(model, (nn.Linear, *OURS)):
        expected = "a module that contains linear layers; for a single layer, lf.LoRALinear.from_linear"
        raise checks.ArgumentError("model", expected, type(model).__name__)
    if peft_layers(model):
        expected = "a model without PEFT layers; fuse those with lf.fuse_"
        raise checks.ArgumentError("model", expected, type(model).__name__)


def replace_(model: nn.Module, kinds: dict[str, tuple[type[nn.Module], dict]], progress: bool = False) -> None:
    """Put a layer in the place of each named nn.Linear, wherever the model holds it, and freeze all but adapters.
    ``kinds``: name → its class and the arguments of ``from_linear``. All layers are built before the first is placed; a
    failure on the way leaves the model as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        linears = {name: model.get_submodule(name) for name in kinds}
        names = bar(kinds, "Adapter layers") if progress else kinds
        fused = {linears[name]: _build(name, linears[name], *kinds[name]) for name in names}
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    if not fused:
        return
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child in fused:
                setattr(parent, key, fused[child])
    layers = [module for module in model.modules() if isinstance(module, OURS)]
    adapters = {id(getattr(layer, name)) for layer in layers for name in layer.TRAINED}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
    if any(isinstance(layer, NBLoRALinear) for layer in fused.values()):
        share_factors_(model)


def _build(name: str, linear: nn.Linear, kind: type[nn.Module], settings: dict) -> nn.Module:
    try:
        return kind.from_linear(linear, **settings)
    except checks.ArgumentError as error:
        raise checks.ArgumentError(error.argument, f"{error.expected} ({name})", error.got) from error


def fuse_(
    peft_model: nn.Module,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    *,
    allow_empty: bool = False,
) -> Report:
    """Give the LoRA layers of an existing PEFT model the fused forward, in place: module objects, parameters, adapters
    and state_dict keys stay as they are, and PEFT goes on working with them. Call it again after adding adapters on
    new layers.

    A fused layer checks at every call whether the fused op computes what PEFT would (one active, plain adapter, no
    hooks, …); where it does not, PEFT's forward runs and the layer's ``fallback_reason`` says why.

    Args:
        peft_model: any module that holds PEFT layers: a PeftModel, or a model after ``add_adapter``.
        filter_fn: (name, layer) → whether to fuse it.
        strict: raise if a layer that ``filter_fn`` admits cannot be fused.
        allow_empty: accept that no layer is fused.

    Raises:
        ArgumentError: no layer to fuse, or ``strict`` and a layer left alone. The model is then unchanged.
        MissingPackageError: PEFT is not installed.
    """
    fused = fused_class()
    report, chosen, unwanted = Report("fused"), [], {}
    for name, layer in peft_layers(peft_model).items():
        if filter_fn is not None and not filter_fn(name, layer):
            report.left[name] = "excluded by filter_fn"
        elif type(layer) is fused:
            report.left[name] = "already fused"
        elif (reason := _unfusable(layer)) is not None:
            report.left[name] = unwanted[name] = reason
        else:
            report.changed[name] = fused.__name__
            chosen.append(layer)
    if strict and unwanted:
        got = Report("fused", left=unwanted).reasons()
        raise checks.ArgumentError("peft_model", "only layers that can be fused (strict=True)", got)
    report.require_change("peft_model", "at least one LoRA layer of PEFT to fuse", allow_empty)
    for layer in chosen:
        layer.__class__ = fused
    return report


def _unfusable(layer: nn.Module) -> str | None:
    """Why a PEFT layer cannot run fused with any of its adapters as things are, or None."""
    from peft.tuners import lora

    from .peft_linear import fused_arguments

    if type(layer) is not lora.Linear:
        return f"PEFT layer {type(layer).__module__}.{type(layer).__name__}"
    if layer.merged_adapters:
        return "merged: unmerge it first"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    if layer.base_layer.weight.dtype not in checks.FLOATS:
        return f"weight of dtype {layer.base_layer.weight.dtype}"
    calls = [fused_arguments(layer, adapter) for adapter in layer.lora_A]
    if any(isinstance(call, tuple) for call in calls):
        return None
    return calls[0] if calls else "no adapter"


def unfuse_(peft_model: nn.Module, *, allow_empty: bool = False) -> Report:
    """Give fused layers PEFT's own forward back; the inverse of ``fuse_``. Merged layers have to be unmerged first.

    Raises:
        ArgumentError: no fused layer, and not ``allow_empty``. The model is then unchanged.
        MissingPackageError: PEFT is not installed.
    """
    fused = fused_class()
    from peft.tuners import lora

    report = Report("unfused")
    for name, layer in peft_layers(peft_model).items():
        if type(layer) is not fused:
            report.left[name] = "not fused"
        elif layer.merged_adapters:
            report.left[name] = "merged: unmerge it first"
        else:
            report.changed[name] = "peft.tuners.lora.Linear"
    report.require_change("peft_model", "at least one fused layer", allow_empty)
    for name in report.changed:
        layer = peft_model.get_submodule(name)
        layer.__dict__.pop("fallback_reason", None)
        layer.__class__ = lora.Linear
    return report
