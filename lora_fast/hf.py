"""LoRAAdamW, the adapters' statistics and exact checkpoints in transformers' Trainer and its subclasses (TRL).

    trainer = Trainer(model, args, …, optimizer_cls_and_kwargs=lf.hf.optimizer_cls_and_kwargs(model, args, methods))
    trainer.add_callback(lf.hf.AdapterStatsCallback(trainer, every=10))

The module imports transformers, so it is imported at the first use of ``lf.hf``.
"""

from __future__ import annotations

import math
import statistics
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import checks
from .checkpoints.adapter import load_checkpoint, prepare_checkpoints, save_checkpoint
from .checkpoints.peft_format import CONFIG
from .metrics import AdapterStats, BoundStats, adapter_stats, bound_stats, not_finite
from .optim import LoRAAdamW, check_options

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import SAFE_WEIGHTS_NAME
except ImportError as error:
    raise checks.MissingPackageError("lora_fast.hf needs transformers: pip install transformers accelerate") from error

__all__ = ["AdapterStatsCallback", "ExactCheckpoints", "optimizer_cls_and_kwargs", "summary"]

SETTINGS = "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"
ALL_GPUS_STATES = "rng_state_all_gpus.pth"
RATIOS = ("rms_ratio", "conditioning")  # figures whose mean over layers is geometric


def optimizer_cls_and_kwargs(
    model: nn.Module | None = None,
    args: TrainingArguments | None = None,
    methods: object = (),
    rounding: str = "auto",
    state_dtype: torch.dtype | None = None,
) -> tuple[Any, dict]:
    """Returns the argument ``Trainer(optimizer_cls_and_kwargs=…)`` with which LoRAAdamW trains the trainer's model.

    The Trainer makes the optimizer when it begins to train, from its own model and arguments at that time. One result
    may therefore serve several Trainers, ``model_init`` and ``hyperparameter_search``. The parameter groups are those
    of Trainer's AdamW: biases, norms and whatever else ``Trainer.get_decay_parameter_names`` leaves out are not
    decayed. A run that AdamW began can be resumed with LoRAAdamW, and one of LoRAAdamW with AdamW unless its methods
    have groups or moments of their own (LoRAPlus, LoRARITE, LoRAMuon).

    Args:
        model: the model that the Trainer gets, if there is one yet; it is only checked.
        args: the TrainingArguments that the Trainer gets; they are only checked.
        methods, rounding, state_dtype: as in ``lf.optim.LoRAAdamW``.

    Returns:
        A factory of optimizers, and no keyword arguments.

    Raises:
        ArgumentError: no module, no TrainingArguments, or other arguments that LoRAAdamW refuses.
    """
    if args is not None and not all(hasattr(args, name) for name in SETTINGS):
        raise checks.ArgumentError("args", "transformers.TrainingArguments", checks.shown(args))
    if model is not None:
        checks.module(model)
    return LoRAAdamWFactory(check_options(methods, rounding, state_dtype), rounding, state_dtype), {}


@dataclass(frozen=True)
class LoRAAdamWFactory:
    """Makes the optimizer of the Trainer that calls it. transformers calls a factory without arguments and what that
    returns with the model; releases that know optimizers' classes alone call it with the parameter groups."""

    methods: tuple
    rounding: str
    state_dtype: torch.dtype | None

    def __call__(self, model_or_groups: Any = None) -> Any:
        if model_or_groups is None:
            return self
        trainer = _calling_trainer()
        args = trainer.args
        is_model = isinstance(model_or_groups, nn.Module)
        model, given = (model_or_groups, None) if is_model else (trainer.model, model_or_groups)
        optimizer = LoRAAdamW(
            model,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            methods=self.methods,
            rounding=self.rounding,
            state_dtype=self.state_dtype,
            groups=_groups_of_trainer(trainer, model, given),
        )
        changing = [type(method).__name__ for method in self.methods if method.changes_weights]
        if changing and args.save_strategy != "no" and not isinstance(trainer, ExactCheckpoints):
            warnings.warn(
                f"{changing[0]} changes frozen weights, which the checkpoints of {type(trainer).__name__} lack: a "
                "resumed run and load_best_model_at_end continue from other weights. "
                "class MyTrainer(lf.hf.ExactCheckpoints, Trainer) saves them",
                stacklevel=2,
            )
        return optimizer


