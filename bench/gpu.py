"""Measures what only a GPU can show, in two commands of at most 210 and 400 seconds (made for an H100, 16 cores).

    python bench/gpu.py --plan --stage 1                  # what it will do, and how long that should take
    python bench/gpu.py --stage 1 --out results-1         # are the ops right, what do GEMM, layer and step cost?
    python bench/gpu.py --stage 2 --out results-2         # tests, memcheck, shapes and ranks, Llama-3-8B, torch.compile
    python bench/gpu.py --only layers steps --out DIR     # some sections of either
    python bench/gpu.py --dry-run --stage 1               # without a GPU; no figure means anything
    python bench/gpu.py --fill-cache build/gpu-cache.tar.xz    # compiles, without a GPU, what both stages launch

Every figure is a line of JSON in DIR/stage1.jsonl (stage2, only) the moment it is known. The end prints goal, measured
and verdict, and each failure; DIR/stage1.txt keeps that, a picture and an archive of what was compiled are beside it.
Sections run in processes of their own with budgets of seconds: what fails, hangs or takes its process down is reported
and the rest goes on. A stage ends by itself when its time is over.

With an archive of compiled kernels (--cache, by default build/gpu-cache.tar.xz if it is there) less is compiled on the
GPU's time. It has to be filled with the Triton of the GPU machine: make gpu-cache TRITON=3.6.0.

Needs torch, Triton and this package (without a network: pip install --no-deps --no-build-isolation -e .). PEFT,
transformers, pytest with pytest-xdist, matplotlib, compute-sanitizer and ncu are used where they are installed.
"""

import argparse
import asyncio
import contextlib
import ctypes
import datetime
import faulthandler
import importlib
import importlib.metadata
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
from gpu_sections.section import MODES, Figures, Options, Progress, in_processes, of_chain, short, work
from gpu_sections.section import summary as of_figure
from gpu_sections.stages import COMPILERS, END, SECTIONS, STAGES, START, WATCHED, WITH_MODELS, Stage, estimate, some
from lora_fast.kernels import tiles
from lora_fast.kernels.device import CARDS

HERE = Path(__file__).resolve().parent
CARRIED = HERE.parent / "build" / "gpu-cache.tar.xz"
MOST_PRINTED, MOST_OF_A_FAILURE, MOST_OF_A_SECTION = 11_000, 200, 4  # characters, characters, lines
PR_SET_PDEATHSIG = 1  # of Linux's prctl
MOST_CARRIED, MOST_RETURNED = 40, 16  # MiB


