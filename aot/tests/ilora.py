# SPDX-License-Identifier: Apache-2.0
"""The check ``ilora``: aot/examples/ilora.c trains in Triton's interpreter, and its factors are those that the package
trains, bit for bit."""

import ctypes
import tempfile
from pathlib import Path

import torch
from interpreter import Interpreter
from library import Library, Stub

from lora_fast.backend import set_backend
from lora_fast.kernels import tiles
from lora_fast.layers.lora import LoRALinear
from lora_fast.methods import ILoRA
from lora_fast.optim import LoRAAdamW

N_TOKENS, D_IN, D_OUT, R, STEPS = 128, 64, 96, 16, 10  # as in ilora.c, as all that follows
OPS = {"project", "linear", "grad_s_b", "grad_a", "adamw_step", "imbalance", "transform"}


def is_built(library: Library) -> bool:
    """Returns whether the library has the example's kernels."""
    words = [kernel.key.decode().split() for kernel in library.kernels]
    return {op for _, op, dtype, r, *_ in words if dtype == "float32" and r == f"r{R}"} >= OPS


def numbers() -> dict[str, torch.Tensor]:
    """Returns the example's x, weight, target and the first a."""
    state, filled = 1, {}
    shapes = {"x": (N_TOKENS, D_IN), "weight": (D_OUT, D_IN), "target": (N_TOKENS, D_OUT), "a": (R, D_IN)}
    for (name, (rows, columns)), scale in zip(shapes.items(), (2.0, 0.25, 2.0, 0.25), strict=True):
        values = []
        for _ in range(rows * columns):
            state = (1664525 * state + 1013904223) % (1 << 32)
            values.append(((state >> 8) / (1 << 24) - 0.5) * scale)  # exact in float32
        filled[name] = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    return filled


def trained_in_python() -> torch.Tensor:
    """Returns a and b as one row of numbers."""
    given = numbers()
    layer = LoRALinear(D_IN, D_OUT, r=R, alpha=2 * R, bias=False, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_(given["weight"]), layer.lora_A.copy_(given["a"]), layer.lora_B.zero_()
    optimizer = LoRAAdamW(layer, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, methods=[ILoRA(lam=0.1)])
    for _ in range(STEPS):
        y = layer(given["x"])
        y.backward((y.detach() - given["target"]) * (2.0 / (N_TOKENS * D_OUT)))
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([layer.lora_A.detach().flatten(), layer.lora_B.detach().flatten()])


def trained_by_example(path: str) -> torch.Tensor:
    """Returns the same of the example, which is built as a shared library."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "factors"
        arguments = (ctypes.c_char_p * 3)(b"ilora", str(file).encode(), None)
        status = ctypes.CDLL(path).main(2, arguments)
        assert status == 0, f"ilora: expected status 0, got {status}"
        return torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)


def compare(library: Library, stub: Stub, arch: int, example: str) -> str:
    """Trains both and returns what was compared."""
    stub.set("arch", arch), stub.set("noting", 0)
    interpreter = Interpreter(library, stub)
    got = trained_by_example(example)
    interpreter.check()
    with set_backend("triton"), tiles.assume(arch=arch, strategy="fused", thin="pass"):
        expected = trained_in_python()
    assert got.shape == expected.shape, f"expected {expected.numel()} numbers, got {got.numel()}"
    different = (got.view(torch.int32) != expected.view(torch.int32)).sum().item()
    assert different == 0, f"{different} of {got.numel()} numbers have other bits than Python's"
    return f"sm_{arch}: {STEPS} steps of iLoRA in C give the bits of Python's"
