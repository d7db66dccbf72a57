"""Figures of one layer that need no GPU: traffic, launches, bytes saved for backward, errors of float32 adapters'
gradients. (Host time: host.py.)

    python bench/counts.py                      # all of them, about five minutes
    python bench/counts.py --only saved

Traffic and launches are counted by Triton's interpreter at 4096×4096 and 8,192 tokens, so they are exact; the GEMM
itself is left out of the traffic (it re-reads its operands from L2 by design). Goals: docs/measured.md.
"""

import argparse
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: traffic is counted in its interpreter

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fast as lf
from lora_fast.kernels import linear, tiles
from lora_fast.kernels.inspection import interpreter
from suite.cases import Case
from suite.comparison import Setting, relative_error, saved_bytes
from suite.ops.providers import layer as providers_of

SECTIONS = ("traffic", "launches", "saved", "gradients")
N_TOKENS, D = 8192, 4096
PEFTS = ("PEFT", "PEFT, bfloat16 adapters", "PEFT, autocast")


def traffic(console: Console) -> None:
    """Bytes that each thin pass asks for over each operand once."""
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
        asked, least = [], []
        for run, operands in passes:
            console.print(f"counting r = {r}, adapters {adapter} …")
            with tiles.assume(arch=90), interpreter.traffic() as counted:
                run()
            asked.append(counted.total)
            least.append(sum(t.numel() * t.element_size() for t in operands))
        ratios = [one / other for one, other in zip([*asked, sum(asked)], [*least, sum(least)], strict=True)]
        table.add_row(str(r), str(adapter).removeprefix("torch."), *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)


class Products(TorchDispatchMode):
    """Counts torch's own matrix products: on a GPU each is a launch of cuBLAS's."""

    count = 0

    def __torch_dispatch__(self, operator, types, given=(), named=None):
        self.count += operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return operator(*given, **(named or {}))


def launches(console: Console) -> None:
    """Kernel launches of one layer, cuBLAS's own counted with them."""
    table = Table(title="Launches of one layer, of them cuBLAS's (goal of the default ≤ 2 forward, ≤ 5 backward)")
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
            shown = (f"{count}, {of_cublas}" for count, of_cublas in counts)
            table.add_row(thin, strategy, f"{dropout_p:g}", *shown)
    console.print(table)


def saved(console: Console) -> None:
    """What one layer keeps for backward, its own parameters left out."""
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
                    size = saved_bytes(providers[name]()) / 2**20
                shown = f"ours, {backend} backend" if name == "ours" else name
                sizes.setdefault(shown, []).append(f"{size:.3f}")
    for name, both in sizes.items():
        table.add_row(name, *both)
    console.print(table)


def gradients(console: Console) -> None:
    """Errors of da and db against float64, of float32 adapters."""
    table = Table(title="Relative L2 error, 512→384, 256 tokens, r = 16, bfloat16 base, float32 adapters (goal ≤ 1e-5)")
    for column in ("", "da", "db"):
        table.add_column(column, justify="right")
    case = Case("layer", "", ((512, 384),), 16, 256, "bfloat16", 0.0)
    for backend, triton, names in (("torch", False, ("PEFT", "ours")), ("Triton", True, ("ours",))):
        operands, providers = providers_of(case, Setting(torch.device("cpu"), triton))
        exact = operands.exact()
        for name in names:
            provider = providers[name]()
            provider.prepare()
            with provider.context():
                y = provider.forward()
                provider.backward(y)
            made = provider.results(y)
            shown = f"ours, {backend} backend" if name == "ours" else name
            table.add_row(shown, *(f"{relative_error(made[of], exact[of]):.1e}" for of in ("da", "db")))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    wanted = parser.parse_args().only
    console = Console()
    console.print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    for section in SECTIONS:
        if section in wanted:
            globals()[section](console)


if __name__ == "__main__":
    main()
