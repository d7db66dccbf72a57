"""r×r systems of every adapter pair: the preconditioner's SPD solve, and the inverse of I + Z."""

import torch

import lora_fast as lf
from suite.cases import Case, Scale
from suite.comparison import Comparison, Cost, Provider, Setting, size
from suite.ops.providers import backend

SOLVE, INVERSE = "SPD solve", "inverse"


def cases(scale: Scale) -> list[Case]:
    return scale.steps("solve", (SOLVE, INVERSE))


def build(case: Case, setting: Setting) -> Comparison:
    generator = torch.Generator(setting.device).manual_seed(0)
    shape = len(case.pairs), case.r, case.r
    factor, rhs = (torch.randn(shape, generator=generator, device=setting.device) for _ in range(2))
    gram, eye = factor @ factor.mT / case.r, torch.eye(case.r, device=setting.device)
    context = lambda: backend("triton" if setting.triton else "torch")
    if case.variant == SOLVE:
        matrices = gram + eye
        loop = lambda: torch.stack([torch.linalg.solve(m, x) for m, x in zip(matrices, rhs, strict=True)])
        batched = lambda: torch.linalg.solve_ex(matrices, rhs)[0]
        ours = lambda: lf.functional.spd_solve(matrices, rhs)[0]
        exact = lambda: torch.linalg.solve(matrices.double(), rhs.double())
        traffic, operations = 3, case.r**3 / 3 + 2 * case.r**3
    else:
        matrices = eye + gram + (factor - factor.mT)  # symmetric part at least I, as NB-LoRA's
        loop = lambda: torch.stack([torch.linalg.inv(m) for m in matrices])
        batched = lambda: torch.linalg.inv_ex(matrices)[0]
        ours = lambda: lf.functional.small_inverse(matrices)
        exact = lambda: torch.linalg.inv(matrices.double())
        traffic, operations = 2, 2 * case.r**3 + 4 * case.r**3
    result = lambda x: {"x": x}
    simple = lambda run: lambda: Provider(run, results=result)
    providers: dict = {"torch, loop": simple(loop), "torch, batched": simple(batched)}
    providers["ours"] = lambda: Provider(ours, results=result, context=context)
    work = Cost(traffic * size(matrices), int(len(case.pairs) * operations))
    return Comparison(providers, {"forward": work}, lambda: result(exact()))
