"""The end of a run on the terminal: tables, samples, where everything is, and what to try next."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..inputs.settings import Settings, option
from ..output.terminal import Display, literal
from .record import Record


def show_result(
    display: Display, settings: Settings, runs: list[Record], folder: Path, source: str, prompt: str
) -> None:
    """The table, the samples, where everything is and what to try next."""
    from ..finetune import report, report_methods

    for table in report.tables(settings, runs):
        display.show(table)
    _show_sample(display, "before", prompt, runs[0].sample_before)
    for run in runs:
        _show_sample(display, "after" if len(runs) == 1 else f"after, {run.label}", prompt, run.sample_after)
    chosen = report_methods.best(runs) if settings.compares_methods else runs[0]
    adapter = folder / settings.runs[runs.index(chosen)].folder / "adapter"
    display.note(f"\nreport    {folder / 'report.html'}\nfigures   {folder / 'metrics.json'}\nadapter   {adapter}")
    display.note("\nUse it in Python:", style="bold")
    load = f"AutoModelForCausalLM.from_pretrained({source!r})"
    display.note(f"  model = peft.PeftModel.from_pretrained({load}, {str(adapter)!r})", style="cyan")
    method = settings.runs[runs.index(chosen)].method
    beside = "beside plain LoRA:" if method.adapters else "both engines, side by side:"
    display.note("Next, " + ("your own text:" if settings.compare else beside), style="bold")
    display.note(f"  {_next_command(settings, method.text)}", style="cyan")


def _show_sample(display: Display, when: str, prompt: str, text: str) -> None:
    display.console.print(f"[bold]{when}[/]  [dim]{literal(prompt)}[/] {literal(text)}")


def _next_command(settings: Settings, method: str) -> str:
    """The same settings, compared; after that, the best method on a text of one's own."""
    chosen = ["--method", method] if (method,) != Settings().method else []
    if settings.compare:
        return shlex.join(["lora-fast", "finetune", *chosen, "--data", "your_text.txt", "--epochs", "1"])
    default, passed_over = Settings().as_dict(), ("engine", "method")
    changed = {n: v for n, v in settings.as_dict().items() if v != default[n] and n not in passed_over}
    words = [word for name, value in changed.items() for word in (option(name), str(value))]
    return shlex.join(["lora-fast", "finetune", *words, *chosen, "--compare"])
