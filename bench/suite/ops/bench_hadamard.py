"""ScaLoRA's Hadamard system, 2r×2r with x ≥ 0, of every adapter pair, from the pair's Grams."""

import torch

from lora_fast.kernels.limits import LARGEST_SCALORA_RANK
from lora_fast.measure.ceilings import Cost
from lora_fast.ops.reference import scalora_solution
from lora_fast.ops.reference.pairs import Grams, grams
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, size
from suite.ops.pair_operands import Pairs


def cases(scale: Scale) -> list[Case]:
    return [case for case in scale.steps("hadamard") if case.r <= LARGEST_SCALORA_RANK]


def with_consistent_gradients(pairs: Pairs, r: int) -> Pairs:
    """Replaces the gradients of a and b by those that follow from one gradient of the weight, here of rank 4r.

    With unrelated gradients the system is indefinite and has no solution to compare with.
    """
    generator = torch.Generator(pairs.a[0].device).manual_seed(1)

    def draw(m, n):
        return torch.randn(m, n, generator=generator, device=pairs.a[0].device)

    for i, (a, b) in enumerate(zip(pairs.a, pairs.b, strict=True)):
        left, right = draw(len(b), 4 * r), draw(4 * r, a.shape[1]) / 1000
        pairs.da[i], pairs.db[i] = (b.mT @ left) @ right, left @ (right @ a.mT)
    return pairs


def solve(systems: Grams) -> torch.Tensor:
    return scalora_solution.scalora_solve(*systems, "nnls")[0]


def build(case: Case, setting: Setting) -> Comparison:
    pairs = with_consistent_gradients(Pairs.of(case, setting.device), case.r)
    grams_of_pairs = [grams(*(t[None] for t in members)) for members in zip(*pairs.lists, strict=True)]
    stacked = Grams(*(torch.cat(tensors).contiguous() for tensors in zip(*grams_of_pairs, strict=True)))

    def results(x):
        return {"x": x}

    def ours() -> Provider:
        if not setting.triton:
            return Provider(lambda: solve(stacked), results=results)
        from lora_fast.kernels.pairs import scalora_system

        return Provider(lambda: scalora_system.scalora_solve(*stacked, "nnls")[0], results=results)

    def batched() -> Provider:
        return Provider(lambda: solve(stacked), results=results)

    def looped() -> Provider:
        return Provider(lambda: torch.cat([solve(systems) for systems in grams_of_pairs]), results=results)

    # on a GPU a loop over the pairs would take seconds
    baseline = {"torch, batched": batched} if setting.triton else {"torch, loop": looped}
    n, side = len(case.pairs), 2 * case.r
    cost = Cost(size(*stacked) + 4 * n * side, n * side**3 // 3)

    def exact():
        return results(solve(Grams(*(gram.double() for gram in stacked))))

    return Comparison(baseline | {"ours": ours}, {"forward": cost}, exact)
