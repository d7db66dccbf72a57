"""LoRAAdamW in transformers' Trainer, made when training starts from the trainer's own model and arguments."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from .. import checks
from ..optim import LoRAAdamW, check_options
from .checkpoints import ExactCheckpoints

SETTINGS = "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"


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

    def __call__(self, params: Any = None, **settings) -> Any:
        if params is None:
            return self
        trainer = _calling_trainer()
        args, model, given = trainer.args, trainer.model, None
        if isinstance(params, nn.Module):
            model = params
        else:  # what torch's optimizers take
            given = list(params)
            given = given if all(isinstance(group, dict) for group in given) else [{"params": given}]
        own = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
            "methods": self.methods,
            "rounding": self.rounding,
            "state_dtype": self.state_dtype,
        }
        groups = _groups_of_trainer(trainer, model, given)
        optimizer = LoRAAdamW(model, groups=groups, **{**own, **settings})
        for method in self.methods:
            if method.changes_weights:
                _warn_of_changed_weights(type(method).__name__, trainer)
        return optimizer


def _warn_of_changed_weights(method: str, trainer: Any) -> None:
    """Warns of what in a Trainer takes the frozen weights to be unchanged."""
    name = type(trainer).__name__
    if trainer.args.save_strategy != "no" and not isinstance(trainer, ExactCheckpoints):
        warnings.warn(
            f"{method} changes frozen weights, which the checkpoints of {name} lack: a resumed run and "
            "load_best_model_at_end continue from other weights. class MyTrainer(lf.hf.ExactCheckpoints, Trainer) "
            "saves them",
            stacklevel=3,
        )
    # TRL's trainers have the attribute; without a penalty (beta = 0) they do not compute the reference.
    if getattr(trainer, "ref_model", trainer) is None and getattr(trainer, "beta", None) != 0:
        warnings.warn(
            f"{method} changes frozen weights, so that the reference of {name} changes, too: it is the model without "
            "its adapters. A ref_model of its own stays as it is",
            stacklevel=3,
        )


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
        args = copy.copy(trainer.args)
        args.optim = "adamw_torch"  # Trainer does not read it where there is a choice, and its package may be missing
        _, kwargs = trainer.get_optimizer_cls_and_kwargs(args, model)
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
