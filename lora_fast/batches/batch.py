"""The interface of a batch of adapter pairs, on which the optimizer and its methods work.

There are two kinds with one interface. A ``StackedBatch`` (stacked.py, plain torch) steps pairs of one shape in one
tensor. A ``GroupedBatch`` (grouped.py, Triton) holds all pairs of one rank, whatever their sizes, and each operation is
one launch. The optimizer's public state stays per parameter, as in torch.

L is the number of products. A pair of E experts contributes E products, which are adjacent. Per-factor values are
stacked into one tensor of 2L rows: the L values for b, then the L values for a. Step counts are in this order as well.
Parameter groups and the shapes of states are in the order a, b.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from .. import backend, checks
from ..kernels.device import to_device
from ..kernels.grouping import group_by
from ..kernels.records import Grams
from ..layers.find import bare_name
from .pairs import Pair

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name of a state → its shape and dtype
PairInGroups = tuple[Pair, int, int]  # a pair, the index of a's parameter group, that of b's
Trained = Any  # Any, because torch types ``grad`` as optional and these tensors always have one
MOMENTS = ("exp_avg", "exp_avg_sq")  # names of AdamW's moments in the optimizer's state


def adamw_state(pair: Pair) -> tuple[Shapes, Shapes]:
    """Returns the shapes and dtypes of AdamW's moments of a, then those of b."""

    def moments(p: Tensor) -> Shapes:
        return {name: (p.shape, p.dtype) for name in MOMENTS}

    return moments(pair.a), moments(pair.b)


NO_STATE: dict = {}


def noise_key(name: str) -> int:
    """Returns the key of stochastic rounding of the parameter of this name: 32 bits."""
    return zlib.crc32(bare_name(name).encode())


def states_of(parameters: list[Tensor], states: dict) -> list[dict]:
    """Returns the optimizer's state of each parameter, empty where there is none. Batches look it up and do not hold
    it, so that a user who clears the optimizer's state frees its memory."""
    return [states.get(p, NO_STATE) for p in parameters]


def step_counts(parameters: list[Tensor], states: dict) -> list[int]:
    """Returns the number of steps that each parameter has taken. Reads all counts of a device at once, which waits for
    the device; a batch therefore calls it only when it is built."""
    counts = [0] * len(parameters)
    stepped = [i for i, p in enumerate(parameters) if "step" in states[p]]
    for positions in group_by(stepped, lambda i: states[parameters[i]]["step"].device).values():
        numbers = torch.stack([states[parameters[i]]["step"].float() for i in positions]).tolist()
        for i, number in zip(positions, numbers, strict=True):
            counts[i] = int(number)
    return counts


