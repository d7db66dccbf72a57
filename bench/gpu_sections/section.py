"""Runs the sections of bench/gpu.py in processes of their own, job by job, so that a failure costs only its job.

A section is a function that returns jobs (name, function). A job returns a dict, its figure, whose "ok", if present, is
True, False or, if nothing is known, None. The process appends each figure to the run's file as a line of JSON as soon
as it is known. A process ends when the device no longer works (after an illegal memory access every later call fails),
when a job takes too long, and when a kernel kills it. The next process continues after the job that failed. If a
provider ended its process in its first run, the job is run again without this provider.
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
from lora_fast.measure.ceilings import Ceilings
from lora_fast.measure.clock import wait
from suite.comparison import Provider, Unavailable, once

Jobs = list[tuple[str, Callable[[], dict]]]
PROGRAM = Path(__file__).resolve().parents[1] / "gpu.py"
LINE = {"section", "figure", "seconds", "values"}
# on a GPU; at tiny sizes in Triton's interpreter; at real sizes on a stub driver
MODES = ("device", "interpreter", "stub")


class Figures:
    """The file of a run's figures, to which several processes append. The last line of a figure counts."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, section: str, figure: str, values: dict, seconds: float = 0.0) -> None:
        line = {"section": section, "figure": figure, "seconds": round(seconds, 2), "values": values}
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")  # a process was killed while it wrote
            file.write(b"\n" * torn + json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def add_failure(self, section: str, figure: str, error: str, ok: bool | None = False) -> None:
        """Adds an error to a figure and keeps its earlier values."""
        self.add(section, figure, self.read().get(section, {}).get(figure, {}) | {"ok": ok, "error": error})

    def read(self) -> dict[str, dict[str, dict]]:
        """Returns section → figure → values."""
        sections: dict[str, dict[str, dict]] = {}
        for line in self._lines():
            sections.setdefault(line["section"], {})[line["figure"]] = line["values"]
        return sections

    def seconds(self) -> dict[str, float]:
        """Returns section → seconds, the sum over its figures."""
        seconds: dict[str, float] = {}
        for line in self._lines():
            seconds[line["section"]] = seconds.get(line["section"], 0.0) + line["seconds"]
        return seconds

    def _lines(self) -> list[dict]:
        """Returns all lines that are figures; a line may be incomplete if its process was killed."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        lines = []
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict) and line.keys() == LINE]


@dataclass
class Progress:
    """The state that a process passes to its successor through the file ``path``.

    Attributes:
        running: section and figure of the current job. trying: the provider whose first run is under way.
        lost: job → provider that is left out of it → reason. began: section → its start, in seconds of the epoch.
        finished: number of jobs that have ended. complete: whether no job is left.
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
        """Replaces the file atomically, since the process may be killed at any time."""
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
        """Records that the provider under trial, or else the running job, has ended its process."""
        if self.trying:
            self.lost.setdefault(self.job, {})[self.trying] = failure
        else:
            figures.add_failure(*self.running, failure)
        self.running = self.trying = None
        self.save()


class Options(NamedTuple):
    """The arguments of a section. ``share``: the number of this process and the number of processes."""

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
        """Returns the ceilings that this run has measured, or infinite ones."""
        values = self.figures.read().get("ceilings", {}).get(dtype, {})
        infinite = float("inf")
        return Ceilings(dtype, values.get("operations", infinite), values.get("bandwidth", infinite))

    def surviving(self, name: str, build: Callable[[], Provider]) -> Callable[[], Provider]:
        """Wraps the builder of a provider: if its first run fails, ``Unavailable`` is raised with the reason."""

        def run() -> Provider:
            progress = self.progress
            if reason := progress.lost.get(progress.job, {}).get(name):
                raise Unavailable(reason)
            progress.trying = name
            progress.save()
            try:
                provider, failure = build(), ""
                once(provider)
                wait(self.device)
            except Unavailable as reason:
                failure = str(reason)
            except Exception as error:
                failure = describe(error)
                self._end_if_lost(failure)
            progress.trying = None
            progress.save()
            if failure:
                raise Unavailable(failure)
            return provider

        return run

    def _end_if_lost(self, failure: str) -> None:
        """Ends the process if the device no longer works. Its successor leaves this provider out."""
        try:
            wait(self.device)
        except Exception:
            self.progress.blame(failure, self.figures)
            raise SystemExit(f"the device was lost: {failure}") from None


class Section(NamedTuple):
    """A section of a stage.

    Attributes:
        jobs: returns the jobs. seconds: its budget. each: the most seconds that one job may take.
        estimate: seconds of a job on an H100, estimated. processes: number of processes that share the jobs.
    """

    jobs: Callable[[Options], Jobs]
    seconds: float
    each: float
    estimate: float
    processes: int = 1


def work(sections: dict[str, Section], options: Options) -> bool:
    """Runs the jobs that have no figure yet, section by section. Returns whether no figure is wrong."""
    progress, (part, parts) = options.progress, options.share
    right = True
    for number, (name, section) in enumerate(sections.items()):
        began = progress.began.setdefault(name, time.time())
        known = options.figures.read().get(name, {})
        try:
            # The shares rotate from section to section, since many sections have a single job.
            jobs = section.jobs(options._replace(seconds=section.seconds))[(part - number) % parts :: parts]
        except Exception as error:
            traceback.print_exc()
            jobs = [("its jobs", lambda error=error: {"ok": False, "error": describe(error)})]
        for figure, job in jobs:
            if figure in known:
                continue
            if options.mode == "device" and time.time() > began + section.seconds:
                options.figures.add_failure(name, figure, f"not begun: the {section.seconds:g} s were over", ok=None)
                continue
            right &= _run(name, figure, job, section, options)
    progress.complete = True
    progress.save()
    return right


def _run(name: str, figure: str, job: Callable[[], dict], section: Section, options: Options) -> bool:
    """Runs a job and frees its memory. On the stub driver the figure is the number of cache hits and misses."""
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
        values = known | {"ok": False, "error": describe(error)}
    faulthandler.cancel_dump_traceback_later()
    on_stub = options.mode == "stub"
    if on_stub:
        values = (values if raised else {"ok": True}) | (compile_cache.counts - before)
    options.figures.add(name, figure, values, time.monotonic() - start)
    progress.running, progress.finished = None, progress.finished + 1
    progress.save()
    if raised or not on_stub:
        print(f"  {name}: {figure}: {summary(values)}", flush=True)
    if raised and progress.path and options.mode == "device" and not _works(options.device):
        sys.exit(1)  # the next process continues
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return values.get("ok") is not False


def _works(device: torch.device) -> bool:
    """Returns whether a device still works after an error, and no graph capture is left open."""
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
    """Runs one share of the sections' jobs within ``seconds``, in as many processes as it takes.

    ``arch``: of the stub driver's card.
    """
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
            figure = progress.running or (names[max(0, len(progress.began) - 1)], "the remaining jobs")
            figures.add_failure(*figure, f"out of time: ended after {seconds:.0f} s", ok=None)
            return
        if progress.running:  # faulthandler ends a process with status 1
            progress.blame("took too long" if status == 1 else _cause(status), figures)
        elif progress == before:  # it ended before any job, and the next process would do the same
            figures.add_failure(names[0], "its process", _cause(status))
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


def describe(error: BaseException) -> str:
    """Returns an error and its causes in words. A broken CUDA graph capture raises a second error on leaving it."""
    text = f"{type(error).__name__}: {str(error)[:500]}"
    return f"{text}, after {describe(error.__context__)}" if error.__context__ else text


def _cause(status: int) -> str:
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
        others = {k: v for k, v in values.items() if k not in ("ok", "tail") and not isinstance(v, dict)}
        word = {True: "ok", False: "WRONG", None: "not known"}[values["ok"]]
        return " ".join([word, *(f"{k}={short(v)}" for k, v in others.items())])
    return short(values)


def _timed(row: dict) -> str:
    host = " (with the host's)" if row["exposed"] else f" (host {row['host'][1]:.4g})" if row["host"] else ""
    return f"{row['provider']} {row['p50']:.4g} µs{host}"


def short(value: object) -> str:
    """Returns a value in a few words, numbers with four digits."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {short(member)}" for name, member in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
