"""PEFT's LoRA layers with the fused forward. ``fuse_`` gives a ``peft.tuners.lora.Linear`` the class FusedLoraLinear,
and a layer over a quantised weight a class of its own (fused_quantized.py).

Parameters, keys and state stay PEFT's own, so PEFT works with the layer as before. Every call checks whether the fused
op computes the same as PEFT's forward; if not, PEFT's forward runs and ``fallback_reason`` contains the reason.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor
from torch.nn import Dropout, Identity, Linear, Module, Parameter
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .. import checks, regions
from ..checks import FLOATS, PLAIN
from ..functional.linear import is_autocast_on, reason_against_op, run_op
from ..kernels.limits import LARGEST_RANK
from ..ops.composite import QUANTIZED_TRACED
from ..quantized import quantized_weight
from . import groups, mixed_batch
from .dora import dora, group_arguments, kept_norms, row_norms, scale_of
from .exact_merge import ExactMerge, merge_scaling
from .fallback import Fallback
from .find import PeftLayer
from .hooks import HOOK, is_hooked, is_offloaded, loaded, returns_to_input
from .terms import Term

# Looked up once, because attribute accesses cost host time in every call.
_traced, _in_backward = torch.compiler.is_compiling, torch._C._current_graph_task_id
DROPOUTS = (Identity, Dropout)
CASTING_OFF = "casting of the input is off"
HOOKED_ALL = "hooks of all modules"
HOOKED = "hooks, or a replaced forward, on the base layer or the adapter"


class FusedForward(Fallback):
    """A mixin for PEFT's LoRA layers, the next base classes, whose forward is one fused op wherever that computes the
    same.

    Attributes:
        PEFT_CLASS: PEFT's class of the layer.
        fallback_reason: why the last call ran PEFT's own forward; None if it ran fused.
    """

    PEFT_CLASS: ClassVar[type]
    if TYPE_CHECKING:  # of PEFT's layer
        lora_A: Any  # nn.ModuleDict of nn.Linear, whose entries torch types as any module
        lora_B: Any
        active_adapters: Any
        merged_adapters: Any
        lora_magnitude_vector: Any
        lora_variant: dict[str, Any]
        cast_input_dtype_enabled: bool
        _active_adapter: Any
        _disable_adapters: bool

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x: (..., d_in) → (..., d_out) in the dtype of the base layer's result."""
        if args or kwargs:
            return self._forward_with_arguments(x, *args, **kwargs)
        call = self._fused_call(x)
        if isinstance(call, str):
            if call == HOOKED and (offloaded := offloaded_modules(self, self.active_adapters[0])):
                with loaded(offloaded):
                    return self.forward(x)
            self._note(call)
            return super().forward(x)
        if self.fallback_reason is not None:  # nn.Module.__setattr__ is slow, so it runs only for a change
            self._note(None)
        base: Any = self._modules["base_layer"]
        if HOOK in base.__dict__:  # accelerate's, which would move x to the weight's device
            y = self._compute(x.to(call[0].device), call)
            return y.to(x.device) if y.device != x.device and returns_to_input(base) else y
        return self._compute(x, call)

    def _forward_with_arguments(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Computes a batch with an adapter for each sample, or what PEFT's forward does with other arguments."""
        call: Any = "extra arguments"
        if not args and kwargs.keys() == {"adapter_names"}:
            call = mixed_batch.mixed_call(self, x, kwargs["adapter_names"], fused_arguments)
            call = HOOKED_ALL if has_global_hooks(self) else call
        reason = call if isinstance(call, str) else None
        if reason is not self.fallback_reason:
            self._note(reason)
        return super().forward(x, *args, **kwargs) if isinstance(call, str) else mixed_batch.run(x, call)

    def _compute(self, x: Tensor, call: tuple) -> Tensor:
        """Computes a call that the op serves."""
        if self.lora_variant and (magnitude := self._magnitude()) is not None:
            return dora(x, call, magnitude, kept_norms(self), self._run)
        return self._run(x, call)

    def _magnitude(self) -> Tensor | None:
        """Returns the magnitudes of the active adapter of a call that the op serves, None if it is plain."""
        active = self._active_adapter
        active = active if type(active) is str else active[0]
        return self.lora_magnitude_vector[active].weight if active in self.lora_variant else None

    @property
    def has_own_op(self) -> bool:  # type: ignore[override]
        is_dora = bool(self.lora_variant) and self._magnitude() is not None
        return is_dora and type(self._modules["base_layer"]) in (Linear, Conv1D)

    def _run(self, x: Tensor, call: tuple) -> Tensor:
        """Computes the op, with the layers of this x if there are any."""
        if _traced() or self.siblings is None:
            return run_op(x, *call)
        y = groups.taken(self, x, call)
        return groups.run(self, x, call) if y is None else y

    def call_arguments(self, x: Tensor) -> tuple | None:
        """Returns ``functional.lora_linear``'s arguments after x if the fused op would serve a call with x, else
        None."""
        call = self._fused_call(x)
        if isinstance(call, str):
            return None
        if self.lora_variant and self._magnitude() is not None:
            return group_arguments(call)
        return call

    def train(self, mode: bool = True) -> Any:
        self.__dict__.pop("_norms", None)
        return super().train(mode)

    def _get_name(self) -> str:
        """Returns the name of PEFT's class, from whose repr PEFT's layer status takes the ``module_type``."""
        return self.PEFT_CLASS.__name__

    def extra_repr(self) -> str:
        return (
            "fused" if self.fallback_reason is None else f"fused, last call by PEFT's forward: {self.fallback_reason}"
        )

    def _fused_call(self, x: Tensor) -> tuple | str:
        """Returns ``lora_linear``'s arguments after x, or the reason why PEFT's forward has to run. It runs at every
        call, so it reads PEFT's fields instead of its slower properties."""
        if self._disable_adapters:
            return "adapters disabled"
        if self.merged_adapters:
            return "merged"
        active = self._active_adapter
        if type(active) is not str:
            if len(active) != 1:
                return f"{len(active)} active adapters"
            active = active[0]
        arguments = fused_arguments(self, active)
        if isinstance(arguments, str):
            return arguments
        if has_global_hooks(self):
            return HOOKED_ALL
        if active in self.lora_variant and x.dim() < 2:
            return "1-d input to DoRA"  # PEFT's result has a dimension more
        call, lora_bias = arguments
        weight, bias = call[0], call[1]
        # Autocast casts x, weight and bias to one dtype, except float64. Without it PEFT casts x for the adapter only.
        if x.dtype not in FLOATS:
            return f"{x.dtype} input"
        if weight.dtype is None:
            if not self.cast_input_dtype_enabled:
                return CASTING_OFF
        elif x.dtype is not weight.dtype or (bias is not None and bias.dtype is not weight.dtype):
            if torch.float64 in (x.dtype, weight.dtype) or not is_autocast_on(weight.device.type):
                return f"{x.dtype} input to {weight.dtype} weights"
        elif not self.cast_input_dtype_enabled:
            return CASTING_OFF
        scaling = call[4]
        reason = reason_against_op(x, weight, call[2], call[3])
        if type(scaling) is not float or not -math.inf < scaling < math.inf:
            reason = reason or _reason_against_scaling(scaling, weight)
        if reason is None and lora_bias is not None:
            return weight, _sum_of_biases(bias, lora_bias * scaling, weight.dtype or x.dtype), *call[2:]
        return reason or call


class FusedLoraLinear(FusedForward, ExactMerge, lora.Linear):
    """A ``peft.tuners.lora.Linear`` with the fused forward."""

    PEFT_CLASS = lora.Linear

    def merge_terms(self, adapter: str) -> list[tuple[Parameter, Term]] | str:
        base: Any = self.get_base_layer()
        a, b, scaling = self.lora_A[adapter], self.lora_B[adapter], merge_scaling(self.scaling[adapter])
        if scaling is None:
            return f"scaling of type {type(self.scaling[adapter]).__name__}"
        if type(base) not in (Linear, Conv1D):
            return f"base layer {type(base).__name__}, not torch.nn.Linear"
        if adapter in self.lora_variant and not self.scales(adapter):
            return "adapter that is more than scaling · b a"
        factors = (b.weight.mT, a.weight.mT) if self.fan_in_fan_out else (a.weight, b.weight)
        terms = [(base.weight, Term(*factors, scaling))]
        if b.bias is not None:
            if base.bias is None:
                return "bias on lora_B over a base layer without one"
            terms.append((base.bias, Term(b.bias.new_ones((1, 1)), b.bias[:, None], scaling)))
        return terms

    def scales(self, adapter: str) -> bool:
        return type(self.lora_variant.get(adapter)) is DoraLinearVariant

    def merge_scale(self, adapter: str) -> Tensor | None:
        if not self.scales(adapter):
            return None
        base: Any = self.get_base_layer()
        weight = base.weight.detach().mT if self.fan_in_fan_out else base.weight.detach()
        rows = row_norms(weight, self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter])
        self._cache_store(f"{adapter}-weight_norm", rows)
        scale: Tensor = scale_of(self.lora_magnitude_vector[adapter].weight, rows)
        return scale[None] if self.fan_in_fan_out else scale[:, None]