class Batch(ABC):
    """Pairs that are processed together.

    A pair without gradients rests: it stays in the batch, and the step changes neither its factors nor its state. The
    results that the batch computes for it are finite and not used.

    Attributes:
        ops: the module that computes r×r algebra for these pairs: the torch twins in a StackedBatch, the kernels in a
            GroupedBatch.
        pairs: the pairs of the batch. products: L, the number of their products.
        rests: whether each pair rests in the current step.
        stochastic: whether new factors of 16 bits are rounded stochastically.
        settings_a, settings_b: the parameter groups of a and b, which contain lr, betas, eps and weight_decay.
    """

    ops: ModuleType

    def __init__(self, members: list[PairInGroups], counts: list[int], stochastic: bool):
        """``counts`` are the numbers of steps that each pair's b has taken. If a method uses both factors, a has taken
        as many; otherwise its number may differ."""
        self.pairs = [pair for pair, *_ in members]
        self.products = sum(pair.experts for pair in self.pairs)
        self._groups = members[0][1:]  # partition.py puts pairs of different groups into different batches
        self._per_pair: dict[str, Tensor] = {}
        self._begun = 0  # steps since the batch was built; a pair's count is ``_offsets`` + ``_begun``
        self._offsets = counts
        self.rests = [False] * len(members)
        self.stochastic = stochastic

    @classmethod
    @abstractmethod
    def build(
        cls,
        members: list[PairInGroups],
        states: dict,
        layout: Callable[[Pair], tuple[Shapes, Shapes]],
        stochastic: bool = False,
    ) -> list[Self]:
        """Returns the batches that together contain all members.

        Args:
            members: pairs that agree in every property of partition.py's ``_key``.
            states: the optimizer's state, by parameter.
            layout: returns the shapes of the states of a pair's a and b, a's first.
            stochastic: whether new factors of 16 bits are rounded stochastically.
        """

    def find_resting(self) -> None:
        """Finds the pairs that rest. Runs whenever the set of parameters with gradients has changed."""
        self.rests = [pair.b.grad is None and pair.a.grad is None for pair in self.pairs]

    def begin(self, param_groups: list[dict]) -> None:
        """Begins a step. Counts it for the pairs that do not rest and reads its settings."""
        self._begun += 1
        if True in self.rests:
            self._offsets = [offset - rests for offset, rests in zip(self._offsets, self.rests, strict=True)]
        self.settings_a, self.settings_b = (param_groups[i] for i in self._groups)

    @abstractmethod
    def end(self) -> None:
        """Ends a step. Frees all that belongs to it alone, so that it does not stay in memory during the next forward
        and backward."""

    def counts(self) -> list[int]:
        """Returns the number of steps that each pair's b has taken, including the current one."""
        return [offset + self._begun for offset in self._offsets]

    def due(self, every: int, phase: int = 0) -> list[bool]:
        """Returns for each pair whether it takes part in the current step and the number of this step, less ``phase``,
        is a multiple of ``every``.

        Raises:
            ArgumentError: ``every`` is not 1 while a CUDA graph is captured: each replay would repeat this decision.
        """
        if every > 1 and backend.is_capturing(self.pairs[0].a.device):
            raise checks.ArgumentError("interval, every", "1 where a CUDA graph is captured", every)
        return [(n - phase) % every == 0 and not rests for n, rests in zip(self.counts(), self.rests, strict=True)]

    def rows(self, flags: list[bool]) -> Tensor:
        """Returns a flag of each pair, repeated for each of its experts, as bool (L,) on the device."""
        repeated = [flag for pair, flag in zip(self.pairs, flags, strict=True) for flag in [flag] * pair.experts]
        return to_device(repeated, torch.bool, self.pairs[0].a.device)

    def per_pair(self, name: str, compute: Callable[[Pair], float]) -> Tensor:
        """Returns a value of each pair, repeated for each of its experts, as (L,) in float32 (float64 for float64
        pairs). The tensor is cached under ``name``."""
        if name not in self._per_pair:
            like = self.pairs[0].a
            dtype = torch.promote_types(like.dtype, torch.float32)
            values = [value for pair in self.pairs for value in [compute(pair)] * pair.experts]
            self._per_pair[name] = to_device(values, dtype, like.device)
        return self._per_pair[name]

    def noise_keys(self, factor: str) -> Tensor:
        """Returns the keys of stochastic rounding of the products' ``factor``, "lora_A" or "lora_B": int64 (L,). They
        are made from names, so that the noise depends on neither batch nor backend."""
        names = [name for pair in self.pairs for name in pair.product_names]
        return to_device([noise_key(f"{name}.{factor}") for name in names], torch.int64, self.pairs[0].a.device)

    @abstractmethod
    def intact(self) -> bool:
        """Returns whether parameters and state are still the tensors that the batch was built from."""

    @abstractmethod
    def grams(self, gradients: bool = False) -> Grams:
        """Returns the Grams of the current factors and, with ``gradients``, of their raw gradients: (L, r, r) each."""

    @abstractmethod
    def add_to_gradients(self, coefficients: Tensor) -> None:
        """Adds coefficient · p to the gradient of each factor p. ``coefficients`` is (2L,), b's first."""

    @abstractmethod
    def precondition(self, damping: float) -> None:
        """Multiplies each gradient by the other factor's inverse Gram, da ← (bᵀb + δI)⁻¹ da and db ← db (a aᵀ + δI)⁻¹.
        δ is ``damping``."""

    @abstractmethod
    def transform_gradients(self, matrices: Tensor) -> None:
        """Multiplies the gradients after the methods applied so far, db ← db M and da ← M da. ``matrices`` contains the
        M, (2L, r, r), b's first."""

    @abstractmethod
    def scale(self, factor_scales: Tensor, gradient_scales: Tensor) -> None:
        """Multiplies the columns of b and the rows of a by ``factor_scales``, rounded to their dtype. Multiplies the
        same columns and rows of gradients and first moments by ``gradient_scales``, and those of second moments by the
        square of ``gradient_scales``. Both are (2L, r), b's first."""

    @abstractmethod
    def merge(
        self, residual_scale: Tensor, factor_scales: Tensor, chosen: list[bool], rounding: str, seed: int
    ) -> None:
        """Adds to W what every product of the chosen pairs loses when ``scale`` multiplies its factors.

        Args:
            residual_scale: (L, r), scaling (1 − α∘β), for b diag(residual_scale) a. Where a factor has 16 bits, the
                product of the factors as ``scale`` rounds them counts.
            factor_scales: (2L, r), as for ``scale``: α, then β.
            rounding, seed: of the weight. Stochastic rounding is seeded with ``seed`` and the number of the step.
        """

    @abstractmethod
    def adamw(self, grams: bool) -> None:
        """Applies AdamW with the gradients after all methods. ``grams`` is whether the Grams of the new factors are
        read afterwards; the kernels can then compute them while they write the factors."""

    @abstractmethod
    def momentum(self, beta: float) -> Grams:
        """Averages each gradient into ``exp_avg``, m ← β m + (1 − β) g, where g is the gradient after the methods
        applied so far. Returns Grams: ka and kb are those of the factors, kp = m_a m_aᵀ and kq = m_bᵀ m_b those of the
        moments, and k is None."""

    @abstractmethod
    def move(self, matrices: Tensor) -> None:
        """Moves the factors along their ``exp_avg`` m, b ← (1 − η w) b + m_b M and a ← (1 − η w) a + M m_a. η and w are
        the factor's own learning rate and weight decay. ``matrices`` contains the M, (2L, r, r), b's first. Afterwards
        ``grams`` returns the Grams of the new factors."""

    @abstractmethod
    def transform(self, matrices: Tensor, target: str = "value", add: bool = False) -> None:
        """Multiplies the factors, b ← b M and a ← M a, or adds the products to them if ``add``, b += b M and a += M a.

        Args:
            matrices: the M, (2L, r, r), b's first.
            target: "value" for the factors, or the name of a state, which is then changed in their place.
            add: whether the products are added.
        """
