"""AdapterLinear: the base class of all our adapter layers, whichever parameters their factors are computed from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from .. import checks
from ..checks import PLAIN
from ..ops import composite
from ..quantized import QuantizedWeight, family_of, quantized_weight, reason_against, reason_against_merge
from . import merge_log
from .fallback import Fallback
from .hooks import carry_hook, offloads
from .merging import Merged, merged_parameters, unmergeable
from .terms import Term

FROZEN = ("weight", "bias")  # the parameters of the linear layer
_traced = torch.compiler.is_compiling


class AdapterLinear(Fallback, nn.Module):
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
        weight: (d_out, d_in), frozen; (d_in, d_out) with ``fan_in_fan_out``, which ``from_linear`` sets for
            transformers' Conv1D (GPT-2). bias: (d_out,), frozen, or None.
        lora_A: a (r, d_in). lora_B: b (d_out, r).
        merged: True while ``weight`` contains the adapter.
        disabled: True while ``lf.disable_adapters`` has the layer compute its frozen linear layer alone.
        fallback_reason: why the last call ran plain torch ops in place of the fused op; None if it did not.

    Raises:
        ArgumentError: r or dropout out of range.
    """

    TRAINABLE: tuple[str, ...]
    SAVED_STATE: tuple[str, ...] = ()
    INIT_ARGUMENTS: tuple[str, ...]
    use_rslora = False
    scales_weight = False  # whether the adapter also scales the rows of the weight (DoRA)

    weight: Tensor
    bias: Tensor | None
    is_plain = False  # whether forward computes x Wᵀ + bias alone: merged or disabled
    base: nn.Module | None = None  # the quantised layer that the weight belongs to; not registered as a child
    fan_in_fan_out = False  # whether the weight is stored as (d_in, d_out), as transformers' Conv1D does
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
        checks.flag(bias, "bias")
        checks.placement(device, dtype)
        self.r = checks.rank(r)
        self.in_features = checks.count(in_features, "in_features")
        self.out_features = checks.count(out_features, "out_features")
        self.dropout_p = checks.probability(dropout)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **place), requires_grad=False)
        vector = nn.Parameter(torch.empty(out_features, **place), requires_grad=False) if bias else None
        self.register_parameter("bias", vector)  # as nn.Linear does, None included
        self.is_plain = self.disabled = False  # is_plain is read at every call
        self._merged = Merged()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings) -> Self:
        """Returns a layer that shares ``linear``'s parameters (they are not copied) and freezes them. Of accelerate's
        hooks the layer gets those that move the input to the weight's device.

        Args:
            linear: a torch.nn.Linear or transformers' Conv1D, on any device, of a floating dtype, or a layer of another
                library with a quantised weight. The new adapter is on its weight's device, in float32 where the weight
                is 16-bit or quantised, else in the weight's dtype.
            settings: the constructor's arguments except sizes, bias, device and dtype.

        Raises:
            ArgumentError: none of them, a weight of another dtype, or settings that the constructor refuses.
        """
        quantized = checked_weight(linear)
        weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        dtype = torch.float32 if quantized else torch.promote_types(linear.weight.dtype, torch.float32)
        # On the meta device the constructor neither allocates nor initialises a weight that is replaced below.
        place: dict[str, Any] = {"device": "meta", "dtype": dtype}
        d_in, d_out = sizes(linear)
        layer = cls(d_in, d_out, bias=bias is not None, **settings, **place)
        device = quantized.device if quantized else linear.weight.device
        for name in cls.TRAINABLE:  # allocated once, here: the constructor's own are on the meta device
            free = getattr(layer, name)
            setattr(layer, name, nn.Parameter(torch.empty_like(free, device=device), free.requires_grad))
        layer.reset_adapter()
        for parameter in linear._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
        layer.register_parameter("weight", weight)  # None where a library keeps it elsewhere
        layer.bias, layer.fan_in_fan_out = bias, is_conv1d(linear)
        if quantized:
            layer.__dict__["base"] = linear  # past nn.Module.__setattr__, which would register a child
            quantized.take_(linear)
        if merge_log.is_changed(linear):  # by a merge of an adapter that has been removed since
            merge_log.mark(layer)
        carry_hook(linear, layer)
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialises weight and bias as nn.Linear does, or as Conv1D, and the adapter."""
        if self.fan_in_fan_out:
            nn.init.normal_(self.weight, std=0.02)
            nn.init.zeros_(cast(Tensor, self.bias))
        else:
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
        if self.is_plain:
            return self.plain_forward(x)
        if self.base is not None and _traced():  # the library's own ops are in the graph
            dropout_p = self.dropout_p if self.training else 0.0
            return composite.add_adapter(self.base(x), x, *self.factors(), self.scaling, dropout_p)
        return self._call(x, *self.arguments())

    def arguments(self) -> tuple:
        """Returns ``functional.lora_linear``'s arguments after x for one forward."""
        dropout_p = self.dropout_p if self.training else 0.0
        return *self.frozen_parameters(), *self.factors(), self.scaling, dropout_p

    def call_arguments(self, x: Tensor) -> tuple | None:
        """Returns the arguments if the op could serve a call with an x that it serves elsewhere, else None."""
        if self.is_plain or not self._parameters.keys() >= {"weight", *self.TRAINABLE}:
            return None
        arguments = weight, _, a, b, *_ = self.arguments()
        has_weight = type(weight) in PLAIN or weight.dtype is None
        return arguments if has_weight and type(a) in PLAIN and type(b) in PLAIN else None

    def frozen_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Returns weight (d_out, d_in) and bias for one forward. FSDP1 replaces them by views of its flat parameter,
        which require a gradient as soon as any parameter in it does; they are detached, because this layer's are
        frozen."""
        if self.base is not None:
            return self.quantized_weight(), None  # the base adds its bias
        weight, bias = self.weight, self.bias
        if weight.requires_grad and getattr(weight._base, "_is_flat_param", False):
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return weight.t() if self.fan_in_fan_out else weight, bias

    def quantized_weight(self) -> Any:
        """Returns the weight of the quantised ``base`` for one call.

        Raises:
            ArgumentError: it is not ready, as its library leaves it before it is moved to its device.
        """
        assert self.base is not None, "a layer over a quantised one"
        weight = quantized_weight(self.base)
        if isinstance(weight, str):
            raise checks.ArgumentError("layer", "a quantised weight that is ready", weight)
        return weight

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

    def plain_forward(self, x: Tensor) -> Tensor:
        """Computes the frozen linear layer alone, while the adapter is merged or disabled.

        Raises:
            ArgumentError: a merged model was offloaded by accelerate. Its hook loads the weight that ``state_dict``
                contains, which is the unmerged one.
        """
        if self._merged.places and offloads(self):
            raise checks.ArgumentError("model", "to be unmerged before it is offloaded (lf.unmerge_)", "a merged layer")
        if self.base is not None:
            y: Tensor = self.base(x)
            return y
        return nn.functional.linear(x, *self.frozen_parameters())

    def merge(self) -> None:
        """Adds the adapter to ``weight`` with one rounding. Layers that share the weight may do the same, in any order;
        ``unmerge`` restores every bit. It warns if the merged layer does not keep what this kind of layer promises
        (``merge_note``).

        Raises:
            ArgumentError: the weight cannot be merged into (without data, sharded, …), or the adapter is disabled.
        """
        if not self.merged:
            self.fold_()
            if note := self.merge_note():
                warnings.warn(f"lora_fast: {note}", stacklevel=2)

    def merge_note(self) -> str:
        """Returns what the merged weight does not keep of this kind of layer, or nothing."""
        return ""

    def fold_(self, keep_originals: str | None = None) -> None:
        """Does what ``merge`` does, without a warning.

        Args:
            keep_originals: where the original of a weight on a GPU is kept, as in ``lf.merge_``; None as at the last
                merge, in the host's memory at first.
        """
        if self.merged:
            return
        if reason := self.unmergeable():
            raise checks.ArgumentError("layer", "a layer that can be merged", reason)
        self._merged.merge({"": [(cast(nn.Parameter, self.weight), self.merge_term())]}, keep_originals)
        self.is_plain = True

    def merge_term(self) -> Term:
        """Returns what the adapter adds to the weight as it is stored: ΔW, or its transpose, scaling · aᵀ bᵀ."""
        a, b = (self.lora_B.t(), self.lora_A.t()) if self.fan_in_fan_out else (self.lora_A, self.lora_B)
        return Term(a, b, float(self.scaling))

    def unmerge(self) -> None:
        """Restores the weight from before ``merge``, bit for bit. From a weight that others have changed since then,
        the adapter is subtracted, as PEFT does.

        Raises:
            ArgumentError: the weight was replaced or resized, or has lost its data, since then.
        """
        if self.merged:
            if self._merged.restorable([self.weight]):
                self._merged.unmerge()
            else:
                self._merged.subtract(self.merge_term())
            self.is_plain = self.disabled

    @property
    def merged(self) -> bool:
        return bool(self._merged.places)

    def unmergeable(self) -> str | None:
        """Returns why the layer cannot be merged, or None if it can."""
        if self.merged:
            return "already merged"
        if self.base is not None:
            return reason_against_merge(self.base)
        if self.disabled:
            return "adapters disabled"
        if offloads(self):
            return "weight offloaded by accelerate, which would load the unmerged one"
        weight = self.weight if "weight" in self._parameters else None
        trained = [getattr(self, name) for name in self.TRAINABLE]
        shape = self.out_features, self.in_features
        shape = shape[::-1] if self.fan_in_fan_out else shape
        return unmergeable(weight, shape, trained, self.scales_weight)

    def not_unmergeable(self) -> str | None:
        """Returns why the original weight cannot be restored, or None if it can."""
        if not self.merged:
            return "not merged"
        return self._merged.lost([self.weight])

    def original_weight(self) -> Tensor:
        """Returns the frozen weight without any adapter. That of a merged layer may be in the host's memory."""
        if not self.merged:
            return self.weight
        if self._merged.is_changed():
            return self._merged.estimate(self.merge_term())
        target = self._merged.targets()[0]
        return target.original.to(target.parameter.dtype)

    def set_disabled_(self, disabled: bool) -> None:
        """Makes forward compute the frozen layer alone, or with the adapter again; for an unmerged layer."""
        self.disabled = self.is_plain = disabled

    def to_linear(self) -> nn.Module:
        """Returns an ``nn.Linear``, or a Conv1D, with this layer's parameters themselves, its mode and its hooks of
        accelerate. If this layer is merged, it forgets the original weight."""
        linear: Any
        if self.base is not None:
            self.quantized_weight().release_(self.base)
            carry_hook(self, self.base)
            return self.base.train(self.training)
        if self.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):  # where it allocates nothing
                linear = Conv1D(self.out_features, self.in_features)
        else:
            place: dict[str, Any] = {"device": "meta", "dtype": self.weight.dtype}
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **place)
        linear.weight, linear.bias = self.weight, self.bias
        self._merged.forget()
        if merge_log.is_changed(self):
            merge_log.mark(linear)
        carry_hook(self, linear)
        return linear.train(self.training)

    def train(self, mode: bool = True) -> Self:
        if self.base is not None:
            self.base.train(mode)
        return super().train(mode)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Stores the unmerged weight beside the adapter, so that a layer that loads the state does not count the
        adapter twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base is not None:  # its library stores scales beside the weight
            self.base.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.merged:
            destination[f"{prefix}weight"] = self.original_weight()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Loads an unmerged weight and an adapter. A merged layer is merged again, with what it has loaded."""
        if self.base is not None:
            adapter = {f"{prefix}{name}" for name in (*self._parameters, *self._buffers) if name not in FROZEN}
            ours = {key: value for key, value in state_dict.items() if key in adapter}
            theirs = {key: value for key, value in state_dict.items() if key not in adapter}
            with self._adapter_alone():
                super()._load_from_state_dict(ours, prefix, local_metadata, strict, missing, unexpected, errors)
                base: Any = self.base  # which knows its scales
                base._load_from_state_dict(theirs, prefix, local_metadata, strict, missing, unexpected, errors)
            return
        merged = self.merged
        if merged:
            self.unmerge()
        if f"{prefix}weight" in state_dict and merged_parameters([self._parameters.get("weight")]):
            errors.append(f"{prefix}weight is merged with the adapter of another layer: use lf.unmerge_ first")
            state_dict = {}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if merged:
            self.fold_()

    def _apply(self, fn, recurse: bool = True) -> Self:
        self._merged.is_changed()  # by others, before this change
        if self.base is None:
            super()._apply(fn, recurse)
        else:
            with self._adapter_alone():
                super()._apply(fn, recurse)
                self.base._apply(fn)  # which knows its scales
        self._merged.follow(fn)
        return self

    @contextmanager
    def _adapter_alone(self) -> Iterator[None]:
        """Leaves the parameters of the base to its own methods: they are none of this layer in the context, and after
        it what they are in the base."""
        base: Any = self.base
        self._parameters["weight"] = self._parameters["bias"] = None  # keeps their places in the order
        try:
            yield
        finally:
            self._parameters.update({name: base._parameters.get(name) for name in FROZEN})

    def __getstate__(self) -> dict:
        """Returns the state for deepcopy, pickle and torch.save. A copy that is made while ``lf.disable_adapters`` runs
        has its adapter, because no context enables it again."""
        return self.__dict__ | {"disabled": False, "is_plain": self.merged}

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in ("in_features", "out_features", "r", *self.INIT_ARGUMENTS)}
        shown |= {"dropout": self.dropout_p, "bias": self.bias is not None}
        shown |= {"fan_in_fan_out": True} if self.fan_in_fan_out else {}
        shown |= {"base": self.quantized_weight().format} if self.base is not None else {}
        return ", ".join(f"{name}={value}" for name, value in shown.items()) + (", merged" * self.merged)


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether it is transformers' Conv1D, a linear layer whose weight is stored as (d_in, d_out) (GPT-2)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def checked_weight(linear: nn.Module) -> QuantizedWeight | None:
    """Returns the quantised weight of a layer whose place an adapter layer can take, None if its weight is a plain one.

    Raises:
        ArgumentError: an adapter layer cannot take the place of this one.
    """
    if isinstance(linear, nn.Module) and family_of(linear) is not None:
        weight = reason_against(linear) or quantized_weight(linear)
        if isinstance(weight, str):
            raise checks.ArgumentError("linear", "a quantised weight that the ops can use", weight)
        return weight
    if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
        expected = "a torch.nn.Linear, transformers' Conv1D or a layer with a quantised weight"
        raise checks.ArgumentError("linear", expected, type(linear).__name__)
    if linear.weight.dtype not in checks.FLOATS:
        expected = "a dtype among float16, bfloat16, float32, float64"
        raise checks.ArgumentError("linear.weight", expected, linear.weight.dtype)
    return None


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Returns d_in and d_out of an nn.Linear, a Conv1D or a layer with a quantised weight."""
    if (kind := family_of(linear)) is not None:
        d_out, d_in = kind.sizes(linear)
        return d_in, d_out
    d_out, d_in = cast(Tensor, linear.weight).shape
    return (d_out, d_in) if is_conv1d(linear) else (d_in, d_out)
