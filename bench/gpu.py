"""Measures what only a GPU can show, in two commands of at most 210 and 400 seconds (made for an H100 with 16 cores).

    python bench/gpu.py --plan --stage 1                  # lists the sections and the estimated times
    python bench/gpu.py --stage 1 --out results-1         # checks the ops; times GEMM, layer and step
    python bench/gpu.py --stage 2 --out results-2         # tests, memcheck, shapes and ranks, Llama-3-8B, torch.compile
    python bench/gpu.py --only layers steps --out DIR     # some sections of either stage
    python bench/gpu.py --dry-run --stage 1               # without a GPU; its figures mean nothing
    python bench/gpu.py --fill-cache build/gpu-cache.tar.xz    # compiles the kernels of both stages, without a GPU

Every figure is written as a line of JSON to DIR/stage1.jsonl (stage2, only) as soon as it is known. At the end the
goals, the measured values, the verdicts and the failures are printed and written to DIR/stage1.txt, beside a picture
and an archive of the newly compiled kernels. Sections run in processes of their own with a time budget each: a job that
fails, hangs or ends its process is reported, and the other jobs go on. A stage ends by itself when its time is over.

An archive of compiled kernels (--cache, by default build/gpu-cache.tar.xz if it exists) saves compilation on the GPU
machine. It must be filled with the Triton of that machine: make gpu-cache TRITON=3.6.0.

Requires torch, Triton and this package (without a network: pip install --no-deps --no-build-isolation -e .). PEFT,
transformers, pytest with pytest-xdist, matplotlib, compute-sanitizer and ncu are used if they are installed.
"""

import argparse
import asyncio
import contextlib
import ctypes
import datetime
import faulthandler
import importlib
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

