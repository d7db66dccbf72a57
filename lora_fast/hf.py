"""LoRAAdamW, the adapters' statistics and exact checkpoints in transformers' Trainer and its subclasses (TRL).

    trainer = Trainer(model, args, …, optimizer_cls_and_kwargs=lf.hf.optimizer_cls_and_kwargs(model, args, methods))
    trainer.add_callback(lf.hf.AdapterStatsCallback(trainer, every=10))

The module imports transformers, so it is imported at the first use of ``lf.hf``.
"""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import checks
from .checkpoints.adapter import check_savable, load_adapter, save_adapter
from .methods import ScaLoRA
from .metrics import AdapterStats, BoundStats, adapter_stats, bound_stats, not_finite
from .optim import LoRAAdamW, check_options

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
except ImportError as error:
    raise checks.MissingPackageError("lora_fast.hf needs transformers: pip install transformers accelerate") from error

__all__ = ["AdapterStatsCallback", "ExactCheckpoints", "optimizer_cls_and_kwargs", "summary"]

ALL_GPUS_STATES = "rng_state_all_gpus.pth"
RATIOS = ("rms_ratio", "conditioning")  # figures whose mean over layers is geometric


def optimizer_cls_and_kwargs(
    model: nn.Module,
    args: TrainingArguments,
    methods: object = (),
    rounding: str = "auto",
    state_dtype: torch.dtype | None = None,
) -> tuple[type, dict]:
    """Returns the argument ``Trainer(optimizer_cls_and_kwargs=…)`` with which LoRAAdamW trains the model.

    Args:
        model: the model that the Trainer gets, with its adapters.
        args: contain the learning rate, betas, epsilon and weight decay, as for Trainer's own AdamW.
        methods, rounding, state_dtype: as in ``lf.optim.LoRAAdamW``.

    Returns:
        The optimizer's class and its keyword arguments.

    Raises:
        ArgumentError: no module, no TrainingArguments, or other arguments that LoRAAdamW refuses.
    """
    names = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    if not all(hasattr(args, name) for name in names):
        raise checks.ArgumentError("args", "transformers.TrainingArguments", checks.shown(args))
    checks.module(model)
    check_options(methods, rounding, state_dtype)
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    return LoRAAdamW, {"model": model, "methods": methods, "rounding": rounding, "state_dtype": state_dtype, **settings}


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


# A class has ExactCheckpoints before its Trainer, whose methods are then the next ones.
if TYPE_CHECKING:
    TrainerMixin = Trainer
else:
    TrainerMixin = object


class ExactCheckpoints(TrainerMixin):
    """Makes a Trainer's checkpoints complete, so that a resumed run continues to the same bits. They then contain the
    frozen weights that ScaLoRA changes and, where one process trains on several GPUs, the states of all their
    generators, which dropout draws from. A Trainer saves that of one of these GPUs. It is the first base of a Trainer
    class:

        class ScaLoRATrainer(lf.hf.ExactCheckpoints, Trainer): pass

    Raises:
        CheckpointError: when training starts, if its checkpoints could not be saved (``lf.save_adapter``).
    """

    model: Any  # a module once the Trainer saves or loads, which its types leave open
    args: Any

    def create_optimizer(self, *args, **kwargs) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        check_savable(self.model, merges=any(type(method) is ScaLoRA for method in getattr(optimizer, "_methods", ())))
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        save_adapter(self.model, output_dir or self.args.output_dir, exact=True)  # replaces PEFT's two files

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.world_size == 1 and torch.cuda.device_count() > 1:
            torch.save(torch.cuda.get_rng_state_all(), Path(output_dir, ALL_GPUS_STATES))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, ALL_GPUS_STATES)).is_file():
            states = torch.load(path, weights_only=True)
            for device, state in zip(range(torch.cuda.device_count()), states, strict=False):  # it may have fewer GPUs
                torch.cuda.set_rng_state(state, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self.model if model is None else model, resume_from_checkpoint)


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
