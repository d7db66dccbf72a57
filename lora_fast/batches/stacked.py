"""Batches in plain torch: pairs of equal shape kept in one tensor. Parameters and their state are views into stacks, so
that a method's algebra is one batched call. A pair of experts is a batch already: there the stack is a view."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.records import Grams
from ..ops.pairs import adamw_, at_least_float32
from ..ops.reference import pairs as reference
from ..ops.reference import scalora_solution
from .batch import MOMENTS, Batch, PairInGroups, Shapes

CACHED = 1 << 20  # elements of a factor's stack on a CPU: larger ones leave its caches, smaller ones are more calls


class Factor:
    """One factor of all pairs of a stack.

    Attributes:
        value: (L, …), whose slices are the parameters. state: name → (L, …), whose slices are their state.
        grad: (L, …), as a method has changed it, or None where the parameters' own are still right.
        steps: (L,) float32, on the parameters' device.
    """

    def __init__(self, parameters: list[Tensor], shapes: Shapes, states: dict):
        """StackedBatch parameters and state, and make both slices of the stacks. New state is zero."""
        self.parameters, self.grad = parameters, None
        self.value = torch.stack([p.data for p in parameters])
        counts = [states[p].get("step", torch.zeros(())) for p in parameters]
        self.steps = torch.stack([count.to(self.value.device, torch.float32) for count in counts])
        self.state: dict[str, Tensor] = {}
        for name, (shape, dtype) in shapes.items():
            self.state[name] = torch.zeros(len(parameters), *shape, dtype=dtype, device=self.value.device)
            for i, p in enumerate(parameters):
                if name in states[p]:
                    self.state[name][i].copy_(states[p][name])
        stacks = {"value": self.value, "step": self.steps} | self.state
        self._slices = {name: list(stack) for name, stack in stacks.items()}
        for i, p in enumerate(parameters):
            p.data = self.value[i]
            states[p].update({name: slices[i] for name, slices in self._slices.items() if name != "value"})
        self._states = [states[p] for p in parameters]
        self._places = self._places_now()

    def intact(self) -> bool:
        """Whether every parameter and its state are still slices of the stacks."""
        return self._places_now() == self._places

    def _places_now(self) -> list[int]:
        names = ("step", *self.state)
        places = [x.data_ptr() if (x := state.get(name)) is not None else 0 for name in names for state in self._states]
        return [p.data_ptr() for p in self.parameters] + places

    def gradient(self) -> Tensor:
        """(L, …), what the methods have made of it so far; a copy, or theirs."""
        return torch.stack([p.grad for p in self.parameters]) if self.grad is None else self.grad

    def adamw(self, settings: dict) -> None:
        if self.grad is None:
            p, m, v, steps = (self._slices[name] for name in ("value", *MOMENTS, "step"))
            g = [parameter.grad for parameter in self.parameters]
        else:
            p, m, v = [self.value], *([self.state[name]] for name in MOMENTS)
            g, steps, self.grad = [self.grad], self._slices["step"][:1], None
        adamw_(p, g, m, v, steps, settings)


class ExpertsFactor(Factor):
    """One factor of a pair of experts. The parameter and its state stay where they are and as PEFT and torch have them;
    ``value``, ``grad`` and ``state`` are (E, …), one slice an expert. What changes value or state in place changes the
    parameter's own memory.

    Attributes:
        steps: (1,) float32: the parameter's.
    """

    def __init__(self, parameter: Tensor, split: Callable[[Tensor], Tensor], shapes: Shapes, states: dict):
        """``split`` returns the view (E, …) of a tensor of the parameter's shape. A state of another shape has the
        experts in its first dimension already. New state is zero."""
        self.parameters, self.grad, self._split = [parameter], None, split
        parameter.data = parameter.data.contiguous()
        state, device = states[parameter], parameter.device
        count = state.get("step", torch.zeros(()))
        self.steps = torch.stack([count.to(device, torch.float32)])
        for name, (shape, dtype) in shapes.items():
            kept = state.get(name)
            new = torch.zeros(shape, dtype=dtype, device=device) if kept is None else kept.to(device, dtype)
            state[name] = new.contiguous()
        state["step"] = self.steps[0]
        self._whole = {name: state[name] for name in shapes}
        self.value = split(parameter.data)
        self.state = {name: split(x) if x.shape == parameter.shape else x for name, x in self._whole.items()}
        self._states = [state]
        self._places = self._places_now()

    def gradient(self) -> Tensor:
        return self._split(self.parameters[0].grad) if self.grad is None else self.grad

    def adamw(self, settings: dict) -> None:
        """AdamW works entry by entry, so it runs on the whole parameter."""
        parameter = self.parameters[0]
        gradient = parameter.grad
        if self.grad is not None:
            gradient = torch.empty_like(parameter)
            self._split(gradient).copy_(self.grad)
            self.grad = None
        moments = ([self._whole[name]] for name in MOMENTS)
        adamw_([parameter.data], [gradient], *moments, [self.steps[0]], settings)


class StackedBatch(Batch):
    """Pairs of one shape and dtype, or one pair of experts. a.value (L, r, d_in), b.value (L, d_out, r)."""

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
    def of(
        cls, members: list[PairInGroups], counts: tuple[int, int], states: dict, layout: Callable
    ) -> list[StackedBatch]:
        """One stack; on a CPU as many as keep each in its cache; one for each pair of experts."""
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
        of_gradients = (self.a.gradient(), self.b.gradient()) if gradients else ()
        return reference.grams(self.a.value, self.b.value, *of_gradients)

    def add_to_gradients(self, coefficients: Tensor) -> None:
        for factor, c in zip((self.b, self.a), coefficients.chunk(2), strict=True):
            factor.grad = (at_least_float32(factor.gradient()) + c[:, None, None] * factor.value).to(factor.value.dtype)

    def precondition(self, damping: float) -> None:
        ka, kb, *_ = self.grams()
        self.transform_gradients(reference.spd_inverse(torch.cat([ka, kb]), damping))

    def transform_gradients(self, matrices: Tensor) -> None:
        for_b, for_a = matrices.chunk(2)
        self.a.grad = (for_a @ at_least_float32(self.a.gradient())).to(self.a.value.dtype)
        self.b.grad = (at_least_float32(self.b.gradient()) @ for_b).to(self.b.value.dtype)

    def scale(self, factor_scales: Tensor, gradient_scales: Tensor) -> None:
        axes = (slice(None), None), (slice(None), slice(None), None)  # columns of b, rows of a
        rows = zip((self.b, self.a), axes, factor_scales.chunk(2), gradient_scales.chunk(2), strict=True)
        for factor, axis, of_factor, of_gradient in rows:
            of_factor, of_gradient = (x[axis].to(factor.value.dtype) for x in (of_factor, of_gradient))
            factor.grad = factor.gradient() * of_gradient
            factor.value *= of_factor
            factor.state["exp_avg"] *= of_gradient
            factor.state["exp_avg_sq"] *= of_gradient.square()

    def merge(self, residual_scale: Tensor, rounding: str, seed: int) -> None:
        names = [name for pair in self.pairs for name in pair.product_names]
        weights = [weight for pair in self.pairs for weight in pair.split_weight(pair.weight.data)]
        residuals = self.b.state.get("merge_residual")
        if residuals is None:
            residuals = [None] * self.products
        elif self.pairs[0].transposed:
            residuals = residuals.mT
        operands = zip(weights, self.a.value, self.b.value, residual_scale, residuals, names, strict=True)
        for weight, a, b, of_product, residual, name in operands:
            product_seed = zlib.crc32(f"{seed} {self.count} {name}".encode())  # torch's CPU generator takes 32 bits
            scalora_solution.add_low_rank_(weight, a, b, of_product, rounding, product_seed, residual)

    def adamw(self, grams: bool) -> None:
        self.a.adamw(self.settings_a)
        self.b.adamw(self.settings_b)

    def momentum(self, beta: float) -> Grams:
        moments = []
        for factor in (self.a, self.b):
            moments.append(factor.state["exp_avg"])
            moments[-1].copy_(torch.lerp(at_least_float32(moments[-1]), at_least_float32(factor.gradient()), 1 - beta))
        kp, kq, *_ = reference.grams(*moments)
        return self.grams()._replace(kp=kp, kq=kq)

    def move(self, matrices: Tensor) -> None:
        for_b, for_a = matrices.chunk(2)
        moves = at_least_float32(self.b.state["exp_avg"]) @ for_b, for_a @ at_least_float32(self.a.state["exp_avg"])
        rows = zip((self.b, self.a), (self.settings_b, self.settings_a), moves, strict=True)
        for factor, settings, of_factor in rows:
            kept = 1 - settings["lr"] * settings["weight_decay"]
            factor.value.copy_(kept * at_least_float32(factor.value) + of_factor)

    def transform(self, matrices: Tensor, target: str = "value", add: bool = False) -> None:
        for_b, for_a = matrices.chunk(2)
        a, b = (factor.value if target == "value" else factor.state[target] for factor in (self.a, self.b))
        for x, product in ((a, for_a @ at_least_float32(a)), (b, at_least_float32(b) @ for_b)):
            if add:
                x.add_(product)
            else:
                x.copy_(product)