class Run:
    """One run of a stage, or of some sections: its figures, and where they are kept. ``seconds``: since it began."""

    def __init__(self, name: str, stage: Stage, out: Path, seconds: float = 0.0):
        self.name, self.stage, self.out = name, stage, out
        self.end = time.monotonic() + stage.seconds - seconds
        self.right = False
        out.mkdir(parents=True, exist_ok=True)
        self.figures = Figures(out / f"{name}.jsonl")
        self.figures.add("conditions", "machine", conditions())

    @property
    def left(self) -> float:
        """Returns the seconds that are left, without those for the end."""
        return self.end - END - time.monotonic()

    def on_device(self, archives: list[Path]) -> None:
        with tempfile.TemporaryDirectory(prefix="lora-fast-gpu-", ignore_cleanup_errors=True) as folder:
            cache = Path(folder) / "triton"
            os.environ |= compile_cache.environment(cache)
            carried = self._unpack(archives, cache)
            before = compile_cache.entries(cache)
            try:
                asyncio.run(self._compile(Path(folder), carried))
                asyncio.run(self._measure(Path(folder)))
            finally:
                self.right = self.tell()
            new = compile_cache.entries(cache) - before
            archive, seconds = self.out / f"{self.name}-cache.tar.xz", self.left + END - 3
            left = compile_cache.pack(cache, new, archive, MOST_RETURNED, preset=1, seconds=seconds)
            kernels = lambda names: sum(name.endswith(".cubin") for name in names)
            self.figures.add(
                "compile", "new kernels", {"packed": kernels(new) - kernels(left), "no room": kernels(left)}
            )

    def _unpack(self, archives: list[Path], cache: Path) -> dict[str, int]:
        """Fills the cache from the archives. One that cannot be read is told and left."""
        carried = {"carried": 0, "of another Triton": 0}
        for archive in archives:
            try:
                usable, others = compile_cache.unpack(archive, cache)
            except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, ValueError, KeyError) as error:
                self.figures.add_failure("compile", archive.name, f"cannot be read: {of_chain(error)}", ok=None)
                print(f"{archive} cannot be read: {error}", flush=True)
                continue
            carried["carried"] += usable
            carried["of another Triton"] += others
        return carried

    async def _compile(self, folder: Path, carried: dict[str, int]) -> None:
        """Makes the sections' launches, at real sizes, on a stub driver, so that they are in the cache afterwards.
        Meanwhile the files of large packages come into memory."""
        print(f"── compile: kernels {short(carried)}", flush=True)
        command = [sys.executable, "-c", "import peft, transformers.models.llama.modeling_llama"]
        reading = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        start, figures, arch = time.monotonic(), Figures(folder / "compile.jsonl"), arch_of_gpu()
        if arch in CARDS:
            seconds = min(self.stage.compile, self.left)
            await compile_all(self.stage.sections, COMPILERS, seconds, figures, folder, arch)
        else:
            print(f"  compile: no card is known for sm_{arch}: kernels are compiled where they are needed", flush=True)
        found = compiled(figures) | carried
        found["ok"] = found["ok"] or None  # the sections themselves will show what does not launch
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reading.wait(), 5)
        self.figures.add("compile", "kernels", found, time.monotonic() - start)
        print(f"  compile: {short(found)}", flush=True)

    async def _measure(self, folder: Path) -> None:
        for phase in self.stage.phases:
            seconds = min(phase.seconds, self.left)
            for name in (name for lane in phase.lanes for name in lane):
                print(f"── {name}: {what(name)}", flush=True)
            async with asyncio.TaskGroup() as side_by_side:
                for lane in phase.lanes:
                    processes = max(SECTIONS[name].processes for name in lane)
                    for part in range(processes):
                        lane_of = in_processes(list(lane), (part, processes), "device", seconds, self.figures, folder)
                        side_by_side.create_task(lane_of)

    def tell(self) -> bool:
        """Prints the table and the failures, and keeps them. Returns whether nothing is wrong."""
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
    """Makes the sections' launches on the stub driver, in some processes. Prints how far it has come."""
    shares = [(part, processes) for part in range(processes)]
    workers = [in_processes(names, share, "stub", seconds, figures, folder, arch) for share in shares]
    running, start = {asyncio.create_task(worker) for worker in workers}, time.monotonic()
    while running:
        ended, running = await asyncio.wait(running, timeout=compile_cache.EVERY)
        for task in ended:
            task.result()
        if running and not ended:
            found = compiled(figures)
            print(f"  {time.monotonic() - start:.0f} s: {found['misses']} compiled, {found['hits']} found", flush=True)


def compiled(figures: Figures) -> dict:
    """Returns the hits, misses and failures of what was compiled."""
    jobs = [values for section in figures.read().values() for values in section.values()]
    counts = {name: sum(values.get(name, 0) for values in jobs) for name in ("hits", "misses")}
    failures = [f"{section}: {figure}: {values['error']}" for section, of in figures.read().items()
                for figure, values in of.items() if values.get("ok") is False]  # fmt: skip
    unfinished = any(values.get("ok") is None for values in jobs)
    return {"ok": False if failures else None if unfinished else True, **counts, "failures": failures[:20]}


# ---- The report


def report(figures: dict, sections: list[str], seconds: dict[str, float]) -> str:
    """Returns the machine, goal, measured and verdict, the summary, and some times, in at most ``MOST_PRINTED``
    characters."""
    parts = [machine(figures), table(verdicts(figures, sections)), summary(figures, sections, seconds), times(figures)]
    text = "\n".join(filter(None, parts))
    return text if len(text) <= MOST_PRINTED else text[: MOST_PRINTED - 30] + "\n… the rest is in DIR"


