"""Everything about the layer that only a GPU can show, in one command.

    python bench/gpu.py                        # on an NVIDIA GPU: tests, repeats, graph capture, timings
    python bench/gpu.py --dry-run              # anywhere: the same sections at tiny sizes, nothing written

Writes bench/results/<device>-<date>.json with device, driver, versions and commit. A section that fails is reported and
the rest goes on. Timings are medians of interleaved runs in bfloat16, with L2 flushed between them.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import traceback
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from torch import nn

import lora_fast as lf
from lora_fast.kernels import tiles

HERE = Path(__file__).resolve().parent
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))  # (d_in, d_out)
GOALS = {"PEFT": {0.0: {(4096, 4096): 1.3, (4096, 14336): 1.25}, 0.1: {(4096, 4096): 1.5, (4096, 14336): 1.5}}}
GOALS["addmm_"] = {0.0: {(4096, 4096): 1.15, (4096, 14336): 1.15}, 0.1: {}}


class InPlaceLoRA(torch.autograd.Function):
    """The best public style by hand: cuBLAS and in-place updates, S recomputed in backward; no dropout, no bias."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling):
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scaling = scaling
        rows = x.view(-1, x.shape[-1])
        y = rows @ weight.t()
        return y.addmm_(rows @ lora_A.to(x.dtype).t(), lora_B.to(x.dtype).t(), alpha=scaling).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B = ctx.saved_tensors
        a, b = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
        rows, dy_rows = x.view(-1, x.shape[-1]), dy.view(-1, dy.shape[-1])
        ds = dy_rows @ b
        da, db = ds.t() @ rows, dy_rows.t() @ (rows @ a.t())
        dx = (dy_rows @ weight).addmm_(ds, a, alpha=ctx.scaling)
        return dx.view(x.shape), None, (da * ctx.scaling).to(lora_A.dtype), (db * ctx.scaling).to(lora_B.dtype), None


def suite(options) -> dict:
    """The test suite, its kernels natively."""
    if options.dry_run:
        return {"verdict": "skipped in a dry run"}
    tests = HERE.parent / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    command += [f"--ignore={tests / name}" for name in ("test_compiled.py", "test_cli.py")]  # need no GPU
    done = subprocess.run(command, capture_output=True, text=True, timeout=360, cwd=HERE)
    return {"returncode": done.returncode, "tail": done.stdout[-2000:]}


def layer(d_in: int, d_out: int, r: int, dropout: float, device) -> lf.LoRALinear:
    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out, bias=False, device=device, dtype=torch.bfloat16)
    module = lf.LoRALinear.from_linear(linear, r=r, alpha=2 * r, dropout=dropout)
    nn.init.normal_(module.lora_B, std=0.02)
    return module


