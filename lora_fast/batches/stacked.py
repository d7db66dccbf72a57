"""Batches in plain torch: a step works on one tensor of all pairs of equal shape, so that a method's algebra is one
batched call. It copies the parameters into a stack and the results back, because code that saves a model drops
parameters that share a storage. Their state is views of stacks. A pair of experts is a stack already, and a batch of
its own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import compress
from typing import Self

import torch
from torch import Tensor

from .. import backend
from ..kernels.device import to_device
from ..kernels.limits import CORRECTION, UPDATE
from ..kernels.records import Grams, Scaled
from ..ops.observers import shown
from ..ops.pairs import adamw_, at_least_float32, float32_copy, grams, with_strides_of
from ..ops.reference.rounding import round_factors, scaled_to
from ..ops.reference.scalora_solution import add_low_rank_
from .batch import MOMENTS, Batch, PairInGroups, Shapes, Trained, states_of, step_counts

CACHED = 1 << 20  # elements of a factor's stack on a CPU: larger stacks leave its caches, smaller ones need more calls


class Factor:
    """The a or the b of all pairs of a stack. Each state of a parameter is a slice of a stack.

    Attributes:
        value: the parameters, (L, …), a copy from its first use in a step until ``end`` writes it back.
        state: name → the stack of a state, from ``begin`` to ``end`` only: between steps the slices alone hold its
            memory, so a user who moves them away frees it.
        grad: the gradient after the methods applied so far, (L, …) in at least float32, or None while no method has
            changed it. moment_scale: what ``scale`` multiplies first moments by, (L, …), or None.
        is_a: whether the rank is the first dimension of a slice.
        keys: the keys of stochastic rounding, int64 (L,), or None to round to nearest.
        steps: the step counts, (L,) float32, on the parameters' device.
        active: which slices do not rest, bool (L,), or None if none rests.
    """

    active: Tensor | None = None
    _positions: list[int]  # of the slices that do not rest
    _counts_agree: bool  # whether all slices have taken the same number of steps
    parameters: list[Trained]
    is_a: bool
    keys: Tensor | None
    grad: Tensor | None = None
    moment_scale: Tensor | None = None
    steps: Tensor
    state: dict[str, Tensor]

    def __init__(self, parameters: list[Tensor], is_a: bool, keys: Tensor | None, shapes: Shapes, states: dict):
        """Copies the state into stacks and replaces it by their slices. New state is zero."""
        self.parameters, self.is_a, self.keys = parameters, is_a, keys
        counts = step_counts(parameters, states)
        self._counts_agree = len(set(counts)) == 1
        device = parameters[0].device
        self.steps = to_device(counts, torch.float32, device)
        self._optimizer_states, self._names = states, tuple(shapes)
        for name, (shape, dtype) in shapes.items():
            stack = torch.zeros(len(parameters), *shape, dtype=dtype, device=device)
            for slice_of_stack, p in zip(stack, parameters, strict=True):
                if name in states[p]:
                    slice_of_stack.copy_(states[p][name])
                states[p][name] = slice_of_stack
        for p, step in zip(parameters, self.steps, strict=True):
            states[p]["step"] = step
        self._addresses = self._current_addresses()

    def _states(self) -> list[dict]:
        return states_of(self.parameters, self._optimizer_states)

    def intact(self) -> bool:
        """Returns whether no parameter has moved, to another device for example, and every state is still a slice."""
        return self._current_addresses() == self._addresses and self._storages_are_stacks()

    def _storages_are_stacks(self) -> bool:
        """Returns whether the first slices share their storage with others. Slices that were moved one by one have
        storages of their own, which an allocator may place side by side at the old addresses."""
        state = self._states()[0]
        firsts = [state[name] for name in self._names]
        n = len(self.parameters)
        return all(first.untyped_storage().nbytes() >= n * first.numel() * first.element_size() for first in firsts)

    def _current_addresses(self) -> list[int]:
        names, states = ("step", *self._names), self._states()
        addresses = [x.data_ptr() if (x := state.get(name)) is not None else 0 for name in names for state in states]
        return [p.data_ptr() for p in self.parameters] + addresses

    def set_resting(self, rests: list[bool]) -> None:
        """Sets which slices rest until the next call."""
        self.active = to_device([not x for x in rests], torch.bool, self.steps.device) if True in rests else None
        self._positions = [i for i, x in enumerate(rests) if not x]
        self._counts_agree &= self.active is None

    def gradient(self) -> Tensor:
        """Returns the gradient after the methods applied so far, (L, …). If no method has changed it, a fresh stack, 0
        for a slice that rests."""
        if self.grad is not None:
            return self.grad
        gradients = [p.grad for p in self.parameters]
        if self.active is not None:
            gradients = [
                torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)
            ]
        return torch.stack(gradients)

    def begin(self) -> None:
        """Begins a step, which counts for the active slices. Makes the stacks of the state from their slices, and
        forgets what a step that raised an error has left."""
        self._forget()
        self.steps += 1 if self.active is None else self.active
        first_state = self._states()[0]
        self.state = {name: self._stack_from(first_state[name]) for name in self._names}

    @cached_property
    def value(self) -> Tensor:
        return torch.stack(self.parameters)

    def _stack_from(self, first: Tensor) -> Tensor:
        """Returns the stack (L, …) of a state whose first slice this is."""
        return first.as_strided((len(self.parameters), *first.shape), (first.numel(), *first.stride()))

    def end(self) -> None:
        """Ends a step, after which the parameters have the new values."""
        if "value" in self.__dict__:
            self._write_back()
        self._forget()
        del self.state

    def _forget(self) -> None:
        self.__dict__.pop("value", None)
        self.grad = self.moment_scale = None

    def _write_back(self) -> None:
        """Copies ``value`` into the parameters that do not rest."""
        parameters, values = self.parameters, list(self.value)
        if self.active is not None:
            parameters, values = ([tensors[i] for i in self._positions] for tensors in (parameters, values))
        torch._foreach_copy_(parameters, values)

    def write(self, stack: Tensor, values: Tensor) -> None:
        """Copies values (L, …) into ``value``, a state, or a transposed view of one; not into slices that rest."""
        if self.active is not None:
            values = torch.where(self.active.view(-1, *[1] * (stack.dim() - 1)), values, stack)
        stack.copy_(values)

    def round(self, values: Tensor, word3: int = UPDATE, *, is_flat: bool = False) -> Tensor:
        """Returns new factors (L, …) in at least float32, rounded to the parameters' dtype (rounding.round_factors)."""
        is_a = None if is_flat else self.is_a
        return round_factors(values, self.value.dtype, self.keys, self.steps.expand(len(values)), is_a, word3)

    def scale(self, factor_scale: Tensor, gradient_scale: Tensor) -> None:
        """Scales values, gradients and, when AdamW reads them, moments. Both scales are (L, …) and broadcast."""
        self.write(self.value, scaled_to(self.value, factor_scale, self.value.dtype))
        self.grad, self.moment_scale = self.gradient() * gradient_scale, gradient_scale

    def adamw(self, settings: dict, grams: bool) -> None:
        """Applies AdamW to the active slices, with the parameters' own gradients unless a method has changed them.
        ``grams``: whether the Grams of the new factors are read afterwards, by which the kernels choose the numbering
        of the noise."""
        if self.value.dtype.itemsize == 2:
            self._adamw_in_float32(settings, is_flat=self.grad is None and not grams)
        else:
            if self.moment_scale is not None:
                for name, scale in zip(MOMENTS, (self.moment_scale, self.moment_scale.square()), strict=True):
                    self.write(self.state[name], self.state[name] * scale)
            self._adamw_in_place(settings)
        self.grad = self.moment_scale = None  # freed before a method changes the new factors

    def _adamw_in_float32(self, settings: dict, is_flat: bool) -> None:
        """Applies AdamW to copies in float32, so that factors and moments are rounded once."""
        moments = [self.state[name] for name in MOMENTS]
        p, g, m, v = map(float32_copy, (self.value, self.gradient(), *moments))
        if self.moment_scale is not None:
            m *= self.moment_scale
            v *= self.moment_scale.square()
        steps = list(self.steps.expand(len(p)))
        if self.active is None and self._counts_agree:
            adamw_([p], [g], [m], [v], steps[:1], settings)
        else:
            p_active, g_active, m_active, v_active = ([x[i] for i in self._positions] for x in (p, g, m, v))
            adamw_(p_active, g_active, m_active, v_active, [steps[i] for i in self._positions], settings)
        for stack, values in zip(moments, (m, v), strict=True):
            self.write(stack, values)
        self.write(self.value, self.round(p, is_flat=is_flat))

    def _adamw_in_place(self, settings: dict) -> None:
        p, states = list(self.value), self._states()
        m, v, steps = ([state[name] for state in states] for name in (*MOMENTS, "step"))
        g = [parameter.grad for parameter in self.parameters] if self.grad is None else list(self.grad)
        if self.active is not None:
            p, g, m, v, steps = ([tensors[i] for i in self._positions] for tensors in (p, g, m, v, steps))
        elif self.grad is not None and self._counts_agree:  # one tensor takes less time than its slices
            p, g, m, v = [self.value], [self.grad], *([self.state[name]] for name in MOMENTS)
            steps = steps[:1]
        adamw_(p, g, m, v, steps, settings)


