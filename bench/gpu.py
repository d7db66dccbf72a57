"""Everything that only a GPU can show, in one command of at most nine minutes on an H100 or H200.

    python bench/gpu.py                        # on an NVIDIA GPU
    python bench/gpu.py --dry-run              # anywhere: the same sections at tiny sizes, interpreted; nothing written
    python bench/gpu.py --only layers steps    # some sections

Timings of the layer, of the optimizer's step and of training steps; error budgets, repeats, CUDA graphs, tensors beyond
2³¹ elements, memcheck, the test suite. Every section is a process of its own with a budget of seconds: what fails, or
runs out of time, is reported and the rest goes on. Writes results/<device>-<date>.json after every section, plots where
matplotlib is there, and prints goal / measured / verdict. Needs torch, Triton and this package (without a network:
pip install --no-deps --no-build-isolation -e .).
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import gpu_checks
import gpu_timings
import torch
from gpu_goals import Verdict, verdicts

import lora_fast

HERE = Path(__file__).resolve().parent
MINUTES = 9
SECTIONS = {  # name → (what runs, seconds)
    "layers": (gpu_timings.layers, 130),
    "steps": (gpu_timings.steps, 50),
    "small": (gpu_timings.small, 40),
    "training": (gpu_timings.training, 60),
    "errors": (gpu_checks.errors, 30),
    "repeats": (gpu_checks.repeats, 45),
    "graphs": (gpu_checks.graphs, 40),
    "large": (gpu_checks.large, 60),
    "memcheck": (gpu_checks.memcheck, 60),
    "suite": (gpu_checks.suite, 240),  # what is left
}
HIDDEN = {"families": (gpu_checks.families, 60)}  # run by memcheck


def run_section(name: str, dry_run: bool, seconds: float, path: Path | None) -> bool:
    """Runs a section here, writing its figures to ``path`` as they come; whether none is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict = {"figures": {}}
    try:
        run = {**SECTIONS, **HIDDEN}[name][0]
        for figure, values in run(gpu_checks.Options(dry_run, device, seconds)):
            found["figures"][figure] = values
            print(f"  {figure}: {summary(values)}", flush=True)
            if path:
                path.write_text(json.dumps(found))
    except Exception:
        found["error"] = traceback.format_exc()[-3000:]
        print(found["error"], flush=True)
    if path:
        path.write_text(json.dumps(found))
    return "error" not in found and all(figure.get("ok") is not False for figure in found["figures"].values())


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
        return " ".join([word, *(f"{k}={v}" for k, v in rest.items())])
    return str(values)


def in_own_process(name: str, dry_run: bool, seconds: float, folder: Path) -> dict:
    """A section's figures as far as it came; "error" says why it went no further."""
    path = folder / f"{name}.json"
    command = [sys.executable, __file__, "--section", name, "--seconds", f"{seconds:.0f}", "--json", str(path)]
    start = time.monotonic()
    process = subprocess.Popen(command + (["--dry-run"] if dry_run else []), start_new_session=True)
    error = None
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its own session: with everything that it started
        process.wait()
        error = f"out of time after {seconds:.0f} s"
    found = json.loads(path.read_text()) if path.exists() else {"figures": {}}
    if error or (process.returncode and "error" not in found and not path.exists()):
        found["error"] = error or f"ended with exit status {process.returncode}"
    if process.returncode and process.returncode < 0 and not error:
        found["error"] = f"killed by signal {-process.returncode}"
    return found | {"seconds": round(time.monotonic() - start, 1)}


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
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
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


def draw(results: dict, path: Path) -> str:
    """Bars of the layer's providers, one panel a shape; or why there is no plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no plots: {error}"
    layers = results.get("layers", {}).get("figures", {})
    figures = {name: found["rows"] for name, found in layers.items() if "rows" in found}
    if not figures:
        return "no plots: the layer was not measured"
    drawing = Figure(figsize=(12, 2.6 * -(-len(figures) // 2)), layout="constrained")
    panels = drawing.subplots(-(-len(figures) // 2), 2, squeeze=False).flat
    for axes, (name, rows) in zip(panels, figures.items(), strict=False):
        rows = [row for row in rows if row["mode"] == "full" and row["p50"] is not None]
        axes.barh([row["provider"] for row in rows], [row["p50"] for row in rows])
        axes.set(title=name, xlabel="µs, forward + backward, median")
        axes.invert_yaxis()
    drawing.savefig(path, dpi=120)
    return f"plots: {path}"


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
        sys.exit(not run_section(options.section, options.dry_run, options.seconds, options.json))
    results: dict = {"conditions": conditions()}
    device = re.sub(r"[^A-Za-z0-9]+", "-", results["conditions"]["device"]).strip("-").lower()
    path = options.results / f"{device}-{results['conditions']['date']}.json"
    end = time.monotonic() + 60 * MINUTES
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            run, seconds = SECTIONS[name]
            seconds = 600 if options.dry_run else min(seconds, end - time.monotonic())
            print(f"── {name}: {run.__doc__.splitlines()[0]}", flush=True)
            if seconds < 1:
                results[name] = {"figures": {}, "error": f"not begun: {MINUTES} minutes were over"}
            else:
                results[name] = in_own_process(name, options.dry_run, seconds, Path(folder))
                print(f"  {results[name]['seconds']} s", flush=True)
            results["verdicts"] = [row._asdict() for row in verdicts(results)]
            if not options.dry_run:
                path.write_text(json.dumps(results, indent=1))
    print(f"\n{show(verdicts(results))}\n")
    if options.dry_run:
        print("A dry run: the sections work; no figure above means anything.")
    unfinished = {name: results[name]["error"] for name in options.only if results[name].get("error")}
    for name, error in unfinished.items():
        print(f"{name}: {error.strip().splitlines()[-1]}")
    if not options.dry_run:
        print(f"written: {path}\n{draw(results, path.with_suffix('.png'))}")
    wrong = [n for n in options.only for f in results[n]["figures"].values() if f.get("ok") is False]
    sys.exit(f"unfinished or wrong: {', '.join(dict.fromkeys([*unfinished, *wrong]))}" if unfinished or wrong else 0)


if __name__ == "__main__":
    main()
