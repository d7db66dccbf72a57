"""Run by test_compiled.py in a process of its own, without the interpreter: compiles every launch of the layer for one
arch and prints what each uses, one JSON object a line."""

import itertools
import json
import sys

import torch

from lora_fast.kernels import compiled, layer, tiles

N_TOKENS, D_IN, D_OUT = 4096, 640, 768  # more than tiles.SHORT, more than one column chunk


def launches(arch, dtype, adapter, r, dropout_p, padding, strategy) -> list[compiled.Launch]:
    """One layer's launches, both passes, with matrices whose rows are ``padding`` elements longer than they show."""
    make = lambda rows, columns: torch.zeros(rows, columns + padding, dtype=dtype)[:, :columns]
    x, dy, weight = make(N_TOKENS, D_IN), make(N_TOKENS, D_OUT), make(D_OUT, D_IN)
    bias = torch.zeros(D_OUT, dtype=dtype)
    thin = torch.zeros(N_TOKENS, r, dtype=dtype)
    lora_A, lora_B = torch.zeros(r, D_IN, dtype=adapter), torch.zeros(D_OUT, r, dtype=adapter)
    keep = layer.draw_mask(1 << 40, N_TOKENS, D_IN, dropout_p, x.device) if dropout_p else None
    with tiles.assume(arch=arch, strategy=strategy), compiled.recorded() as recorded:
        layer.project(x, lora_A, keep)
        layer.project(x[:64], lora_A, keep)
        layer.linear(x, weight, bias, thin, lora_B, 2.0)
        layer.grad_s_b(dy, thin, lora_B, 2.0)
        layer.grad_a(x, thin, lora_A, keep)
        layer.grad_x(dy, weight, thin, lora_A, keep)
    return recorded


def identity(launch: compiled.Launch) -> str:
    """Launches that compile to the same kernel share it."""
    kinds = {name: value for name, value in launch.arguments.items() if name.isupper()}
    kinds |= {name: str(v.dtype) for name, v in launch.arguments.items() if isinstance(v, torch.Tensor)}
    return f"{launch.kernel.__name__} {kinds} {launch.options}"


def main(arch: int, dtype: str, ranks: list[int]) -> None:
    dtype, seen = getattr(torch, dtype), set()
    for r, adapter, dropout_p in itertools.product(ranks, {dtype: 0, torch.float32: 0}, (0.0, 0.1)):
        for padding, strategy in ((0, "fused"), (4, "fused"), (0, "cublas")):  # rows of 4 more: no TMA
            for launch in launches(arch, dtype, adapter, r, dropout_p, padding, strategy):
                name = identity(launch)
                if name in seen:
                    continue
                seen.add(name)
                used = compiled.resources(compiled.compile_for(launch, arch))
                row = {"kernel": launch.kernel.__name__, "name": name, "r": r, "aligned": padding == 0}
                row |= {"registers": used.registers, "stack": used.stack, "shared": used.shared, "spills": used.spills}
                row["tensor_core"] = used.count(compiled.TENSOR_CORE[arch])
                row["gemm_tensor_core"] = used.count(compiled.GEMM_TENSOR_CORE[arch])
                row["tma_loads"] = used.count("UTMALDG")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], [int(r) for r in sys.argv[3].split(",")])
