"""Counts figures of one layer, and of layers that read the same x, that need no GPU: traffic, launches, bytes saved for
backward, and the errors of float32 adapters' gradients. (host.py measures host time.)

    python bench/counts.py                      # all of them, in about five minutes
    python bench/counts.py --only saved

Triton's interpreter counts traffic and launches at 4096×4096 and 8,192 tokens, so they are exact. The traffic excludes
the GEMM itself, which re-reads its operands from L2 by design. The bytes of groups come from the grids of the launches,
by a formula that the interpreter checks at a small size. The goals are in docs/measured.md.
"""

import argparse
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for its interpreter to count

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fast as lf
from lora_fast.kernels import linear, tiles
from lora_fast.kernels.inspection import interpreter
from lora_fast.kernels.linear.grads import GradA
from lora_fast.kernels.linear.group import GroupProject
from lora_fast.kernels.linear.group_grads import GroupGradA
from lora_fast.kernels.linear.project import Project
from suite.cases import Case
from suite.comparison import Setting, once, relative_error, saved_bytes, size
from suite.ops.providers import layer as providers_of

SECTIONS = ("traffic", "launches", "groups", "saved", "gradients")
N_TOKENS, D = 8192, 4096
# d_out of the layers of a Llama-3-8B block that read the same x of D columns, and (d_in, d_out) of the other layers.
GROUPS, OTHERS = {"q, k, v": (4096, 1024, 1024), "gate, up": (14336, 14336)}, ((4096, 4096), (14336, 4096))
PEFTS = ("PEFT", "PEFT, bfloat16 adapters", "PEFT, autocast")


def traffic(console: Console) -> None:
    """Prints the bytes that each thin pass requests, over each operand once."""
    table = Table(title=f"Traffic over minimum, {D}×{D}, {N_TOKENS} tokens, 16-bit activations (goal ≤ 1.3 at r = 16)")
    for column in ("r", "adapters", "S = x aᵀ", "dS, db", "da", "all three"):
        table.add_column(column, justify="right")
    for r, adapter in ((16, torch.float16), (16, torch.float32), (64, torch.float16)):
        x, thin = torch.zeros(N_TOKENS, D, dtype=torch.float16), torch.zeros(N_TOKENS, r, dtype=adapter)
        a, b = torch.zeros(r, D, dtype=adapter), torch.zeros(D, r, dtype=adapter)
        passes = (
            (lambda x=x, a=a: linear.project(x, a), (x, a, thin)),
            (lambda x=x, thin=thin, b=b: linear.grad_s_b(x, thin, b, 1.0), (x, thin, b, thin, b)),
            (lambda x=x, thin=thin, a=a: linear.grad_a(x, thin, a), (x, thin, a)),
        )
        requested, least = [], []
        for run, operands in passes:
            console.print(f"counting r = {r}, adapters {adapter} …")
            with tiles.assume(arch=90), interpreter.traffic() as counted:
                run()
            requested.append(counted.total)
            least.append(size(*operands))
        totals = zip([*requested, sum(requested)], [*least, sum(least)], strict=True)
        ratios = [traffic_bytes / least_bytes for traffic_bytes, least_bytes in totals]
        table.add_row(str(r), str(adapter).removeprefix("torch."), *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)


class Products(TorchDispatchMode):
    """Counts torch's own matrix products, each of which is a launch of cuBLAS on a GPU."""

    looks_inside = True
    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return operator(*args, **(kwargs or {}))