def machine(figures: dict) -> str:
    """Returns what was measured on, and what it reaches."""
    where, limits = figures.get("conditions", {}).get("machine", {}), figures.get("ceilings", {}).get("bfloat16", {})
    words = [where.get("device", "an unknown device")]
    words += [f"{name} {where[name]}" for name in ("driver", "torch", "triton") if name in where]
    if limits.get("bandwidth"):
        words.append(f"copy {limits['bandwidth'] / 1e12:.2f} TB/s, cuBLAS {limits['operations'] / 1e12:.0f} TFLOP/s")
    return ", ".join(words)


def times(figures: dict) -> str:
    """Returns the times of the layers and steps that the goals are about, a line for each."""
    chosen = [(name, values) for section in ("layers", "steps", "inverses") for name, values in
              figures.get(section, {}).items() if values.get("rows")]  # fmt: skip
    return "\n".join(f"{name}: {of_figure(values)}"[:330] for name, values in chosen)


def summary(figures: dict, sections: list[str], seconds: dict[str, float]) -> str:
    """Returns a line for each section, then failures and what is not known, some of each section."""
    lines = [f"{name}: {len(figures.get(name, {}))} figures in {seconds.get(name, 0.0):.0f} s" for name in sections]
    for word, ok in (("failures", False), ("not known", None)):
        chosen = {
            section: [(name, values) for name, values in of.items() if values.get("ok", True) is ok]
            for section, of in figures.items()
        }
        lines.append(f"{word}: {sum(map(len, chosen.values()))}")
        for section, members in chosen.items():
            told = [f"{section}: {name}: {values.get('error') or short(values)}" for name, values in members]
            lines += [line[:MOST_OF_A_FAILURE] for line in told[:MOST_OF_A_SECTION]]
            lines += [f"{section}: and {len(told) - MOST_OF_A_SECTION} more"] * (len(told) > MOST_OF_A_SECTION)
    return "\n".join(lines)


def arch_of_gpu() -> int:
    """Returns the compute capability as one number; that of the carried kernels where there is no GPU."""
    if not torch.cuda.is_available():
        return compile_cache.ARCH
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def seconds_so_far() -> float:
    """Returns the seconds since this process began. The import of torch counts, too."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine's start
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def wrong(figures: dict) -> list[tuple[str, str, dict]]:
    return [(section, name, values) for section, of in figures.items() for name, values in of.items()
            if values.get("ok") is False]  # fmt: skip


def table(found: list[Verdict]) -> str:
    width = [max(len(row[k]) for row in (*found, Verdict._fields)) for k in range(4)]
    lines = (Verdict._fields, *found)
    return "\n".join("  ".join(word.ljust(n) for word, n in zip(row, width, strict=True)).rstrip() for row in lines)


def conditions() -> dict:
    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=5)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

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
        **{package: version(package) for package in ("numpy", "peft", "transformers")},
        "commit": output("git", "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


# ---- Without a GPU


def plan(name: str, stage: Stage) -> str:
    """Returns each section's figures, estimate and budget, and their sums."""
    sketch = Options("device", torch.device("cpu"), Figures(Path(os.devnull)), Progress())
    lines = [f"{name} ends after {stage.seconds:g} s at most. Estimates: an H100 with 16 cores, none of them measured."]
    head = ("section", "figures", "processes", "estimate", "budget", "")
    rows = [
        ("compile", "", str(COMPILERS), f"{START + 6:.0f} s", f"{stage.compile:g} s", "if all kernels were carried")
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
                told = f"{estimate(section, count):.0f} s", f"{budget:g} s", what(section)
                rows.append((section, str(count), str(processes), *told))
            longest = max(longest, spent)
        rows.append(
            ("", "", "", f"{longest:.0f} s", f"{phase.seconds:g} s", "the longest of these, with its process's start")
        )
        total += longest
    rows.append(("end", "", "", "4 s", f"{END:g} s", "archive, picture, report"))
    budgets = stage.compile + sum(phase.seconds for phase in stage.phases) + END
    rows.append(("in all", "", "", f"{total + 4:.0f} s", f"{budgets:g} s", ""))
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(6)]
    return "\n".join([*lines, *("  ".join(w.ljust(n) for w, n in zip(row, widths, strict=True)).rstrip()
                                for row in (head, *rows))])  # fmt: skip


