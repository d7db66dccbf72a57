"""Batches on the Triton kernels: all pairs of one rank, whatever their sizes, in their own memory. Each operation is
one launch for each combination of dtypes. The methods' changes of the gradients are recorded, and applied when AdamW
reads them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, compress
from typing import Self

import torch
from torch import Tensor

from .. import backend
from ..kernels import pointer_table
from ..kernels.device import to_device
from ..kernels.launch import report_addresses
from ..kernels.pairs import adamw, add_low_rank, gram, momentum, regularizers, transform
from ..kernels.pairs.adamw import Settings
from ..kernels.pairs.transform import Noise
from ..kernels.records import Grams, Scaled, StepWork
from ..ops.observers import shown
from .batch import MOMENTS, Batch, PairInGroups, Trained, states_of, step_counts
from .pairs import Pair

ALL_GRAMS = Grams._fields


class GroupedBatch(Batch):
    """Pairs of one rank. Their factors are listed with all b first, then all a.

    A batch owns pointer tables with the addresses of factors and moments, which are copied to the device once. There is
    one table for each combination of dtypes, so as a rule one. Gradients move at every step, and the list of their
    addresses is copied when it has changed. Hyperparameters are arguments of the launch.
    """

    ops = backend.load_ops("pairs", triton=True)
    # The work of one step, which ``_forget`` drops.
    _work: dict[str, Tensor]
    _grams_before: Tensor | None
    _grams_after: Tensor | None
    _listed: list[pointer_table.TableWithGradients] | None

    def __init__(self, members: list[PairInGroups], states: dict, layout: Callable, stochastic: bool):
        pairs = [pair for pair, *_ in members]
        self._factors: list[Trained] = [pair.b for pair in pairs] + [pair.a for pair in pairs]
        counts = step_counts(self._factors, states)
        super().__init__(members, counts[: len(pairs)], stochastic)
        self._rank, self._device = pairs[0].rank, self._factors[0].device
        experts = [pair.experts for pair in pairs] * 2
        rows = [float(count) for count, n in zip(counts, experts, strict=True) for _ in range(n)]
        self._steps = to_device(rows, torch.float32, self._device)
        first = [0, *accumulate(experts)][:-1]  # each factor's first row in per-factor tensors of 2L rows
        layouts = [layout(pair) for pair in self.pairs]
        shapes = [shapes_b for _, shapes_b in layouts] + [shapes_a for shapes_a, _ in layouts]
        for p, row, factor_shapes in zip(self._factors, first, shapes, strict=True):
            state = {
                name: _state_or_zeros(states[p], name, shape, dtype, p.device)
                for name, (shape, dtype) in factor_shapes.items()
            }
            states[p].update({"step": self._steps[row]} | state)  # all experts of a parameter share its step count
        self._optimizer_states = states
        positions = {id(p): i for i, p in enumerate(states)}
        self._positions = [positions[id(p)] for p in self._factors]  # of their states among all
        self._moments = [name for name in MOMENTS if name in shapes[0]]
        self._names = (*self._moments, "step")
        is_a = [False] * len(self.pairs) + [True] * len(self.pairs)
        self._tables = pointer_table.build_tables(self._columns(), is_a, first, experts)
        self._noise = None
        if stochastic and any(p.dtype.itemsize == 2 for p in self._factors):
            self._noise = Noise(self._steps, torch.cat([self.noise_keys("lora_B"), self.noise_keys("lora_A")]))
        self._places, self._dtypes = self._current_places(), [p.dtype for p in self._factors]
        self._state_addresses = [self._addresses_of_state(p) for p in self._factors]
        self._forget()
        self.find_resting()

    @classmethod
    def build(cls, members: list[PairInGroups], states: dict, layout: Callable, stochastic: bool = False) -> list[Self]:
        """Returns one batch with all members."""
        return [cls(members, states, layout, stochastic)]

    def find_resting(self) -> None:
        """Tells the tables which factors rest. Without methods, one factor of a pair may rest alone."""
        super().find_resting()
        rests = [p.grad is None for p in self._factors]
        self._resting = True in rests
        for table in self._tables:
            table.set_resting(rests)

    def _columns(self) -> list[list[Tensor]]:
        """Returns the tables' columns. The moments are read from the state each time and not held, so that a user who
        takes them out of the state frees their memory."""
        states = self._states()
        return [self._factors, *([state[name] for state in states] for name in self._moments)]

    def _states(self) -> list[dict]:
        """Returns the state of each factor. It is found by position, because a tensor is slow to hash; the optimizer
        builds batches anew when the set of states or its order changes."""
        states = list(self._optimizer_states.values())
        return [states[i] for i in self._positions]

    def _tensors_of(self, table: pointer_table.FactorTable) -> Iterator[Tensor]:
        """Yields the tensors whose addresses a table holds. They are looked up when the first is asked for, which only
        tests do."""
        for column in self._columns():
            for i in table.positions:
                yield column[i]

    def begin(self, param_groups: list[dict]) -> None:
        super().begin(param_groups)
        self._forget()  # what a step that raised an error has left
        for table in self._tables:
            report_addresses(table.entries, self._tensors_of(table))
        if pointer_table.capturing():
            pointer_table.hold_for_graphs(self)

    def end(self) -> None:
        self._forget()

    def _forget(self) -> None:
        """Drops all that belongs to one step: the recorded work, Ka and Kb before and after AdamW, and the
        gradients."""
        self._work, self._grams_before, self._grams_after, self._listed = {}, None, None, None

    def intact(self) -> bool:
        """Compares whole lists, because this runs at every step and list comparison is the fastest check in Python."""
        last, current = len(self._factors) - 1, self._begun % len(self._factors)
        return (
            self._current_places() == self._places
            and all([p.is_contiguous() for p in self._factors])  # all() of a list is faster than of a generator
            and [p.dtype for p in self._factors] == self._dtypes
            and all(
                [self._addresses_of_state(self._factors[i]) == self._state_addresses[i] for i in (0, current, last)]
            )
        )

    def _current_places(self) -> list[int]:
        """Returns the addresses of the parameters and the identities of the tensors that hold their state.

        Reading the addresses of all state tensors would take longer than the rest of the check, because these objects
        are not in the host's caches. ``intact`` therefore reads those of the first factor, the last and another one at
        each step: code that replaces the memory of state tensors replaces that of all of them."""
        states = self._states()
        ids = [id(state.get(name)) for name in self._names for state in states]
        return [*[p.data_ptr() for p in self._factors], *ids]

    def _addresses_of_state(self, p: Tensor) -> list[int]:
        state = self._optimizer_states[p]
        return [state[name].data_ptr() for name in self._names]

    def grams(self, gradients: bool = False) -> Grams:
        if gradients:
            return Grams(*gram.table_grams(self._with_gradients(), self.products, self._rank, ALL_GRAMS))
        if self._grams_after is not None:
            kb, ka = self._grams_after.chunk(2)
            return Grams(ka, kb)
        ka, kb = self._before().chunk(2)
        return Grams(ka, kb)

    def _before(self) -> Tensor:
        """Returns Ka, then Kb, of the factors before the step: (2L, r, r)."""
        if self._grams_before is None:
            self._grams_before = self._compute_grams("ka", "kb")
        return self._grams_before

    def _compute_grams(self, *wanted: str) -> Tensor:
        factors = [table.with_column(0) for table in self._tables]
        return gram.table_grams(factors, self.products, self._rank, wanted).flatten(0, 1)

    def _with_gradients(self) -> list[pointer_table.TableWithGradients]:
        """Returns the tables with the addresses of the gradients beside those of the factors."""
        if self._listed is None:
            gradients = [p.grad for p in self._factors]
            if self._resting:  # kernels do not read the gradient of a factor that rests, so any other stands in
                other = next(g for g in gradients if g is not None)
                gradients = [other if g is None else g for g in gradients]
            if not all([g.is_contiguous() for g in gradients]):
                gradients = [g.contiguous() for g in gradients]
            self._listed = [table.with_gradients(gradients) for table in self._tables]
        return self._listed

    def add_to_gradients(self, coefficients: Tensor) -> None:
        self._work["additive"] = coefficients

    @shown
    def precondition(self, damping: float) -> None:
        self.transform_gradients(self.ops.spd_inverse(self._before(), damping))  # Ka is for b's gradient, Kb for a's

    def transform_gradients(self, matrices: Tensor) -> None:
        self._work["matrices"] = matrices.contiguous()

    def scale(self, factor_scales: Tensor, gradient_scales: Tensor) -> None:
        self._work |= {"scale_p": factor_scales.contiguous(), "scale_g": gradient_scales.contiguous()}

    @shown
    def merge(
        self, residual_scale: Tensor, factor_scales: Tensor, chosen: list[bool], rounding: str, seed: int
    ) -> None:
        pairs = list(compress(self.pairs, chosen))
        weights = [pair.mergeable_weight.data for pair in pairs]
        residuals = None
        if rounding == "compensated":
            states_b = states_of([pair.b for pair in pairs], self._optimizer_states)
            # A float32 weight has no residual, and the kernel reads none: the weight stands in for it.
            residuals = [state.get("merge_residual", w) for state, w in zip(states_b, weights, strict=True)]
            residuals = [x for pair, w in zip(pairs, residuals, strict=True) for x in _split_stored(pair, w)]
        weights = [x for pair, w in zip(pairs, weights, strict=True) for x in _split_stored(pair, w)]
        a, b = map(list, zip(*[factors for pair in pairs for factors in _split_factors(pair)], strict=True))
        scaling = self.per_pair("scaling", lambda pair: pair.scaling)
        scales = [residual_scale, scaling, *factor_scales.chunk(2)]
        if not all(chosen) or any(pair.transposed for pair in pairs):
            sizes = [pair.experts for pair in self.pairs]
            rows = list(compress(zip(*(x.split(sizes) for x in scales), strict=True), chosen))
            # A weight that is stored transposed takes bᵀ for a, so that α and β change places.
            rows = [row[:2] + row[:1:-1] if pair.transposed else row for pair, row in zip(pairs, rows, strict=True)]
            scales = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        scale, *scaled = [x.contiguous() for x in scales]
        seed_of_step = self._seed(seed)
        add_low_rank.add_low_rank_(weights, a, b, scale, rounding, seed_of_step, residuals, Scaled(*scaled))

    def _seed(self, seed: int) -> int | Tensor:
        """Returns a seed that differs at each step, also when a CUDA graph replays the step. On a GPU the seed is
        always in device memory: the kernel that takes it as a number is another one, which could not be loaded while a
        graph is captured."""
        base = zlib.crc32(str(seed).encode()) << 30
        # The sum of the steps that the products have taken grows at each step, whichever of them rest.
        if self._device.type == "cuda":
            return self._steps[: self.products].sum(dtype=torch.float64).long() + base
        taken = zip(self.pairs, self.counts(), self.rests, strict=True)
        return base + sum(pair.experts * (count - (not rests)) for pair, count, rests in taken)

    @shown
    def adamw(self, grams: bool) -> None:
        work = StepWork(**self._work, gram=grams, keys=self._noise and self._noise.keys)
        factors = self._with_gradients()
        settings = self._settings()
        self._grams_after = adamw.step_tables_(factors, 2 * self.products, self._rank, settings, self._steps, work)
        # The kernels write past autograd. The new version makes a backward through an older graph an error.
        torch.autograd.graph.increment_version(self._factors)
        self._listed = None  # gradients are not held after their last use
        if grams and self._grams_after is None:  # the kernel returns no Grams at large ranks
            self._grams_after = self._compute_grams("kb", "ka")

    @shown
    def momentum(self, beta: float) -> Grams:
        momentum.average_(self._with_gradients(), beta, self._steps)
        torch.autograd.graph.increment_version(self._columns()[1])
        self._listed = None  # as in adamw
        factors = [table.with_column(1) for table in self._tables]
        totals = gram.table_grams(factors, self.products, self._rank, ("ka", "kb", "kp", "kq"))
        return Grams(*totals)

    @shown
    def move(self, matrices: Tensor) -> None:
        momentum.move_(self._tables, matrices.contiguous(), self._settings(), self._noise)
        torch.autograd.graph.increment_version(self._factors)
        self._grams_before = None  # ``grams`` computes those of the moved factors

    def _settings(self) -> Settings:
        """Returns hyperparameters as arguments of the launch. Learning rates that are on the device are read there: the
        host does not wait for them, and a CUDA graph reads them at every replay."""
        sides = self.settings_b, self.settings_a
        in_memory, rates, numbers = regularizers.learning_rates(sides[0]["lr"], sides[1]["lr"], self._steps)
        rows = [(lr, *x["betas"], x["eps"], x["weight_decay"]) for lr, x in zip(numbers, sides, strict=True)]
        return Settings(tuple([float(x) for row in rows for x in row]), rates if in_memory else None)

    @shown
    def transform(self, matrices: Tensor, target: str = "value", add: bool = False) -> None:
        column = 0 if target == "value" else 1 + self._moments.index(target)
        noise = self._noise if add else None  # a multiplied factor is rounded to nearest, as in stacked.py
        transform.transform_tables_(self._tables, matrices.contiguous(), column, add, noise)
        torch.autograd.graph.increment_version(self._columns()[column])


def _split_stored(pair: Pair, x: Tensor) -> list[Tensor]:
    """Returns the contiguous weights of a pair's products, in the layout in which they are stored."""
    return [x] if pair.experts == 1 else list(x)


def _split_factors(pair: Pair) -> Iterable[tuple[Tensor, Tensor]]:
    """Returns a (r, d_in) and b (d_out, r) of each product, or bᵀ and aᵀ where the weight is stored transposed."""
    if pair.experts == 1:
        return [(pair.a, pair.b)]
    a, b = pair.split_a(pair.a.data), pair.split_b(pair.b.data)
    return zip(b.mT, a.mT, strict=True) if pair.transposed else zip(a, b, strict=True)


def _state_or_zeros(state: dict, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the state of that name if it exists, else zeros."""
    if name in state:
        return state[name].to(device, dtype).contiguous()
    return torch.zeros(shape, dtype=dtype, device=device)
