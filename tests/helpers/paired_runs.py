"""Runs a workflow with PEFT's layers and again with fused ones, and compares what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import peft
import pytest
import tiny_model
import torch
import transformers
from transformers.trainer_callback import PrinterCallback

import lora_fast as lf
from lora_fast.layers.fused_peft import FusedForward

Result = TypeVar("Result")
Change = Callable[[torch.nn.Module], torch.nn.Module]
CLOCKS = ("runtime", "per_second", "step_time", "preparation_time")  # parts of the names of logged times


def both(run: Callable[[Change], Result], calls_are_seen: bool = True) -> tuple[Result, Result]:
    """Returns the workflow's result with PEFT's layers and with fused ones, after the same seeds.

    Args:
        run: the workflow. It gets a function for its PEFT model, which returns that model, fused in the second run.
        calls_are_seen: whether Python runs at a layer's call. It does not in a compiled model, where only the number of
            layers is checked.

    Raises:
        AssertionError: no layer was fused in the second run, or one of them never ran fused.
    """
    changed: list[FusedForward] = []
    ran: set[int] = set()
    fused_call = FusedForward._fused_call

    def fuse(model: torch.nn.Module) -> torch.nn.Module:
        lf.fuse_(model)
        changed.extend(layer for layer in model.modules() if isinstance(layer, FusedForward))
        return model

    def note(layer: FusedForward, x: torch.Tensor) -> tuple | str:
        call = fused_call(layer, x)
        if not isinstance(call, str):
            ran.add(id(layer))
        return call

    transformers.set_seed(0)
    theirs = run(lambda model: model)
    with pytest.MonkeyPatch.context() as patch:
        if calls_are_seen:
            patch.setattr(FusedForward, "_fused_call", note)
        transformers.set_seed(0)
        ours = run(fuse)
    assert changed, "no layer was fused"
    if calls_are_seen:
        assert {id(layer) for layer in changed} <= ran, "a fused layer never ran fused"
    return theirs, ours


def language_model(vocabulary: int, **changes) -> transformers.LlamaForCausalLM:
    """Returns a float64 model of one layer. Large weights make its predictions uneven."""
    return tiny_model.model(vocabulary, **{"num_hidden_layers": 1, "initializer_range": 0.2, **changes}).double()


def adapted(model: torch.nn.Module, targets: str | list[str] = "all-linear", **options) -> peft.PeftModel:
    """Returns a PeftModel with random factors: PEFT's initial b is 0, which would hide most differences."""
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": targets} | options
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def lora_config(**options) -> peft.LoraConfig:
    """Returns the config of ``adapted``, for libraries that call PEFT themselves."""
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": "all-linear"}
    return peft.LoraConfig(**settings | options)


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of what the model trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of the gradients of what the model trains."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logs(trainer: transformers.Trainer) -> list[dict[str, float]]:
    """Returns what a Trainer has logged, without times."""
    return [
        {name: value for name, value in row.items() if not any(clock in name for clock in CLOCKS)}
        for row in trainer.state.log_history
    ]


def train(trainer: transformers.Trainer) -> dict[str, Any]:
    """Trains without printing, and returns what was logged and trained."""
    trainer.remove_callback(PrinterCallback)
    before = trained(trainer.model)
    trainer.train()
    after = trained(trainer.model)
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items()), "nothing was trained"
    return {"logs": logs(trainer), "trained": after}


def is_fused(model: torch.nn.Module) -> bool:
    return any(isinstance(layer, FusedForward) for layer in model.modules())


def optimizer_choice(model: torch.nn.Module, args: transformers.TrainingArguments, methods=()) -> tuple | None:
    """Returns a Trainer's ``optimizer_cls_and_kwargs``: LoRAAdamW for fused layers and none for PEFT's, which Trainer's
    own AdamW then trains."""
    return lf.hf.optimizer_cls_and_kwargs(model, args, methods) if is_fused(model) else None


def assert_same(run: Callable[[Change], Any], tolerance: float = 1e-12, calls_are_seen: bool = True) -> None:
    """Runs a workflow with PEFT's layers and with fused ones (``both``) and compares the results: tensors and numbers
    within the tolerance, which is relative above 1, and everything else exactly."""
    theirs, ours = both(run, calls_are_seen)
    assert_close(theirs, ours, tolerance, tolerance)


def assert_close(theirs: Any, ours: Any, atol: float, rtol: float = 0.0, where: str = "") -> None:
    if isinstance(theirs, dict):
        assert theirs.keys() == ours.keys(), f"{where}: {theirs.keys() ^ ours.keys()}"
        for name, value in theirs.items():
            assert_close(value, ours[name], atol, rtol, f"{where}/{name}")
    elif isinstance(theirs, (list, tuple)):
        assert len(theirs) == len(ours), where
        for i, (value, other) in enumerate(zip(theirs, ours, strict=True)):
            assert_close(value, other, atol, rtol, f"{where}/{i}")
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol, msg=lambda text: f"{where}: {text}")
    elif isinstance(theirs, float):
        is_same = math.isclose(theirs, ours, rel_tol=rtol, abs_tol=atol) or (math.isnan(theirs) and math.isnan(ours))
        assert is_same, f"{where}: {theirs} and {ours}"
    else:
        assert theirs == ours, f"{where}: {theirs} and {ours}"
