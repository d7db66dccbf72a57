"""Builds the engines that are compared: four models over the same tensors, so that no weight is stored twice."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import fuse_
from ...measure.memory import weight_bytes
from ...optim import LoRAAdamW
from ...surgery.change_report import Report
from ..finetune import training
from ..inputs import models, quantization
from ..inputs.settings import Settings

BASE, EAGER, COMPILED, FUSED = "base", "PEFT eager", "PEFT compiled", "fused"
LABELS = (BASE, EAGER, COMPILED, FUSED)
LR = 1e-5  # small, so that the weights do not diverge while they are timed
B_STD = 0.01  # of the random lora_B; with a fresh one, which is zero, the gradient of lora_A would be zero


@dataclass
class Engine:
    """A model and its optimizer, which is None for the frozen model."""

    label: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    def trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]


@dataclass
class Engines:
    """All engines by label, and what they share.

    Attributes:
        fusing: the report of ``fuse_``. dtype: of the frozen weights, if they are not quantised. vocabulary: number of
            different tokens. weights: ``weight_bytes`` of the frozen model. weight_format: of quantised weights, or "".
    """

    by_label: dict[str, Engine]
    fusing: Report
    dtype: torch.dtype
    device: torch.device
    vocabulary: int
    weights: tuple[int, int]
    weight_format: str

    def fallbacks(self) -> dict[str, int]:
        """Returns reason → number of the fused engine's layers that ran PEFT's own forward in the last pass."""
        reasons = (getattr(module, "fallback_reason", None) for module in self.by_label[FUSED].model.modules())
        return dict(Counter(filter(None, reasons)))

    def precision(self):
        """Returns the context of a forward pass: autocast for 16-bit weights, as in transformers' Trainer."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def build(settings: Settings, source: str, dtype: torch.dtype, compiled: bool) -> Engines:
    """Builds the engines on the first GPU, or on the CPU.

    Raises:
        ArgumentError: the model does not load, or the targets match nothing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    model = models.load_model(source, dtype, settings.quantize).train()
    if model.device != device:  # transformers moves no 8-bit model of bitsandbytes, which is loaded onto the GPU
        model.to(device)
    model.config.use_cache = False
    training.check_targets(model, settings.target_modules, settings.expert_parameters)
    frozen = models.twin(model).requires_grad_(False)
    weights = weight_bytes(frozen, dtype)
    frozen.enable_input_require_grads()  # without any trained parameter there would be no backward pass
    eager = training.peft_model(model, settings)
    for name, parameter in eager.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=B_STD)
    fused = models.twin(eager)
    fusing = fuse_(fused, allow_empty=True)
    by_label = {BASE: Engine(BASE, frozen, None), EAGER: Engine(EAGER, eager, _adamw(eager))}
    if compiled:
        regions = compiled_twin(eager)
        by_label[COMPILED] = Engine(COMPILED, regions, _adamw(regions))
    by_label[FUSED] = Engine(FUSED, fused, LoRAAdamW(fused, lr=LR))
    vocabulary = model.config.get_text_config().vocab_size
    weight_format = quantization.format_of(model, settings.quantize)
    return Engines(by_label, fusing, dtype, device, vocabulary, weights, weight_format)


def compiled_twin(model: nn.Module) -> nn.Module:
    """Returns a twin whose repeated blocks are compiled one by one.

    This takes seconds, where the whole model takes minutes, and gives much the same code.
    """
    from accelerate.utils import compile_regions

    return compile_regions(models.twin(model))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, fused=True)


def random_batch(device: torch.device, vocabulary: int, rows: int, seq_len: int) -> dict[str, Tensor]:
    """Returns random tokens (rows, seq_len) as inputs and labels; a step takes as long with any tokens."""
    drawn: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(0), "dtype": torch.int64, "device": "cpu"}
    ids = torch.randint(vocabulary, (rows, seq_len), **drawn).to(device)
    return {"input_ids": ids, "labels": ids}
