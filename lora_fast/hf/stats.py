"""The adapters' statistics in the logs of transformers' Trainer."""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import fields

from torch import nn
from transformers import Trainer, TrainerCallback

from .. import checks
from ..metrics import AdapterStats, BoundStats, adapter_stats, bound_stats, not_finite

RATIOS = ("rms_ratio", "conditioning")  # figures whose mean over layers is geometric


class AdapterStatsCallback(TrainerCallback):
    """Logs ``summary`` of the adapters before the first step, every ``every`` steps and after the last step, through
    ``trainer.log`` and so to every place that the Trainer reports to. Each time copies once from the device. A warning
    names the adapters whose factors are not finite, each of them once.

    Args:
        trainer: the Trainer that the callback is added to.
        every: steps between two logs, an integer of at least 1.

    Attributes:
        bounds: the last result of ``lf.metrics.bound_stats``, one entry per norm-bounded layer.

    Raises:
        ArgumentError: ``every`` out of range.
    """

    def __init__(self, trainer: Trainer, every: int = 10):
        self._trainer, self._every = trainer, checks.count(every, "every")
        self.bounds: dict[str, BoundStats] = {}
        self._named: set[str] = set()  # the adapters that a warning has named

    def on_train_begin(self, args, state, control, model, **others):
        if state.global_step == 0:  # not resumed
            self._log(state, control, model)

    def on_step_end(self, args, state, control, model, **others):
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._log(state, control, model)

    def _log(self, state, control, model: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        stats = adapter_stats(model)
        self.bounds = bound_stats(model, stats)
        if names := [name for name in not_finite(stats) if name not in self._named]:
            self._named.update(names)
            text = f"adapters with factors that are not finite, after step {state.global_step}: {', '.join(names)}"
            warnings.warn(text, stacklevel=2)
        if figures := summary(stats, self.bounds):
            loss_is_due = control.should_log  # trainer.log clears the flag, and this step's loss would not be logged
            self._trainer.log(figures)
            control.should_log = loss_is_due


def summary(stats: dict[str, AdapterStats], bounds: dict[str, BoundStats] | None = None) -> dict[str, float]:
    """Returns the mean, minimum and maximum over all adapters of each figure of ``lf.metrics.adapter_stats``, under
    ``adapter/<figure>_mean``, ``_min`` and ``_max``.

    The mean is geometric for ratios (rms_ratio, conditioning). Adapters whose factors are not finite are left out; if
    there are any, ``adapter/not_finite`` is their number. A result that is not finite is left out, such as that of a
    ratio where b = 0.

    Args:
        stats: the result of ``lf.metrics.adapter_stats``.
        bounds: the result of ``lf.metrics.bound_stats``. It adds ``adapter/bound_used_…``, the share of their bounds
            that norm-bounded layers use.

    Raises:
        ArgumentError: other values than these results.
    """
    if bounds is not None and not (
        isinstance(bounds, dict) and all(isinstance(layer, BoundStats) for layer in bounds.values())
    ):
        raise checks.ArgumentError("bounds", "the result of lf.metrics.bound_stats", checks.shown(bounds))
    names = [field.name for field in fields(AdapterStats)]
    lost = set(not_finite(stats))
    finite = [adapter for name, adapter in stats.items() if name not in lost]
    figures = {name: [float(getattr(adapter, name)) for adapter in finite] for name in names}
    figures["bound_used"] = [layer.used for name, layer in (bounds or {}).items() if name not in lost]
    flat: dict[str, float] = {"adapter/not_finite": float(len(lost))} if lost else {}
    for name, values in figures.items():
        if values and not any(map(math.isnan, values)):
            flat |= {f"adapter/{name}_min": min(values), f"adapter/{name}_max": max(values)}
            flat[f"adapter/{name}_mean"] = _mean(values, geometric=name in RATIOS)
    return {name: value for name, value in flat.items() if math.isfinite(value)}


def _mean(values: list[float], geometric: bool) -> float:
    if geometric and min(values) > 0 and math.isfinite(max(values)):
        return statistics.geometric_mean(values)
    return statistics.fmean(values)