def _reason_against_scaling(scaling: Any, weight: Tensor) -> str | None:
    """Returns why the op does not take a scaling, with which PEFT multiplies whatever it is."""
    try:
        checks.scaling(scaling, weight.device)
    except checks.ArgumentError:
        return f"scaling {scaling!r}" if isinstance(scaling, float) else f"scaling of type {type(scaling).__name__}"
    return None


def fused_arguments(layer: PeftLayer, adapter: str) -> tuple[tuple, Tensor | None] | str:
    """Returns ``lora_linear``'s arguments after x for one adapter, or why the fused op does not compute the same as
    PEFT.

    Returns:
        (weight, bias, lora_A, lora_B, scaling, dropout_p) and lora_B's bias, which is to be scaled and added to the
        base layer's; or the reason as a string.
    """
    modules = layer._modules  # read past nn.Module.__getattr__, which costs host time at every call
    base, a = modules["base_layer"], modules["lora_A"]._modules.get(adapter)
    if a is None:
        return f"no adapter {adapter!r} in this layer"
    b, dropout = modules["lora_B"]._modules[adapter], modules["lora_dropout"]._modules[adapter]
    is_plain = adapter not in layer.lora_variant
    if not is_plain and (reason := _reason_against_variant(layer, adapter)) is not None:
        return reason
    if type(a) is not Linear or type(b) is not Linear or type(dropout) not in DROPOUTS:
        return f"adapter of {type(a).__name__}, {type(b).__name__}, {type(dropout).__name__}"
    if is_hooked(base) or is_hooked(a) or is_hooked(b) or is_hooked(dropout):
        return HOOKED
    parameters: Any  # of any types: the next lines check them
    if "_is_replica" in layer.__dict__:  # nn.DataParallel's replica, whose tensors are plain attributes
        parameters, a_parameters, b_parameters = base.__dict__, a.__dict__, b.__dict__
    else:
        parameters, a_parameters, b_parameters = base._parameters, a._parameters, b._parameters
    weight, lora_a, lora_b = parameters.get("weight"), a_parameters.get("weight"), b_parameters.get("weight")
    bias = parameters.get("bias")
    if not ((type(base) is Linear or type(base) is Conv1D) and type(weight) in PLAIN):
        weight = _quantized_weight(base, bias)
        if isinstance(weight, str):
            return weight
        bias = None  # the base layer adds it
    elif weight.requires_grad:
        return "trainable base weight"
    elif type(base) is Conv1D:
        weight = weight.t()  # a view: the op takes any strides
    if type(lora_a) not in PLAIN or type(lora_b) not in PLAIN:
        return f"adapter of {type(lora_a).__name__}, {type(lora_b).__name__}"
    if layer.r[adapter] > LARGEST_RANK:
        return f"rank {layer.r[adapter]}, above {LARGEST_RANK}"
    if a_parameters.get("bias") is not None:
        return "bias on lora_A"
    drops = dropout.training and type(dropout) is Dropout and (is_plain or layer.training)  # DoRA's looks at the layer
    dropout_p = dropout.p if drops else 0.0
    arguments = weight, bias, lora_a, lora_b, layer.scaling[adapter], dropout_p
    return arguments, b_parameters.get("bias")


