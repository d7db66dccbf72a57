"""dS = s dy b and db = s dyᵀ S from one read of dy; da = dSᵀ x from one read of x."""

import torch.nn.functional as F

from lora_fast.measure.ceilings import Cost
from suite.cases import Case, Scale
from suite.comparison import Comparison, Setting, size
from suite.ops.layer_operands import eagerly, launchers, operands, ours
from suite.ops.providers import backend


def cases(scale: Scale) -> list[Case]:
    return scale.layers("grads")


def eager(x, dy, s, a, b, scaling):
    ds = scaling * (dy @ b.to(dy.dtype))
    return {"da": (ds.T @ x).to(a.dtype), "db": (scaling * (dy.T @ s)).to(b.dtype)}


def build(case: Case, setting: Setting) -> Comparison:
    op, ops = operands(case, setting), launchers(setting)
    s = F.linear(op.x, op.lora_A.to(op.x.dtype))
    args = op.x, op.dy, s, op.lora_A, op.lora_B, op.scaling

    def run():
        ds, db = ops.grad_s_b(op.dy, s, op.lora_B, op.scaling)
        return {"da": ops.grad_a(op.x, ds, op.lora_A), "db": db}

    providers = eagerly(eager, *args) | {"ours": ours(run, lambda: backend("auto"))}
    # dy, S, b in, dS, db out (dS is as large as S); then x, dS in, da out
    bytes_moved = size(op.dy, s, op.lora_B, s, op.lora_B) + size(op.x, s, op.lora_A)
    cost = Cost(bytes_moved, 2 * case.n_tokens * case.r * (2 * case.shape[1] + case.shape[0]))
    return Comparison(providers, {"forward": cost}, lambda: eager(*(t.double() for t in args[:5]), op.scaling))
