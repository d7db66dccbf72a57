"""How bench/gpu.py runs a section: in a process of its own, figure by figure, so that whatever fails costs little.

A section is a generator of jobs (name, function); a job's dict is a figure, whose "ok", where it has one, says whether
it is as it should be. The process writes what it has to a file after every job. It ends where a job raises (after an
illegal memory access nothing else would run in it), where a job takes too long, and wherever a kernel may take it down;
the next process goes on behind the job that failed. A provider that took its process down in its first run is left out
when that job is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from measure import Provider, Unavailable, once, wait

Jobs = Iterator[tuple[str, Callable[[], dict]]]
PROGRAM = Path(__file__).with_name("gpu.py")
MARGIN = 15  # seconds of its budget that a process may take to start and to end


@dataclass
class Progress:
    """What a section has come to; shared by its processes through ``path``.

    Attributes:
        running: the job under way. trying: the provider whose first run is under way.
        lost: job → providers left out of it → why. complete: whether there are no more jobs.
    """

    path: Path | None = None
    figures: dict[str, dict] = field(default_factory=dict)
    running: str | None = None
    trying: str | None = None
    lost: dict[str, dict[str, str]] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def of(cls, path: Path) -> Progress:
        return cls(path, **json.loads(path.read_text())) if path.exists() else cls(path)

    def save(self) -> None:
        """Whole or not at all: the process may be killed at any time."""
        if self.path:
            values = asdict(self)
            del values["path"]
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(values))
            new.replace(self.path)

    def blame(self, failure: str) -> None:
        """The process ends with what is running: a provider's first run, or else the job."""
        if self.trying:
            self.lost.setdefault(self.running, {})[self.trying] = failure
        else:
            self.figures[self.running] = {"ok": False, "error": failure}
        self.running = self.trying = None
        self.save()


class Options(NamedTuple):
    """What a section is given. ``seconds``: its budget, from when it begins."""

    dry_run: bool
    device: torch.device
    seconds: float
    progress: Progress

    def surviving(self, name: str, build: Callable[[], Provider]) -> Callable[[], Provider]:
        """A provider that fails in its first run is not measured, with the reason; the others are."""

        def run() -> Provider:
            progress = self.progress
            if why := progress.lost.get(progress.running, {}).get(name):
                raise Unavailable(why)
            progress.trying = name
            progress.save()
            try:
                provider, failure = build(), ""
                once(provider)
                wait(self.device)
            except Unavailable as reason:
                failure = str(reason)
            except Exception as error:
                failure = of_chain(error)
                self._go_on(failure)
            progress.trying = None
            progress.save()
            if failure:
                raise Unavailable(failure)
            return provider

        return run

    def _go_on(self, failure: str) -> None:
        """Ends the process where the device answers no more; the next one leaves out what was tried here."""
        try:
            wait(self.device)
        except Exception:
            self.progress.blame(failure)
            raise SystemExit(f"the device was lost: {failure}") from None


class Section(NamedTuple):
    """``seconds``: for all of it. ``each``: for one figure. ``alone``: nothing else may run beside it."""

    jobs: Callable[[Options], Jobs]
    seconds: float
    each: float
    alone: bool = False


def run(name: str, section: Section, options: Options, again: bool) -> bool:
    """Runs a section's jobs here, those that its progress lacks; whether none is wrong. ``again``: end the process
    where a job raises, since another goes on."""
    progress = options.progress
    for figure, job in section.jobs(options):
        if figure in progress.figures:
            continue
        progress.running = figure
        progress.save()
        faulthandler.dump_traceback_later(options.seconds if options.dry_run else section.each, exit=True)
        raised = False
        try:
            values = job()
        except Exception as error:
            raised = True
            traceback.print_exc()
            values = {"ok": False, "error": of_chain(error)}
        faulthandler.cancel_dump_traceback_later()
        progress.figures[figure], progress.running = values, None
        progress.save()
        print(f"  {name}: {figure}: {summary(values)}", flush=True)
        if raised and again:
            sys.exit(1)
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    progress.complete = True
    progress.save()
    return all(figure.get("ok") is not False for figure in progress.figures.values())


async def in_processes(name: str, section: Section, seconds: float, folder: Path, arguments: list[str]) -> dict:
    """A section's figures as far as it came, in as many processes as that takes; "error": why it went no further."""
    path = folder / f"{name}.json"
    start = time.monotonic()
    command = [sys.executable, str(PROGRAM), "--section", name, "--json", str(path), *arguments]
    error = ""
    while not error:
        left = start + seconds - time.monotonic()
        before = Progress.of(path)
        status = await _ended([*command, "--seconds", f"{max(left - MARGIN, 1):.0f}"], left)
        progress = Progress.of(path)
        if progress.complete:
            break
        if status is None:
            error = f"out of time after {seconds:.0f} s"
            if progress.running:
                progress.figures[progress.running] = {"ok": None, "error": "out of time"}
        elif progress.running:  # 1 is faulthandler's status
            progress.blame(f"took more than {section.each:.0f} s" if status == 1 else _told(status))
        elif (progress.figures, progress.lost) == (before.figures, before.lost):
            error = _told(status)  # before any job, and so would the next process
    found = {"figures": progress.figures, "seconds": round(time.monotonic() - start, 1)}
    return found | ({"error": error} if error else {})


async def _ended(command: list[str], seconds: float) -> int | None:
    """Exit status of the process; None: it had to be ended after these seconds. What it started is ended with it."""
    process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
    try:
        async with asyncio.timeout(seconds):
            return await process.wait()
    except TimeoutError:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def of_chain(error: BaseException) -> str:
    """The error and what it came of: leaving a CUDA graph's capture raises over the error that broke the capture."""
    said = f"{type(error).__name__}: {str(error)[:500]}"
    return f"{said}, after {of_chain(error.__context__)}" if error.__context__ else said


def _told(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def summary(values: dict) -> str:
    """Of one figure, a line."""
    if "rows" in values:
        modes = {row["mode"] for row in values["rows"]}
        main = "full" if "full" in modes else "forward"
        shown = [row for row in values["rows"] if row["mode"] == main and row["p50"] is not None]
        lacking = [row for row in values["rows"] if row["unavailable"]]
        missing = [f"{row['provider']} not measured ({row['unavailable']})" for row in lacking]
        return ", ".join([f"{row['provider']} {row['p50']:.4g} µs" for row in shown] + missing)
    if "ok" in values:
        rest = {k: v for k, v in values.items() if k not in ("ok", "tail") and not isinstance(v, dict)}
        word = {True: "ok", False: "WRONG", None: "not known"}[values["ok"]]
        return " ".join([word, *(f"{k}={short(v)}" for k, v in rest.items())])
    return short(values)


def short(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {short(of)}" for name, of in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
