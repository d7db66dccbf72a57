"""r×r systems of every adapter pair: the preconditioner's SPD solve, and the inverse of I + Z."""

import torch

import lora_fast as lf
from lora_fast.measure.ceilings import Cost
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, size
from suite.ops.providers import backend

SOLVE, INVERSE = "SPD solve", "inverse"


def cases(scale: Scale) -> list[Case]:
    return scale.steps("solve", (SOLVE, INVERSE))


def build(case: Case, setting: Setting) -> Comparison:
    generator = torch.Generator(setting.device).manual_seed(0)
    shape = len(case.pairs), case.r, case.r
    factor, rhs = (torch.randn(shape, generator=generator, device=setting.device) for _ in range(2))
    gram, eye = factor @ factor.mT / case.r, torch.eye(case.r, device=setting.device)
    if case.variant == SOLVE:
        matrices = gram + eye
        runs = {
            "torch, loop": lambda: torch.stack([torch.linalg.solve(m, x) for m, x in zip(matrices, rhs, strict=True)]),
            "torch, batched": lambda: torch.linalg.solve_ex(matrices, rhs)[0],
            "ours": lambda: lf.functional.spd_solve(matrices, rhs)[0],
        }
        passes, operations = 3, case.r**3 / 3 + 2 * case.r**3
    else:
        matrices = eye + gram + (factor - factor.mT)  # the symmetric part is at least I, as NB-LoRA's is
        runs = {
            "torch, loop": lambda: torch.stack([torch.linalg.inv(m) for m in matrices]),
            "torch, batched": lambda: torch.linalg.inv_ex(matrices)[0],
            "ours": lambda: lf.functional.small_inverse(matrices),
        }
        passes, operations = 2, 2 * case.r**3 + 4 * case.r**3

    def results(x):
        return {"x": x}

    def exact():
        if case.variant == SOLVE:
            return results(torch.linalg.solve(matrices.double(), rhs.double()))
        return results(torch.linalg.inv(matrices.double()))

    def context():
        return backend("triton" if setting.triton else "torch")

    # torch's own runs look at no backend, so the context makes no difference to them
    providers = {name: lambda run=run: Provider(run, results=results, context=context) for name, run in runs.items()}
    cost = Cost(passes * size(matrices), int(len(case.pairs) * operations))
    return Comparison(providers, {"forward": cost}, exact)
