"""One run: PEFT's model, fused or as it is, in transformers' Trainer, with everything measured on the way."""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_leaves
from transformers.trainer_callback import PrinterCallback

from ... import NBLoRAConfig, SingLoRAConfig, fuse_, hf, inject_, load_adapter, save_adapter
from ...checks import ArgumentError
from ...measure.clock import Stopwatch
from ...measure.memory import PeakBytes, distinct_bytes, saved_for_backward
from ...methods import ScaLoRA
from ...optim import LoRAAdamW
from ...surgery.change_report import Report
from ..inputs import models
from ..inputs.data import TokenData
from ..inputs.settings import Run, Settings
from ..output import run_folder
from ..output.terminal import Display, Diverged
from .record import Record
from .weight_change import mean_erank

SAMPLE_TOKENS = 40
EVALUATIONS, CHECKPOINTS = 4, 4  # in a run, evenly spaced; one more evaluation before the first step
STATISTICS = 60  # of the adapters in a run, at most about


class StopRequest:
    """While it is open, the first Ctrl-C asks for a stop at the next safe place; the second one stops at once."""

    def __init__(self, display: Display):
        self.asked, self._display = False, display

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *signal_and_frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._display.note("Stopping after the current step; Ctrl-C again stops at once.")


@dataclass
class RunContext:
    """What all runs share."""

    settings: Settings
    source: str
    dtype: torch.dtype
    tokenizer: transformers.PreTrainedTokenizerBase
    data: TokenData
    prompt: str
    display: Display
    stop: StopRequest
    total: int = field(init=False)
    tried: bool = field(init=False, default=False)  # the later runs, on the model

    def __post_init__(self):
        self.total = self.settings.total_steps(len(self.data.train))


def prepare(job: RunContext, run: Run) -> tuple[torch.nn.Module, str]:
    """The model with fresh adapters, and the report of what was injected or fused. The first time, the runs that follow
    are tried on it, too.

    Raises:
        ArgumentError: targets that match nothing, nothing that can be fused, or a run, this one or a later one, that
            cannot train this model.
    """
    base = models.load_model(job.source, job.dtype)
    check_targets(base, job.settings.target_modules)
    if not job.tried:
        for later in job.settings.runs[job.settings.runs.index(run) + 1 :]:
            _try(job, later, base)
        job.tried = True
    transformers.set_seed(job.settings.seed)  # the same adapters for every run
    model, layers = _with_adapters(job, run, base)
    _check_methods(run, model)
    return model, layers


def _try(job: RunContext, run: Run, base: transformers.PreTrainedModel) -> None:
    """Raises ArgumentError unless the run could begin. On modules of its own over the same weights: ``base`` stays as
    it is, and takes no more memory than the run will."""
    modules = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
    if run.method.adapters is None:
        _check_methods(run, _with_adapters(job, run, modules)[0])
        return
    config = _config(job, run)
    if getattr(config, "bound_ratio", None) is not None:
        config = dataclasses.replace(config, norm="frobenius")  # fails on the same weights, and is quick
    _inject(run, modules, config)


def _check_methods(run: Run, model: torch.nn.Module) -> None:
    try:
        if run.method.instances:
            LoRAAdamW(model, methods=run.method.instances)
    except ArgumentError as error:
        raise _of_method(run, error) from error


def _with_adapters(job: RunContext, run: Run, base: transformers.PreTrainedModel) -> tuple[torch.nn.Module, str]:
    if run.method.adapters is not None:
        report = _inject(run, base, _config(job, run))
        report.note = run.method.adapters.note(base)
        return base, str(report)
    settings = job.settings
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    if run.engine == "eager":
        return model, "PEFT's own layers"
    try:
        return model, str(fuse_(model))
    except ArgumentError as error:
        raise ArgumentError("--engine", "eager where no layer can be fused", error.got) from error


def _config(job: RunContext, run: Run) -> NBLoRAConfig | SingLoRAConfig:
    settings = job.settings
    layers = {"r": settings.rank, "dropout": settings.dropout, "target_modules": settings.target_modules}
    return run.method.adapters.config(settings.alpha, job.total, **layers)


def _inject(run: Run, base: transformers.PreTrainedModel, config: NBLoRAConfig | SingLoRAConfig) -> Report:
    try:
        return inject_(base, config)
    except ArgumentError as error:
        raise _of_method(run, error) from error


