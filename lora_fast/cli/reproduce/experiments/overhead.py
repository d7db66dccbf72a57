"""Times the parts of SmolLM2-135M's training steps, for experiments on the overhead of an optimizer."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .... import fuse_
from ....measure.clock import wall_seconds
from ...inputs import data, models
from .session import Session

RANK, BATCH = 16, 2
CPU = torch.device("cpu")


@dataclass
class Times:
    """Seconds of consecutive steps: of forward and backward, and of the optimizer."""

    gradients: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    def median(self) -> float:
        """Returns the median seconds of the optimizer."""
        return statistics.median(self.optimizer)


def seq_len(session: Session) -> int:
    return 64 if session.quick else 128


def prepare(session: Session, rank: int = RANK) -> tuple[nn.Module, Iterator[Tensor]]:
    """Returns SmolLM2 with fused adapters on all linear layers, in float32 on the CPU, and an endless iterator over
    (2, seq_len) blocks of the text.

    Raises:
        ArgumentError: the packages of the model or of the text are not installed.
    """
    data.locate(data.PACKAGED)  # raises before the slow imports
    models.locate(models.PACKAGED)
    with session.display.working("Loading SmolLM2"):
        import peft
        import transformers

        models.quieten()
        transformers.set_seed(0)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        base = models.load_model(models.cached(models.PACKAGED, ""), torch.float32)
        model = peft.get_peft_model(base, config).train()
        fuse_(model)
        blocks = _blocks(seq_len(session))
    return model, _batches(blocks)


def gradients(model: nn.Module, ids: Tensor) -> float:
    """Runs forward and backward; returns the seconds."""

    def run():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return wall_seconds(run, ids.device)


def update(optimizer: torch.optim.Optimizer) -> float:
    """Runs the optimizer's step; returns the seconds."""
    return wall_seconds(optimizer.step, CPU)


def warm(model: nn.Module, ids: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """Takes a step with each optimizer, in which it allocates its state."""
    for optimizer in optimizers:
        gradients(model, ids)
        optimizer.step()


@functools.cache
def _blocks(tokens: int) -> Tensor:
    path, tokenizer = data.locate(data.PACKAGED), models.load_tokenizer(models.cached(models.PACKAGED, ""))
    return data.blocks(data.documents(path, data.read(path), tokenizer), tokenizer, tokens).train.ids


def _batches(ids: Tensor) -> Iterator[Tensor]:
    while True:
        yield from ids[: len(ids) // BATCH * BATCH].view(-1, BATCH, ids.shape[1])
