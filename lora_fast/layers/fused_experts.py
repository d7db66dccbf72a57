"""PEFT's adapters of experts' parameters (``target_parameters``) with the fused forward.

PEFT has one ``ParamWrapper`` for each adapted parameter, and nests those of one module. Its forward computes W + ΔW of
all experts and replaces the parameter by it during the call. Here the outermost wrapper computes the module's forward
with the fused op for each adapted parameter (experts.py), and W + ΔW is never formed. Every call checks whether that is
the same; if not, PEFT's forward runs and ``fallback_reason`` contains the reason.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from ..checks import FLOATS, LARGEST_SCALING, NUMBERS, PLAIN
from ..functional.experts import grouped_linear, lora_grouped_linear
from ..functional.linear import is_autocast_on, reason_against_op
from ..kernels.limits import LARGEST_RANK
from .experts import Experts, experts_of
from .fallback import Fallback
from .fused_peft import has_global_hooks
from .hooks import is_hooked

HOOKED = "hooks, or a replaced forward, on the experts"
INSIDE = "parametrized experts, as within PEFT's forward of another parameter"


class Factors(NamedTuple):
    """An adapter of all experts: a (E, r, d_in), b (E, d_out, r), and the scaling."""

    a: Tensor
    b: Tensor
    scaling: float


class FusedParamWrapper(Fallback, ParamWrapper):
    """A ``peft.tuners.lora.ParamWrapper`` with the fused forward.

    Attributes:
        fallback_reason: why the last call ran PEFT's own forward; None if it ran fused, or within that of the outermost
            wrapper.
    """

    PEFT_CLASS = ParamWrapper
    takes_siblings = False

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Takes and returns what the experts' module does."""
        call = "extra arguments" if kwargs else self._fused_call(x, *args)
        if isinstance(call, str):
            self._note(call)
            return super().forward(x, *args, **kwargs)
        kind, wrappers, adapters = call
        for wrapper in wrappers:
            if wrapper.fallback_reason is not None:
                wrapper._note(None)
        module = wrappers[-1].base_layer
        return kind.forward(module, partial(_linear, kind, module, adapters), x, *args)

    def extra_repr(self) -> str:
        reason = self.fallback_reason
        return "fused" if reason is None else f"fused, last call by PEFT's forward: {reason}"

    def _fused_call(self, x: Any, *args: Any) -> tuple[Experts, list[Any], dict[str, Factors]] | str:
        """Returns the kind of the experts, this wrapper and those within it, and the adapter of each parameter that has
        an active one; or the reason why PEFT's forward has to run."""
        wrappers, module = chain(self)
        adapters: dict[str, Factors] = {}
        for wrapper in wrappers:
            factors = wrapper._active_factors() if type(wrapper) is FusedParamWrapper else NOT_FUSED
            if isinstance(factors, str):
                return factors
            if factors is not None:
                adapters[wrapper.parameter_name] = factors
        if not adapters:
            return "no active adapter"
        if has_global_hooks(self):
            return "hooks of all modules"
        if is_hooked(module) or any(is_hooked(wrapper) for wrapper in wrappers[1:]):
            return HOOKED
        kind = experts_of(module)
        if kind is None or "parametrizations" in module._modules:
            return INSIDE if kind else f"{type(module).__name__} with a forward of its own"
        return _reason_against_call(kind, module, adapters, x, args) or (kind, wrappers, adapters)

    def _active_factors(self) -> Factors | str | None:
        """Returns the active adapter, None where there is none, or why PEFT's forward has to run."""
        if self._disable_adapters:
            return "adapters disabled"
        if self.merged_adapters:
            return "merged"
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) > 1:
            return f"{len(active)} active adapters"
        return factors_of(self, active[0]) if active else None


# PEFT looks for the class by this name; pickle takes the qualified one.
FusedParamWrapper.__name__ = ParamWrapper.__name__
NOT_FUSED = "beside an adapter of another parameter that is not fused"


def chain(wrapper: nn.Module) -> tuple[list[Any], nn.Module]:
    """Returns a wrapper with those within it, and the module whose parameters they adapt."""
    wrappers, module = [], wrapper
    while isinstance(module, ParamWrapper):
        wrappers.append(module)
        module = module.base_layer
    return wrappers, module


