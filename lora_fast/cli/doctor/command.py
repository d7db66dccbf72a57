"""``lora-fast doctor`` prints what is installed (installation.py), what works, and how to repair the rest
(checkup.py)."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated

import typer

from ..output.tables import Cell, Table
from ..output.terminal import Display, exit_codes

_JSON = "Print JSON instead of tables."
_COLOURS = {"works": "green", "fails": "red", "none": "yellow"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help=_JSON)] = False) -> None:
    """Check this installation: versions, devices, which backend runs and why, and what works.

    Every check uses a part of the package on tiny data: a layer's forward and backward pass against its formula, the
    kernels, a compilation, an optimizer step, fusing a PEFT model. Takes half a minute at most. The exit code is 0 if
    the core works (a layer on the backend that runs here, an optimizer step, adapter files) and 1 if not.

    **Examples**

    - `lora-fast doctor`

        prints the results, and below them a remedy for everything that does not work

    - `lora-fast doctor --json > doctor.json`

        writes the same into a file, for a bug report
    """
    display = Display()
    with exit_codes(display):
        with display.working("Loading libraries"):
            from . import checkup, installation

        findings = []
        for check in checkup.checks():
            with contextlib.nullcontext() if as_json else display.working(check.name):
                findings.append(checkup.examine(check))
        name, why = installation.which_backend()
        works = all(finding.state == checkup.WORKS for finding in findings if finding.core) and name != "none"
        about = {
            "versions": installation.versions(),
            "devices": installation.devices(),
            "backend": {"name": name, "why": why},
            "interpreter": installation.interpreter(),
        }
        if as_json:
            checks = [vars(finding) for finding in findings]
            typer.echo(json.dumps({"core_works": works, **about, "checks": checks}, indent=1, ensure_ascii=False))
        else:
            _show(display, about, findings, works)
    if not works:
        raise typer.Exit(1)


def _show(display: Display, about: dict, findings: list, works: bool) -> None:
    rows = list(about["versions"].items())
    rows += [("device" if i == 0 else "", text) for i, text in enumerate(about["devices"])]
    rows.append(("backend", f"{about['backend']['name']}: {about['backend']['why']}"))
    rows.append(("Triton's interpreter", about["interpreter"]))
    display.show(Table("", [Cell("this machine"), Cell("")], [[Cell(name), Cell(text)] for name, text in rows]))
    display.note("")
    head = [Cell("check"), Cell(""), Cell("seen")]
    display.show(Table("", head, [[Cell(f.name), Cell(f.state, _COLOURS[f.state]), Cell(f.seen)] for f in findings]))
    for finding in findings:
        if finding.remedy:
            display.note(f"\n{finding.name}: {finding.seen}", style="bold")
            display.note(f"  {finding.remedy}")
    broken = ", ".join(finding.name for finding in findings if finding.state == "fails")
    if works:
        display.note(
            "\nThe core works. " + (f"These parts do not: {broken}." if broken else "So does every other part.")
        )
    else:
        display.error("the core does not work: " + (broken or about["backend"]["why"]))
