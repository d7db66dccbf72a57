"""Run by the kernels' tests in a process of its own, without the interpreter: compiles the launches of the adapter step
for one arch and prints what each uses, one JSON object a line."""

import json
import sys

import torch

from lora_fast.kernels import compiled, gram, hadamard, merge, step

D_IN, D_OUT = 4096, 1024


def tensors(r: int, dtype: torch.dtype, ranks: list[int] | None = None) -> tuple[list, list]:
    ranks = ranks or [r, r]
    return [torch.zeros(k, D_IN, dtype=dtype) for k in ranks], [torch.zeros(D_OUT, k, dtype=dtype) for k in ranks]


def run_gram(r: int, dtype: torch.dtype) -> None:
    a, b = tensors(r, dtype)
    gram.gram(a, b, a, b, ("ka", "kb", "kp", "kq", "k"))


def run_step(r: int, dtype: torch.dtype, **options) -> None:
    """Two factors; ``options`` switch work on."""
    a, b = tensors(r, dtype)
    row, square = torch.ones(4, r), torch.zeros(4, r, r)
    work = step.Work(
        additive=row[:, 0].contiguous() if options.get("add") else None,
        matrices=square if options.get("matrix") else None,
        scale_p=row if options.get("scale") else None,
        scale_g=row if options.get("scale") else None,
        gram=options.get("gram", False),
    )
    factors = [(t, t, t.float(), t.float()) for t in a + b]
    step.step_(factors, [True, True, False, False], torch.ones(1, 5, dtype=torch.float64), torch.ones(4), work)


def run_plain(r: int, dtype: torch.dtype) -> None:
    run_step(r, dtype)


def run_full(r: int, dtype: torch.dtype) -> None:
    run_step(r, dtype, add=True, matrix=True, scale=True, gram=True)


def run_transform(r: int, dtype: torch.dtype) -> None:
    a, b = tensors(r, dtype)
    step.transform_(a + b, [True, True, False, False], torch.zeros(4, r, r))


def run_merge(r: int, dtype: torch.dtype) -> None:
    """float32 adapters into weights of ``dtype``."""
    a, b = tensors(r, torch.float32)
    weights, scale = [torch.zeros(D_OUT, D_IN, dtype=dtype) for _ in a], torch.zeros(2, r)
    merge.merge_(weights, a, b, scale, "stochastic", 1 << 40)
    merge.merge_(weights, a, b, scale, "compensated", residuals=[w.clone() for w in weights])


def run_scalora(r: int, dtype: torch.dtype) -> None:
    for solver in ("nnls", "paper"):
        x, alive, _ = hadamard.scalora_solve(*torch.zeros(5, 3, r, r), solver)
    hadamard.scales(x, alive, torch.ones((), dtype=torch.float64), torch.ones(3), 0.25, None)


OPS = {"gram": run_gram, "plain": run_plain, "full": run_full, "transform": run_transform}
OPS["merge"] = run_merge
OPS["scalora"] = run_scalora


def main(arch: int, jobs: list[str]) -> None:
    """A job is op:dtype:ranks, as gram:float32:1,16."""
    for op, dtype, ranks in (job.split(":") for job in jobs):
        for r in (int(r) for r in ranks.split(",")):
            with compiled.recorded() as launches:
                OPS[op](r, getattr(torch, dtype))
            for launch in launches:
                used = compiled.resources(compiled.compile_for(launch, arch))
                row = {"kernel": launch.kernel.__name__, "op": op, "r": r, "dtype": dtype}
                row |= {"registers": used.registers, "stack": used.stack, "spills": used.spills, "shared": used.shared}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
