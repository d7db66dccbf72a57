"""LoRAAdamW, the adapters' statistics and exact checkpoints in transformers' Trainer and its subclasses (TRL).

    trainer = Trainer(model, args, …, optimizer_cls_and_kwargs=lf.hf.optimizer_cls_and_kwargs(methods=methods))
    trainer.add_callback(lf.hf.AdapterStatsCallback(trainer, every=10))

The package imports transformers, so it is imported at the first use of ``lf.hf``.
"""

from .. import checks

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise checks.MissingPackageError("lora_fast.hf needs transformers: pip install transformers accelerate") from error

from .checkpoints import ExactCheckpoints
from .optimizer import optimizer_cls_and_kwargs
from .stats import AdapterStatsCallback, summary

__all__ = ["AdapterStatsCallback", "ExactCheckpoints", "optimizer_cls_and_kwargs", "summary"]
