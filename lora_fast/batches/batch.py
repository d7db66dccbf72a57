"""What the optimizer and its methods work on: a batch of adapter pairs, and what can be done to all of it at once.

Two kinds, one interface: a ``StackedBatch`` (stacked.py, plain torch) holds pairs of one shape in one tensor; a
``GroupedBatch`` (grouped.py, Triton) holds all pairs of one rank, whatever their sizes, and every operation is one
launch. What the optimizer shows to the outside stays per parameter, as in torch.

L counts products: a pair of E experts is E of them, one after the other. Numbers per factor come in one tensor of 2L
rows, those of the batch's b first, then those of its a.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .. import backend, checks
from ..kernels.records import Grams
from .pairs import Pair

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
PairInGroups = tuple[Pair, int, int]  # a pair, and the parameter groups of its a and b
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by their names in the state


def adamw_state(pair: Pair) -> tuple[Shapes, Shapes]:
    """Shapes and dtypes of the state of a and of b: AdamW's moments."""
    return tuple({name: (p.shape, p.dtype) for name in MOMENTS} for p in (pair.a, pair.b))


class Batch(ABC):
    """Pairs that have taken the same number of steps.

    Attributes:
        pairs: those that the batch holds. products: L, the number of their products.
        ops: the module that computes r×r algebra for these pairs, kernels or twins (``backend.ops``).
        count: b's steps, the one under way included (a's may be others only without a method that uses both).
        settings_a, settings_b: lr, betas, eps and weight_decay of this step.
    """

    def __init__(self, members: list[PairInGroups], counts: tuple[int, int]):
        """counts: the steps that b and a have taken."""
        self.pairs = [pair for pair, *_ in members]
        self.ops = backend.ops("pairs", self.pairs[0].a)
        self.products = sum(pair.experts for pair in self.pairs)
        self.count = counts[0]
        self._groups = members[0][1:]
        self._per_pair: dict[str, Tensor] = {}

    def begin(self, param_groups: list[dict]) -> None:
        """A new step: count it and read the settings."""
        self.count += 1
        self.settings_a, self.settings_b = (param_groups[i] for i in self._groups)

    def due(self, every: int, phase: int = 0) -> bool:
        """Whether this step's number, less ``phase``, is a multiple of ``every``.

        Raises:
            ArgumentError: ``every`` is not 1 and a CUDA graph is captured: each replay would do what this one does.
        """
        device = self.pairs[0].a.device
        if every > 1 and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise checks.ArgumentError("interval, every", "1 where a CUDA graph is captured", every)
        return (self.count - phase) % every == 0

    def per_pair(self, name: str, of: Callable[[Pair], float]) -> Tensor:
        """A number of each pair, repeated for each of its experts: (L,) in float32 (float64 for float64 pairs).
        ``name`` is what it is kept under."""
        if name not in self._per_pair:
            like = self.pairs[0].a
            dtype = torch.promote_types(like.dtype, torch.float32)
            numbers = [number for pair in self.pairs for number in [of(pair)] * pair.experts]
            self._per_pair[name] = torch.tensor(numbers, dtype=dtype, device=like.device)
        return self._per_pair[name]

    @abstractmethod
    def intact(self) -> bool:
        """Whether the parameters are still where the batch expects them."""

    @abstractmethod
    def grams(self, gradients: bool = False) -> Grams:
        """Of the factors as they are and, if asked, of their raw gradients: (L, r, r) each."""

    @abstractmethod
    def add_to_gradients(self, coefficients: Tensor) -> None:
        """g += coefficient · p for every factor: (2L,)."""

    @abstractmethod
    def precondition(self, damping: float) -> None:
        """da ← (bᵀb + δI)⁻¹ da, db ← db (a aᵀ + δI)⁻¹."""

    @abstractmethod
    def transform_gradients(self, matrices: Tensor) -> None:
        """db ← db M, da ← M da: (2L, r, r), on what the methods have made of the gradients so far."""

    @abstractmethod
    def scale(self, factor_scales: Tensor, gradient_scales: Tensor) -> None:
        """Columns of b and rows of a times ``factor_scales``, (2L, r); of their gradients and first moments times
        ``gradient_scales``, of their second moments times its square."""

    @abstractmethod
    def merge(self, residual_scale: Tensor, rounding: str, seed: int) -> None:
        """W += b diag(residual_scale) a for every product: (L, r). ``seed`` and the step's number seed stochastic
        rounding."""

    @abstractmethod
    def adamw(self, grams: bool) -> None:
        """AdamW on what the gradients have become. ``grams``: those of the result will be asked for."""

    @abstractmethod
    def momentum(self, beta: float) -> Grams:
        """m ← β m + (1 − β) g for every factor's ``exp_avg`` m, g being what the methods have made of its gradient.
        Returns the Grams of the factors and of m: ka, kb, kp = m_a m_aᵀ and kq = m_bᵀ m_b; k is None."""

    @abstractmethod
    def move(self, matrices: Tensor) -> None:
        """b ← (1 − η w) b + m_b M and a ← (1 − η w) a + M m_a: (2L, r, r), with the ``exp_avg`` m and each factor's own
        learning rate η and weight decay w. ``grams`` returns those of the moved factors afterwards."""

    @abstractmethod
    def transform(self, matrices: Tensor, target: str = "value", add: bool = False) -> None:
        """b ← b M, a ← M a, or b += b M, a += M a: (2L, r, r). ``target`` is "value" for the factors, or
        the name of a state."""
