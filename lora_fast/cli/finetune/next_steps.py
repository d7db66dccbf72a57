"""Prints the end of a call of finetune: tables, samples, the files, and the commands to try next."""

from __future__ import annotations

import shlex

from ..inputs import models, quantization
from ..inputs.settings import Settings, option
from ..output import run_folder
from ..output.terminal import Display, escape_markup
from . import report, report_methods
from .pipeline import Outcome


def show(display: Display, outcome: Outcome) -> None:
    """Prints the figures and the samples of all runs, the paths of the files, and how to use the adapter. If several
    methods were compared, the adapter is that of the best one."""
    settings, records, prompt = outcome.settings, outcome.records, outcome.prompt
    for table in report.tables(settings, records):
        display.show(table)
    _show_sample(display, "before", prompt, records[0].sample_before)
    for record in records:
        _show_sample(display, "after" if len(records) == 1 else f"after, {record.label}", prompt, record.sample_after)
    best = report_methods.best(records) if settings.compares_methods else records[0]
    run = settings.runs[records.index(best)]
    adapter = outcome.folder / run.folder / "adapter"
    display.note(f"\nreport    {outcome.folder / run_folder.REPORT}")
    display.note(f"figures   {outcome.folder / run_folder.METRICS}")
    display.note(f"adapter   {adapter}")
    display.note("\nUse the adapter in Python:", style="bold")
    words = [repr(outcome.source)]
    if settings.quantize:
        words += [f"quantization_config={quantization.code(settings.quantize, models.choose_dtype(settings.dtype))}"]
    base = f"AutoModelForCausalLM.from_pretrained({', '.join(words)})"
    display.note(f"  model = peft.PeftModel.from_pretrained({base}, {str(adapter)!r})", style="cyan")
    if settings.compare:
        display.note("Next, train on your own text:", style="bold")
    elif run.method.adapters:
        display.note("Next, compare with plain LoRA:", style="bold")
    else:
        display.note("Next, compare both engines:", style="bold")
    display.note(f"  {next_command(settings, run.method.text)}", style="cyan")


def _show_sample(display: Display, when: str, prompt: str, text: str) -> None:
    display.console.print(f"[bold]{when}[/]  [dim]{escape_markup(prompt)}[/] {escape_markup(text)}")


def next_command(settings: Settings, method: str) -> str:
    """Returns the command to try next: the same settings with --compare or, after a comparison, ``method`` on the
    user's own text."""
    method_words = ["--method", method] if (method,) != Settings().method else []
    defaults = Settings().as_dict()
    changed = {name: value for name, value in settings.as_dict().items() if value != defaults[name]}
    words = lambda *names: [word for name in names if name in changed for word in _words(name, changed[name])]
    if settings.compare:
        kept = words("quantize", "dora", "target_parameters")
        return shlex.join(["lora-fast", "finetune", *method_words, *kept, "--data", "your_text.txt", "--epochs", "1"])
    kept = words(*[name for name in changed if name not in ("engine", "method")])
    return shlex.join(["lora-fast", "finetune", *kept, *method_words, "--compare"])


def _words(name: str, value: object) -> list[str]:
    """Returns the words of an option; those of a flag that is on are its name alone."""
    return [option(name)] if value is True else [option(name), str(value)]