def _reason_against_variant(layer: PeftLayer, adapter: str) -> str | None:
    """Returns why the op does not compute a variant of LoRA, None for DoRA."""
    variant = layer.lora_variant[adapter]
    if type(variant) is not DoraLinearVariant:
        return f"variant {type(variant).__name__}"
    if layer.ephemeral_gpu_offload:
        return "DoRA with ephemeral_gpu_offload"
    holder = layer._modules["lora_magnitude_vector"]._modules[adapter]
    if is_hooked(holder):
        return HOOKED
    magnitude = holder._parameters.get("weight") if "_is_replica" not in layer.__dict__ else holder.weight
    if type(holder) is not DoraLinearLayer or type(magnitude) not in PLAIN:
        return f"magnitudes in a {type(holder).__name__} of {type(magnitude).__name__}"
    return None


def _quantized_weight(base: Module, bias: Tensor | None) -> Any:
    """Returns the base layer's quantised weight, or why the op does not take what the base layer has."""
    if _traced():
        return QUANTIZED_TRACED
    if "_is_replica" in base.__dict__:
        return f"replica of {type(base).__name__} in nn.DataParallel"
    weight = quantized_weight(base)
    if weight is None:
        if type(base) in (Linear, Conv1D):
            return f"weight of type {type(base._parameters.get('weight')).__name__}"
        return f"base layer {type(base).__name__}, not torch.nn.Linear or of a known quantised format"
    if bias is not None and bias.requires_grad:
        return f"trained bias of a {type(base).__name__}"
    return weight


def has_global_hooks(layer: PeftLayer) -> bool:
    """Returns whether there are hooks of all modules. A checkpointed region that runs again runs what it has run at
    first, which saved the tensors that its backward needs, whatever was registered or removed meanwhile."""
    hooked = _has_any_global_hook()
    if _traced() or (not hooked and _in_backward() == -1):
        return hooked
    return regions.true_again(f"hooks_{id(layer)}", hooked)


def _sum_of_biases(bias: Tensor | None, scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the base layer's bias plus the scaled bias of lora_B (``lora_bias=True``), in the weight's dtype, or in
    float32 where the weight has 16 bits and the adapter has more."""
    total = scaled if bias is None else scaled + bias
    return total.to(dtype if scaled.dtype is dtype or dtype.itemsize > 2 else torch.float32)


def offloaded_modules(layer: PeftLayer, adapter: str) -> list[Module]:
    """Returns the modules of an adapter's call that accelerate offloads, so that ``loaded`` removes what ``HOOKED``
    names; none if others have other hooks, or no data (PEFT creates adapters of an offloaded layer without)."""
    parts = [layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]]
    hooked = [module for module in parts if is_hooked(module)]
    others = [module for module in parts if module not in hooked]
    is_loaded = not any(parameter.is_meta for module in others for parameter in module.parameters())
    return hooked if is_loaded and all(map(is_offloaded, hooked)) else []
