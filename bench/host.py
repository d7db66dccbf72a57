"""Measures the host time of one layer on the Triton path and of PEFT's eager layer, without a GPU, in four minutes.

    python bench/host.py

Ours runs as on a GPU, through launch plans and Triton's C launcher, on the stub driver of the tests, which reports an
H100 and computes nothing: 4096×4096, 4,096 tokens, r = 16, bfloat16. PEFT's layer and the frozen linear run torch's CPU
operators on two tokens of a 16×16 layer, where they compute next to nothing. Neither includes the time of CUDA's own
driver. The figures are CPU times of one thread in interleaved rounds: the lower quartile of the rounds' means.

A second table has the seven layers of a transformer block, of which q, k and v read one tensor, and gate and up another
one, and layers that share an input beside layers that do not. A third one has the block's forward without gradients for
one token, as in generation. There cuBLAS multiplies by the frozen weights, and torch's CPU operators in its place
compute next to nothing because the layers have one output.

A fourth one has a layer over bitsandbytes' 4-bit weight (NF4, double quantisation). The library's products of both
sides are the same ones, by its CPU operators on a 16×16 weight and two tokens. Ours gets a result of the real size in
place of what they return.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import stub_driver
import torch
import triton
from bases import quantize_
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import lora_fast as lf
from lora_fast.measure.clock import host_microseconds
from lora_fast.quantized.bitsandbytes_4bit import FourBitWeight

ARCH, TOKENS, D, R, SMALL = 90, 4096, 4096, 16, 16
# With these variables 32 MiB tensors come from memory that the process keeps, as from a GPU's caching allocator. The C
# library reads them when a process starts.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
LAUNCHES = 7  # of forward and backward with default options
ONE_TOKEN = 14  # launches of a block for one token
WARM_UP, ROUNDS, CALLS = 5, 100, 20  # rounds, rounds, calls a round
ADAPTERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.q = nn.Linear(d, d, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.q(x)


def peft_layer(
    d: int, r: int, dropout: float, adapter: torch.dtype, fused: bool, model: nn.Module | None = None
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["q"])
    model = get_peft_model(model or Model(d), config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    if fused:
        lf.fuse_(model)
    return model.train().base_model.model.q


def our_layer(dropout: float, adapter: torch.dtype) -> nn.Module:
    layer = lf.LoRALinear(D, D, r=R, alpha=2 * R, dropout=dropout, bias=False, dtype=torch.bfloat16)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(adapter), layer.lora_B.data.to(adapter)
    return layer


class Layers(nn.Module):
    """Layers that are called one after the other; ``shared`` has the number of those that read each of the inputs."""

    def __init__(self, d_in: int, d_out: int, shared: tuple[int, ...]):
        super().__init__()
        linear = lambda: nn.Linear(d_in, d_out, bias=False, dtype=torch.bfloat16)
        for i, count in enumerate(shared):
            self.add_module(str(i), nn.ModuleList(linear() for _ in range(count)))

    def forward(self, inputs):
        return [layer(x) for layers, x in zip(self.children(), inputs, strict=True) for layer in layers]


BLOCK = (3, 1, 2, 1)  # q, k, v; o; gate, up; down
SHARED = {"a block": BLOCK, "three layers of one input": (3,), "two layers of an input each": (1, 1)}


def shared_layers(shape: tuple[int, int], shared: tuple[int, ...], r: int, engine: str, adapter: torch.dtype) -> Layers:
    """Returns layers (d_in, d_out), PEFT's or ours, ours alone or in groups."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=r"\d\.\d")
    model = get_peft_model(Layers(*shape, shared), config, autocast_adapter_dtype=False)
    if engine != "PEFT":
        lf.fuse_(model, group=engine == "groups")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    return model.base_model.model


def shared_calls(shared: tuple[int, ...], engine: str, adapter: torch.dtype) -> Callable:
    """Returns a function that runs forward and backward of layers, PEFT's or ours."""
    tokens, d, r = (2, SMALL, 8) if engine == "PEFT" else (TOKENS, D, R)
    layers = shared_layers((d, d), shared, r, engine, adapter)
    trained = [parameter for parameter in layers.parameters() if parameter.requires_grad]
    inputs = [torch.zeros(1, tokens, d, dtype=torch.bfloat16, requires_grad=True) for _ in shared]
    dys = [torch.zeros(1, tokens, d, dtype=torch.bfloat16)] * sum(shared)
    with torch.no_grad():
        layers(inputs)  # finds the groups
    return lambda: torch.autograd.grad(layers(inputs), [*inputs, *trained], dys)


def one_token_call(engine: str, adapter: torch.dtype) -> Callable:
    """Returns a function that runs a block's layers without gradients for one token, PEFT's or ours."""
    d, shape, r = (SMALL, (SMALL, SMALL), 8) if engine == "PEFT" else (D, (D, 1), R)
    layers = shared_layers(shape, BLOCK, r, engine, adapter).eval()
    inputs = [torch.zeros(1, 1, d, dtype=torch.bfloat16) for _ in BLOCK]

    def forward():
        with torch.no_grad():
            layers(inputs)

    return forward


