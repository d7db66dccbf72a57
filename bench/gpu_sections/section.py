"""How bench/gpu.py runs its sections: in processes of their own, figure by figure, so that whatever fails costs little.

A section is a function that returns jobs (name, function). A job's dict is a figure, whose "ok", where it has one,
says whether it is as it should be. The process appends each figure to the run's file as a line of JSON the moment it
is known. A process ends where the device answers no more (after an illegal memory access nothing else would run in
it), where a job takes too long, and wherever a kernel may take it down. The next process goes on behind the job that
failed. A provider that took its process down in its first run is left out when that job is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_sections import compile_cache
from suite.comparison import Ceilings, Provider, Unavailable, once, wait

Jobs = list[tuple[str, Callable[[], dict]]]
PROGRAM = Path(__file__).resolve().parents[1] / "gpu.py"
LINE = {"section", "figure", "seconds", "values"}
MODES = ("device", "interpreter", "stub")  # on a GPU; tiny sizes in Triton's interpreter; real ones on a stub driver


class Figures:
    """The file of a run's figures, to which several processes append. Of lines with one name the last counts."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, section: str, figure: str, values: dict, seconds: float = 0.0) -> None:
        line = {"section": section, "figure": figure, "seconds": round(seconds, 2), "values": values}
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")  # a process was ended while it wrote
            file.write(b"\n" * torn + json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def add_failure(self, section: str, figure: str, error: str, ok: bool | None = False) -> None:
        """Adds an error to a figure. What was known of the figure stays."""
        self.add(section, figure, self.read().get(section, {}).get(figure, {}) | {"ok": ok, "error": error})

    def read(self) -> dict[str, dict[str, dict]]:
        """Returns section → figure → values."""
        sections: dict[str, dict[str, dict]] = {}
        for line in self._lines():
            sections.setdefault(line["section"], {})[line["figure"]] = line["values"]
        return sections

    def seconds(self) -> dict[str, float]:
        """Returns how long the figures of each section took, one after the other."""
        seconds: dict[str, float] = {}
        for line in self._lines():
            seconds[line["section"]] = seconds.get(line["section"], 0.0) + line["seconds"]
        return seconds

    def _lines(self) -> list[dict]:
        """Returns all lines that are figures: a process may have been ended while it wrote one."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        lines = []
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict) and line.keys() == LINE]


@dataclass
class Progress:
    """What the processes that follow each other know of each other, through ``path``.

    Attributes:
        running: section and figure of the job under way. trying: the provider whose first run is under way.
        lost: job → providers left out of it → why. began: section → when, in seconds of the epoch.
        finished: how many jobs have ended. complete: whether there are no more.
    """

    path: Path | None = None
    running: tuple[str, str] | None = None
    trying: str | None = None
    lost: dict[str, dict[str, str]] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    finished: int = 0
    complete: bool = False

    @classmethod
    def of(cls, path: Path) -> Progress:
        return cls(path, **json.loads(path.read_text())) if path.exists() else cls(path)

    def save(self) -> None:
        """Writes the file wholly or not at all, since the process may be killed at any time."""
        if self.path:
            values = asdict(self)
            del values["path"]
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(values))
            new.replace(self.path)

    @property
    def job(self) -> str:
        return ": ".join(self.running)

    def blame(self, failure: str, figures: Figures) -> None:
        """Notes that the process has ended with what is running: a provider's first run, or else the job."""
        if self.trying:
            self.lost.setdefault(self.job, {})[self.trying] = failure
        else:
            figures.add_failure(*self.running, failure)
        self.running = self.trying = None
        self.save()


class Options(NamedTuple):
    """What a section is given. ``share``: the number of this process, and how many there are."""

    mode: str
    device: torch.device
    figures: Figures
    progress: Progress
    seconds: float = 600.0
    share: tuple[int, int] = (0, 1)

    @property
    def tiny(self) -> bool:
        return self.mode == "interpreter"

    def ceilings(self, dtype: str) -> Ceilings:
        """Returns the ceilings measured at the start of this run; infinite ones where they were not measured."""
        values = self.figures.read().get("ceilings", {}).get(dtype, {})
        infinite = float("inf")
        return Ceilings(dtype, values.get("operations", infinite), values.get("bandwidth", infinite))

    def surviving(self, name: str, build: Callable[[], Provider]) -> Callable[[], Provider]:
        """Wraps a provider's builder: one that fails in its first run is not measured, with the reason."""

        def run() -> Provider:
            progress = self.progress
            if why := progress.lost.get(progress.job, {}).get(name):
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
        """Ends the process if the device answers no more. The next one leaves out what was tried here."""
        try:
            wait(self.device)
        except Exception:
            self.progress.blame(failure, self.figures)
            raise SystemExit(f"the device was lost: {failure}") from None


class Section(NamedTuple):
    """A section of a stage.

    Attributes:
        jobs: its figures. seconds: its budget. each: the most that one figure may take.
        estimate: seconds that a figure takes on an H100, by estimate. processes: how many share its jobs.
    """

    jobs: Callable[[Options], Jobs]
    seconds: float
    each: float
    estimate: float
    processes: int = 1


def work(sections: dict[str, Section], options: Options) -> bool:
    """Runs the jobs of sections that have no figure yet, one section after the other. Returns whether none is wrong."""
    progress, (part, parts) = options.progress, options.share
    right = True
    for number, (name, section) in enumerate(sections.items()):
        began = progress.began.setdefault(name, time.time())
        known = options.figures.read().get(name, {})
        try:
            # Each section begins with another share: many have a single job.
            jobs = section.jobs(options._replace(seconds=section.seconds))[(part - number) % parts :: parts]
        except Exception as error:
            traceback.print_exc()
            jobs = [("its jobs", lambda error=error: {"ok": False, "error": of_chain(error)})]
        for figure, job in jobs:
            if figure in known:
                continue
            if options.mode == "device" and time.time() > began + section.seconds:
                options.figures.add_failure(name, figure, f"not begun: {section.seconds:g} s were over", ok=None)
                continue
            right &= _run(name, figure, job, section, options)
    progress.complete = True
    progress.save()
    return right


def _run(name: str, figure: str, job: Callable[[], dict], section: Section, options: Options) -> bool:
    """Runs one job and frees what it leaves. On the stub driver its figure is what it found compiled."""
    progress, start, before = options.progress, time.monotonic(), compile_cache.counts.copy()
    progress.running = name, figure
    progress.save()
    faulthandler.dump_traceback_later(section.each if options.mode == "device" else 600, exit=True)
    raised = False
    try:
        values = job()
    except Exception as error:
        raised = True
        traceback.print_exc()
        known = options.figures.read().get(name, {}).get(figure, {})
        values = known | {"ok": False, "error": of_chain(error)}
    faulthandler.cancel_dump_traceback_later()
    on_stub = options.mode == "stub"
    if on_stub:
        values = (values if raised else {"ok": True}) | (compile_cache.counts - before)
    options.figures.add(name, figure, values, time.monotonic() - start)
    progress.running, progress.finished = None, progress.finished + 1
    progress.save()
    if raised or not on_stub:
        print(f"  {name}: {figure}: {summary(values)}", flush=True)
    if raised and progress.path and options.mode == "device" and not _answers(options.device):
        sys.exit(1)  # another process goes on
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return values.get("ok") is not False


def _answers(device: torch.device) -> bool:
    """Tells whether a device still works after an error, with no capture left open."""
    try:
        wait(device)
        return device.type != "cuda" or torch.cuda.current_stream() == torch.cuda.default_stream()
    except Exception:
        return False


async def in_processes(
    names: list[str],
    share: tuple[int, int],
    mode: str,
    seconds: float,
    figures: Figures,
    folder: Path,
    arch: int = compile_cache.ARCH,
) -> None:
    """Runs one share of the sections' jobs, in as many processes as it takes, within these seconds. ``arch``: of the
    stub driver's card."""
    path = folder / f"{mode}-{'-'.join(names)}-{share[0]}.json"
    until = time.monotonic() + seconds
    command = [sys.executable, str(PROGRAM), "--work", *names, "--share", f"{share[0]}/{share[1]}"]
    command += ["--mode", mode, "--progress", str(path), "--figures", str(figures.path)]
    environment = {**os.environ, **(compile_cache.stub_environment(arch) if mode == "stub" else {})}
    while True:
        before = Progress.of(path)
        status = await _ended(command, environment, until - time.monotonic())
        progress = Progress.of(path)
        if progress.complete:
            return
        if status is None:
            where = progress.running or (names[max(0, len(progress.began) - 1)], "the rest")
            figures.add_failure(*where, f"out of time: ended after {seconds:.0f} s", ok=None)
            return
        if progress.running:  # 1 is faulthandler's status
            progress.blame("took too long" if status == 1 else _told(status), figures)
        elif progress == before:  # before any job, and so would the next process
            figures.add_failure(names[0], "its process", _told(status))
            return


async def _ended(command: list[str], environment: dict[str, str], seconds: float) -> int | None:
    """Returns the exit status of the process, or None if it had to be ended after these seconds. What it started is
    ended with it."""
    process = await asyncio.create_subprocess_exec(*command, env=environment, start_new_session=True)
    try:
        async with asyncio.timeout(seconds):
            return await process.wait()
    except TimeoutError:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):  # a process may hang in the driver
            await asyncio.wait_for(process.wait(), 10)