class ExpertsFactor(Factor):
    """The a or the b of a pair of experts. The parameter and its state keep their memory and the shapes that PEFT and
    torch give them. ``value`` and ``state`` are views (E, …) of this memory with one slice for each expert; ``grad``
    has the same shape.

    Attributes:
        steps: the parameter's step count, (1,) float32.
    """

    _counts_agree = True

    def __init__(
        self,
        parameter: Tensor,
        split: Callable[[Tensor], Tensor],
        is_a: bool,
        keys: Tensor | None,
        shapes: Shapes,
        states: dict,
    ):
        """``split`` returns the view (E, …) of a tensor of the parameter's shape. A state of another shape already has
        the experts as its first dimension. New state is zero."""
        self.parameters, self.is_a, self.keys, self._split = [parameter], is_a, keys, split
        state, device = states[parameter], parameter.device
        self.steps = to_device(step_counts([parameter], states), torch.float32, device)
        for name, (shape, dtype) in shapes.items():
            old = state.get(name)
            new = torch.zeros(shape, dtype=dtype, device=device) if old is None else old.to(device, dtype)
            state[name] = with_strides_of(new, parameter) if new.shape == parameter.shape else new.contiguous()
        state["step"] = self.steps[0]
        self._optimizer_states, self._names = states, tuple(shapes)
        self._addresses = self._current_addresses()

    @cached_property
    def value(self) -> Tensor:
        return self._split(self.parameters[0])

    def _write_back(self) -> None:
        """Writes nothing, since ``value`` is the parameter's own memory."""

    def _stack_from(self, first: Tensor) -> Tensor:
        return self._split(first) if first.shape == self.parameters[0].shape else first

    def gradient(self) -> Tensor:
        return self._split(self.parameters[0].grad) if self.grad is None else self.grad

    def adamw(self, settings: dict, grams: bool) -> None:
        super().adamw(settings, grams=True)  # the kernels number interleaved factors by rows in any case

    def _adamw_in_place(self, settings: dict) -> None:
        """Applies AdamW to the whole parameter, since it works entry by entry."""
        parameter = self.parameters[0]
        gradient = parameter.grad
        if self.grad is not None:  # bring (E, …) back to the parameter's layout
            gradient = torch.empty_like(parameter)
            self._split(gradient).copy_(self.grad)
        state = self._states()[0]
        m, v = ([state[name]] for name in MOMENTS)
        adamw_([parameter], [gradient], m, v, [self.steps[0]], settings)