def what(section: str) -> str:
    """Returns what a section does: the first line of its docstring."""
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
        found = compiled(on_stub)
        print(f"\n{summary(figures.read(), names, figures.seconds())}\non the stub driver: {short(found)}")
        print("A dry run: the sections work; no figure above means anything.")
        return right and found["ok"] is True


def fill_cache(archive: Path) -> bool:
    """Compiles what both stages launch, and what the tests launch as far as they come without values, for sm_90."""
    import triton

    print(f"compiling for sm_{compile_cache.ARCH} with Triton {triton.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "triton"
        os.environ |= compile_cache.environment(cache)
        figures, names = Figures(Path(folder) / "compile.jsonl"), list(dict.fromkeys(
            STAGES[1].sections + STAGES[2].sections
        ))  # fmt: skip
        asyncio.run(compile_all(names, os.cpu_count() or 1, 3 * 3600, figures, Path(folder)))
        found = compiled(figures)
        compile_cache.compile_tests(os.cpu_count() or 1)
        # Triton's launchers are libraries for one version of Python, and quickly made.
        files = {name for name in compile_cache.entries(cache) if not name.endswith(".so")}
        left = compile_cache.pack(cache, files, archive, MOST_CARRIED)
        size = archive.stat().st_size / compile_cache.MEBIBYTE
        print(f"{archive}: {len(files) - len(left)} files, {size:.1f} MiB; {short(found)}")
        if left:
            print(f"{len(left)} files had no room in {MOST_CARRIED} MiB")
        return found["ok"] is True and not left


# ---- The command


def one_share(options: argparse.Namespace) -> bool:
    """Does the work of one process, which does not outlive its parent."""
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
                with contextlib.suppress(ImportError):  # a provider that needs it says so
                    importlib.import_module(package)
        sections = {name: (SECTIONS | WATCHED)[name] for name in options.work}
        return work(sections, Options(options.mode, device, figures, progress, share=(part, parts)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", type=int, choices=STAGES, help="which of the two")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for figures, report, picture, archive")
    parser.add_argument("--cache", type=Path, nargs="*", metavar="FILE", help="archives of compiled kernels")
    parser.add_argument("--plan", action="store_true", help="print what would run and how long it should take")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes interpreted, real sizes on a stub driver")
    parser.add_argument("--fill-cache", type=Path, metavar="FILE", help="compile what both stages launch, for sm_90")
    parser.add_argument("--work", nargs="+", choices=[*SECTIONS, *WATCHED], help=argparse.SUPPRESS)  # of one process
    parser.add_argument("--mode", choices=MODES, default="device", help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        sys.exit(not one_share(options))
    if unknown := [name for name in options.only or () if name not in SECTIONS]:
        parser.error(f"--only: {', '.join(unknown)}: no section; there are {', '.join(SECTIONS)}")
    if options.fill_cache:
        sys.exit(not fill_cache(options.fill_cache))
    if (options.stage is None) == (options.only is None):
        parser.error("name a stage (--stage 1, --stage 2) or sections (--only …)")
    name = f"stage{options.stage}" if options.stage else "only"
    stage = STAGES[options.stage] if options.stage else some(options.only)
    if options.plan:
        print(plan(name, stage))
        return
    if options.dry_run:
        sys.exit(not dry_run(stage.sections, options.out))
    if options.out is None:
        parser.error("--out DIR: where should the figures go?")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.glob(f"{name}*"))):
        parser.error(f"--out {options.out}: expected a folder without {name}'s results; name another one")
    archives = options.cache if options.cache is not None else [CARRIED] * CARRIED.exists()
    if missing := [str(archive) for archive in archives if not archive.is_file()]:
        parser.error(f"--cache: no such file: {', '.join(missing)}")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: kernels would not run on the GPU")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: use --dry-run, or run this on a machine with an NVIDIA GPU")
    run = Run(name, stage, options.out, seconds_so_far())
    run.on_device(archives)
    sys.exit(0 if run.right else "something is wrong, or was not measured: see above")


if __name__ == "__main__":
    main()
