"""The whole layer, forward and backward: y = x Wᵀ + s (k∘x) aᵀ bᵀ; dx, da, db."""

from lora_fast.measure.ceilings import Cost
from suite.cases import Case, Scale
from suite.comparison import Comparison, Setting, size
from suite.ops.providers import Operands, layer


def cases(scale: Scale) -> list[Case]:
    return scale.layers("layer", scale.dropouts)


def build(case: Case, setting: Setting) -> Comparison:
    op, providers = layer(case, setting)
    exact = op.exact if not case.dropout else None  # every provider draws its own mask: there is no common result
    return Comparison(providers, costs(op, case), exact)


def costs(op: Operands, case: Case) -> dict[str, Cost]:
    """Returns the least cost of each mode."""
    (d_in, d_out), t, r = case.shape, case.n_tokens, case.r
    s_bytes = t * r * op.x.element_size()
    once = size(op.x, op.weight, op.lora_A, op.lora_B, op.dy) + s_bytes  # y is as large as dy
    forward = Cost(once, 2 * t * (d_in * d_out + r * (d_in + d_out)))
    backward = Cost(  # x, dy, S, W, a, b in; dx, da, db out
        once + size(op.x, op.lora_A, op.lora_B),
        2 * t * (d_in * d_out + 2 * r * (d_in + d_out)),
    )
    full = Cost(*map(sum, zip(forward, backward, strict=True)))
    return {"forward": forward, "backward": backward, "full": full}
