"""Complete checkpoints of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from ..checkpoints.adapter import is_checkpoint, load_checkpoint, prepare_checkpoints, save_checkpoint
from ..checks import CheckpointError

ALL_GPUS_STATES = "rng_state_all_gpus.pth"
OUTSIDE_MODEL = "trained_outside_model.pt"

# A class has ExactCheckpoints before its Trainer, whose methods are then the next ones.
if TYPE_CHECKING:
    TrainerMixin = Trainer
else:
    TrainerMixin = object


class ExactCheckpoints(TrainerMixin):
    """Makes a Trainer's checkpoints complete, so that a resumed run continues to the same bits, and the best model at
    the end is the one of its checkpoint. They then contain the frozen weights that ScaLoRA changes, buffers such as
    running statistics, parameters that the optimizer trains outside of the model (a loss's) and, where one process
    trains on several GPUs, the states of all their generators, which dropout draws from. A Trainer saves that of one of
    these GPUs. It is the first base of a Trainer class, also of TRL's and of
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
            folder = output_dir or self.args.output_dir
            save_checkpoint(self.model, folder)  # replaces PEFT's two files
            if outside := self._trained_outside():
                torch.save([p.detach().cpu() for p in outside], Path(folder, OUTSIDE_MODEL))

    def _trained_outside(self) -> list[Any]:
        """Returns the optimizer's trained parameters that are not the model's."""
        if self.optimizer is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:  # which replace parameters
            return []
        inside = {id(p) for p in self.model.parameters()}
        trained = (p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad)
        return [p for p in trained if id(p) not in inside]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, OUTSIDE_MODEL)).is_file():
            saved, outside = torch.load(path, weights_only=True), self._trained_outside()
            expected, got = ([tuple(tensor.shape) for tensor in tensors] for tensors in (outside, saved))
            if expected != got:
                raise CheckpointError(OUTSIDE_MODEL, f"trained parameters outside the model of {expected}", str(got))
            for p, value in zip(outside, saved, strict=True):
                p.data.copy_(value)

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
            if not is_checkpoint(model, resume_from_checkpoint):  # a plain Trainer's, which has all in that file
                return
        load_checkpoint(model, resume_from_checkpoint)

    def _saves_whole_state(self, model: nn.Module) -> bool:
        """Returns whether a Trainer saves the ``state_dict`` of the model rather than an adapter, as of a module with
        PEFT's layers of which transformers does not know."""
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        own_save = vars(plain).get("save_pretrained", getattr(type(plain), "save_pretrained", None))
        return not self.is_fsdp_enabled and own_save in (None, PreTrainedModel.save_pretrained)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint or ""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not is_checkpoint(self.model, best):
            super()._load_best_model()
            return
        self._load_from_checkpoint(best)
        card, step = getattr(self.model, "model_card_data", None), best.rpartition("-")[2]  # of sentence-transformers
        if card is not None and step.isdigit():
            card.set_best_model_step(int(step))
