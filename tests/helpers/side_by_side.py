"""Runs one workflow with PEFT's layers and once more with fused ones, from the same seeds, and compares the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fused_models import fused_layers
from peft import PeftModel
from tiny import batch, loss_of
from torch import Tensor, nn

import lora_fast as lf

UNCALLED = "not called yet"
Prepare = Callable[[nn.Module], nn.Module]


def plain(model: nn.Module) -> nn.Module:
    """Leaves PEFT's layers as they are."""
    return model


def assert_same(
    run: Callable[[Prepare], Any],
    layers: int,
    atol: float = 0.0,
    reason: str | None = None,
    rtol: float = 0.0,
    injected: bool = False,
) -> Any:
    """Asserts that ``run`` returns the same with PEFT's layers and with fused ones, and that those ran as they should.

    Args:
        run: takes ``prepare``, which it calls with each model that has its adapters, and returns numbers, tensors, or
            lists and dictionaries of them.
        layers: how many layers of each model ``fuse_`` is to fuse.
        atol, rtol: the greatest difference.
        reason: the ``fallback_reason`` of all layers after the run. None: all of them ran fused.
        injected: also run it with the layers of ``lf.inject_`` in place of PEFT's.

    Returns:
        What the fused run returned.
    """
    prepared: list[nn.Module] = []

    def prepare(model: nn.Module) -> nn.Module:
        prepared.append(model)
        return fuse(model, layers)

    torch.manual_seed(0)
    theirs = run(plain)
    torch.manual_seed(0)
    ours = run(prepare)
    assert prepared
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)
    for model in prepared:
        assert_ran(model, layers, reason)
    if injected:
        torch.manual_seed(0)
        torch.testing.assert_close(run(inject), theirs, atol=atol, rtol=rtol)
    return ours


def inject(model: PeftModel) -> nn.Module:
    """Returns the model of a PeftModel with the layers of ``lf.inject_`` and the same values."""
    values, config = factors(model), model.peft_config["default"]
    plain = model.unload()
    with torch.random.fork_rng():
        lf.inject_(plain, config)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(values[name])
    return plain


def fuse(model: nn.Module, layers: int) -> nn.Module:
    """Fuses the layers of a model, asserts how many they are, and notes that they have not been called."""
    report = lf.fuse_(model)
    assert len(report.changed) == layers, report
    for layer in fused_layers(model):
        layer.fallback_reason = UNCALLED
    return model


def assert_ran(model: nn.Module, layers: int, reason: str | None = None) -> None:
    """Asserts that the last calls of all fused layers ran fused, or by PEFT's forward for one reason."""
    reasons = [layer.fallback_reason for layer in fused_layers(model)]
    assert reasons == [reason] * layers, reasons


def language_loss(model: nn.Module, step: int) -> Tensor:
    return loss_of(model, batch(step))


def train(
    model: nn.Module,
    steps: int = 3,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[nn.Module, int], Tensor] = language_loss,
) -> list[float]:
    """Trains a model, by default a causal language model by AdamW, and returns the loss of each step."""
    optimizer = optimizer or adamw(model)
    losses = []
    for step in range(steps):
        value = loss(model, step)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all parameters that require a gradient, by names that do not tell whose layers they are in."""
    return {_name(name): p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def factors(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all adapters' factors, trained or not, by such names."""
    return {_name(name): p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def _name(name: str) -> str:
    return name.replace("base_model.model.", "").replace(".default.weight", "")
