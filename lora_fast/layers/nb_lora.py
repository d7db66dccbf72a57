"""NBLoRALinear: a frozen linear layer with a norm-bounded adapter, and the hooks by which a model computes the factors
of all such layers in one call."""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .. import checks, regions
from ..functional.linear import is_autocast_on
from ..kernels.grouping import group_by
from . import factor_cache, hooks, inverse_cayley
from .base import AdapterLinear, checked_weight
from .rounding_room import UNIT_ROUNDOFF, usable_bound
from .terms import merged_weight


class SharedFactors(NamedTuple):
    """The factors of a layer that a model's running forward has computed.

    Attributes:
        thread: the thread of that forward. Another one may run the same layer with other gradients enabled, or none.
        factors: a (r, d_in) and b (d_out, r).
        bound: the layer's ``applied_bound`` when the factors were computed.
    """

    thread: int
    factors: tuple[Tensor, Tensor]
    bound: float


NORMS = {"spectral": 0.0, "frobenius": 0.5, "nuclear": 1.0}  # name → 1 / p of the Schatten norm


class NBLoRALinear(AdapterLinear):
    """Linear layer with a low-rank adapter whose norm cannot exceed a bound ("Norm-Bounded Low-Rank Adaptation").

    ``y = x Wᵀ + bias + dropout(x) aᵀ bᵀ``, computed as one fused op. The factors a and b are not trained themselves.
    They are the Cayley transform of free parameters, with the scales folded into b. The singular values of ΔW = b a are
    therefore at most sv (both sorted), and the norm of sv is at most the bound, for all values of the parameters:
    sv = bound · softmax(free_scale / √r)^(1/p) with p = 1 (nuclear), 2 (Frobenius) or ∞ (spectral: sv = bound).

    The bound holds as applied, with the rounding of the layer's products. Where they run in 16 bits (a 16-bit weight,
    or autocast), sv is therefore computed from ``applied_bound``, which is a little lower (rounding_room.py): in
    bfloat16 by 1.2 %, and by another 3.6 % for the nuclear norm of a 1024×1024 matrix; in float16 by an eighth.

    A layer called by itself computes its own factors. In a model that went through ``lf.inject_`` or
    ``share_factors_``, the factors of all layers are computed in one call before the model's forward.

    Args:
        in_features, out_features, r, dropout, bias, device, dtype: as AdapterLinear; r at most d_in.
        norm: ``"spectral"``, ``"frobenius"`` or ``"nuclear"``.
        bound: upper bound on the norm of ΔW. None means 1 (spectral), √r (Frobenius) or r (nuclear), with which all sv
            are 1 at the start.
        learn_scale: train the shares of the bound that the singular values get. The spectral norm has no shares.

    Attributes:
        weight, bias, merged: as AdapterLinear.
        free_a: (r, d_in), free_b: (d_out, r), trained. free_scale: (r,), trained with ``learn_scale``.
        bound: the bound, which may be changed at any time.

    Raises:
        ArgumentError: r, norm, bound or dropout out of range.
    """

    TRAINABLE = SAVED_STATE = factor_cache.SAVED_STATE
    INIT_ARGUMENTS = ("norm", "bound", "learn_scale")
    takes_siblings = False
    scaling = 1.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        norm: str = "nuclear",
        bound: float | None = None,
        learn_scale: bool = True,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, r, dropout, bias, device, dtype)
        if r > in_features:
            raise checks.ArgumentError("r", f"at most in_features, {in_features}", r)
        self.norm = checks.choice(norm, "norm", tuple(NORMS))
        self.power = NORMS[norm]
        self.bound = r**self.power if bound is None else checks.positive(bound, "bound")
        self.learn_scale = checks.flag(learn_scale, "learn_scale")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.free_a = nn.Parameter(torch.empty(r, in_features, **place))
        self.free_b = nn.Parameter(torch.empty(out_features, r, **place))
        self.free_scale = nn.Parameter(torch.empty(r, **place), requires_grad=learn_scale and self.power > 0)
        self.cache: factor_cache.CachedFactors | None = None
        self.shared: SharedFactors | None = None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, bound_ratio: float | None = None, **settings) -> Self:
        """Returns a layer that shares ``linear``'s parameters, as ``AdapterLinear.from_linear`` does.

        Args:
            bound_ratio: instead of ``bound``, the bound as a multiple of the weight's own norm.
        """
        if bound_ratio is not None:
            settings["bound"] = _bound_from(linear, bound_ratio, **settings)
        return super().from_linear(linear, **settings)

    def reset_adapter(self) -> None:
        """Initialises ``free_a`` by Kaiming and the other parameters to 0, so that b = 0, a aᵀ = I and all singular
        values have equal shares of the bound."""
        nn.init.kaiming_uniform_(self.free_a, a=math.sqrt(5))
        nn.init.zeros_(self.free_b)
        nn.init.zeros_(self.free_scale)

    @property
    def applied_bound(self) -> float:
        """The bound on the exact ΔW: ``bound``, less the room for rounding in the dtype in which the layer's products
        run now."""
        dtype, device_type = self.weight.dtype, self.weight.device.type
        if self.base is not None:
            dtype = torch.bfloat16  # x may have any dtype: the most room that it can need
        elif dtype is not torch.float64 and is_autocast_on(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        equal_values = 1 if self.learn_scale else self.r
        return usable_bound(dtype, self.bound, self.power, (self.in_features, self.out_features), equal_values)

    def factors(self) -> tuple[Tensor, Tensor]:
        shared = self.shared
        if shared is None or shared.thread != _thread():
            return factor_cache.cached_factors([self])[0]
        (a, b), bound = shared.factors, self.applied_bound
        if bound == shared.bound:
            return a, b
        # A model may enter autocast within its forward, after the hook that computed the factors.
        with regions.unseen():
            return a, b * (bound / shared.bound)

    @torch.no_grad()
    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Returns a (r, d_in) and b (d_out, r) of the plain LoRA adapter with scaling 1 that equals this layer in its
        dtype, in at least float32."""
        return factor_cache.cached_factors([self])[0]

    @property
    def lora_A(self) -> Tensor:
        return self.plain_factors()[0]

    @property
    def lora_B(self) -> Tensor:
        return self.plain_factors()[1]

    @property
    def alpha(self) -> float:
        return float(self.r)

    def free_parameters_for(
        self, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns free_a, free_b and free_scale, in float64, with which ΔW = scaling · lora_B lora_A. They exist for
        every product of rank at most r within the bound. A product between ``applied_bound`` and ``bound`` is applied
        as the multiple that is within ``applied_bound``.

        Args:
            lora_A: (k, d_in), any k. lora_B: (d_out, k).

        Raises:
            ArgumentError: a norm above the bound or a rank above r (with the singular values); NaN or Inf.
        """
        device = self.free_a.device
        return inverse_cayley.free_parameters(
            lora_A.to(device), lora_B.to(device), scaling,
            self.r, self.bound, self.applied_bound, self.power, self.learn_scale,
        )  # fmt: skip

    @torch.no_grad()
    def merge_note(self) -> str:
        """Returns by how much the merged weight's rounding can exceed the bound, for a 16-bit weight. The errors are
        taken as independent, which gives their spectral norm; their nuclear norm is at most √m of their Frobenius norm.
        """
        original = self.original_weight().to(self.weight.device)
        if not self.merged or original.dtype not in UNIT_ROUNDOFF:
            return ""
        exact = merged_weight(original.float(), [self.merge_term()])
        error = torch.linalg.vector_norm(self.weight.data - exact).item()
        smaller, larger = sorted(original.shape)
        spread = {"spectral": smaller**-0.5 + larger**-0.5, "frobenius": 1.0, "nuclear": smaller**0.5}[self.norm]
        added = f"{error * spread / self.bound:.2g} times the bound, {self.bound:g}"
        dtype = str(original.dtype).removeprefix("torch.")
        return (
            f"rounding to the {dtype} weight adds up to about {added}, to the {self.norm} norm of ΔW" if error else ""
        )

    def train(self, mode: bool = True) -> Self:
        self.cache = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> Self:
        self.cache = None  # drop the cache so that no tensor stays on the old device
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> Self:
        """Returns nn.DataParallel's replica, which computes its own factors: these are on this layer's device."""
        replica = super()._replicate_for_data_parallel()
        replica.cache = replica.shared = None
        return replica

    def __getstate__(self) -> dict:
        """Returns the state for deepcopy, pickle and torch.save, without the factors, which are computed again."""
        return super().__getstate__() | {"cache": None, "shared": None}


def _bound_from(linear: nn.Linear, ratio: float, norm: str = "nuclear", bound: float | None = None, **others) -> float:
    """Returns the bound that is ``ratio`` times the weight's norm."""
    quantized = checked_weight(linear)
    weight = quantized.dequantized(torch.float32) if quantized else linear.weight
    checks.choice(norm, "norm", tuple(NORMS))
    check_bound_ratio(ratio, bound)
    if weight.is_meta:
        raise checks.ArgumentError("bound_ratio", "a weight with data", "a weight on the meta device")
    size = matrix_norm(weight, norm)
    if not 0.0 < size < math.inf:
        raise checks.ArgumentError("bound_ratio", "a weight whose norm is finite and above 0", f"norm {size:g}")
    return ratio * size


def check_bound_ratio(ratio: float, bound: float | None) -> None:
    """Raises ArgumentError unless the ratio is a finite number above 0 and no bound is given beside it."""
    checks.positive(ratio, "bound_ratio")
    if bound is not None:
        raise checks.ArgumentError(
            "bound_ratio", "None where bound is given", f"{ratio:g} and bound {checks.shown(bound)}"
        )


@torch.no_grad()
def matrix_norm(matrix: Tensor, norm: str) -> float:
    """Returns a norm of ``NORMS``, computed on the matrix's device. The spectral and nuclear norms come from the
    eigenvalues of the smaller Gram matrix in float64 (4096×4096: about ten seconds on a CPU core)."""
    if norm == "frobenius":
        return torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
    matrix = matrix.double()
    gram = matrix @ matrix.mT if len(matrix) <= matrix.shape[1] else matrix.mT @ matrix
    if not gram.isfinite().all():
        return math.nan
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return (singular.sum() if norm == "nuclear" else singular[-1]).item()


def share_factors_(model: nn.Module) -> None:
    """Registers hooks by which the model computes the factors of all its NBLoRALinear layers in one call before each
    forward. Layers that are sharded (DTensor) or merged are left out. Copies of the model have the hooks, too."""
    if before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(before_forward)
        model.register_forward_hook(after_forward, always_call=True)  # also after a forward that raises


def unshare_factors_(model: nn.Module) -> None:
    """Removes the hooks of ``share_factors_`` from all modules that contain no NBLoRALinear any more."""
    for module in model.modules():
        if any(isinstance(inner, NBLoRALinear) for inner in module.modules()):
            continue
        hooks = ((module._forward_pre_hooks, before_forward), (module._forward_hooks, after_forward))
        for registered, hook in hooks:
            for number in [number for number, function in registered.items() if function is hook]:
                del registered[number]
                module._forward_hooks_always_called.pop(number, None)


def before_forward(model: nn.Module, args: tuple) -> None:
    """Gives every layer its factors for this forward."""
    thread = _thread()
    for layer, factors in factors_of(model):
        layer.shared = SharedFactors(thread, factors, layer.applied_bound)


def factors_of(model: nn.Module) -> list[tuple[NBLoRALinear, tuple[Tensor, Tensor]]]:
    """Returns a (r, d_in) and b (d_out, r) of every NBLoRALinear not merged, disabled or sharded, computed in one call
    per device."""
    layers = [x for x in model.modules() if isinstance(x, NBLoRALinear) and not x.is_plain]
    # FSDP gathers a DTensor, or FSDP1's flat vector, only for its own module's forward, so such a layer computes its
    # factors there.
    whole = [layer for layer in layers if type(layer.free_a) in checks.PLAIN and layer.free_a.dim() == 2]
    # The same holds for a layer that accelerate has offloaded.
    whole = [layer for layer in whole if not (layer.free_a.is_meta and hooks.HOOK in layer.__dict__)]
    groups = group_by(whole, lambda layer: layer.free_a.device).values()
    return [pair for group in groups for pair in zip(group, factor_cache.cached_factors(group), strict=True)]


def after_forward(model: nn.Module, args: tuple, output: object) -> None:
    """Takes the factors back, so that a layer called by itself does not use old ones."""
    thread = _thread()
    for layer in model.modules():
        if isinstance(layer, NBLoRALinear) and layer.shared is not None and layer.shared.thread == thread:
            layer.shared = None


def _thread() -> int:
    """Returns the number of the current thread, 0 in compiled code, which cannot ask for it."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