def forward_backward(module, x, dy):
    x.grad = None
    for p in module.parameters():
        p.grad = None
    y = module(x)
    y.backward(dy)
    return [y, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


def repeats(options) -> dict:
    """The same inputs give the same bits, call after call, with both strategies."""
    n_tokens, d, count = (64, 64, 3) if options.dry_run else (4096, 4096, 1000)
    differing = {}
    for strategy in ("fused", "cublas"):
        module = layer(d, d, 16, 0.0, options.device)
        x = torch.randn(n_tokens, d, device=options.device, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(n_tokens, d, device=options.device, dtype=torch.bfloat16)
        with lf.set_backend("triton"), tiles.assume(strategy=strategy):
            first = [t.detach().clone() for t in forward_backward(module, x, dy)]
            differing[strategy] = 0
            for _ in range(count):
                again = forward_backward(module, x, dy)
                differing[strategy] += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return {"runs": count, "differing": differing}


def graph(options) -> dict:
    """A captured step replays to the bits of an eager one; with dropout, replays draw different masks."""
    if options.device.type != "cuda":
        return {"verdict": "needs a GPU"}
    module = layer(1024, 1024, 16, 0.0, options.device)
    x = torch.randn(512, 1024, device=options.device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    eager = [t.detach().clone() for t in forward_backward(module, x, dy)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        forward_backward(module, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outputs = forward_backward(module, x, dy)
    captured.replay()
    same = all(torch.equal(a, b) for a, b in zip(eager, outputs, strict=True))
    dropped = layer(1024, 1024, 16, 0.5, options.device)
    dropped(x)  # compiles before capture
    with torch.cuda.graph(again := torch.cuda.CUDAGraph()):
        y = dropped(x)
    again.replay()
    first = y.clone()
    again.replay()
    return {"replay equals eager": same, "replays draw new masks": not torch.equal(first, y)}


def timings(options) -> dict:
    """Forward + backward of each engine, and ours over theirs."""
    n_tokens, shapes, rounds = (64, ((64, 128),), 2) if options.dry_run else (8192, SHAPES, 15)
    rows = []
    for d_in, d_out in shapes:
        for r in (16,) if options.dry_run else (16, 64):
            for dropout in (0.0, 0.1):
                engines = build_engines(d_in, d_out, r, dropout, options.device)
                x = torch.randn(n_tokens, d_in, device=options.device, dtype=torch.bfloat16, requires_grad=True)
                dy = torch.randn(n_tokens, d_out, device=options.device, dtype=torch.bfloat16)
                row = {"d_in": d_in, "d_out": d_out, "r": r, "dropout": dropout, "n_tokens": n_tokens}
                row["microseconds"] = time_engines(engines, x, dy, rounds, options.device)
                rows.append(row)
    return {"rows": rows}


def build_engines(d_in: int, d_out: int, r: int, dropout: float, device) -> dict:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    ours = layer(d_in, d_out, r, dropout, device)
    frozen = nn.Linear(d_in, d_out, bias=False, device="meta")
    frozen.weight = ours.weight
    peft = Linear(frozen, "default", LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout), r=r, lora_alpha=2 * r)
    engines = {"frozen linear": frozen, "PEFT": peft.to(device).train()}
    engines |= {"ours, fused": ("fused", ours), "ours, cublas": ("cublas", ours), "ours, table": (None, ours)}
    if dropout == 0.0:
        run = lambda x: InPlaceLoRA.apply(x, ours.weight, ours.lora_A, ours.lora_B, ours.scaling)
        engines["addmm_"] = run
    return engines


def time_engines(engines: dict, x, dy, rounds: int, device) -> dict:
    """Median microseconds a forward + backward; engines take turns, L2 is flushed before each."""
    cache = torch.empty(256 << 20 if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    taken = {name: [] for name in engines}
    for turn in range(rounds + 3):
        for name, engine in engines.items():
            strategy, module = engine if isinstance(engine, tuple) else (None, engine)
            backend = "triton" if name.startswith("ours") else "auto"
            with lf.set_backend(backend), tiles.assume(strategy=strategy):
                cache.zero_()
                elapsed = time_once(module, x, dy, device)
            if turn >= 3:
                taken[name].append(elapsed)
    return {name: statistics.median(values) for name, values in taken.items()}


def time_once(module, x, dy, device) -> float:
    x.grad = None
    if device.type != "cuda":
        module(x).backward(dy)
        return 0.0  # a dry run measures nothing
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    module(x).backward(dy)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def report(rows: list[dict]) -> None:
    """The table goal / measured / verdict."""
    for row in rows:
        ours = row["microseconds"]["ours, table"]
        print(f"\n{row['d_in']}→{row['d_out']}, r={row['r']}, dropout {row['dropout']:g}, {row['n_tokens']} tokens")
        for name, other in row["microseconds"].items():
            goals = GOALS.get(name, {}).get(row["dropout"], {}) if row["r"] == 16 else {}
            goal = goals.get((row["d_in"], row["d_out"]))
            verdict = "" if goal is None else f"goal ≥ {goal}: {'met' if other / ours >= goal else 'missed'}"
            print(f"  {name:16}{other:10.1f} µs   over ours {other / ours:5.2f}   {verdict}")


def conditions(options) -> dict:
    def output(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    import triton

    return {
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if options.device.type == "cuda"
        else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output("git", "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, nothing timed; runs without a GPU")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the JSON")
    options = parser.parse_args()
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device.type != "cuda" and not options.dry_run:
        parser.error("no CUDA device: use --dry-run, or run this on a machine with an NVIDIA GPU")
    results, failed = {"conditions": conditions(options)}, []
    for section in (timings, repeats, graph, suite):
        print(f"── {section.__name__}: {section.__doc__}", flush=True)
        try:
            results[section.__name__] = section(options)
        except Exception:
            results[section.__name__] = {"error": traceback.format_exc()}
            failed.append(section.__name__)
        print(json.dumps(results[section.__name__], indent=1)[:3000], flush=True)
    if not options.dry_run:
        report(results["timings"].get("rows", []))
        name = re.sub(r"[^A-Za-z0-9]+", "-", results["conditions"]["device"]).strip("-").lower()
        path = options.results / f"{name}-{results['conditions']['date']}.json"
        path.write_text(json.dumps(results, indent=1))
        print(f"\nwritten: {path}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
