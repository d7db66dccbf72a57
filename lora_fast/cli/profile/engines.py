"""The engines that are compared: one model four times over the same tensors, so that no weight is held twice."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ... import fuse_
from ...optim import LoRAAdamW
from ...surgery.change_report import Report
from ..finetune import training
from ..inputs import models
from ..inputs.settings import Settings

BASE, EAGER, COMPILED, FUSED = "base", "PEFT eager", "PEFT compiled", "fused"
LABELS = (BASE, EAGER, COMPILED, FUSED)
LR = 1e-5  # small: the weights must not run away while they are timed
B_STD = 0.01  # of the random lora_B: a fresh one is zero, and with it the gradient of lora_A


@dataclass
class Engine:
    """``optimizer``: None for the frozen model, which trains nothing."""

    label: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    def trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]


@dataclass
class Engines:
    """``fusing``: what ``fuse_`` did. ``dtype``: of the frozen weights. ``vocabulary``: number of tokens."""

    found: dict[str, Engine]
    fusing: Report
    dtype: torch.dtype
    device: torch.device
    vocabulary: int

    def fallbacks(self) -> dict[str, int]:
        """Why layers of the fused engine ran PEFT's own forward the last time → how many of them."""
        reasons = (getattr(module, "fallback_reason", None) for module in self.found[FUSED].model.modules())
        return dict(Counter(filter(None, reasons)))

    def precision(self):
        """The context of every forward pass: with 16-bit weights autocast, as transformers' Trainer does."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def build(settings: Settings, source: str, dtype: torch.dtype, compiled: bool) -> Engines:
    """The model on the first GPU, or the CPU.

    Raises:
        ArgumentError: a model that does not load, or targets that match nothing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    model = models.load_model(source, dtype).to(device).train()
    model.config.use_cache = False
    training.check_targets(model, settings.target_modules)
    frozen = twin(model).requires_grad_(False)
    frozen.enable_input_require_grads()  # or there would be no backward pass
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
    eager = get_peft_model(model, config)
    for name, parameter in eager.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=B_STD)
    fused = twin(eager)
    fusing = fuse_(fused, allow_empty=True)
    found = {BASE: Engine(BASE, frozen, None), EAGER: Engine(EAGER, eager, _adamw(eager))}
    if compiled:
        regions = compiled_twin(eager)
        found[COMPILED] = Engine(COMPILED, regions, _adamw(regions))
    found[FUSED] = Engine(FUSED, fused, LoRAAdamW(fused, lr=LR))
    return Engines(found, fusing, dtype, device, model.config.get_text_config().vocab_size)


def twin(model: nn.Module) -> nn.Module:
    """Another model of the same modules over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def compiled_twin(model: nn.Module) -> nn.Module:
    """Its repeated blocks compiled one by one: seconds, where the whole model takes minutes, for much the same code."""
    from accelerate.utils import compile_regions

    return compile_regions(twin(model))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, fused=True)


def random_batch(device: torch.device, vocabulary: int, rows: int, seq_len: int) -> dict[str, Tensor]:
    """Random tokens (rows, seq_len): what they are does not change how long they take."""
    ids = torch.randint(vocabulary, (rows, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "labels": ids}