if "--dry-run" in sys.argv or "--mode interpreter" in " ".join(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch

import lora_fast
from gpu_sections import compile_cache
from gpu_sections.goals import Verdict, verdicts
from gpu_sections.plot import draw
from gpu_sections.section import MODES, Figures, Options, Progress, describe, in_processes, short, work
from gpu_sections.section import summary as summarize_figure
from gpu_sections.stages import COMPILERS, END, SECTIONS, STAGES, START, WATCHED, WITH_MODELS, Stage, estimate, stage_of
from lora_fast.kernels import tiles
from lora_fast.kernels.device import CARDS
from lora_fast.measure.machine import package_version

HERE = Path(__file__).resolve().parent
DEFAULT_CACHE = HERE.parent / "build" / "gpu-cache.tar.xz"
MOST_PRINTED, MOST_OF_A_FAILURE, MOST_OF_A_SECTION = 11_000, 200, 4  # characters, characters, lines
PR_SET_PDEATHSIG = 1  # an option of Linux's prctl
MOST_CARRIED, MOST_RETURNED = 40, 16  # MiB of the archive that is filled, and of the one that a run writes


class Run:
    """A run of a stage, or of some sections, and the file of its figures. ``seconds``: since the process started."""

    def __init__(self, name: str, stage: Stage, out: Path, seconds: float = 0.0):
        self.name, self.stage, self.out = name, stage, out
        self.end = time.monotonic() + stage.seconds - seconds
        self.right = False
        out.mkdir(parents=True, exist_ok=True)
        self.figures = Figures(out / f"{name}.jsonl")
        self.figures.add("conditions", "machine", conditions())

    @property
    def left(self) -> float:
        """The remaining seconds, without those reserved for the end."""
        return self.end - END - time.monotonic()

    def on_device(self, archives: list[Path]) -> None:
        """Compiles and measures the stage, reports it, and packs the newly compiled kernels."""
        with tempfile.TemporaryDirectory(prefix="lora-fast-gpu-", ignore_cleanup_errors=True) as folder:
            cache = Path(folder) / "triton"
            os.environ |= compile_cache.environment(cache)
            carried = self._unpack(archives, cache)
            before = compile_cache.entries(cache)
            try:
                asyncio.run(self._compile(Path(folder), carried))
                asyncio.run(self._measure(Path(folder)))
            finally:
                self.right = self.report()
            new = compile_cache.entries(cache) - before
            archive, seconds = self.out / f"{self.name}-cache.tar.xz", self.left + END - 3
            left = compile_cache.pack(cache, new, archive, MOST_RETURNED, preset=1, seconds=seconds)
            packed, unpacked = (sum(name.endswith(".cubin") for name in names) for names in (new - set(left), left))
            self.figures.add("compile", "new kernels", {"packed": packed, "no room": unpacked})

    def _unpack(self, archives: list[Path], cache: Path) -> dict[str, int]:
        """Fills the cache from the archives. An unreadable archive is reported and skipped."""
        carried = {"carried": 0, "of another Triton": 0}
        for archive in archives:
            try:
                usable, others = compile_cache.unpack(archive, cache)
            except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, ValueError, KeyError) as error:
                self.figures.add_failure("compile", archive.name, f"cannot be read: {describe(error)}", ok=None)
                print(f"{archive} cannot be read: {error}", flush=True)
                continue
            carried["carried"] += usable
            carried["of another Triton"] += others
        return carried

    async def _compile(self, folder: Path, carried: dict[str, int]) -> None:
        """Runs the sections at real sizes on a stub driver, which fills the cache with their kernels.

        Meanwhile another process reads the files of large packages, so that later imports find them in memory.
        """
        print(f"── compile: kernels {short(carried)}", flush=True)
        command = [sys.executable, "-c", "import peft, transformers.models.llama.modeling_llama"]
        reading = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        start, figures, arch = time.monotonic(), Figures(folder / "compile.jsonl"), arch_of_gpu()
        if arch in CARDS:
            seconds = min(self.stage.compile, self.left)
            await compile_all(self.stage.sections, COMPILERS, seconds, figures, folder, arch)
        else:
            print(f"  compile: sm_{arch} is not a known card, so kernels are compiled when they are needed", flush=True)
        counts = compiled(figures) | carried
        counts["ok"] = counts["ok"] or None  # a launch that fails here will fail again in its section
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reading.wait(), 5)
        self.figures.add("compile", "kernels", counts, time.monotonic() - start)
        print(f"  compile: {short(counts)}", flush=True)

    async def _measure(self, folder: Path) -> None:
        for phase in self.stage.phases:
            seconds = min(phase.seconds, self.left)
            for name in (name for lane in phase.lanes for name in lane):
                print(f"── {name}: {what(name)}", flush=True)
            async with asyncio.TaskGroup() as side_by_side:
                for lane in phase.lanes:
                    processes = max(SECTIONS[name].processes for name in lane)
                    for part in range(processes):
                        share = (part, processes)
                        run = in_processes(list(lane), share, "device", seconds, self.figures, folder)
                        side_by_side.create_task(run)

    def report(self) -> bool:
        """Prints the table and the failures and writes them. Returns whether all is measured and nothing is wrong."""
        figures = self.figures.read()
        text = report(figures, self.stage.sections, self.figures.seconds())
        complete = all(figures.get(section) for section in self.stage.sections)
        (self.out / f"{self.name}.txt").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\nfigures: {self.figures.path}", flush=True)
        print(draw(figures, self.out / f"{self.name}.png"), flush=True)
        return complete and not wrong(figures)


async def compile_all(
    names: list[str],
    processes: int,
    seconds: float,
    figures: Figures,
    folder: Path,
    arch: int = compile_cache.ARCH,
) -> None:
    """Runs the sections on the stub driver, in some processes. Prints the progress."""
    shares = [(part, processes) for part in range(processes)]
    workers = [in_processes(names, share, "stub", seconds, figures, folder, arch) for share in shares]
    running, start = {asyncio.create_task(worker) for worker in workers}, time.monotonic()
    while running:
        ended, running = await asyncio.wait(running, timeout=compile_cache.EVERY)
        for task in ended:
            task.result()
        if running and not ended:
            counts = compiled(figures)
            print(
                f"  {time.monotonic() - start:.0f} s: {counts['misses']} compiled, {counts['hits']} in the cache",
                flush=True,
            )


