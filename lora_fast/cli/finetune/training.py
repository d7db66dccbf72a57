"""Trains one run: the model with its adapters in transformers' Trainer, with a callback that measures each step."""

from __future__ import annotations

import collections
import dataclasses
import math
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._pytree import tree_leaves
from transformers.trainer_callback import PrinterCallback

from ... import NBLoRAConfig, SingLoRAConfig, fuse_, hf, inject_, load_adapter, save_adapter
from ...checks import ArgumentError
from ...measure.clock import Stopwatch
from ...measure.memory import PeakBytes, distinct_bytes, saved_for_backward, weight_bytes
from ...optim import LoRAAdamW
from ...surgery.change_report import Report
from ..inputs import models, quantization
from ..inputs.data import TokenData
from ..inputs.method_options import NBLoRA, SingLoRA
from ..inputs.settings import Run, Settings
from ..output import run_folder
from ..output.terminal import Display
from .record import Diverged, Record
from .weight_change import mean_erank

SAMPLE_TOKENS = 40
EVALUATIONS, CHECKPOINTS = 4, 4  # evenly spaced over a run; another evaluation comes before the first step
STATISTICS = 60  # approximate largest number of times that a run computes statistics of the adapters


class StopRequest:
    """Handles Ctrl-C while it is open: the first one sets ``requested``, which training checks after each step; the
    second one raises KeyboardInterrupt at once."""

    def __init__(self, display: Display):
        self.requested, self._display = False, display

    def __enter__(self) -> StopRequest:
        self._previous_handler = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGINT, self._previous_handler)

    def _on_signal(self, *signal_and_frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._display.note("Stopping after the current step. Press Ctrl-C again to stop at once.")


@dataclass
class RunContext:
    """Holds what all runs of a call share.

    Attributes:
        source: the folder or hub id of the base model.
        dtype: that of the base model; the adapters are float32.
        prompt: the text that the samples continue.
        stop: the handler of Ctrl-C.
        total: the number of optimizer steps of each run.
        tried: whether the later runs were tried on the model of the first one.
    """

    settings: Settings
    source: str
    dtype: torch.dtype
    tokenizer: transformers.PreTrainedTokenizerBase
    data: TokenData
    prompt: str
    display: Display
    stop: StopRequest
    total: int = field(init=False)
    tried: bool = field(init=False, default=False)

    def __post_init__(self):
        self.total = self.settings.total_steps(len(self.data.train))


def prepare(context: RunContext, run: Run) -> tuple[torch.nn.Module, str]:
    """Returns the model with fresh adapters, and the report of what was injected or fused. The first call also tries
    the later runs on the model, so that their errors appear before any training.

    Raises:
        ArgumentError: the targets match nothing, nothing can be fused, or this run or a later one cannot train this
            model.
    """
    base = models.load_model(context.source, context.dtype, context.settings.quantize)
    check_targets(base, context.settings.target_modules, context.settings.expert_parameters)
    if not context.tried:
        for later in context.settings.runs[context.settings.runs.index(run) + 1 :]:
            _try(context, later, base)
        context.tried = True
    transformers.set_seed(context.settings.seed)  # so that every run starts from the same adapters
    model, layers = _with_adapters(context, run, base)
    _check_methods(run, model)
    return model, layers


def _try(context: RunContext, run: Run, base: transformers.PreTrainedModel) -> None:
    """Raises ArgumentError unless the run could begin. Works on copies of the modules over the same weights, so that
    ``base`` is unchanged and no memory is needed for a second model."""
    modules = models.twin(base)
    if run.method.adapters is None:
        _check_methods(run, _with_adapters(context, run, modules)[0])
        return
    config = _config(context, run.method.adapters)
    if isinstance(config, NBLoRAConfig) and config.bound_ratio is not None:
        config = dataclasses.replace(config, norm="frobenius")  # fast, and fails for the same weights: those of norm 0
    _inject(run, modules, config)


def _check_methods(run: Run, model: torch.nn.Module) -> None:
    try:
        if run.method.instances:
            LoRAAdamW(model, methods=run.method.instances)
    except ArgumentError as error:
        raise _with_method(run, error) from error


def peft_config(settings: Settings) -> LoraConfig:
    """Returns PEFT's config of the settings' plain LoRA adapters."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT takes any float, but declares an int
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
        target_parameters=settings.expert_parameters,
        use_dora=settings.dora,
    )


def peft_model(base: transformers.PreTrainedModel, settings: Settings) -> PeftModel:
    """Returns PEFT's model of the settings' adapters.

    Raises:
        ArgumentError: PEFT has no such adapters for a part of the model, as DoRA or dropout for experts, which
            all-linear includes where transformers stacks them.
    """
    try:
        return get_peft_model(base, peft_config(settings))
    except ValueError as error:
        raise ArgumentError("--targets", "parts of the model that PEFT adapts with these options", error) from error


def _with_adapters(context: RunContext, run: Run, base: transformers.PreTrainedModel) -> tuple[torch.nn.Module, str]:
    """Returns the model with fresh adapters in ``base``, and the report of what was injected or fused."""
    if run.method.adapters is not None:
        report = _inject(run, base, _config(context, run.method.adapters))
        report.note = ". ".join(filter(None, (run.method.adapters.note(base), report.note)))
        return base, str(report)
    model = peft_model(base, context.settings)
    if run.engine == "eager":
        return model, "PEFT's own layers"
    try:
        return model, str(fuse_(model))
    except ArgumentError as error:
        raise ArgumentError("--engine", "eager where no layer can be fused", error.got) from error


def _config(context: RunContext, adapters: NBLoRA | SingLoRA) -> NBLoRAConfig | SingLoRAConfig:
    settings = context.settings
    options = {"r": settings.rank, "dropout": settings.dropout, "target_modules": settings.target_modules}
    return adapters.config(settings.alpha, context.total, **options)


def _inject(run: Run, base: transformers.PreTrainedModel, config: NBLoRAConfig | SingLoRAConfig) -> Report:
    try:
        return inject_(base, config)
    except ArgumentError as error:
        raise _with_method(run, error) from error


def _with_method(run: Run, error: ArgumentError) -> ArgumentError:
    """Returns the error with the ``--method`` that caused it in front of its argument."""
    return ArgumentError(f"--method {run.method.text}: {error.argument}", error.expected, error.got)


def check_targets(model: torch.nn.Module, targets: str | list[str], parameters: list[str] | None = None) -> None:
    """Checks that each name matches a linear layer, or a parameter of experts. PEFT complains only if no name matches
    anything.

    Raises:
        ArgumentError: a name matches no linear layer, or no parameter of three dimensions.
    """
    stacked = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    for target in parameters or ():
        if not any(name == target or name.endswith("." + target) for name in stacked):
            known = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in stacked)) or "none in this model"
            raise ArgumentError("--target-parameters", f"some of {known}", repr(target))
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, linear)]
    for target in () if targets == "all-linear" else targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ArgumentError("--targets", f"all-linear, or some of {known}", repr(target))


def train(context: RunContext, run: Run, model: torch.nn.Module, layers: str, folder: Path) -> Record:
    """Trains to the end, from the last complete checkpoint under ``folder`` if there is one, and saves the adapter.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed once, and a checkpoint is saved; or it was pressed twice.
        Diverged: the loss became infinite or NaN. The exception contains the record so far.
    """
    checkpoint = run_folder.last_checkpoint(folder)
    trainer, recorder = _trainer(context, run, model, folder, checkpoint)
    record, labels = recorder.record, [planned.label for planned in context.settings.runs]
    record.layers = record.layers or layers
    if not record.sample_before:  # unless the run is resumed
        record.sample_before = sample(model, context.tokenizer, context.prompt)
    if len(record.losses) == context.total:  # no step is left to train, so only load the weights
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        with context.display.training(run.label, labels, context.total, done=len(record.losses)):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if len(record.losses) < context.total:  # the Trainer stopped because context.stop was requested
        raise KeyboardInterrupt
    record.layers += fallbacks(model)
    record.sample_after = sample(model, context.tokenizer, context.prompt)
    if run.method.adapters is not None:
        save_adapter(model, folder / "adapter")
        return record
    assert isinstance(model, PeftModel), "a method without adapters of its own trains those of PEFT"
    if run.method.changes_base:
        record.layers += f". {save_adapter(model, folder / 'adapter').note}"
        with context.display.working("Measuring how far the weights have moved"):
            record.change_erank = mean_erank(model, models.load_model(context.source, context.dtype))
    else:
        model.save_pretrained(str(folder / "adapter"))
    return record


class ScaLoRATrainer(hf.ExactCheckpoints, transformers.Trainer):
    """A Trainer whose checkpoints contain the frozen weights that ScaLoRA has changed."""


class AdapterTrainer(transformers.Trainer):
    """A Trainer whose checkpoints contain the adapter and its free parameters, but not the frozen model."""

    model: torch.nn.Module  # optional in the base class, but None only before __init__ sets it

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # TrainingArguments declares that output_dir may be None, but replaces None by a default.
        save_adapter(self.model, output_dir or self.args.output_dir)  # type: ignore[arg-type]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_adapter(self.model if model is None else model, resume_from_checkpoint)


def _trainer(
    context: RunContext, run: Run, model: torch.nn.Module, folder: Path, checkpoint: Path | None
) -> tuple[transformers.Trainer, Recorder]:
    """Returns the Trainer of a run and its recorder. Plain LoRA is trained by the Trainer's own AdamW, every other
    method by LoRAAdamW."""
    args = _arguments(context, run, folder, resumed=checkpoint is not None)
    record = Record(run.label)
    if checkpoint is not None:
        record = Record(**run_folder.read_json(checkpoint / run_folder.RECORD))
    record.tokens_per_step = args.train_batch_size * args.gradient_accumulation_steps * context.settings.seq_len
    record.trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record.weight_format = quantization.format_of(model, context.settings.quantize)
    record.weight_bytes, record.plain_weight_bytes = weight_bytes(model, context.dtype)
    recorder = Recorder(context, record, Stopwatch(args.device))
    plain = not (run.method.instances or run.method.adapters)
    optimizer = None if plain else hf.optimizer_cls_and_kwargs(model, args, run.method.instances)
    trainer_class: type[transformers.Trainer] = AdapterTrainer if run.method.adapters else transformers.Trainer
    trainer_class = ScaLoRATrainer if run.method.changes_base else trainer_class
    trainer = trainer_class(
        model,
        args,
        train_dataset=context.data.train,
        eval_dataset=context.data.held_out,
        callbacks=[recorder],
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log
    recorder.statistics = hf.AdapterStatsCallback(trainer, math.ceil(context.total / STATISTICS))
    trainer.add_callback(recorder.statistics)  # after the recorder, which has stopped the clock by then
    return trainer, recorder


def fallbacks(model: torch.nn.Module) -> str:
    """Returns how many fused layers ran PEFT's own forward in their last call and why, as the end of a sentence; empty
    if none did."""
    reasons = [getattr(module, "fallback_reason", None) for module in model.modules()]
    counts = collections.Counter(filter(None, reasons))
    return "".join(f"; {count} ran PEFT's forward ({reason})" for reason, count in counts.items())


def _arguments(context: RunContext, run: Run, folder: Path, resumed: bool) -> transformers.TrainingArguments:
    settings = context.settings
    on_cpu = not torch.cuda.is_available()
    args = transformers.TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=context.total,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=run.method.lr or settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=max(1, context.total // 20),
        weight_decay=0.0,
        seed=settings.seed,
        bf16=context.dtype == torch.bfloat16,
        fp16=context.dtype == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,  # Recorder stops at a loss that is not finite
        eval_on_start=not resumed,
        prediction_loss_only=True,  # without keeping the logits of all blocks
        save_strategy="no",  # Recorder decides when
        save_total_limit=2,  # a crash may leave the last one incomplete
        label_names=["labels"],  # rather than what the Trainer infers from the model's class
        remove_unused_columns=False,  # Blocks yields only what the model takes
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    if args.device.type == "cuda":  # reading the property sets _n_gpu to the number of GPUs
        args._n_gpu = 1  # with more, the Trainer would split each batch over them with DataParallel
    return args


class Recorder(transformers.TrainerCallback):
    """Records each step, decides when to evaluate and to save, and stops after the current step on Ctrl-C.

    Attributes:
        statistics: the callback that logs the adapters' statistics.
    """

    statistics: hf.AdapterStatsCallback

    def __init__(self, context: RunContext, record: Record, stopwatch: Stopwatch):
        self.context, self.record, self.stopwatch = context, record, stopwatch
        self.record.memory_kind = stopwatch.memory_kind
        self._counting: PeakBytes | None = None
        self._evaluate_at = {math.ceil(context.total * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
        self._save_every = context.settings.save_every or math.ceil(context.total / CHECKPOINTS)

    def on_train_begin(self, args, state, control, model, **others):
        if not self.record.saved_bytes:  # unless a resumed run has measured it
            rows = [self.context.data.train[i] for i in range(min(args.train_batch_size, len(self.context.data.train)))]
            batch = transformers.default_data_collator(rows)
            self.record.saved_bytes = saved_for_backward(model.train(), batch)

    def on_step_begin(self, args, state, control, **others):
        self.stopwatch.start()

    def on_pre_optimizer_step(self, args, state, control, **others):
        if not self.record.optimizer_bytes:
            self._counting = PeakBytes()
            self._counting.__enter__()  # open until on_optimizer_step
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
        if self.context.stop.requested:
            control.should_save = control.should_training_stop = True
        if control.should_evaluate:
            self.context.display.evaluating()

    def on_log(self, args, state, control, logs, **others):
        figures = {name: value for name, value in logs.items() if name.startswith("adapter/")}
        if figures:
            self.record.adapter.append({"step": state.global_step, **figures})
            self.record.add_bounds(self.statistics.bounds)
            self.context.display.bounds(list(self.record.bounds_used().values()))
        if "loss" not in logs:
            return
        self._check_finite("loss", logs["loss"], state.global_step)
        self.record.losses.append(logs["loss"])
        self.context.display.step(state.global_step, logs["loss"], self.record.seconds[-1])

    def on_evaluate(self, args, state, control, metrics, **others):
        self._check_finite("held-out loss", metrics["eval_loss"], state.global_step)
        self.record.held_out.append((state.global_step, metrics["eval_loss"]))
        self.context.display.held_out(state.global_step, metrics["eval_loss"])

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise Diverged(f"the {name} is {value} at step {step}: try a smaller --lr", self.record)

    def on_save(self, args, state, control, **others):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        run_folder.write_json(checkpoint / run_folder.RECORD, self.record.as_dict())


@torch.no_grad()
def sample(model: torch.nn.Module, tokenizer, prompt: str) -> str:
    """Returns the most likely continuation of ``prompt``. It is not random, so that the samples before and after
    training can be compared."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    settings = {"do_sample": False, "repetition_penalty": 1.1, "use_cache": True}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # The stubs of Module know no generate, and transformers and PEFT have no common class that has it.
    output = model.eval().generate(  # type: ignore[operator]
        **inputs, max_new_tokens=SAMPLE_TOKENS, pad_token_id=pad, **settings
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
