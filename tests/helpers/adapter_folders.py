"""Rewrites sidecars, and compares models by their logits."""

import copy

import safetensors.torch
import torch
from budget import check, error
from tiny import batch, llama

from lora_fast.checkpoints.sidecar import SIDECAR


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(batch()).logits


def assert_peft_logits(ours, peft) -> None:
    """Asserts that both models' logits are equally close to PEFT's in float64, and far from the frozen model's."""
    got, theirs, exact = logits(ours), logits(peft), logits(copy.deepcopy(peft).double())
    check("logits", got, exact, error(theirs, exact), torch.float32)
    assert error(logits(llama()), exact) > 1e-2


def rewritten(path, change):
    """Applies a function of (metadata, tensors) to a folder's sidecar."""
    file = path / SIDECAR
    with safetensors.safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, file, metadata)