def measured_shared(progress: Progress) -> dict[tuple, float]:
    """Returns (layers, engine, adapters) → µs."""
    engines = {"a block": ("PEFT", "groups")}  # without groups autograd really adds the parts of dx, for 30 ms
    keys = [(name, engine, dtype) for name in SHARED for engine in engines.get(name, ("groups",)) for dtype in ADAPTERS]
    calls = {key: shared_calls(SHARED[key[0]], key[1], ADAPTERS[key[2]]) for key in keys}
    task = progress.add_task("layers that share an input", total=WARM_UP + ROUNDS // 2)
    count_round = lambda turn: progress.update(task, completed=turn)
    return host_microseconds(
        {key: (count_round, call) for key, call in calls.items()}, ROUNDS // 2, WARM_UP, CALLS // 4
    )


def print_shared(console: Console, times: dict[tuple, float]) -> None:
    table = Table(title="µs on the host, forward + backward, of several layers")
    ratio = "three of one input / two of an input each"
    for column in ("adapters", "block: PEFT", "ours", "PEFT / ours", ratio):
        table.add_column(column, justify="right")
    for name in ADAPTERS:
        peft, ours = (times["a block", engine, name] for engine in ("PEFT", "groups"))
        three, two = (times[layers, "groups", name] for layers in list(SHARED)[1:])
        table.add_row(name, f"{peft:.0f}", f"{ours:.0f}", f"{peft / ours:.2f}", f"{three / two:.2f}")
    console.print(table)
    console.print("Goals: PEFT / ours ≥ 1.8; three of one input / two of an input each < 1.")


def nf4_model() -> Model:
    model = Model(SMALL)
    quantize_(model, "nf4", torch.bfloat16)
    return model


def quantized_layer(engine: str, dropout: float, adapter: torch.dtype) -> nn.Module:
    """Returns a layer over a 16×16 NF4 weight, which ours takes for one of D × D (``shrink_products``)."""
    model, (d, r) = nf4_model(), (SMALL, 8) if engine == "PEFT" else (D, R)
    base: Any = model.q
    base.in_features = base.out_features = d
    base.weight.quant_state.shape = torch.Size((d, d))
    return peft_layer(d, r, dropout, adapter, engine != "PEFT", model)


def shrink_products() -> None:
    """Makes the library's products of ours those of two tokens by a small weight, which PEFT's side computes, too."""
    small_x, small = torch.zeros(1, 2, SMALL, dtype=torch.bfloat16), FourBitWeight(nf4_model().q)

    def shrunk(product: Callable) -> Callable:
        def run(weight: FourBitWeight, x: Tensor) -> Tensor:
            product(small, small_x)
            return torch.empty((1, TOKENS, D), dtype=torch.bfloat16)

        return run

    FourBitWeight.product, FourBitWeight.grad = shrunk(FourBitWeight.product), shrunk(FourBitWeight.grad)


def measured_quantized(stub: stub_driver.Stub, progress: Progress) -> dict[tuple, float]:
    """Returns (engine, adapters, dropout) → µs of forward and backward."""
    shrink_products()
    calls = {}
    for dtype in ADAPTERS:
        for dropout in (0.0, 0.1):
            for engine, (tokens, d) in {"PEFT": (2, SMALL), "ours": (TOKENS, D)}.items():
                layer = quantized_layer(engine, dropout, ADAPTERS[dtype])
                calls[engine, dtype, dropout], _ = calls_of(layer, tokens, d)
            check_launches(stub, (dtype, dropout), calls["ours", dtype, dropout], LAUNCHES)
    task = progress.add_task("quantised", total=WARM_UP + ROUNDS)
    count_round = lambda turn: progress.update(task, completed=turn)
    return host_microseconds({key: (count_round, call) for key, call in calls.items()}, ROUNDS, WARM_UP, CALLS)


def print_quantized(console: Console, times: dict[tuple, float]) -> None:
    table = Table(title="µs on the host, forward + backward, of a layer over an NF4 weight")
    for column in ("adapters", "dropout", "PEFT", "ours", "over PEFT", "PEFT / ours"):
        table.add_column(column, justify="right")
    for name in ADAPTERS:
        for dropout in (0.0, 0.1):
            peft, ours = (times[engine, name, dropout] for engine in ("PEFT", "ours"))
            cells = f"{peft:.0f}", f"{ours:.0f}", f"{ours / peft:.2f}", f"{peft / ours:.2f}"
            table.add_row(name, f"{dropout:g}", *cells)
    console.print(table)
    console.print("Goal: over PEFT ≤ 0.75 (PEFT / ours ≥ 1.33).")


def measured_one_token(stub: stub_driver.Stub, progress: Progress) -> dict[tuple, float]:
    """Returns (engine, adapters) → µs."""
    keys = [(engine, dtype) for engine in ("PEFT", "groups") for dtype in ADAPTERS]
    calls = {key: one_token_call(key[0], ADAPTERS[key[1]]) for key in keys}
    for key, call in calls.items():
        if key[0] != "PEFT":
            check_launches(stub, key, call, ONE_TOKEN)
    task = progress.add_task("one token", total=WARM_UP + ROUNDS // 2)
    count_round = lambda turn: progress.update(task, completed=turn)
    return host_microseconds({key: (count_round, call) for key, call in calls.items()}, ROUNDS // 2, WARM_UP, CALLS)


def print_one_token(console: Console, times: dict[tuple, float]) -> None:
    table = Table(title="µs on the host, forward without gradients of a block for one token")
    for column in ("adapters", "PEFT", "ours", "PEFT / ours"):
        table.add_column(column, justify="right")
    for name in ADAPTERS:
        peft, ours = (times[engine, name] for engine in ("PEFT", "groups"))
        table.add_row(name, f"{peft:.0f}", f"{ours:.0f}", f"{peft / ours:.2f}")
    console.print(table)


def calls_of(module: nn.Module, tokens: int, d: int) -> tuple[Callable, Callable]:
    """Returns a function that runs forward and backward, and one that runs forward without gradients."""
    x = torch.zeros(1, tokens, d, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.zeros(1, tokens, d, dtype=torch.bfloat16)
    trained = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def forward():
        with torch.no_grad():
            module(x)

    return lambda: torch.autograd.grad(module(x), trained, dy), forward


def check_launches(stub: stub_driver.Stub, name: tuple, call: Callable, expected: int) -> None:
    """Raises RuntimeError unless a call of ours launches as many kernels as expected."""
    call()
    before = stub.counter("launches")
    call()
    launched = stub.counter("launches") - before
    if launched != expected:
        raise RuntimeError(f"{name}: {launched} launches, expected {expected}")


def measured(stub: stub_driver.Stub, progress: Progress) -> dict[tuple, float]:
    """Returns (engine, adapters, dropout, mode) → µs; adapters and dropout of the frozen linear are None."""
    frozen = Model(SMALL).q.requires_grad_(False)
    modules = {("frozen", None, None): (frozen, 2, SMALL)}
    for name, dtype in ADAPTERS.items():
        for dropout in (0.0, 0.1):
            modules["PEFT", name, dropout] = peft_layer(SMALL, 8, dropout, dtype, fused=False), 2, SMALL
            modules["LoRALinear", name, dropout] = our_layer(dropout, dtype), TOKENS, D
            modules["fused PEFT layer", name, dropout] = peft_layer(D, R, dropout, dtype, fused=True), TOKENS, D
    calls = {}
    for key, (module, tokens, d) in modules.items():
        both, forward = calls[*key, "both"], calls[*key, "forward"] = calls_of(module, tokens, d)
        if d == D:
            check_launches(stub, key, both, LAUNCHES)
            check_launches(stub, key, forward, 2)
    task = progress.add_task("rounds", total=WARM_UP + ROUNDS)

    def count_round(turn: int) -> None:
        progress.update(task, completed=turn)

    steps = {key: (count_round, call) for key, call in calls.items()}
    return host_microseconds(steps, ROUNDS, WARM_UP, CALLS)


def main() -> None:
    if not ALLOCATOR.keys() <= os.environ.keys():
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= ALLOCATOR | {"OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, "-W", "ignore", *sys.argv], environment)
    stub = stub_driver.install(ARCH)
    console = Console(width=110)
    with Progress(console=console, transient=True) as progress:
        times, shared = measured(stub, progress), measured_shared(progress)
        one_token, quantized = measured_one_token(stub, progress), measured_quantized(stub, progress)
    frozen = times["frozen", None, None, "both"]
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    console.print(f"{versions}, launches for an {stub.card.name}")
    table = Table(title=f"µs on the host, forward + backward (frozen linear: {frozen:.0f})")
    shares = "over PEFT", "added, over PEFT's", "forward alone, over PEFT"
    for column in ("adapters", "dropout", "", "PEFT", "ours", *shares):
        table.add_column(column, justify="left" if not column else "right")
    for name in ADAPTERS:
        for dropout in (0.0, 0.1):
            peft = times["PEFT", name, dropout, "both"]
            for engine in ("LoRALinear", "fused PEFT layer"):
                ours = times[engine, name, dropout, "both"]
                added = (ours - frozen) / (peft - frozen)
                forward = times[engine, name, dropout, "forward"] / times["PEFT", name, dropout, "forward"]
                shares = f"{ours / peft:.2f}", f"{added:.2f}", f"{forward:.2f}"
                table.add_row(name, f"{dropout:g}", engine, f"{peft:.0f}", f"{ours:.0f}", *shares)
    console.print(table)
    console.print("Goals: over PEFT ≤ 0.75 (float32 adapters), 0.9; added ≤ 0.6, 0.65; forward without gradients ≤ 1.")
    print_shared(console, shared)
    print_one_token(console, one_token)
    print_quantized(console, quantized)


if __name__ == "__main__":
    main()
