"""LoRALinear: a frozen linear layer and its adapter in one module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import changed_base, checks, functional

INITS = ("kaiming", "gaussian")


class Mergeable:
    """Of a layer with ``weight``, lora_A, lora_B, scaling and a buffer ``_unmerged_weight``, None at first."""

    def merge(self) -> None:
        """Fold the adapter into ``weight`` with one rounding; the original is kept until ``unmerge``."""
        if not self.merged:
            original = self.weight.data
            self.weight.data = merged_weight(original, [(self.lora_A, self.lora_B, self.scaling)])
            self._unmerged_weight = original

    def unmerge(self) -> None:
        """Restore every bit of the weight from before ``merge``."""
        if self.merged:
            self.weight.data = self._unmerged_weight
            self._unmerged_weight = None

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None


class LoRALinear(Mergeable, nn.Module):
    """Linear layer with a low-rank adapter (Hu et al., arXiv 2106.09685), computed as one fused op.

    ``y = x Wᵀ + bias + scaling · dropout(x) aᵀ bᵀ``, scaling = alpha / r.

    Args:
        in_features: d_in.
        out_features: d_out.
        r: rank, 1 to 256.
        alpha: scale of the adapter; ``scaling`` = alpha / r, or alpha / sqrt(r) with ``use_rslora``.
        dropout: probability of dropping an element of x on the adapter's way, in training only.
        bias: whether the frozen layer has one.
        use_rslora: rank-stabilised scaling (Kalajdzievski, arXiv 2312.03732).
        init: of ``lora_A``: ``"kaiming"`` (PEFT's default) or ``"gaussian"`` (std 1/r); ``lora_B`` starts at 0.
        device: of all parameters.
        dtype: of all parameters (``from_linear`` gives the adapter float32 where the weight is 16-bit, as PEFT does).

    Attributes:
        weight: (d_out, d_in), frozen. bias: (d_out,), frozen, or None.
        lora_A: (r, d_in), trained. lora_B: (d_out, r), trained.
        merged: True while ``weight`` contains the adapter.

    Raises:
        ArgumentError: r, alpha, dropout or init out of range.
    """

    TRAINED = ("lora_A", "lora_B")  # parameters
    FREE = ()  # tensors that lora_A and lora_B do not tell: none
    SETTINGS = ("alpha", "use_rslora")  # besides r and dropout

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        init: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.r = checks.rank(r)
        self.alpha = checks.positive(alpha, "alpha")
        self.dropout_p = checks.probability(dropout)
        self.use_rslora = use_rslora
        self.init = checks.choice(init, "init", INITS)
        self.scaling = self.alpha / (math.sqrt(r) if use_rslora else r)
        place = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **place), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, **place), requires_grad=False) if bias else None
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **place))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **place))
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
    ) -> LoRALinear:
        """The fused layer over ``linear``'s own parameters (shared, not copied, and frozen from now on).

        The adapter is on the weight's device, in float32 where the weight is 16-bit, else in the weight's dtype.
        """
        return over_linear(cls, linear, r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora, init=init)

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation of weight and bias, and a fresh adapter."""
        nn.Linear.reset_parameters(self)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """A fresh adapter: ``lora_A`` by ``init``, ``lora_B`` zero, so that the layer starts as its frozen linear."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=1 / self.r)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) → (..., d_out)."""
        if self._buffers["_unmerged_weight"] is not None:
            return nn.functional.linear(x, self.weight, self.bias)
        p = self._parameters
        if len(p) == 4:  # nn.Module.__getattr__ costs host time at every call
            weight, bias, lora_A, lora_B = p["weight"], p["bias"], p["lora_A"], p["lora_B"]
        else:  # parametrized or flattened (FSDP1): a parameter is an attribute of another kind
            weight, bias, lora_A, lora_B = self.weight, self.bias, self.lora_A, self.lora_B
        dropout_p = self.dropout_p if self.training else 0.0
        return functional.lora_linear(x, weight, bias, lora_A, lora_B, self.scaling, dropout_p)

    def extra_repr(self) -> str:
        rows = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{rows}, r={self.r}, alpha={self.alpha:g}, dropout={self.dropout_p:g}" + (", merged" * self.merged)


def over_linear(kind: type[nn.Module], linear: nn.Linear, **settings) -> nn.Module:
    """An adapter layer of the kind over ``linear``'s own parameters (shared, not copied, and frozen from now on). The
    adapter, fresh, is on the weight's device, in float32 where the weight is 16-bit, else in the weight's dtype."""
    if not isinstance(linear, nn.Linear):
        raise checks.ArgumentError("linear", "a torch.nn.Linear", type(linear).__name__)
    weight, bias = linear.weight, linear.bias
    if weight.dtype not in checks.FLOATS:
        expected = "a dtype among float16, bfloat16, float32, float64"
        raise checks.ArgumentError("linear.weight", expected, weight.dtype)
    place = {"device": "meta", "dtype": torch.promote_types(weight.dtype, torch.float32)}
    layer = kind(linear.in_features, linear.out_features, bias=bias is not None, **settings, **place)
    for name in kind.TRAINED:
        free = getattr(layer, name)
        setattr(layer, name, nn.Parameter(torch.empty_like(free, device=weight.device), free.requires_grad))
    layer.reset_adapter()
    layer.weight = weight.requires_grad_(False)
    layer.bias = None if bias is None else bias.requires_grad_(False)
    if changed_base.is_changed(linear):
        changed_base.mark(layer)
    return layer.train(linear.training)


@torch.no_grad()
def merged_weight(weight: Tensor, adapters: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """A new tensor weight + Σ scaling · b a over the (a, b, scaling) given, summed in float32 (float64 for a float64
    weight) and rounded once to weight's dtype. weight: (d_out, d_in), a: (r, d_in), b: (d_out, r)."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for a, b, scaling in adapters:
        total = torch.addmm(total, b.to(total.dtype), a.to(total.dtype), alpha=scaling)
    return total.to(weight.dtype)
