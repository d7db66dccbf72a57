"""Runs the microbenchmark suite: every op by every provider. An op is measured only if its tests pass.

    python bench/run.py                          # everything, in about two minutes on two quiet CPU cores
    python bench/run.py --quick                  # one case an op, within a minute
    python bench/run.py layer step               # some ops
    python bench/run.py --compare runs/bench-1/bench.json      # marks what changed beyond noise

On a GPU the Triton kernels are timed at the sizes of real models. On a CPU the same command times the torch twins at
smaller sizes, and Triton's interpreter counts the kernels' traffic and launches. Writes bench.json, bench.csv, plots/
and bench.html.
"""

import argparse
import datetime
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_fast.measure.machine import environment
from suite.cases import SCALES, from_dict
from suite.changes import Change, compare
from suite.counting import in_own_process
from suite.registry import OPS, TESTS, here, module
from suite.report import microseconds, shown, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COUNTING_SECONDS = {"cpu": 60, "cpu-quick": 15, "tiny": 5}


def pytest(*arguments: str) -> int:
    """Runs pytest in bench/ and returns its exit status."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=HERE).returncode


def green(ops: tuple[str, ...]) -> bool:
    """Runs the tests of these ops and returns whether they pass."""
    nodes = dict.fromkeys(str(ROOT / node) for op in ops for node in TESTS[op])
    return pytest("-q", "--no-header", "-W", "ignore", *nodes) == 0


def measured(ops: tuple[str, ...], scale: str, console: Console) -> tuple[list[dict], list[dict]]:
    """Runs the cases of these ops and returns their rows and the ceilings of the device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        options = ["--scale", scale, "--ops", ",".join(ops), "--benchmark-json", str(path), "--benchmark-quiet"]
        if pytest("-vv", "--no-header", "-W", "ignore", str(HERE / "test_ops.py"), *options):
            raise SystemExit("bench: a case failed, see above; no file was written")
        benchmarks = [benchmark["extra_info"] for benchmark in json.loads(path.read_text())["benchmarks"]]
    rows = [row for benchmark in benchmarks for row in benchmark["rows"]]
    if not here().triton:
        console.print("counting traffic and launches of the kernels in Triton's interpreter …")
        counts = in_own_process(list(dict.fromkeys(from_dict(row["case"]) for row in rows)), COUNTING_SECONDS[scale])
        for row in shown(rows):
            if row["provider"] == "ours":
                row.update(counts[from_dict(row["case"])])
    ceilings = [benchmark["ceilings"] for benchmark in benchmarks]
    return rows, list({ceiling["dtype"]: ceiling for ceiling in ceilings}.values())


def table(rows: list[dict]) -> Table:
    """Returns a table of ours, with a line for each case."""
    lines = Table(box=None, pad_edge=False)
    for heading in ("op", "case", "ours µs (p20–p80)", "× first provider", "roofline", "saved MiB", "error"):
        lines.add_column(heading, justify="left" if heading in ("op", "case") else "right")
    firsts: dict = {}
    for row in shown(rows):
        case = from_dict(row["case"])
        firsts.setdefault(case, row["provider"])
        if row["provider"] == "ours":
            saved = "" if row["saved"] is None else f"{row['saved'] / 2**20:.2f}"
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            time = "{} ({}–{})".format(*(microseconds(row[name]) for name in ("p50", "p20", "p80")))
            share = f"{row['roofline']:.2f}"
            lines.add_row(case.op, case.name, time, f"{row['ratio'][1]:.2f} {firsts[case]}", share, saved, error)
    return lines


def changed(changes: list[Change], console: Console) -> None:
    beyond = [change for change in changes if change.beyond_noise]
    console.print(f"{len(beyond)} of {len(changes)} rows changed beyond noise (p20–p80 of the two runs do not overlap)")
    for change in beyond:
        way = "faster" if change.times > 1 else "slower"
        console.print(f"  ×{change.times:.3f} {way}: {change.case}, {change.provider}, {change.mode}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"ops to measure, all by default: {', '.join(OPS)}")
    parser.add_argument(
        "--quick", action="store_true", help="measure one case an op, within a minute on a CPU; the figures are rough"
    )
    parser.add_argument("--scale", choices=SCALES, help="extent of the run; by default it follows from the device")
    parser.add_argument(
        "--compare", type=Path, metavar="JSON", help="an earlier bench.json; rows that changed beyond noise are marked"
    )
    parser.add_argument("--output", type=Path, help="a new folder for the results; by default the next runs/bench-N")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"OP: expected some of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    earlier = json.loads(options.compare.read_text()) if options.compare else None
    ops, setting, console = tuple(options.ops) or OPS, here(), Console(width=None if sys.stdout.isatty() else 150)
    scale = options.scale or ("gpu" if setting.triton else "cpu") + ("-quick" if options.quick else "")
    folder = options.output or next(path for n in range(1, 10**6) if not (path := Path(f"runs/bench-{n}")).exists())
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--output: expected a new or empty folder, got {folder}")
    load = f"{os.getloadavg()[0]:.1f}"
    console.print(f"running the tests of {', '.join(ops)}:")
    if not green(ops):
        sys.exit("bench: a test failed, so nothing is measured")
    rows, ceilings = measured(ops, scale, console)
    run = {
        "environment": environment(),
        "scale": scale,
        "on_gpu": setting.triton,
        "load": load,
        "cores": os.cpu_count(),
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tests": list(ops),
        "what": {op: inspect.getdoc(module(op)).splitlines()[0] for op in ops},
        "ceilings": ceilings,
        "rows": rows,
    }
    changes = compare(earlier, run) if earlier else []
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, run, changes)
    console.print(table(rows))
    if earlier:
        changed(changes, console)
    console.print(f"\npage      {folder / 'bench.html'}\nnumbers   {folder / 'bench.json'}, {folder / 'bench.csv'}")


if __name__ == "__main__":
    main()