def compiled(figures: Figures) -> dict:
    """Returns the cache hits, misses and failures of the jobs on the stub driver."""
    sections = figures.read()
    jobs = [values for section in sections.values() for values in section.values()]
    counts = {name: sum(values.get(name, 0) for values in jobs) for name in ("hits", "misses")}
    failures = [f"{section}: {figure}: {values['error']}" for section, figure, values in wrong(sections)]
    unfinished = any(values.get("ok") is None for values in jobs)
    return {"ok": False if failures else None if unfinished else True, **counts, "failures": failures[:20]}


# ---- The report


def report(figures: dict, sections: list[str], seconds: dict[str, float]) -> str:
    """Returns the machine, the table of goals, the summary and some times, in at most ``MOST_PRINTED`` characters."""
    parts = [machine(figures), table(verdicts(figures, sections)), summary(figures, sections, seconds), times(figures)]
    text = "\n".join(filter(None, parts))
    return text if len(text) <= MOST_PRINTED else text[: MOST_PRINTED - 30] + "\n… see the files in DIR"


def machine(figures: dict) -> str:
    """Returns the device, the versions and the ceilings in one line."""
    where, limits = figures.get("conditions", {}).get("machine", {}), figures.get("ceilings", {}).get("bfloat16", {})
    words = [where.get("device", "an unknown device")]
    words += [f"{name} {where[name]}" for name in ("driver", "torch", "triton") if name in where]
    if limits.get("bandwidth"):
        words.append(f"copy {limits['bandwidth'] / 1e12:.2f} TB/s, cuBLAS {limits['operations'] / 1e12:.0f} TFLOP/s")
    return ", ".join(words)


def times(figures: dict) -> str:
    """Returns a line with the times of each figure that has a goal: the layers, the steps and the inverses."""
    chosen = [
        (name, values)
        for section in ("layers", "steps", "inverses")
        for name, values in figures.get(section, {}).items()
        if values.get("rows")
    ]
    return "\n".join(f"{name}: {summarize_figure(values)}"[:330] for name, values in chosen)


def summary(figures: dict, sections: list[str], seconds: dict[str, float]) -> str:
    """Returns a line for each section, then some failures and some unknown figures of each section."""
    lines = [f"{name}: {len(figures.get(name, {}))} figures in {seconds.get(name, 0.0):.0f} s" for name in sections]
    for word, ok in (("failures", False), ("not known", None)):
        chosen = {
            section: [(name, values) for name, values in members.items() if values.get("ok", True) is ok]
            for section, members in figures.items()
        }
        lines.append(f"{word}: {sum(map(len, chosen.values()))}")
        for section, members in chosen.items():
            texts = [f"{section}: {name}: {values.get('error') or short(values)}" for name, values in members]
            lines += [text[:MOST_OF_A_FAILURE] for text in texts[:MOST_OF_A_SECTION]]
            lines += [f"{section}: and {len(texts) - MOST_OF_A_SECTION} more"] * (len(texts) > MOST_OF_A_SECTION)
    return "\n".join(lines)


