"""y = x Wᵀ + s S bᵀ and dx = dy W + dS a, either as one GEMM whose accumulator starts from the adapter's part, or as
cuBLAS's GEMM and a kernel that adds the adapter's part."""

from dataclasses import replace

import torch.nn.functional as F

from lora_fast.measure.ceilings import Cost
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, size
from suite.ops.layer_operands import eagerly, launchers, operands, ours
from suite.ops.providers import backend
from suite.ops.providers import ours as variants

FORWARD, BACKWARD = "y", "dx"
CUBLAS = "the frozen product alone"  # by cuBLAS on a GPU


def cases(scale: Scale) -> list[Case]:
    return [replace(case, variant=variant) for case in scale.layers("linear") for variant in (FORWARD, BACKWARD)]


def eager(left, weight, thin, factor, scaling):
    """Returns left weightᵀ + scaling · thin factorᵀ; weight (d_out, d_in) and factor (d_out, r) of this product."""
    return {"result": F.linear(left, weight) + scaling * F.linear(thin, factor.to(left.dtype))}


def in_place(left, weight, thin, factor, scaling):
    return {"result": F.linear(left, weight).addmm_(thin, factor.to(left.dtype).t(), alpha=scaling)}


def build(case: Case, setting: Setting) -> Comparison:
    op, ops = operands(case, setting), launchers(setting)
    if case.variant == BACKWARD:
        ds = op.scaling * (op.dy @ op.lora_B.to(op.dy.dtype))
        args = op.dy, op.weight.t(), ds, op.lora_A.t(), 1.0
    else:
        s = F.linear(op.x, op.lora_A.to(op.x.dtype))
        args = op.x, op.weight, s, op.lora_B, op.scaling
    left, weight, thin, factor, scaling = args

    def run_ours():
        if case.variant == BACKWARD:
            return {"result": ops.grad_x(op.dy, op.weight, thin, op.lora_A)}
        return {"result": ops.linear(op.x, op.weight, None, thin, op.lora_B, op.scaling)}

    providers = {CUBLAS: lambda: Provider(lambda: F.linear(left, weight))} | eagerly(eager, *args)
    providers["addmm_"] = ours(lambda: in_place(*args), lambda: backend("auto"))
    for name, context in variants(case, setting).items():
        providers[name] = ours(run_ours, context)
    d_in, d_out = case.shape
    operations = 2 * case.n_tokens * (d_in * d_out + case.r * weight.shape[0])
    cost = Cost(size(op.x, op.weight, thin, factor, op.dy), operations)
    return Comparison(providers, {"forward": cost}, lambda: eager(*(t.double() for t in args[:4]), scaling))