def _of_method(run: Run, error: ArgumentError) -> ArgumentError:
    return ArgumentError(f"--method {run.method.text}: {error.argument}", error.expected, error.got)


def check_targets(model: torch.nn.Module, targets: str | list[str]) -> None:
    """Each name must match a linear layer: PEFT itself is silent unless none of them does."""
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, linear)]
    for target in () if targets == "all-linear" else targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            found = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ArgumentError("--targets", f"all-linear, or some of {found}", repr(target))


def train(job: RunContext, run: Run, model: torch.nn.Module, layers: str, folder: Path) -> Record:
    """Trains to the end, from the last whole checkpoint under ``folder`` if there is one, and saves the adapter.

    Raises:
        KeyboardInterrupt: after the first Ctrl-C, once a checkpoint is saved; at the second one.
        Diverged: the loss became infinite or NaN. It holds the record so far.
    """
    checkpoint = run_folder.last_checkpoint(folder)
    trainer, recorder = _trainer(job, run, model, folder, checkpoint)
    record = recorder.record
    record.layers = record.layers or layers
    if not record.sample_before:
        record.sample_before = sample(model, job.tokenizer, job.prompt)
    if len(record.losses) == job.total:  # interrupted after the last step
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        with job.display.training(run, job.settings.runs, job.total, done=len(record.losses)):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if len(record.losses) < job.total:
        raise KeyboardInterrupt
    record.layers += fallbacks(model)
    record.sample_after = sample(model, job.tokenizer, job.prompt)
    if _changes_base(run):
        record.layers += f". {save_adapter(model, folder / 'adapter').note}"
        with job.display.working("Measuring how far the weights have moved"):
            record.change_erank = mean_erank(model, models.load_model(job.source, job.dtype))
    elif run.method.adapters is not None:
        save_adapter(model, folder / "adapter")
    else:
        model.save_pretrained(folder / "adapter")
    return record


class ScaLoRATrainer(hf.ExactCheckpoints, transformers.Trainer):
    """Its checkpoints hold the frozen weights that have changed."""


class AdapterTrainer(transformers.Trainer):
    """Its checkpoints hold the adapter with the parameters behind it, not the frozen model."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_adapter(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_adapter(self.model if model is None else model, resume_from_checkpoint)


def _changes_base(run: Run) -> bool:
    return any(isinstance(method, ScaLoRA) for method in run.method.instances)


def _trainer(
    job: RunContext, run: Run, model: torch.nn.Module, folder: Path, checkpoint: Path | None
) -> tuple[transformers.Trainer, Recorder]:
    """Plain LoRA is trained by the Trainer's own AdamW, everything else by LoRAAdamW."""
    args = _arguments(job, run, folder, resumed=checkpoint is not None)
    record = Record(run.label)
    if checkpoint is not None:
        record = Record(**run_folder.read_json(checkpoint / run_folder.RECORD))
    record.tokens_per_step = args.train_batch_size * args.gradient_accumulation_steps * job.settings.seq_len
    record.trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    recorder = Recorder(job, record, Stopwatch(args.device))
    ours = run.method.instances or run.method.adapters
    optimizer = hf.optimizer_cls_and_kwargs(model, args, run.method.instances) if ours else None
    data = {"train_dataset": job.data.train, "eval_dataset": job.data.held_out}
    plain = AdapterTrainer if run.method.adapters else transformers.Trainer
    kind = ScaLoRATrainer if _changes_base(run) else plain
    trainer = kind(model, args, callbacks=[recorder], optimizer_cls_and_kwargs=optimizer, **data)
    trainer.remove_callback(PrinterCallback)
    recorder.statistics = hf.AdapterStatsCallback(trainer, math.ceil(job.total / STATISTICS))
    trainer.add_callback(recorder.statistics)  # after the recorder: it has stopped the clock
    return trainer, recorder


def fallbacks(model: torch.nn.Module) -> str:
    """Fused layers whose last call had to run PEFT's own forward, and why."""
    reasons = [getattr(module, "fallback_reason", None) for module in model.modules()]
    counts = collections.Counter(filter(None, reasons))
    return "".join(f"; {count} ran PEFT's forward ({reason})" for reason, count in counts.items())


