"""Everything that only a GPU can show, in one command of at most nine minutes on an H100 or H200.

    python bench/gpu.py                        # on an NVIDIA GPU
    python bench/gpu.py --dry-run              # anywhere: the same sections at tiny sizes, interpreted; nothing written
    python bench/gpu.py --only layers steps    # some sections

Timings of the layer, of the optimizer's step and of training steps, one section after the other; then, side by side,
error budgets, repeats, CUDA graphs, tensors beyond 2³¹ elements, memcheck and the test suite. Every section runs in
processes of its own with a budget of seconds: what fails, hangs or takes its process down is reported and the rest goes
on. Writes results/<device>-<date>.json after every section, plots where matplotlib is there, and prints goal / measured
/ verdict. Needs torch, Triton and this package (without a network: pip install --no-deps --no-build-isolation -e .).
"""

import argparse
import asyncio
import datetime
import faulthandler
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from gpu_errors import errors
from gpu_families import families, large
from gpu_goals import Verdict, verdicts
from gpu_graphs import graphs
from gpu_memcheck import memcheck
from gpu_plot import draw
from gpu_repeats import repeats
from gpu_section import Options, Progress, Section, in_processes, run
from gpu_suite import suite
from gpu_timings import layers, small, steps
from gpu_training import training

import lora_fast

HERE = Path(__file__).resolve().parent
MINUTES = 9
REST = 60 * MINUTES  # what the timed sections leave
SECTIONS = {
    "layers": Section(layers, 170, 60, alone=True),
    "steps": Section(steps, 70, 40, alone=True),
    "small": Section(small, 50, 30, alone=True),
    "training": Section(training, 70, 70, alone=True),
    "errors": Section(errors, REST, 60),
    "repeats": Section(repeats, REST, 60),
    "graphs": Section(graphs, REST, 40),
    "large": Section(large, REST, 90),
    "memcheck": Section(memcheck, REST, REST),
    "suite": Section(suite, REST, REST),
}
HIDDEN = {"families": Section(families, REST, REST)}  # run by memcheck


class Run:
    """One run of the program: its results, and where they are kept."""

    def __init__(self, names: list[str], dry_run: bool, folder: Path):
        self.names, self.dry_run = names, dry_run
        self.results: dict = {"conditions": conditions()}
        device = re.sub(r"[^A-Za-z0-9]+", "-", self.results["conditions"]["device"]).strip("-").lower()
        self.path = folder / f"{device}-{self.results['conditions']['date']}.json"
        self.end = time.monotonic() + 60 * MINUTES

    async def all_sections(self) -> None:
        cores = os.cpu_count() or 1
        self.turns = asyncio.Semaphore(1 if self.dry_run else max(1, cores // 2))
        with tempfile.TemporaryDirectory() as folder:
            for name in self.names:
                if SECTIONS[name].alone:
                    await self.section(name, Path(folder))
            async with asyncio.TaskGroup() as checks:
                for name in self.names:
                    if not SECTIONS[name].alone:
                        checks.create_task(self.section(name, Path(folder)))

    async def section(self, name: str, folder: Path) -> None:
        async with self.turns:
            section = SECTIONS[name]
            seconds = 600 if self.dry_run else min(section.seconds, self.end - time.monotonic())
            print(f"── {name}: {section.jobs.__doc__.splitlines()[0]}", flush=True)
            if seconds < 1:
                found = {"figures": {}, "error": f"not begun: {MINUTES} minutes were over"}
            else:
                arguments = ["--dry-run"] if self.dry_run else []
                found = await in_processes(name, section, seconds, folder, arguments)
                print(f"  {name}: {found['seconds']} s", flush=True)
            self.results[name] = found
            self.results["verdicts"] = [row._asdict() for row in verdicts(self.results)]
            if not self.dry_run:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(self.results, indent=1))

    def tell(self) -> str:
        """Prints the table and where it is kept. Returns the names of sections that are unfinished or wrong."""
        print(f"\n{show(verdicts(self.results))}\n")
        unfinished = {name: self.results[name]["error"] for name in self.names if "error" in self.results[name]}
        for name, error in unfinished.items():
            print(f"{name}: {error}")
        if self.dry_run:
            print("A dry run: the sections work; no figure above means anything.")
        else:
            print(f"written: {self.path}\n{draw(self.results, self.path.with_suffix('.png'))}")
        wrong = [n for n in self.names for f in self.results[n]["figures"].values() if f.get("ok") is False]
        return ", ".join(dict.fromkeys([*unfinished, *wrong]))


def conditions() -> dict:
    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
        except FileNotFoundError:
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    import triton

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "lora_fast": lora_fast.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output("git", "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def show(found: list[Verdict]) -> str:
    width = [max(len(row[k]) for row in (*found, Verdict._fields)) for k in range(4)]
    lines = (Verdict._fields, *found)
    return "\n".join("  ".join(word.ljust(n) for word, n in zip(row, width, strict=True)).rstrip() for row in lines)


def one_section(name: str, dry_run: bool, seconds: float, path: Path | None) -> bool:
    """In this process; whether nothing is wrong."""
    faulthandler.enable()
    device = torch.device("cpu" if dry_run else "cuda")
    options = Options(dry_run, device, seconds, Progress.of(path) if path else Progress())
    return run(name, {**SECTIONS, **HIDDEN}[name], options, again=path is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no figure means anything, nothing written")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the JSON and the plots")
    parser.add_argument("--section", choices=[*SECTIONS, *HIDDEN], help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        parser.error("no CUDA device: use --dry-run, or run this on a machine with an NVIDIA GPU")
    if options.section:
        sys.exit(not one_section(options.section, options.dry_run, options.seconds, options.json))
    whole = Run(options.only, options.dry_run, options.results)
    asyncio.run(whole.all_sections())
    trouble = whole.tell()
    sys.exit(f"unfinished or wrong: {trouble}" if trouble else 0)


if __name__ == "__main__":
    main()