def _calling_trainer() -> Any:
    """Returns the Trainer in whose ``create_optimizer`` a factory is called. Trainer passes it neither itself nor its
    arguments, which may be others than the user's (TRL copies them) and change (hyperparameter_search)."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise checks.ArgumentError("optimizer_cls_and_kwargs", "a call by transformers' Trainer", "another caller")


def _groups_of_trainer(trainer: Any, model: nn.Module, given: list[dict] | None) -> list[dict]:
    """Returns the parameter groups of the trainer's own AdamW, in whose order checkpoints store the state. ``given``
    are those with which it called the factory, or None."""
    if type(trainer).get_optimizer_cls_and_kwargs is not Trainer.get_optimizer_cls_and_kwargs:
        # sentence-transformers' has groups with the loss's parameters, too, and with rates of their own.
        _, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        for name in ("params", "model", "optimizer_dict"):  # under which Trainer looks for groups
            if isinstance(groups := kwargs.get(name), list):
                return groups
    if given is not None:
        return given
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = [{"params": [], "weight_decay": decay} for decay in (trainer.args.weight_decay, 0.0)]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[name not in decayed]["params"].append(p)
    return groups


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
    """Makes a Trainer's checkpoints complete, so that a resumed run continues to the same bits, and the best model at
    the end is the one of its checkpoint. They then contain the frozen weights that ScaLoRA changes, buffers such as
    running statistics and, where one process trains on several GPUs, the states of all their generators, which dropout
    draws from. A Trainer saves that of one of these GPUs. It is the first base of a Trainer class, also of TRL's and of
    sentence-transformers':

        class ScaLoRATrainer(lf.hf.ExactCheckpoints, Trainer): pass

    The model has layers of ours or of PEFT, in a PeftModel or without one (``model.add_adapter``,
    ``peft.inject_adapter_in_model``). In a model of sentence-transformers, the adapter's files are those of
    transformers' model in it, so that a checkpoint opens as one of its own.

    Raises:
        CheckpointError: when training starts, if its checkpoints could not be saved (``lf.save_adapter``).
    """

    model: Any  # a module once the Trainer saves or loads, which its types leave open
    args: Any

    def create_optimizer(self, *args, **kwargs) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        merges = any(method.changes_weights for method in getattr(optimizer, "_methods", ()))
        prepare_checkpoints(self.model, merges)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_checkpoint(self.model, output_dir or self.args.output_dir)  # replaces PEFT's two files

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
        model = self.model if model is None else model
        if self._saves_whole_state(model) and Path(resume_from_checkpoint, SAFE_WEIGHTS_NAME).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # the frozen weights, too
        load_checkpoint(model, resume_from_checkpoint)

    def _saves_whole_state(self, model: nn.Module) -> bool:
        """Returns whether a Trainer saves the ``state_dict`` of the model rather than an adapter, as of a module with
        PEFT's layers of which transformers does not know."""
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        own_save = vars(plain).get("save_pretrained", getattr(type(plain), "save_pretrained", None))
        return not self.is_fsdp_enabled and own_save in (None, PreTrainedModel.save_pretrained)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint or ""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not Path(best, CONFIG).is_file():
            super()._load_best_model()
            return
        self._load_from_checkpoint(best)
        card, step = getattr(self.model, "model_card_data", None), best.rpartition("-")[2]  # of sentence-transformers
        if card is not None and step.isdigit():
            card.set_best_model_step(int(step))


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
