"""The five r×r Grams of every adapter pair: a aᵀ, bᵀb, da daᵀ, dbᵀdb, da aᵀ."""

import torch
from torch import Tensor

from lora_fast.ops.reference import pairs as reference
from suite.cases import Case, Scale
from suite.comparison import Comparison, Cost, Provider, Setting, size
from suite.ops.pair_operands import Pairs, by_shape


def cases(scale: Scale) -> list[Case]:
    return scale.steps("gram")


def looped(a: list, b: list, da: list, db: list) -> list[tuple[Tensor, ...]]:
    return [(x @ x.T, y.T @ y, dx @ dx.T, dy.T @ dy, dx @ x.T) for x, y, dx, dy in zip(a, b, da, db, strict=True)]


def named(pairs: list) -> dict[str, Tensor]:
    return {f"{i} {k}": gram for i, of_pair in enumerate(pairs) for k, gram in enumerate(of_pair)}


def build(case: Case, setting: Setting) -> Comparison:
    pairs = Pairs.of(case, setting.device)
    groups = by_shape(case.pairs)
    order = [i for indices in groups.values() for i in indices]

    def loop() -> Provider:
        return Provider(lambda: looped(*pairs.lists), results=named)

    def kernel() -> Provider:
        from lora_fast.kernels.pairs import gram

        by_pair = lambda grams: named(list(zip(*grams, strict=True)))
        return Provider(lambda: gram.gram(*pairs.lists, gram.Grams._fields), results=by_pair)

    def stacked() -> Provider:
        """The torch backend keeps factors of one shape in a stack."""
        stacks = [[torch.stack([one[i] for i in indices]) for one in pairs.lists] for indices in groups.values()]
        unstack = lambda found: [of_pair for grams in found for of_pair in zip(*grams, strict=True)]
        in_order = lambda found: dict(zip(order, unstack(found), strict=True))
        results = lambda found: named([in_order(found)[i] for i in range(len(order))])
        return Provider(lambda: [reference.grams(*stack) for stack in stacks], results=results)

    tensors = [t for one in pairs.lists for t in one]
    grams = 5 * 4 * case.r**2 * len(case.pairs)
    work = Cost(size(*tensors) + grams, sum(5 * case.r * t.numel() for t in pairs.a + pairs.b))
    exact = lambda: named(looped(*([t.double() for t in one] for one in pairs.lists)))
    return Comparison({"torch, loop": loop, "ours": kernel if setting.triton else stacked}, {"forward": work}, exact)
