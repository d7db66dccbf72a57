"""The interface of a batch of adapter pairs, on which the optimizer and its methods work.

There are two kinds with one interface. A ``StackedBatch`` (stacked.py, plain torch) holds pairs of one shape in one
tensor. A ``GroupedBatch`` (grouped.py, Triton) holds all pairs of one rank, whatever their sizes, and each operation is
one launch. The optimizer's public state stays per parameter, as in torch.

L is the number of products. A pair of E experts contributes E products, which are adjacent. Per-factor values are
stacked into one tensor of 2L rows: the L values for b, then the L values for a.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from .. import backend, checks
from ..kernels.records import Grams
from .pairs import Pair

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name of a state → its shape and dtype
PairInGroups = tuple[Pair, int, int]  # a pair, and the indices of the parameter groups of its a and b
Trained = Any  # a tensor that has a gradient, which torch types as optional
MOMENTS = ("exp_avg", "exp_avg_sq")  # names of AdamW's moments in the optimizer's state


def adamw_state(pair: Pair) -> tuple[Shapes, Shapes]:
    """Returns shapes and dtypes of AdamW's moments, of a and of b."""

    def moments(p: Tensor) -> Shapes:
        return {name: (p.shape, p.dtype) for name in MOMENTS}

    return moments(pair.a), moments(pair.b)


class Batch(ABC):
    """Pairs that have taken the same number of steps.

    Attributes:
        ops: the module that computes r×r algebra for these pairs: the torch twins in a StackedBatch, the kernels in a
            GroupedBatch.
        pairs: the pairs of the batch. products: L, the number of their products.
        count: the number of b's steps, including the current one. It is a's too, but for batches without a method that
            uses both factors.
        settings_a, settings_b: lr, betas, eps and weight_decay of the current step.
    """

    ops: ModuleType

    def __init__(self, members: list[PairInGroups], counts: tuple[int, int]):
        """``counts`` are the numbers of steps that b and a have taken."""
        self.pairs = [pair for pair, *_ in members]
        self.products = sum(pair.experts for pair in self.pairs)
        self.count = counts[0]
        self._groups = members[0][1:]  # partition.py puts pairs of different groups into different batches
        self._per_pair: dict[str, Tensor] = {}

    @classmethod
    @abstractmethod
    def build(
        cls,
        members: list[PairInGroups],
        counts: tuple[int, int],
        states: dict,
        layout: Callable[[Pair], tuple[Shapes, Shapes]],
    ) -> list[Self]:
        """Returns batches of all members, whose properties in partition.py's ``_key`` are equal."""

    def begin(self, param_groups: list[dict]) -> None:
        """Begins a step: counts it and reads its settings."""
        self.count += 1
        self.settings_a, self.settings_b = (param_groups[i] for i in self._groups)

    def due(self, every: int, phase: int = 0) -> bool:
        """Returns whether the number of the current step, less ``phase``, is a multiple of ``every``.

        Raises:
            ArgumentError: ``every`` is not 1 while a CUDA graph is captured: each replay would repeat this decision.
        """
        if every > 1 and backend.is_capturing(self.pairs[0].a.device):
            raise checks.ArgumentError("interval, every", "1 where a CUDA graph is captured", every)
        return (self.count - phase) % every == 0

    def per_pair(self, name: str, compute: Callable[[Pair], float]) -> Tensor:
        """Returns a value of each pair, repeated for each of its experts, as (L,) in float32 (float64 for float64
        pairs). The tensor is cached under ``name``."""
        if name not in self._per_pair:
            like = self.pairs[0].a
            dtype = torch.promote_types(like.dtype, torch.float32)
            values = [value for pair in self.pairs for value in [compute(pair)] * pair.experts]
            self._per_pair[name] = torch.tensor(values, dtype=dtype, device=like.device)
        return self._per_pair[name]

    @abstractmethod
    def intact(self) -> bool:
        """Returns whether parameters and state are still the tensors that the batch was built from."""

    @abstractmethod
    def grams(self, gradients: bool = False) -> Grams:
        """Returns the Grams of the current factors and, with ``gradients``, of their raw gradients: (L, r, r) each."""

    @abstractmethod
    def add_to_gradients(self, coefficients: Tensor) -> None:
        """g += coefficient · p for every factor: (2L,)."""

    @abstractmethod
    def precondition(self, damping: float) -> None:
        """da ← (bᵀb + δI)⁻¹ da, db ← db (a aᵀ + δI)⁻¹."""

    @abstractmethod
    def transform_gradients(self, matrices: Tensor) -> None:
        """db ← db M, da ← M da: (2L, r, r), on the gradients after the methods applied so far."""

    @abstractmethod
    def scale(self, factor_scales: Tensor, gradient_scales: Tensor) -> None:
        """Multiplies columns of b and rows of a by ``factor_scales`` (2L, r), those of their gradients and first
        moments by ``gradient_scales`` (2L, r), and those of their second moments by its square."""

    @abstractmethod
    def merge(self, residual_scale: Tensor, rounding: str, seed: int) -> None:
        """W += b diag(residual_scale) a for every product: (L, r). ``seed`` and the number of the step seed stochastic
        rounding."""

    @abstractmethod
    def adamw(self, grams: bool) -> None:
        """Applies AdamW with the gradients after all methods. ``grams`` announces that the Grams of the new factors
        will be read."""

    @abstractmethod
    def momentum(self, beta: float) -> Grams:
        """m ← β m + (1 − β) g for every factor's ``exp_avg`` m, where g is the gradient after the methods applied so
        far. Returns the Grams of the factors and of m: ka, kb, kp = m_a m_aᵀ and kq = m_bᵀ m_b; k is None."""

    @abstractmethod
    def move(self, matrices: Tensor) -> None:
        """b ← (1 − η w) b + m_b M and a ← (1 − η w) a + M m_a: (2L, r, r), with the ``exp_avg`` m and each factor's own
        learning rate η and weight decay w. Afterwards ``grams`` returns those of the new factors."""

    @abstractmethod
    def transform(self, matrices: Tensor, target: str = "value", add: bool = False) -> None:
        """b ← b M, a ← M a, or with ``add`` b += b M, a += M a: (2L, r, r). ``target`` is "value" for the factors, or
        the name of a state."""
