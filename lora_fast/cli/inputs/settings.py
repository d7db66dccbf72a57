"""The options of ``lora-fast finetune`` as one record, and the checks of their values, before any file is read."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ... import checks
from ...checks import ArgumentError
from . import method_options, quantization

ENGINES = ("fused", "eager")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_STEPS = 40


@dataclass(frozen=True)
class Run:
    """A training run. A call of finetune makes one run or, with --compare, several.

    Attributes:
        label: its name in tables, plots and metrics.json.
        engine: one of ENGINES.
        method: what it trains with.
        folder: its sub-folder of the output folder; empty if there is only one run.
    """

    label: str
    engine: str
    method: method_options.Choice
    folder: str


@dataclass(frozen=True)
class Settings:
    """Everything that determines the result of a call of finetune. It is saved with the result, and compared when the
    call is resumed."""

    model: str = "smollm2"
    data: str = "kjv"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "all-linear"
    target_parameters: str | None = None
    dora: bool = False
    steps: int | None = None
    epochs: int | None = None
    lr: float = 1e-3
    seq_len: int = 256
    batch: int = 2
    accumulation: int = 1
    dtype: str = "auto"
    quantize: str | None = None
    seed: int = 0
    method: tuple[str, ...] = ("lora",)
    prompt: str | None = None
    save_every: int | None = None
    engine: str = "fused"
    compare: bool = False

    def __post_init__(self):
        method = tuple(self.method)  # the command line and JSON give a list
        if self.compare and len(method) == 1 and method_options.has_own_layers(method[0]):
            method = ("lora", *method)  # PEFT has no such layers, so plain LoRA is what to compare with
        object.__setattr__(self, "method", method)

    @property
    def compares_methods(self) -> bool:
        return len(self.method) > 1

    @property
    def runs(self) -> list[Run]:
        """The runs in their order: one for each method or, with one method, one for each engine."""
        choices = [method_options.read(text) for text in self.method]
        if self.compares_methods:
            return [Run(choice.text, self.engine, choice, _folder_name(choice.text)) for choice in choices]
        engines = ENGINES if self.compare else (self.engine,)
        return [Run(engine, engine, choices[0], engine if self.compare else "") for engine in engines]

    @property
    def target_modules(self) -> str | list[str]:
        """The targets in the form that ``peft.LoraConfig`` takes."""
        return "all-linear" if self.targets == "all-linear" else [name.strip() for name in self.targets.split(",")]

    @property
    def expert_parameters(self) -> list[str] | None:
        """The parameters of experts in the form that ``peft.LoraConfig(target_parameters=…)`` takes."""
        return None if self.target_parameters is None else [name.strip() for name in self.target_parameters.split(",")]

    def total_steps(self, blocks: int) -> int:
        """Returns the number of optimizer steps of a run on ``blocks`` training blocks."""
        if self.epochs is None:
            return self.steps or DEFAULT_STEPS
        return self.epochs * math.ceil(math.ceil(blocks / self.batch) / self.accumulation)

    def _check_expert_parameters(self) -> None:
        """Raises ArgumentError if the experts' adapters have a name missing, or a setting that PEFT refuses."""
        if self.expert_parameters is None:
            return
        if not all(self.expert_parameters):
            got = repr(self.target_parameters)
            raise ArgumentError("--target-parameters", "parameter names separated by commas", got)
        if self.dora:
            raise ArgumentError("--dora", "plain LoRA with --target-parameters, as PEFT", "both")
        if self.dropout:
            raise ArgumentError("--dropout", "0 with --target-parameters, as PEFT", self.dropout)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def check(self) -> Settings:
        """Checks the value of every option and returns self. Reads no file and imports nothing.

        Raises:
            ArgumentError: a value is out of range, or two options exclude each other.
        """
        checks.rank(self.rank, "--rank")
        checks.positive(self.alpha, "--alpha")
        checks.positive(self.lr, "--lr")
        if not 0.0 <= self.dropout < 1.0:  # NaN fails too
            raise ArgumentError("--dropout", "a probability from 0 up to, but not including, 1", self.dropout)
        if self.steps is not None and self.epochs is not None:
            raise ArgumentError("--steps", "either --steps or --epochs", "both")
        for name in ("steps", "epochs", "batch", "accumulation", "save_every"):
            _at_least(getattr(self, name), 1, name)
        _at_least(self.seq_len, 2, "seq_len")
        if not 0 <= self.seed < 2**32:
            raise ArgumentError("--seed", "an integer from 0 to 2**32 - 1", self.seed)
        checks.choice(self.engine, "--engine", ENGINES)
        if self.compares_methods and not self.compare:
            raise ArgumentError("--method", "one method, or several with --compare", " ".join(self.method))
        unknown_to_peft = [run.method.name for run in self.runs if run.method.adapters]
        if self.engine == "eager" and unknown_to_peft:
            raise ArgumentError("--engine", f"fused for {unknown_to_peft[0]}, which PEFT does not have", self.engine)
        folders = [run.folder for run in self.runs]
        if len(set(folders)) < len(folders):
            raise ArgumentError("--method", "each method with its options once", " ".join(self.method))
        checks.choice(self.dtype, "--dtype", DTYPES)
        quantization.check(self.quantize)
        changing = [run.method.text for run in self.runs if run.method.changes_base]
        if self.quantize is not None and changing:
            expected = "a method that leaves the frozen weights as they are, with --quantize"
            raise ArgumentError("--method", expected, f"{changing[0]}, which merges into them")
        if not all(self.target_modules):
            raise ArgumentError("--targets", "all-linear, or module names separated by commas", repr(self.targets))
        if unknown_to_peft and (self.dora or self.target_parameters):
            option_name = "--dora" if self.dora else "--target-parameters"
            raise ArgumentError(option_name, "a method that trains PEFT's adapters", unknown_to_peft[0])
        self._check_expert_parameters()
        for name in ("model", "data", "prompt"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ArgumentError(option(name), "some text", repr(getattr(self, name)))
        return self


def option(name: str) -> str:
    """Returns the option as it is typed: seq_len → --seq-len."""
    return "--" + name.replace("_", "-")


def _folder_name(method: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", method)


def absolute(name: str) -> str:
    """Returns the absolute path of an existing file or folder, so that a run can be resumed from any working directory.
    Other names are returned as they are."""
    packaged = name in (Settings.model, Settings.data)
    return str(Path(name).resolve()) if Path(name).exists() and not packaged else name


def _at_least(value: int | None, least: int, name: str) -> None:
    if value is not None and value < least:
        raise ArgumentError(option(name), f"an integer of at least {least}", value)