def arch_of_gpu() -> int:
    """Returns the compute capability as one number, or that of the archive where there is no GPU."""
    if not torch.cuda.is_available():
        return compile_cache.ARCH
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def seconds_so_far() -> float:
    """Returns the seconds since this process started, the import of torch included."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds between the boot and the start of the process
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def wrong(figures: dict) -> list[tuple[str, str, dict]]:
    """Returns (section, figure, values) of every figure whose "ok" is False."""
    return [
        (section, name, values)
        for section, members in figures.items()
        for name, values in members.items()
        if values.get("ok") is False
    ]


def table(rows: list[Verdict]) -> str:
    return aligned([Verdict._fields, *rows])


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Returns rows of words as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def conditions() -> dict:
    """Returns the device, its state, and the versions of all programs that matter for the figures."""

    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=5)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptxas = os.environ.get("TRITON_PTXAS_PATH", str(bundled))
    cuda = torch.cuda.is_available()
    state = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "state": output("nvidia-smi", f"--query-gpu={state}", "--format=csv,noheader").split("\n")[0],
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count if cuda else 0,
        "cores": os.cpu_count(),
        "lora_fast": lora_fast.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": (re.search(r"V([\d.]+)", output(ptxas, "--version")) or ["", "unknown"])[1],
        "python": sys.version.split()[0],
        **{package: package_version(package) for package in ("numpy", "peft", "transformers")},
        "commit": output("git", "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


# ---- Without a GPU


def plan(name: str, stage: Stage) -> str:
    """Returns a table of each section's figures, estimate and budget, and their sums."""
    sketch = Options("device", torch.device("cpu"), Figures(Path(os.devnull)), Progress())
    lines = [f"{name} ends after {stage.seconds:g} s at most. Estimates: an H100 with 16 cores, none of them measured."]
    head = ("section", "figures", "processes", "estimate", "budget", "")
    rows = [
        ("compile", "", str(COMPILERS), f"{START + 6:.0f} s", f"{stage.compile:g} s", "if the archive has all kernels")
    ]
    total = START + 6
    for phase in stage.phases:
        longest = 0.0
        for lane in phase.lanes:
            spent = START
            for section in lane:
                with tiles.assume(arch=compile_cache.ARCH):
                    count = len(SECTIONS[section].jobs(sketch))
                spent += estimate(section, count)
                processes, budget = SECTIONS[section].processes, SECTIONS[section].seconds
                times = f"{estimate(section, count):.0f} s", f"{budget:g} s"
                rows.append((section, str(count), str(processes), *times, what(section)))
            longest = max(longest, spent)
        rows.append(
            ("", "", "", f"{longest:.0f} s", f"{phase.seconds:g} s", "the longest lane, with the start of its process")
        )
        total += longest
    rows.append(("end", "", "", "4 s", f"{END:g} s", "archive, picture, report"))
    budgets = stage.compile + sum(phase.seconds for phase in stage.phases) + END
    rows.append(("in all", "", "", f"{total + 4:.0f} s", f"{budgets:g} s", ""))
    return "\n".join([*lines, aligned([head, *rows])])


def what(section: str) -> str:
    """Returns the description of a section, the first line of its docstring."""
    return SECTIONS[section].jobs.__doc__.splitlines()[0]


