"""Batches in plain torch: pairs of equal shape are kept in one tensor. Parameters and their state are views of these
stacks, so that a method's algebra is one batched call. A pair of experts is a stack already, and a batch of its own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor

from .. import backend
from ..kernels.records import Grams
from ..ops.pairs import adamw_, at_least_float32, grams
from ..ops.reference.scalora_solution import add_low_rank_
from .batch import MOMENTS, Batch, PairInGroups, Shapes, Trained

CACHED = 1 << 20  # elements of a factor's stack on a CPU: larger stacks leave its caches, smaller ones need more calls


class Factor:
    """The a or the b of all pairs of a stack.

    Attributes:
        value: the parameters, (L, …); each parameter is a slice of it. state: name → (L, …), with slices alike.
        grad: the gradient after the methods applied so far, (L, …), or None while no method has changed it.
        steps: the step counts, (L,) float32, on the parameters' device.
    """

    parameters: list[Trained]
    grad: Tensor | None
    value: Tensor
    steps: Tensor
    state: dict[str, Tensor]

    def __init__(self, parameters: list[Tensor], shapes: Shapes, states: dict):
        """Copies parameters and state into stacks, and makes both slices of the stacks. New state is zero."""
        self.parameters, self.grad = parameters, None
        self.value = torch.stack([p.data for p in parameters])
        like: dict[str, Any] = {"dtype": torch.float32, "device": self.value.device}
        counts = [states[p].get("step", torch.zeros((), **like)) for p in parameters]
        self.steps = torch.stack([count.to(**like) for count in counts])
        self.state = {}
        for name, (shape, dtype) in shapes.items():
            self.state[name] = torch.zeros(len(parameters), *shape, dtype=dtype, device=self.value.device)
            for i, p in enumerate(parameters):
                if name in states[p]:
                    self.state[name][i].copy_(states[p][name])
        stacks = {"value": self.value, "step": self.steps} | self.state
        self._slices = {name: list(stack) for name, stack in stacks.items()}  # made once, since slicing takes time
        for i, p in enumerate(parameters):  # the stacks replace the tensors' own memory, so that nothing is kept twice
            p.data = self.value[i]
            states[p].update({name: slices[i] for name, slices in self._slices.items() if name != "value"})
        self._states = [states[p] for p in parameters]
        self._addresses = self._current_addresses()

    def intact(self) -> bool:
        """Returns whether every parameter and its state are still slices of the stacks."""
        return self._current_addresses() == self._addresses

    def _current_addresses(self) -> list[int]:
        names = ("step", *self.state)
        addresses = [
            x.data_ptr() if (x := state.get(name)) is not None else 0 for name in names for state in self._states
        ]
        return [p.data_ptr() for p in self.parameters] + addresses

    def gradient(self) -> Tensor:
        """Returns the gradient after the methods applied so far, (L, …). A fresh stack if no method has changed it."""
        return torch.stack([p.grad for p in self.parameters]) if self.grad is None else self.grad

    def adamw(self, settings: dict) -> None:
        """Applies AdamW: to the slices with the parameters' own gradients, or to the whole stack if a method has
        changed the gradient."""
        if self.grad is None:
            p, m, v, steps = (self._slices[name] for name in ("value", *MOMENTS, "step"))
            g = [parameter.grad for parameter in self.parameters]
        else:
            p, m, v = [self.value], *([self.state[name]] for name in MOMENTS)
            g, steps, self.grad = [self.grad], self._slices["step"][:1], None  # all slices have the same count
        adamw_(p, g, m, v, steps, settings)


class ExpertsFactor(Factor):
    """The a or the b of a pair of experts. The parameter and its state keep their memory and the shapes that PEFT and
    torch give them. ``value`` and ``state`` are views (E, …) of this memory with one slice for each expert; ``grad``
    has the same shape.

    Attributes:
        steps: the parameter's step count, (1,) float32.
    """

    def __init__(self, parameter: Tensor, split: Callable[[Tensor], Tensor], shapes: Shapes, states: dict):
        """``split`` returns the view (E, …) of a tensor of the parameter's shape. A state of another shape already has
        the experts as its first dimension. New state is zero."""
        self.parameters, self.grad, self._split = [parameter], None, split
        parameter.data = parameter.data.contiguous()
        state, device = states[parameter], parameter.device
        count = state.get("step", torch.zeros((), dtype=torch.float32, device=device))
        self.steps = torch.stack([count.to(device, torch.float32)])
        for name, (shape, dtype) in shapes.items():
            old = state.get(name)
            new = torch.zeros(shape, dtype=dtype, device=device) if old is None else old.to(device, dtype)
            state[name] = new.contiguous()
        state["step"] = self.steps[0]
        self._whole = {name: state[name] for name in shapes}
        self.value = split(parameter.data)
        self.state = {name: split(x) if x.shape == parameter.shape else x for name, x in self._whole.items()}
        self._states = [state]
        self._addresses = self._current_addresses()

    def gradient(self) -> Tensor:
        return self._split(self.parameters[0].grad) if self.grad is None else self.grad

    def adamw(self, settings: dict) -> None:
        """Applies AdamW to the whole parameter, since it works entry by entry."""
        parameter = self.parameters[0]
        gradient = parameter.grad
        if self.grad is not None:  # bring (E, …) back to the parameter's layout
            gradient = torch.empty_like(parameter)
            self._split(gradient).copy_(self.grad)
            self.grad = None
        m, v = ([self._whole[name]] for name in MOMENTS)
        adamw_([parameter.data], [gradient], m, v, [self.steps[0]], settings)


class StackedBatch(Batch):
    """Pairs of one shape and dtype, or one pair of experts.

    Attributes:
        a, b: the factors, with a.value (L, r, d_in) and b.value (L, d_out, r).
    """

    ops = backend.load_ops("pairs", triton=False)
    a: Factor
    b: Factor

    def __init__(
        self, members: list[PairInGroups], counts: tuple[int, int], states: dict, shapes: tuple[Shapes, Shapes]
    ):
        super().__init__(members, counts)
        pair = self.pairs[0]
        if pair.experts > 1:
            self.a = ExpertsFactor(pair.a, pair.split_a, shapes[0], states)
            self.b = ExpertsFactor(pair.b, pair.split_b, shapes[1], states)
        else:
            self.a = Factor([pair.a for pair in self.pairs], shapes[0], states)
            self.b = Factor([pair.b for pair in self.pairs], shapes[1], states)

    @classmethod
    def build(cls, members: list[PairInGroups], counts: tuple[int, int], states: dict, layout: Callable) -> list[Self]:
        """Returns one stack of all members. On a CPU it is divided into stacks that each fit the cache, and each pair
        of experts is a stack of its own."""
        pair = members[0][0]
        size = len(members) if pair.a.is_cuda else max(1, CACHED // max(1, pair.a.numel(), pair.b.numel()))
        size = 1 if pair.experts > 1 else size
        parts = [members[i : i + size] for i in range(0, len(members), size)]
        return [cls(part, counts, states, layout(pair)) for part in parts]

    def begin(self, param_groups: list[dict]) -> None:
        super().begin(param_groups)
        for factor in (self.a, self.b):
            factor.steps += 1
            factor.grad = None

    def intact(self) -> bool:
        return self.a.intact() and self.b.intact()

    def grams(self, gradients: bool = False) -> Grams:
        a, b = self.a.value, self.b.value
        return grams(a, b, self.a.gradient(), self.b.gradient()) if gradients else grams(a, b)

    def add_to_gradients(self, coefficients: Tensor) -> None:
        for factor, c in zip((self.b, self.a), coefficients.chunk(2), strict=True):
            factor.grad = (at_least_float32(factor.gradient()) + c[:, None, None] * factor.value).to(factor.value.dtype)

    def precondition(self, damping: float) -> None:
        ka, kb, *_ = self.grams()
        inverses = self.ops.spd_inverse(torch.cat([ka, kb]), damping)
        self.transform_gradients(inverses)  # Ka is for b's gradient, Kb for a's

    def transform_gradients(self, matrices: Tensor) -> None:
        matrices_b, matrices_a = matrices.chunk(2)
        self.a.grad = (matrices_a @ at_least_float32(self.a.gradient())).to(self.a.value.dtype)
        self.b.grad = (at_least_float32(self.b.gradient()) @ matrices_b).to(self.b.value.dtype)

    def scale(self, factor_scales: Tensor, gradient_scales: Tensor) -> None:
        broadcasts = (slice(None), None), (slice(None), slice(None), None)  # over the columns of b, the rows of a
        sides = zip((self.b, self.a), broadcasts, factor_scales.chunk(2), gradient_scales.chunk(2), strict=True)
        for factor, broadcast, *scales in sides:
            factor_scale, gradient_scale = (scale[broadcast].to(factor.value.dtype) for scale in scales)
            factor.grad = factor.gradient() * gradient_scale
            factor.value *= factor_scale
            factor.state["exp_avg"] *= gradient_scale
            factor.state["exp_avg_sq"] *= gradient_scale.square()

    def merge(self, residual_scale: Tensor, rounding: str, seed: int) -> None:
        names = [name for pair in self.pairs for name in pair.product_names]
        weights = [weight for pair in self.pairs for weight in pair.split_weight(pair.mergeable_weight.data)]
        residuals: Iterable[Tensor | None] = [None] * self.products
        stored = self.b.state.get("merge_residual")
        if stored is not None:
            residuals = stored.mT if self.pairs[0].transposed else stored  # stored in the layout of the weight
        captured = backend.is_capturing(weights[0].device)  # a seed would be the same at every replay
        operands = zip(weights, self.a.value, self.b.value, residual_scale, residuals, names, strict=True)
        for weight, a, b, scale, residual, name in operands:
            # By the product's name, the noise does not depend on the batch. torch's CPU generator takes 32 bits.
            product_seed = None if captured else zlib.crc32(f"{seed} {self.count} {name}".encode())
            add_low_rank_(weight, a, b, scale, rounding, product_seed, residual)

    def adamw(self, grams: bool) -> None:
        self.a.adamw(self.settings_a)
        self.b.adamw(self.settings_b)

    def momentum(self, beta: float) -> Grams:
        moments = []
        for factor in (self.a, self.b):
            moments.append(factor.state["exp_avg"])
            # In float32, since a 16-bit average would lose small changes; rounded once.
            moments[-1].copy_(torch.lerp(at_least_float32(moments[-1]), at_least_float32(factor.gradient()), 1 - beta))
        kp, kq, *_ = grams(*moments)
        return self.grams()._replace(kp=kp, kq=kq)

    def move(self, matrices: Tensor) -> None:
        matrices_b, matrices_a = matrices.chunk(2)
        moment_a, moment_b = (at_least_float32(factor.state["exp_avg"]) for factor in (self.a, self.b))
        sides = (
            (self.b, self.settings_b, moment_b @ matrices_b),
            (self.a, self.settings_a, matrices_a @ moment_a),
        )
        for factor, settings, change in sides:
            decay = 1 - settings["lr"] * settings["weight_decay"]
            factor.value.copy_(decay * at_least_float32(factor.value) + change)

    def transform(self, matrices: Tensor, target: str = "value", add: bool = False) -> None:
        matrices_b, matrices_a = matrices.chunk(2)
        a, b = (factor.value if target == "value" else factor.state[target] for factor in (self.a, self.b))
        for x, product in ((a, matrices_a @ at_least_float32(a)), (b, at_least_float32(b) @ matrices_b)):
            if add:
                x.add_(product)
            else:
                x.copy_(product)
