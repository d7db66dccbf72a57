"""Batches on the Triton kernels: all pairs of one rank, whatever their sizes, where they lie; every operation is one
launch (for each combination of dtypes). What methods do to gradients is put off until AdamW reads them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from .batch import Batch, Member
from .kernels import gram, merge, solve
from .kernels import step as kernel
from .kernels.table import kept, to_device
from .step import Grams

ALL = gram.Grams._fields


class Group(Batch):
    """Pairs of one rank. Factors are listed b's first, then a's."""

    def __init__(self, members: list[Member], count: int, states: dict, layout: Callable):
        super().__init__(members, count)
        self._b, self._a = [pair.b for pair in self.pairs], [pair.a for pair in self.pairs]
        self._factors = self._b + self._a
        self._is_a = [False] * len(self.pairs) + [True] * len(self.pairs)
        self._device = self._factors[0].device
        self._steps = torch.full((len(self._factors),), float(count), device=self._device)
        layouts = [layout(pair) for pair in self.pairs]
        shapes = [of_b for _, of_b in layouts] + [of_a for of_a, _ in layouts]
        for p, steps, of in zip(self._factors, self._steps, shapes, strict=True):
            p.data = p.data.contiguous()
            state = {name: _like(states[p], name, *shape, p.device) for name, shape in of.items()}
            states[p].update({"step": steps} | state)
        self._states = [states[p] for p in self._factors]
        self._forget()

    @classmethod
    def of(cls, members: list[Member], count: int, states: dict, layout: Callable) -> list[Group]:
        return [cls(members, count, states, layout)]

    def begin(self, param_groups: list[dict]) -> None:
        super().begin(param_groups)
        self._forget()

    def _forget(self) -> None:
        self._work, self._metric, self._after = {}, None, None

    def intact(self) -> bool:
        return all(p.device == self._device and p.is_contiguous() for p in self._factors)

    def grams(self, gradients: bool = False) -> Grams:
        if gradients:
            return Grams(*gram.gram(self._a, self._b, *self._gradients(), ALL))
        if self._after is not None:
            kb, ka = self._after.chunk(2)
            return Grams(ka, kb)
        ka, kb = self._both().chunk(2)
        return Grams(ka, kb)

    def _both(self) -> Tensor:
        """Ka, then Kb, of the factors before the step: (2L, r, r)."""
        if self._metric is None:
            self._metric = gram.factor_grams(self._a + self._b, self._is_a[::-1])
        return self._metric

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        grads = [p.grad.contiguous() for p in self._factors]
        return grads[len(self.pairs) :], grads[: len(self.pairs)]

    def add_to_gradients(self, coefficients: Tensor) -> None:
        self._work["additive"] = coefficients

    def precondition(self, damping: float) -> None:
        self._work["matrices"] = solve.spd_inverse(self._both(), damping)  # b's gradient takes Ka, a's Kb

    def scale(self, factors: Tensor, gradients: Tensor) -> None:
        self._work |= {"scale_p": factors, "scale_g": gradients}

    def merge(self, rest: Tensor, rounding: str, seed: int) -> None:
        weights = [pair.weight.data for pair in self.pairs]
        residuals = None
        if rounding == "compensated":  # a float32 weight has none, and needs none
            residuals = [s.get("merge_residual", w) for s, w in zip(self._states, weights, strict=False)]
        merge.merge_(weights, self._a, self._b, rest.float().contiguous(), rounding, self._seed(seed), residuals)

    def _seed(self, seed: int) -> int | Tensor:
        """Returns another seed each step, also where a CUDA graph replays it. On a GPU it is always in memory: a kernel
        that takes a number is another one, and could not be loaded while a graph is captured."""
        base = zlib.crc32(str(seed).encode()) << 30
        return self._steps[0].long() + (base + 1) if self._device.type == "cuda" else base + self.count

    def adamw(self, grams: bool) -> None:
        da, db = self._gradients()
        moments = ([state[name] for state in self._states] for name in ("exp_avg", "exp_avg_sq"))
        factors = list(zip(self._factors, db + da, *moments, strict=True))
        work = kernel.Work(**self._work, gram=grams)
        self._after = kernel.step_(factors, self._is_a, self._hyper(), self._steps, work)

    def _hyper(self) -> Tensor:
        """float64 (2L, 5) on the device; learning rates that are tensors there never come to the host."""
        n, rows = len(self.pairs), []
        for settings in (self.settings_b, self.settings_a):
            lr = 0.0 if _on_device(settings["lr"]) else float(settings["lr"])
            betas = (float(beta) for beta in settings["betas"])
            rows.append((lr, *betas, settings["eps"], settings["weight_decay"]))
        build = lambda: to_device([rows[0]] * n + [rows[1]] * n, torch.float64, self._device)
        hyper = kept(("hyper", self._device, n, *rows), build)
        for part, settings in zip(hyper.chunk(2), (self.settings_b, self.settings_a), strict=True):
            if _on_device(settings["lr"]):
                part[:, 0] = settings["lr"]
        return hyper

    def transform(self, matrices: Tensor, of: str = "value", add: bool = False) -> None:
        tensors = self._factors if of == "value" else [state[of] for state in self._states]
        kernel.transform_(tensors, self._is_a, matrices.contiguous(), add)


def _on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.is_cuda


def _like(state: dict, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A state that is there already, or zeros."""
    if name in state:
        return state[name].to(device, dtype).contiguous()
    return torch.zeros(shape, dtype=dtype, device=device)