def of_chain(error: BaseException) -> str:
    """Returns an error and what caused it: leaving a CUDA graph's capture raises over the error that broke it."""
    said = f"{type(error).__name__}: {str(error)[:500]}"
    return f"{said}, after {of_chain(error.__context__)}" if error.__context__ else said


def _told(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def summary(values: dict) -> str:
    """Returns a figure in one line."""
    if "rows" in values:
        modes = {row["mode"] for row in values["rows"]}
        main = "full" if "full" in modes else "forward"
        shown = [row for row in values["rows"] if row["mode"] == main and row["p50"] is not None]
        lacking = [row for row in values["rows"] if row["unavailable"]]
        missing = [f"{row['provider']} not measured ({row['unavailable'][:120]})" for row in lacking]
        return ", ".join([*map(_timed, shown), *missing])
    if "ok" in values:
        rest = {k: v for k, v in values.items() if k not in ("ok", "tail") and not isinstance(v, dict)}
        word = {True: "ok", False: "WRONG", None: "not known"}[values["ok"]]
        return " ".join([word, *(f"{k}={short(v)}" for k, v in rest.items())])
    return short(values)


def _timed(row: dict) -> str:
    host = " (with the host's)" if row["exposed"] else f" (host {row['host'][1]:.4g})" if row["host"] else ""
    return f"{row['provider']} {row['p50']:.4g} µs{host}"


def short(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {short(of)}" for name, of in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