def launches(console: Console) -> None:
    """Prints the kernel launches of one layer, those of cuBLAS included."""
    title = "Launches of one layer, and how many of them are cuBLAS's (goal of the default ≤ 2 forward, ≤ 5 backward)"
    table = Table(title=title)
    for column in ("thin products", "GEMM", "dropout", "forward", "backward"):
        table.add_column(column, justify="right")
    for thin, strategy in (("pass", "fused"), ("pass", "cublas"), ("cublas", "cublas")):
        for dropout_p in (0.0, 0.1):
            counts = []
            x = torch.randn(1024, 640, dtype=torch.bfloat16, requires_grad=True)
            module = lf.LoRALinear(640, 640, r=16, alpha=16, dropout=dropout_p, dtype=torch.bfloat16)
            dy = torch.ones_like(x)
            with lf.set_backend("triton"), tiles.assume(arch=90, strategy=strategy, thin=thin):
                with interpreter.traffic() as counted, Products() as products:
                    y = module(x)
                counts.append((len(counted.launches) + products.count, products.count))
                with interpreter.traffic() as counted, Products() as products:
                    torch.autograd.grad(y, (x, module.lora_A, module.lora_B), dy)
                counts.append((len(counted.launches) + products.count, products.count))
            cells = (f"{total}, {cublas}" for total, cublas in counts)
            table.add_row(thin, strategy, f"{dropout_p:g}", *cells)
    console.print(table)


def passes_of_group(n_tokens: int, d: int, count: int, grouped: bool) -> tuple:
    """Returns x, and what computes S and da of ``count`` layers that read it, or of one, by one pass each."""
    x = torch.zeros(n_tokens, d, dtype=torch.float16)
    factors = [torch.zeros(16, d, dtype=x.dtype) for _ in range(count)]
    if grouped:
        return x, GroupProject(x, factors, False, False, False), GroupGradA(x, x.dtype, factors)
    return x, Project(x, factors[0], False, False, False), GradA(x, x.dtype, factors[0], False)


def bytes_of_group(n_tokens: int, d: int, count: int, grouped: bool) -> int:
    """Returns the bytes of S and da: x, factors, S, dS and partial sums, from the launches' grids."""
    with tiles.assume(arch=90):
        _, project, grad_a = passes_of_group(n_tokens, d, count, grouped)
    (blocks, _, columns), (chunks, splits) = project.launch.grid, grad_a.launch.grid
    r = 16 * (count if grouped else 1)
    s = 2 * (n_tokens * d * columns + blocks * r * d + n_tokens * r)
    parts = 2 * splits if (grad_a.parts.add if grouped else grad_a.add) else 0  # each is written and read
    da = 2 * (n_tokens * d + chunks * n_tokens * r + r * d) + 4 * parts * r * d
    return (s + da) * (1 if grouped else count)  # layers alone are alike


def check_bytes() -> None:
    """Raises RuntimeError unless the interpreter counts what ``bytes_of_group`` returns, at a small size."""
    for grouped in (False, True):
        with tiles.assume(arch=90), interpreter.traffic() as counted:
            x, project, grad_a = passes_of_group(600, 640, 3, grouped)
            factors, thin = [torch.zeros(16, 640, dtype=x.dtype)] * 3, [torch.zeros(600, 16, dtype=x.dtype)] * 3
            project(x, factors if grouped else factors[0])
            grad_a(x, thin) if grouped else grad_a(x, thin[0], factors[0])
        expected = bytes_of_group(600, 640, 3 if grouped else 1, grouped)
        if counted.total != expected:
            raise RuntimeError(f"grouped={grouped}: {counted.total} bytes counted, {expected} by the formula")


def groups(console: Console) -> None:
    """Prints the bytes and launches of the layers of a block that read the same x, alone and as groups."""
    check_bytes()
    title = (
        f"Llama-3-8B block, r = 16, 16 bits, {N_TOKENS} tokens: GB by the launches' grids, checked by the interpreter"
    )
    table = Table(title=title)
    dxs = "alone", "by cuBLAS", "by one kernel"
    for column in ("", "S, da", *(f"dx {form}" for form in dxs), *(f"all, dx {form}" for form in dxs)):
        table.add_column(column, justify="right")
    dx, totals = N_TOKENS * D * 2, [0.0] * 3
    for name, d_outs in GROUPS.items():
        m = len(d_outs)
        alone, grouped = (bytes_of_group(N_TOKENS, D, m, together) for together in (False, True))
        # Alone each dx is written, and autograd's m − 1 sums read two and write one. cuBLAS writes dx, m − 1 products
        # and the update read and write it. One kernel writes it.
        moved = [(m + 3 * (m - 1)) * dx, (1 + 2 * (m - 1) + 2) * dx, dx]
        whole = [alone + moved[0], grouped + moved[1], grouped + moved[2]]
        totals = [total + each for total, each in zip(totals, whole, strict=True)]
        cells = [f"{value / 1e9:.3f}" for value in (*moved, *whole)]
        table.add_row(name, f"{alone / 1e9:.3f} → {grouped / 1e9:.3f}", *cells)
    table.add_row("both", *[""] * 4, *[f"{total / 1e9:.3f}" for total in totals])
    console.print(table)
    console.print("Goals of all: 0.5 with one kernel, at most 0.92 where dx accumulates.")
    for strategy in ("fused", "cublas"):
        console.print(f"launches of the block's seven layers, GEMM {strategy}: {block_launches(strategy)} (goal ≤ 40)")


