"""y = x Wᵀ + s S bᵀ: the GEMM whose accumulator starts from the adapter's part, or cuBLAS and a kernel that adds it."""

import torch.nn.functional as F
from measure import Comparison, Setting, Work, size
from providers import backend
from providers import ours as variants
from shapes import Case, Scale
from thin import eagerly, launchers, operands, ours


def cases(scale: Scale) -> list[Case]:
    return scale.layers("linear")


def eager(x, weight, s, b, scaling):
    return {"y": F.linear(x, weight) + scaling * F.linear(s, b.to(x.dtype))}


def in_place(x, weight, s, b, scaling):
    return {"y": F.linear(x, weight).addmm_(s, b.to(x.dtype).t(), alpha=scaling)}


def build(case: Case, setting: Setting) -> Comparison:
    op, ops = operands(case, setting), launchers(setting)
    s = F.linear(op.x, op.lora_A.to(op.x.dtype))
    args = op.x, op.weight, s, op.lora_B, op.scaling
    providers = eagerly(eager, *args)
    providers["addmm_"] = ours(lambda: in_place(*args), lambda: backend("auto"))
    for name, context in variants(case, setting).items():
        run = lambda: {"y": ops.linear(op.x, op.weight, None, s, op.lora_B, op.scaling)}
        providers[name] = ours(run, context)
    d_in, d_out = case.shape
    work = Work(size(op.x, op.weight, s, op.lora_B, op.dy), 2 * case.n_tokens * (d_in * d_out + case.r * d_out))
    exact = lambda: eager(*(t.double() for t in args[:4]), op.scaling)
    return Comparison(providers, {"forward": work}, exact)
