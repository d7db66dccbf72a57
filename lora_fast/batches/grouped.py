"""Batches on the Triton kernels: all pairs of one rank, whatever their sizes, where they lie; every operation is one
launch (for each combination of dtypes). What methods do to gradients is put off until AdamW reads them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels import pointer_table
from ..kernels.launch import report_addresses
from ..kernels.pairs import adamw as kernel
from ..kernels.pairs import add_low_rank as merge
from ..kernels.pairs import gram, momentum, regularizers, transform
from ..kernels.records import Grams, StepWork
from .batch import MOMENTS, Batch, PairInGroups
from .pairs import Pair

ALL = Grams._fields


class GroupedBatch(Batch):
    """Pairs of one rank. Factors are listed b's first, then a's. A group owns its tables of where factors and moments
    lie, copied to the device once (one for each combination of dtypes, as a rule one). Gradients move at every step;
    the list of their places is copied when it has changed. Hyperparameters are arguments of the launch."""

    def __init__(self, members: list[PairInGroups], counts: tuple[int, int], states: dict, layout: Callable):
        super().__init__(members, counts)
        self._b, self._a = [pair.b for pair in self.pairs], [pair.a for pair in self.pairs]
        self._factors = self._b + self._a
        self._rank, self._device = self.pairs[0].rank, self._factors[0].device
        self._steps = torch.tensor(counts, dtype=torch.float32).repeat_interleave(self.products).to(self._device)
        experts = [pair.experts for pair in self.pairs] * 2
        first = [0, *accumulate(experts)][:-1]  # row of each factor in what counts products
        layouts = [layout(pair) for pair in self.pairs]
        shapes = [of_b for _, of_b in layouts] + [of_a for of_a, _ in layouts]
        for p, row, kinds in zip(self._factors, first, shapes, strict=True):
            p.data = p.data.contiguous()
            state = {name: _like(states[p], name, *kind, p.device) for name, kind in kinds.items()}
            states[p].update({"step": self._steps[row]} | state)  # those of other experts go with it
        self._states = [states[p] for p in self._factors]
        self._moments = [name for name in MOMENTS if name in shapes[0]]
        self._names = (*self._moments, "step")
        is_a = [False] * len(self.pairs) + [True] * len(self.pairs)
        self._tables = pointer_table.build_tables(self._columns(), is_a, first, experts)
        self._places, self._dtypes = self._places_now(), [p.dtype for p in self._factors]
        self._state_places = [self._places_of_state(i) for i in range(len(self._states))]
        self._forget()

    @classmethod
    def of(
        cls, members: list[PairInGroups], counts: tuple[int, int], states: dict, layout: Callable
    ) -> list[GroupedBatch]:
        return [cls(members, counts, states, layout)]

    def _columns(self) -> list[list[Tensor]]:
        """Returns the tables' columns. Moments are not held: who takes them out of the state may want their memory."""
        return [self._factors, *([state[name] for state in self._states] for name in self._moments)]

    def begin(self, param_groups: list[dict]) -> None:
        super().begin(param_groups)
        self._forget()
        for pairs in self._tables:
            report_addresses(pairs.entries, (column[i] for column in self._columns() for i in pairs.positions))
        if pointer_table.capturing():
            pointer_table.hold_for_graphs(self)

    def _forget(self) -> None:
        self._work, self._metric, self._after, self._listed = {}, None, None, None

    def intact(self) -> bool:
        """Compares lists, since it is asked at every step and the host has little time."""
        last, turn = len(self._states) - 1, self.count % len(self._states)
        return (
            self._places_now() == self._places
            and all([p.is_contiguous() for p in self._factors])
            and [p.dtype for p in self._factors] == self._dtypes
            and all([self._places_of_state(i) == self._state_places[i] for i in (0, turn, last)])
        )

    def _places_now(self) -> list[int]:
        """Returns the addresses of the parameters and the identities of the tensors that hold their state. To ask each
        of these for its address would take longer than all else (they are out of the host's caches), so ``intact`` asks
        the first, the last, and another at each step: who moves state inside its tensors moves all of it."""
        ids = [id(state.get(name)) for name in self._names for state in self._states]
        return [*[p.data_ptr() for p in self._factors], *ids]

    def _places_of_state(self, i: int) -> list[int]:
        return [self._states[i][name].data_ptr() for name in self._names]

    def grams(self, gradients: bool = False) -> Grams:
        if gradients:
            return Grams(*gram.table_grams(self._with_gradients(), self.products, self._rank, ALL))
        if self._after is not None:
            kb, ka = self._after.chunk(2)
            return Grams(ka, kb)
        ka, kb = self._both().chunk(2)
        return Grams(ka, kb)

    def _both(self) -> Tensor:
        """Ka, then Kb, of the factors before the step: (2L, r, r)."""
        if self._metric is None:
            self._metric = self._grams("ka", "kb")
        return self._metric

    def _grams(self, *wanted: str) -> Tensor:
        factors = [pairs.with_column(0) for pairs in self._tables]
        return gram.table_grams(factors, self.products, self._rank, wanted).flatten(0, 1)

    def _with_gradients(self) -> list[pointer_table.TableWithGradients]:
        if self._listed is None:
            gradients = [p.grad for p in self._factors]
            if not all([g.is_contiguous() for g in gradients]):
                gradients = [g.contiguous() for g in gradients]
            self._listed = [pairs.with_gradients(gradients) for pairs in self._tables]
        return self._listed

    def add_to_gradients(self, coefficients: Tensor) -> None:
        self._work["additive"] = coefficients

    def precondition(self, damping: float) -> None:
        self.transform_gradients(self.ops.spd_inverse(self._both(), damping))  # b's gradient takes Ka, a's Kb

    def transform_gradients(self, matrices: Tensor) -> None:
        self._work["matrices"] = matrices.contiguous()

    def scale(self, factor_scales: Tensor, gradient_scales: Tensor) -> None:
        self._work |= {"scale_p": factor_scales, "scale_g": gradient_scales}

    def merge(self, residual_scale: Tensor, rounding: str, seed: int) -> None:
        weights = [pair.weight.data for pair in self.pairs]
        residuals = None
        if rounding == "compensated":  # a float32 weight has none, and needs none
            residuals = [s.get("merge_residual", w) for s, w in zip(self._states, weights, strict=False)]
            residuals = [x for pair, w in zip(self.pairs, residuals, strict=True) for x in _experts_of(pair, w)]
        weights = [x for pair, w in zip(self.pairs, weights, strict=True) for x in _experts_of(pair, w)]
        a, b = zip(*[both for pair in self.pairs for both in _factors_of(pair)], strict=True)
        merge.add_low_rank_(
            weights, [*a], [*b], residual_scale.float().contiguous(), rounding, self._seed(seed), residuals
        )

    def _seed(self, seed: int) -> int | Tensor:
        """Returns another seed each step, also where a CUDA graph replays it. On a GPU it is always in memory: a kernel
        that takes a number is another one, and could not be loaded while a graph is captured."""
        base = zlib.crc32(str(seed).encode()) << 30
        return self._steps[0].long() + (base + 1) if self._device.type == "cuda" else base + self.count

    def adamw(self, grams: bool) -> None:
        work = StepWork(**self._work, gram=grams)
        factors = self._with_gradients()
        self._after = kernel.step_tables_(factors, 2 * self.products, self._rank, self._settings(), self._steps, work)
        torch.autograd.graph.increment_version(self._factors)
        self._listed = None  # gradients are not held past their last use
        if grams and self._after is None:
            self._after = self._grams("kb", "ka")

    def momentum(self, beta: float) -> Grams:
        momentum.average_(self._with_gradients(), beta, self._steps)
        torch.autograd.graph.increment_version(self._columns()[1])
        self._listed = None  # as in adamw
        factors = [pairs.with_column(1) for pairs in self._tables]
        totals = gram.table_grams(factors, self.products, self._rank, ("ka", "kb", "kp", "kq"))
        return Grams(*totals)

    def move(self, matrices: Tensor) -> None:
        momentum.move_(self._tables, matrices.contiguous(), self._settings())
        torch.autograd.graph.increment_version(self._factors)
        self._metric = None

    def _settings(self) -> kernel.Settings:
        """Returns arguments of the launch. A learning rate that is on the device is read there instead: the host does
        not wait for it, and a CUDA graph finds it at every replay."""
        sides = self.settings_b, self.settings_a
        in_memory, rates, numbers = regularizers.learning_rates(*(settings["lr"] for settings in sides), self._steps)
        rows = [(lr, *x["betas"], x["eps"], x["weight_decay"]) for lr, x in zip(numbers, sides, strict=True)]
        return kernel.Settings(tuple([float(x) for row in rows for x in row]), rates if in_memory else None)

    def transform(self, matrices: Tensor, target: str = "value", add: bool = False) -> None:
        column = 0 if target == "value" else 1 + self._moments.index(target)
        transform.transform_tables_(self._tables, matrices.contiguous(), column, add)
        torch.autograd.graph.increment_version(self._columns()[column])


def _experts_of(pair: Pair, x: Tensor) -> list[Tensor]:
    """The contiguous weights of a pair's products, as they are stored."""
    return [x] if pair.experts == 1 else list(x)


def _factors_of(pair: Pair) -> Iterable[tuple[Tensor, Tensor]]:
    """a (r, d_in) and b (d_out, r) of each product; bᵀ and aᵀ where the weight is stored transposed."""
    if pair.experts == 1:
        return [(pair.a, pair.b)]
    a, b = pair.split_a(pair.a.data), pair.split_b(pair.b.data)
    return zip(b.mT, a.mT, strict=True) if pair.transposed else zip(a, b, strict=True)


def _like(state: dict, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A state that is there already, or zeros."""
    if name in state:
        return state[name].to(device, dtype).contiguous()
    return torch.zeros(shape, dtype=dtype, device=device)