def _arguments(job: RunContext, run: Run, folder: Path, resumed: bool) -> transformers.TrainingArguments:
    settings = job.settings
    on_cpu = not torch.cuda.is_available()
    args = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=job.total,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=run.method.lr or settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=max(1, job.total // 20),
        weight_decay=0.0,
        seed=settings.seed,
        bf16=job.dtype == torch.bfloat16,
        fp16=job.dtype == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_on_start=not resumed,
        prediction_loss_only=True,
        save_strategy="no",  # Recorder says when
        save_total_limit=2,  # the last one may be cut short by a crash
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    if args.device.type == "cuda":  # asking for the device counts the GPUs
        args._n_gpu = 1  # with more, Trainer would spread a batch over them with DataParallel
    return args


class Recorder(transformers.TrainerCallback):
    """Writes down what happens, decides when to evaluate and to save, and stops at a finished step on Ctrl-C.

    Attributes:
        statistics: what logs those of the adapters.
    """

    statistics: hf.AdapterStatsCallback

    def __init__(self, job: RunContext, record: Record, stopwatch: Stopwatch):
        self.job, self.record, self.stopwatch = job, record, stopwatch
        self.record.memory_kind = stopwatch.memory_kind
        self._counting: PeakBytes | None = None
        self._evaluate_at = {math.ceil(job.total * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
        self._save_every = job.settings.save_every or math.ceil(job.total / CHECKPOINTS)

    def on_train_begin(self, args, state, control, model, **others):
        if not self.record.saved_bytes:
            rows = [self.job.data.train[i] for i in range(min(args.train_batch_size, len(self.job.data.train)))]
            batch = transformers.default_data_collator(rows)
            self.record.saved_bytes = saved_for_backward(model.train(), batch)

    def on_step_begin(self, args, state, control, **others):
        self.stopwatch.start()

    def on_pre_optimizer_step(self, args, state, control, **others):
        if not self.record.optimizer_bytes:
            self._counting = PeakBytes()
            self._counting.__enter__()
        self.stopwatch.optimizer_starts()

    def on_optimizer_step(self, args, state, control, optimizer, **others):
        self.stopwatch.optimizer_ends()
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self.record.optimizer_peak_bytes = self._counting.peak
            self.record.optimizer_bytes = distinct_bytes(tree_leaves(optimizer.state_dict()))
            self._counting = None

    def on_step_end(self, args, state, control, **others):
        seconds, optimizer_seconds, memory = self.stopwatch.stop()
        self.record.seconds.append(seconds)
        self.record.optimizer_seconds.append(optimizer_seconds)
        self.record.memory.append(memory)
        step = state.global_step
        control.should_evaluate = step in self._evaluate_at
        control.should_save = step % self._save_every == 0 or step == state.max_steps
        if self.job.stop.asked:
            control.should_save = control.should_training_stop = True
        if control.should_evaluate:
            self.job.display.evaluating()

    def on_log(self, args, state, control, logs, **others):
        figures = {name: value for name, value in logs.items() if name.startswith("adapter/")}
        if figures:
            self.record.adapter.append({"step": state.global_step, **figures})
            self.record.add_bounds(self.statistics.bounds)
            self.job.display.bounds(list(self.record.bounds_used().values()))
        if "loss" not in logs:
            return
        self._check_finite("loss", logs["loss"], state.global_step)
        self.record.losses.append(logs["loss"])
        self.job.display.step(state.global_step, logs["loss"], self.record.seconds[-1])

    def on_evaluate(self, args, state, control, metrics, **others):
        self._check_finite("held-out loss", metrics["eval_loss"], state.global_step)
        self.record.held_out.append((state.global_step, metrics["eval_loss"]))
        self.job.display.held_out(state.global_step, metrics["eval_loss"])

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise Diverged(f"the {what} is {value} at step {step}: try a smaller --lr", self.record)

    def on_save(self, args, state, control, **others):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        run_folder.write_json(checkpoint / run_folder.RECORD, self.record.as_dict())


@torch.no_grad()
def sample(model: torch.nn.Module, tokenizer, prompt: str) -> str:
    """The likeliest continuation of ``prompt``: no randomness, so before and after can be compared."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    settings = {"do_sample": False, "repetition_penalty": 1.1, "use_cache": True}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.eval().generate(**inputs, max_new_tokens=SAMPLE_TOKENS, pad_token_id=pad, **settings)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