class StackedBatch(Batch):
    """Pairs of one shape and dtype, or one pair of experts.

    Attributes:
        a, b: the factors, with a.value (L, r, d_in) and b.value (L, d_out, r).
    """

    ops = backend.load_ops("pairs", triton=False)
    a: Factor
    b: Factor

    def __init__(self, members: list[PairInGroups], states: dict, shapes: tuple[Shapes, Shapes], stochastic: bool):
        super().__init__(members, step_counts([pair.b for pair, *_ in members], states), stochastic)
        pair = self.pairs[0]
        keys_a = keys_b = None
        if stochastic and pair.a.dtype.itemsize == 2:
            keys_a, keys_b = self.noise_keys("lora_A"), self.noise_keys("lora_B")
        if pair.experts > 1:
            self.a = ExpertsFactor(pair.a, pair.split_a, True, keys_a, shapes[0], states)
            self.b = ExpertsFactor(pair.b, pair.split_b, False, keys_b, shapes[1], states)
        else:
            self.a = Factor([pair.a for pair in self.pairs], True, keys_a, shapes[0], states)
            self.b = Factor([pair.b for pair in self.pairs], False, keys_b, shapes[1], states)
        self.find_resting()

    @classmethod
    def build(cls, members: list[PairInGroups], states: dict, layout: Callable, stochastic: bool = False) -> list[Self]:
        """Returns one stack of all members. On a CPU it is divided into stacks that each fit the cache, and each pair
        of experts is a stack of its own."""
        pair = members[0][0]
        size = len(members) if pair.a.is_cuda else max(1, CACHED // max(1, pair.a.numel(), pair.b.numel()))
        size = 1 if pair.experts > 1 else size
        parts = [members[i : i + size] for i in range(0, len(members), size)]
        return [cls(part, states, layout(pair), stochastic) for part in parts]

    def find_resting(self) -> None:
        super().find_resting()
        if len(self.pairs) > 1:  # a batch in which all pairs rest takes no part in the step
            for factor in (self.a, self.b):
                factor.set_resting(self.rests)

    def begin(self, param_groups: list[dict]) -> None:
        super().begin(param_groups)
        for factor in (self.a, self.b):
            factor.begin()

    def end(self) -> None:
        for factor in (self.a, self.b):
            factor.end()

    def intact(self) -> bool:
        return self.a.intact() and self.b.intact()

    def grams(self, gradients: bool = False) -> Grams:
        a, b = self.a.value, self.b.value
        return grams(a, b, self.a.gradient(), self.b.gradient()) if gradients else grams(a, b)

    def add_to_gradients(self, coefficients: Tensor) -> None:
        for factor, c in zip((self.b, self.a), coefficients.chunk(2), strict=True):
            factor.grad = at_least_float32(factor.gradient()) + c[:, None, None] * factor.value

    @shown
    def precondition(self, damping: float) -> None:
        ka, kb, *_ = self.grams()
        inverses = self.ops.spd_inverse(torch.cat([ka, kb]), damping)
        self.transform_gradients(inverses)  # Ka is for b's gradient, Kb for a's

    def transform_gradients(self, matrices: Tensor) -> None:
        matrices_b, matrices_a = matrices.chunk(2)
        self.a.grad = matrices_a @ at_least_float32(self.a.gradient())
        self.b.grad = at_least_float32(self.b.gradient()) @ matrices_b

    def scale(self, factor_scales: Tensor, gradient_scales: Tensor) -> None:
        broadcasts = (slice(None), None), (slice(None), slice(None), None)  # over the columns of b, the rows of a
        sides = zip((self.b, self.a), broadcasts, factor_scales.chunk(2), gradient_scales.chunk(2), strict=True)
        for factor, broadcast, *scales in sides:
            factor.scale(*(scale[broadcast] for scale in scales))

    @shown
    def merge(
        self, residual_scale: Tensor, factor_scales: Tensor, chosen: list[bool], rounding: str, seed: int
    ) -> None:
        names = [name for pair in self.pairs for name in pair.product_names]
        counts = [n for pair, n in zip(self.pairs, self.counts(), strict=True) for _ in range(pair.experts)]
        merged = [flag for pair, flag in zip(self.pairs, chosen, strict=True) for _ in range(pair.experts)]
        weights = [weight for pair in self.pairs for weight in pair.split_weight(pair.mergeable_weight.data)]
        residuals: Iterable[Tensor | None] = [None] * self.products
        stored = self.b.state.get("merge_residual")
        if stored is not None:
            residuals = stored.mT if self.pairs[0].transposed else stored  # stored in the layout of the weight
        captured = backend.is_capturing(weights[0].device)  # a seed would be the same at every replay
        scaling = self.per_pair("scaling", lambda pair: pair.scaling)
        scaled = map(Scaled, scaling, *factor_scales.chunk(2))
        factors = self.a.value, self.b.value
        operands = zip(weights, *factors, residual_scale, residuals, scaled, names, counts, strict=True)
        for weight, a, b, scale, residual, scales, name, count in compress(operands, merged):
            # By the product's name, the noise does not depend on the batch. torch's CPU generator takes 32 bits.
            product_seed = None if captured else zlib.crc32(f"{seed} {count} {name}".encode())
            add_low_rank_(weight, a, b, scale, rounding, product_seed, residual, scales)

    @shown
    def adamw(self, grams: bool) -> None:
        self.a.adamw(self.settings_a, grams)
        self.b.adamw(self.settings_b, grams)

    @shown
    def momentum(self, beta: float) -> Grams:
        moments = []
        for factor in (self.a, self.b):
            moment = factor.state["exp_avg"]
            # In float32, since a 16-bit average would lose small changes; rounded once.
            average = torch.lerp(at_least_float32(moment), at_least_float32(factor.gradient()), 1 - beta)
            factor.write(moment, average.to(moment.dtype))
            moments.append(moment)
        kp, kq, *_ = grams(*moments)
        return self.grams()._replace(kp=kp, kq=kq)

    @shown
    def move(self, matrices: Tensor) -> None:
        matrices_b, matrices_a = matrices.chunk(2)
        moment_a, moment_b = (at_least_float32(factor.state["exp_avg"]) for factor in (self.a, self.b))
        sides = (
            (self.b, self.settings_b, moment_b @ matrices_b),
            (self.a, self.settings_a, matrices_a @ moment_a),
        )
        for factor, settings, change in sides:
            decay = 1 - settings["lr"] * settings["weight_decay"]
            factor.write(factor.value, factor.round(decay * at_least_float32(factor.value) + change))

    @shown
    def transform(self, matrices: Tensor, target: str = "value", add: bool = False) -> None:
        matrices_b, matrices_a = matrices.chunk(2)
        a, b = (factor.value if target == "value" else factor.state[target] for factor in (self.a, self.b))
        products = (self.a, a, matrices_a @ at_least_float32(a)), (self.b, b, at_least_float32(b) @ matrices_b)
        for factor, stack, product in products:
            if add:
                product += stack
            # A multiplied factor is rounded to nearest: noise would move its product at every step, whatever the rate.
            factor.write(stack, factor.round(product, CORRECTION) if add else product.to(stack.dtype))