def block_launches(strategy: str) -> str:
    """Returns the launches of forward and backward, those of cuBLAS included, at 1/32 of the widths and 512 tokens:
    of layers alone, which autograd's three sums follow, and as groups."""
    make = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)
    counts = []
    for grouped in (False, True):
        with tiles.assume(arch=90, strategy=strategy, thin="pass"), interpreter.traffic() as counted, Products() as mm:
            for d_in, d_outs in [*((D, d_outs) for d_outs in GROUPS.values()), *((d, (d_out,)) for d, d_out in OTHERS)]:
                x, d_outs = make(512, d_in // 32), [d_out // 32 for d_out in d_outs]
                members = [(make(d, d_in // 32), None, make(16, d_in // 32), make(d, 16), 1.0, None) for d in d_outs]
                dys = [make(512, d) for d in d_outs]
                for one in [range(len(d_outs))] if grouped else [[i] for i in range(len(d_outs))]:
                    some, needed = [members[i] for i in one], [True] * len(one)
                    _, ss = linear.group_forward(x, some)
                    linear.group_backward([dys[i] for i in one], x, ss, some, False, (True, needed, needed))
        counts.append(len(counted.launches) + mm.count)
    return f"{counts[0]} + 3 → {counts[1]} + 0"


def saved(console: Console) -> None:
    """Prints the bytes that one layer keeps for backward, its parameters excluded."""
    table = Table(title="MiB saved for backward: 1024×1024, 4,096 tokens, r = 16, bfloat16 base (x + float32 S = 8.25)")
    for column in ("", "dropout 0", "dropout 0.1"):
        table.add_column(column, justify="right")
    sizes: dict[str, list[str]] = {}
    for dropout in (0.0, 0.1):
        case = Case("layer", "", ((1024, 1024),), 16, 4096, "bfloat16", dropout)
        for backend, triton, names in (("torch", False, PEFTS + ("ours",)), ("Triton", True, ("ours",))):
            _, providers = providers_of(case, Setting(torch.device("cpu"), triton))
            for name in names:
                with console.status(name):
                    mebibytes = saved_bytes(providers[name]()) / 2**20
                label = f"ours, {backend} backend" if name == "ours" else name
                sizes.setdefault(label, []).append(f"{mebibytes:.3f}")
    for label, cells in sizes.items():
        table.add_row(label, *cells)
    console.print(table)


def gradients(console: Console) -> None:
    """Prints the errors of da and db against float64, for float32 adapters."""
    table = Table(title="Relative L2 error, 512→384, 256 tokens, r = 16, bfloat16 base, float32 adapters (goal ≤ 1e-5)")
    for column in ("", "da", "db"):
        table.add_column(column, justify="right")
    case = Case("layer", "", ((512, 384),), 16, 256, "bfloat16", 0.0)
    for backend, triton, names in (("torch", False, ("PEFT", "ours")), ("Triton", True, ("ours",))):
        operands, providers = providers_of(case, Setting(torch.device("cpu"), triton))
        exact = operands.exact()
        for name in names:
            provider = providers[name]()
            results = provider.results(once(provider))
            label = f"ours, {backend} backend" if name == "ours" else name
            table.add_row(label, *(f"{relative_error(results[key], exact[key]):.1e}" for key in ("da", "db")))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="the sections to run")
    wanted = parser.parse_args().only
    console = Console()
    console.print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    for section in SECTIONS:
        if section in wanted:
            globals()[section](console)


if __name__ == "__main__":
    main()
