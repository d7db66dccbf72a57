"""AdapterLinear: the base class of all our adapter layers, whichever parameters their factors are computed from."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from .. import checks, functional
from . import merge_log
from .hooks import carry_hook


class AdapterLinear(nn.Module):
    """A frozen linear layer and its low-rank adapter: ``y = x Wᵀ + bias + scaling · dropout(x) aᵀ bᵀ``, one fused op.

    A parametrisation is a subclass with ``lora_A``, ``lora_B``, ``scaling`` and ``alpha`` = scaling · r of the plain
    LoRA adapter that it equals, and with ``reset_adapter``. Its constructor registers its parameters, then calls
    ``reset_parameters``. It has three class attributes:

        TRAINABLE        names of its trained parameters
        SAVED_STATE      names of the parameters and buffers that lora_A and lora_B do not determine, so that an
                         adapter's files must store them as well
        INIT_ARGUMENTS   names of its constructor's arguments besides r and dropout; each is also an attribute

    Args:
        in_features: d_in.
        out_features: d_out.
        r: rank, 1 to 256.
        dropout: probability that an element of x is dropped on the way to the adapter, in training only.
        bias: whether the frozen layer has a bias.
        device: device of all parameters.
        dtype: dtype of all parameters (``from_linear`` gives the adapter float32 where the weight is 16-bit, as PEFT
            does).

    Attributes:
        weight: (d_out, d_in), frozen. bias: (d_out,), frozen, or None.
        lora_A: a (r, d_in). lora_B: b (d_out, r).
        merged: True while ``weight`` contains the adapter.

    Raises:
        ArgumentError: r or dropout out of range.
    """

    TRAINABLE: tuple[str, ...]
    SAVED_STATE: tuple[str, ...] = ()
    INIT_ARGUMENTS: tuple[str, ...]
    use_rslora = False

    weight: Tensor
    bias: Tensor | None
    _unmerged_weight: Tensor | None
    if TYPE_CHECKING:  # read-only here: some subclasses have attributes of these names, others properties

        @property
        def lora_A(self) -> Tensor: ...
        @property
        def lora_B(self) -> Tensor: ...
        @property
        def scaling(self) -> float: ...
        @property
        def alpha(self) -> float: ...

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        dropout: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.r = checks.rank(r)
        self.dropout_p = checks.probability(dropout)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **place), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, **place), requires_grad=False) if bias else None
        self.register_buffer("_unmerged_weight", None, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings) -> Self:
        """Returns a layer that shares ``linear``'s parameters (they are not copied) and freezes them. Of accelerate's
        hooks the layer gets those that move the input to the weight's device.

        Args:
            linear: on any device, of a floating dtype. The new adapter is on its weight's device, in float32 where the
                weight is 16-bit, else in the weight's dtype.
            settings: the constructor's arguments except sizes, bias, device and dtype.

        Raises:
            ArgumentError: no nn.Linear, a weight of another dtype, or settings that the constructor refuses.
        """
        if not isinstance(linear, nn.Linear):
            raise checks.ArgumentError("linear", "a torch.nn.Linear", type(linear).__name__)
        weight, bias = linear.weight, linear.bias
        if weight.dtype not in checks.FLOATS:
            expected = "a dtype among float16, bfloat16, float32, float64"
            raise checks.ArgumentError("linear.weight", expected, weight.dtype)
        # On the meta device the constructor neither allocates nor initialises a weight that is replaced below.
        place: dict[str, Any] = {"device": "meta", "dtype": torch.promote_types(weight.dtype, torch.float32)}
        layer = cls(linear.in_features, linear.out_features, bias=bias is not None, **settings, **place)
        for name in cls.TRAINABLE:  # allocated once, here: the constructor's own are on the meta device
            free = getattr(layer, name)
            setattr(layer, name, nn.Parameter(torch.empty_like(free, device=weight.device), free.requires_grad))
        layer.reset_adapter()
        weight.requires_grad_(False)
        if bias is not None:
            bias.requires_grad_(False)
        layer.weight, layer.bias = weight, bias
        if merge_log.is_changed(linear):  # by a merge of an adapter that has been removed since
            merge_log.mark(layer)
        carry_hook(linear, layer)
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialises weight and bias as nn.Linear does, and the adapter."""
        nn.Linear.reset_parameters(cast(nn.Linear, self))  # it uses weight and bias alone
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialises the adapter."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns a (r, d_in) and b (d_out, r) for one forward, differentiable."""
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) → (..., d_out)."""
        if self._buffers["_unmerged_weight"] is not None:  # merged; read past nn.Module.__getattr__, which is slow
            return nn.functional.linear(x, self.weight, self.bias)
        weight, bias = self.frozen_parameters()
        a, b = self.factors()
        dropout_p = self.dropout_p if self.training else 0.0
        return functional.lora_linear(x, weight, bias, a, b, self.scaling, dropout_p)

    def frozen_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Returns weight and bias for one forward. FSDP1 replaces them by views of its flat parameter, which require a
        gradient as soon as any parameter in it does; they are detached, because this layer's are frozen."""
        weight, bias = self.weight, self.bias
        is_stored = "weight" in self._parameters or "weight" in self.__dict__  # and not computed by a parametrization
        if is_stored and type(weight) is Tensor and weight.requires_grad:
            return weight.detach(), None if bias is None else bias.detach()
        return weight, bias

    def free_parameters_for(self, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> tuple[Tensor, ...]:
        """Returns the values of the tensors in ``SAVED_STATE``, in its order, with which ΔW = scaling · lora_B lora_A.

        Raises:
            ArgumentError: this kind of layer cannot be computed from two factors, or not from these.
        """
        expected = f"the parameters of a {type(self).__name__} beside it, as lf.save_adapter writes them"
        raise checks.ArgumentError("adapter", expected, "plain LoRA")

    @torch.no_grad()
    def load_free_(self, *values: Tensor) -> None:
        """Copies values into the tensors in ``SAVED_STATE``, in its order."""
        for name, value in zip(self.SAVED_STATE, values, strict=True):
            getattr(self, name).copy_(value)

    def merge(self) -> None:
        """Adds the adapter to ``weight`` with one rounding; the original weight is kept until ``unmerge``. It warns if
        the merged layer does not keep what this kind of layer promises (``merge_note``)."""
        if not self.merged:
            self.fold_()
            if note := self.merge_note():
                warnings.warn(f"lora_fast: {note}", stacklevel=2)

    def merge_note(self) -> str:
        """Returns what the merged weight does not keep of this kind of layer, or nothing."""
        return ""

    def fold_(self) -> None:
        """Does what ``merge`` does, without a warning."""
        if not self.merged:
            original = self.weight.data
            # Assigning .data keeps the parameter's identity, on which optimizers rely.
            self.weight.data = merged_weight(original, [(self.lora_A, self.lora_B, self.scaling)])
            self._unmerged_weight = original

    def unmerge(self) -> None:
        """Restores the weight from before ``merge``, bit for bit."""
        if self._unmerged_weight is not None:
            self.weight.data = self._unmerged_weight
            self._unmerged_weight = None

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in ("in_features", "out_features", "r", *self.INIT_ARGUMENTS)}
        shown |= {"dropout": self.dropout_p, "bias": self.bias is not None}
        return ", ".join(f"{name}={value}" for name, value in shown.items()) + (", merged" * self.merged)


@torch.no_grad()
def merged_weight(weight: Tensor, adapters: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Returns weight + Σ scaling · b a, summed in float32 (float64 for a float64 weight) and rounded once to the
    weight's dtype.

    Args:
        weight: (d_out, d_in).
        adapters: a (r, d_in), b (d_out, r) and scaling of each.
    """
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for a, b, scaling in adapters:
        total = torch.addmm(total, b.to(total.dtype), a.to(total.dtype), alpha=scaling)
    return total.to(weight.dtype)