def dry_run(names: list[str], out: Path | None) -> bool:
    """Runs the sections at tiny sizes in the interpreter, then at their own sizes on the stub driver."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Figures((out or Path(folder)) / "dry-run.jsonl")
        figures.path.parent.mkdir(parents=True, exist_ok=True)
        figures.path.unlink(missing_ok=True)
        print("── in Triton's interpreter, at tiny sizes", flush=True)
        options = Options("interpreter", torch.device("cpu"), figures, Progress())
        right = work({name: SECTIONS[name] for name in names}, options)
        print("── on the stub driver, which computes nothing, at real sizes", flush=True)
        os.environ.pop("TRITON_INTERPRET")
        on_stub = Figures(Path(folder) / "stub.jsonl")
        asyncio.run(compile_all(names, os.cpu_count() or 1, 3600, on_stub, Path(folder)))
        counts = compiled(on_stub)
        print(f"\n{summary(figures.read(), names, figures.seconds())}\non the stub driver: {short(counts)}")
        print("This was a dry run: it shows that the sections run. Its figures mean nothing.")
        return right and counts["ok"] is True


def fill_cache(archive: Path) -> bool:
    """Compiles the kernels of both stages for sm_90, and those of the tests as far as they run on the stub driver."""
    import triton

    print(f"compiling for sm_{compile_cache.ARCH} with Triton {triton.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "triton"
        os.environ |= compile_cache.environment(cache)
        figures = Figures(Path(folder) / "compile.jsonl")
        names = list(dict.fromkeys(STAGES[1].sections + STAGES[2].sections))
        asyncio.run(compile_all(names, os.cpu_count() or 1, 3 * 3600, figures, Path(folder)))
        counts = compiled(figures)
        compile_cache.compile_tests(os.cpu_count() or 1)
        # Triton's launchers (.so) are libraries for one version of Python, and are quickly compiled
        files = {name for name in compile_cache.entries(cache) if not name.endswith(".so")}
        left = compile_cache.pack(cache, files, archive, MOST_CARRIED)
        size = archive.stat().st_size / compile_cache.MEBIBYTE
        print(f"{archive}: {len(files) - len(left)} files, {size:.1f} MiB; {short(counts)}")
        if left:
            print(f"{len(left)} files did not fit in {MOST_CARRIED} MiB")
        return counts["ok"] is True and not left


# ---- The command


def one_share(options: argparse.Namespace) -> bool:
    """Runs this process's share of some sections. The process is killed when its parent ends."""
    faulthandler.enable()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    device = torch.device("cuda" if options.mode == "device" else "cpu")
    part, parts = map(int, options.share.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        figures = Figures(options.figures or Path(folder) / "figures.jsonl")
        progress = Progress.of(options.progress) if options.progress else Progress()
        compile_cache.use()
        if options.mode == "stub":
            compile_cache.on_stub_driver()
        if options.mode == "device" and set(options.work) & set(WITH_MODELS):
            for package in ("peft", "transformers.models.llama.modeling_llama"):
                with contextlib.suppress(ImportError):  # providers that need it raise Unavailable
                    importlib.import_module(package)
        sections = {name: (SECTIONS | WATCHED)[name] for name in options.work}
        return work(sections, Options(options.mode, device, figures, progress, share=(part, parts)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", type=int, choices=STAGES, help="the stage to run")
    parser.add_argument(
        "--only", nargs="+", metavar="SECTION", help=f"the sections to run: some of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the figures, report, picture and archive")
    parser.add_argument("--cache", type=Path, nargs="*", metavar="FILE", help="archives of compiled kernels to use")
    parser.add_argument("--plan", action="store_true", help="print the sections and their estimated times")
    parser.add_argument(
        "--dry-run", action="store_true", help="run tiny sizes interpreted, and real sizes on a stub driver"
    )
    parser.add_argument(
        "--fill-cache", type=Path, metavar="FILE", help="compile the kernels of both stages for sm_90 into an archive"
    )
    parser.add_argument("--work", nargs="+", choices=[*SECTIONS, *WATCHED], help=argparse.SUPPRESS)  # internal
    parser.add_argument("--mode", choices=MODES, default="device", help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        sys.exit(not one_share(options))
    if unknown := [name for name in options.only or () if name not in SECTIONS]:
        parser.error(f"--only: expected some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if options.fill_cache:
        sys.exit(not fill_cache(options.fill_cache))
    if (options.stage is None) == (options.only is None):
        parser.error("expected either a stage (--stage 1, --stage 2) or sections (--only …)")
    name = f"stage{options.stage}" if options.stage else "only"
    stage = STAGES[options.stage] if options.stage else stage_of(options.only)
    if options.plan:
        print(plan(name, stage))
        return
    if options.dry_run:
        sys.exit(not dry_run(stage.sections, options.out))
    if options.out is None:
        parser.error("--out DIR: expected a folder for the figures")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.glob(f"{name}*"))):
        parser.error(f"--out {options.out}: expected a folder without results of {name}")
    archives = options.cache if options.cache is not None else [DEFAULT_CACHE] * DEFAULT_CACHE.exists()
    if missing := [str(archive) for archive in archives if not archive.is_file()]:
        parser.error(f"--cache: no such file: {', '.join(missing)}")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, so the kernels would not run on the GPU")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: use --dry-run, or run this on a machine with an NVIDIA GPU")
    run = Run(name, stage, options.out, seconds_so_far())
    run.on_device(archives)
    sys.exit(0 if run.right else "a figure is wrong or was not measured: see above")


if __name__ == "__main__":
    main()
