"""lora-fast doctor: what is here (installation.py), what works, and what to do about what does not (checkup.py)."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..output.tables import Cell, Table
from ..output.terminal import Display, exit_codes

_JSON = "Print everything as JSON, and nothing else."
_COLOURS = {"works": "green", "fails": "red", "none": "yellow"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help=_JSON)] = False) -> None:
    """Look at this installation: versions, devices, which backend runs and why, and what works.

    Every check does the real thing in a small way: a layer forward and backward against its formula, the kernels, a
    compilation, an optimizer step, a PEFT model fused. Half a minute at most. Exit code 0 if the core works (the
    layer on the backend that is used here, an optimizer step, adapter files), 1 if not.

    **Examples**

    - `lora-fast doctor`

        what to do about what does not work stands below it

    - `lora-fast doctor --json > doctor.json`

        for a bug report
    """
    display = Display()
    with exit_codes(display):
        with display.working("Loading libraries"):
            from . import checkup, installation

        found = []
        for check in checkup.checks():
            if as_json:
                found.append(checkup.examine(check))
            else:
                with display.working(check.name):
                    found.append(checkup.examine(check))
        name, why = installation.which_backend()
        works = all(finding.state == checkup.WORKS for finding in found if finding.core) and name != "none"
        about = {
            "versions": installation.versions(),
            "devices": installation.devices(),
            "backend": {"name": name, "why": why},
            "interpreter": installation.interpreter(),
        }
        if as_json:
            checks = [vars(finding) for finding in found]
            typer.echo(json.dumps({"core_works": works, **about, "checks": checks}, indent=1, ensure_ascii=False))
        else:
            _show(display, about, found, works)
    if not works:
        raise typer.Exit(1)


def _show(display: Display, about: dict, found: list, works: bool) -> None:
    rows = list(about["versions"].items())
    rows += [("device" if i == 0 else "", text) for i, text in enumerate(about["devices"])]
    rows.append(("backend", f"{about['backend']['name']}: {about['backend']['why']}"))
    rows.append(("Triton's interpreter", about["interpreter"]))
    display.show(Table("", [Cell("this machine"), Cell("")], [[Cell(name), Cell(text)] for name, text in rows]))
    display.note("")
    head = [Cell("check"), Cell(""), Cell("seen")]
    display.show(Table("", head, [[Cell(f.name), Cell(f.state, _COLOURS[f.state]), Cell(f.seen)] for f in found]))
    for finding in found:
        if finding.remedy:
            display.note(f"\n{finding.name}: {finding.seen}", style="bold")
            display.note(f"  {finding.remedy}")
    broken = ", ".join(finding.name for finding in found if finding.state == "fails")
    if works:
        rest = f"; what does not: {broken}." if broken else ", and so does all that is here."
        display.note(f"\nThe core works{rest}")
    else:
        display.error("the core does not work here: " + (broken or about["backend"]["why"]))
