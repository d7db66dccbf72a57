"""S = x aᵀ: one read of x."""

import torch.nn.functional as F

from lora_fast.measure.ceilings import Cost
from suite.cases import Case, Scale
from suite.comparison import Comparison, Setting, size
from suite.ops.layer_operands import eagerly, launchers, operands, ours
from suite.ops.providers import backend


def cases(scale: Scale) -> list[Case]:
    return scale.layers("project")


def eager(x, a):
    return {"s": F.linear(x, a.to(x.dtype))}


def build(case: Case, setting: Setting) -> Comparison:
    op, ops = operands(case, setting), launchers(setting)
    providers = eagerly(eager, op.x, op.lora_A)
    providers["ours"] = ours(lambda: {"s": ops.project(op.x, op.lora_A)}, lambda: backend("auto"))
    s_bytes = case.n_tokens * case.r * op.x.element_size()
    cost = Cost(size(op.x, op.lora_A) + s_bytes, 2 * case.n_tokens * case.r * case.shape[0])
    return Comparison(providers, {"forward": cost}, lambda: {"s": op.x.double() @ op.lora_A.double().T})