def factors_of(wrapper: Any, adapter: str) -> Factors | str:
    """Returns the factors of all experts as views of PEFT's, or why there are none for the op.

    PEFT keeps (r·E, d) and (d', E·r) for the change of the parameter (E, p, q) as stored. Their roles depend on the
    layout that it takes the parameter to have, which is not the module's in PEFT 0.18."""
    a, b, experts, rank = wrapper.lora_A[adapter], wrapper.lora_B[adapter], wrapper.num_experts, wrapper.r[adapter]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or adapter in wrapper.lora_variant:
        return f"adapter of {type(a).__name__}, {type(b).__name__}"
    if is_hooked(a) or is_hooked(b):
        return "hooks on the adapter"
    if a.bias is not None or b.bias is not None:
        return "bias on the adapter"
    if type(a.weight) not in PLAIN or type(b.weight) not in PLAIN:
        return f"adapter of {type(a.weight).__name__}, {type(b.weight).__name__}"
    if experts == 1:
        return "a single expert"
    if len(a.weight) != experts * rank or b.weight.shape[1] != experts * rank:
        return f"adapter of {len(a.weight)} ranks for {experts} experts of rank {rank}"
    if rank > LARGEST_RANK:
        return f"rank {rank}, above {LARGEST_RANK}"
    scaling = wrapper.scaling[adapter]
    if type(scaling) not in NUMBERS or not abs(scaling) <= LARGEST_SCALING:
        return f"scaling {scaling!r}" if isinstance(scaling, float) else f"scaling of type {type(scaling).__name__}"
    lora_a = a.weight.reshape(experts, rank, -1)
    lora_b = b.weight.reshape(-1, rank, experts).permute(2, 0, 1)
    takes_out_in = getattr(wrapper, "_did_swap_in_out_features", False)
    if takes_out_in == getattr(wrapper.get_base_layer(), "is_transposed", False):
        lora_a, lora_b = lora_b.mT, lora_a.mT
    return Factors(lora_a, lora_b, scaling)


def reason_against_parameter(kind: Experts, module: Any, name: str) -> str | None:
    """Returns why the op cannot compute with an adapted parameter and the others of its module, or None if it can."""
    if name not in kind.parameters(module):
        return f"parameter {name!r}, which is none of its linear layers"
    return next((reason for name in kind.parameters(module) if (reason := _against(getattr(module, name)))), None)


def _against(weight: Any) -> str | None:
    if type(weight) not in PLAIN:
        return f"weight of type {type(weight).__name__}"
    if weight.dim() != 3 or weight.dtype not in FLOATS:
        return f"weight of {weight.dim()} dimensions and dtype {weight.dtype}"
    return "trainable base weight" if weight.requires_grad else None


def _reason_against_call(kind: Experts, module: Any, adapters: dict[str, Factors], x: Any, args: tuple) -> str | None:
    """Returns why the op cannot serve a call of the experts with x and these further arguments, or None if it can."""
    weights = [getattr(module, name) for name in kind.parameters(module)]
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or any(w.dtype is not weights[0].dtype for w in weights):
        return f"{getattr(x, 'dtype', type(x).__name__)} input to weights of {[w.dtype for w in weights]}"
    if any(tensor.device != x.device for tensor in weights):
        return "input on another device"
    if type(x) in PLAIN and (reason := kind.reason(module, weights[0].dtype, x, *args)):
        return reason
    for name, (a, b, _) in adapters.items():
        if reason := reason_against_parameter(kind, module, name) or reason_against_op(x, getattr(module, name), a, b):
            return reason
        if a.device != x.device:
            return "adapter on another device"
    return None


def _linear(kind: Experts, module: Any, adapters: dict[str, Factors], name: str, rows: Tensor, offsets: Tensor):
    """Returns the results of the experts' linear layers with the parameter of this name."""
    weight, bias, adapter = getattr(module, name), kind.bias(module, name), adapters.get(name)
    weight = weight.mT if kind.is_transposed(module) else weight
    device = rows.device.type
    with torch.autocast(device, enabled=False) if is_autocast_on(device) else nullcontext():
        rows = rows.to(weight.dtype)
        if adapter is None:
            return grouped_linear(rows, weight, bias, offsets)
        return lora_grouped_linear(rows, weight, bias, *adapter, offsets)
