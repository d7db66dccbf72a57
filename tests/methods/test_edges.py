"""The sweep: dtypes × methods × edges. No step at an edge raises a foreign error; finite pairs stay finite and in
proportion, frozen weights stay finite, and a pair that is not finite changes nothing else, bit for bit.

In proportion means that no entry of the effective weight W + s b a moves by ``LARGEST`` learning rates in a step, with
factors and gradients of ordinary size. The methods' formulas give (c is a small number, η the learning rate):

- AdamW moves an entry of a factor by c η whatever the gradient, so the product of rank r by c η Σ_k (|b| + |a|). LoRA+
  multiplies by its ratio. ScaLoRA scales factors by at most 4 and merges what the product loses; ScaledAdamW, RefLoRA
  and the coupled ScaleReg change the gradients that AdamW normalises.
- iLoRA's and the decoupled ScaleReg's pulls are η times their λ, at most half of a factor.
- BaLoRA does not change the product, so what moves it is AdamW on balanced factors, and their rounding.
- LoRA-RITE moves b a by η times whitened gradients, whose entries are at most √d; LoRA-Muon by η in the spectral norm.
  Both bound the first order of the product's step. The second, Δb Δa, is what factors without full rank would enlarge:
  equal rows and columns, which 16 bits make almost equal.
"""

import itertools
import math

import pytest
import roundings
import torch
from adapter_pairs import bits, same
from torch import nn

import lora_fast as lf
from lora_fast import methods as M

LR, STEPS, LARGEST = 1e-3, 4, 100
METHODS = {
    "plain": [],
    "lora+": [M.LoRAPlus(4.0)],
    "scale-reg": [M.ScaleReg()],
    "scale-reg decoupled, lora+": [M.ScaleReg(decoupled=True), M.LoRAPlus(4.0)],
    "scaled adamw": [M.ScaledAdamW()],
    "ilora": [M.ILoRA()],
    "ilora lora+": [M.ILoRA(lam=1.0), M.LoRAPlus(4.0)],
    "pilora": [M.PiLoRA()],
    "balora": [M.BaLoRA()],
    "balora every 2, svd_signed, m": [M.BaLoRA(every=2, gauge="svd_signed", transport="m")],
    "balora mv, scaled adamw": [M.BaLoRA(transport="mv"), M.ScaledAdamW()],
    "scalora": [M.ScaLoRA(interval=1)],
    "scalora every 2, paper": [M.ScaLoRA(interval=2, solver="paper", rounding="compensated"), M.LoRAPlus(4.0)],
    "scalora scalar": [M.ScaLoRA(interval=1, solver="scalar", limit=None)],
    "lora-rite": [M.LoRARITE()],
    "lora-rite ilora": [M.LoRARITE(), M.ILoRA(lam=1.0)],
    "lora-rite scale-reg": [M.LoRARITE(), M.ScaleReg(decoupled=True)],
    "lora-muon": [M.LoRAMuon()],
    "lora-muon ilora": [M.LoRAMuon(), M.ILoRA(lam=1.0)],
    "ref-lora": [M.RefLoRA()],
    "ref-lora scale-reg": [M.RefLoRA(), M.ScaleReg()],
}
DTYPES = torch.float32, torch.bfloat16, torch.float16
ORDINARY = (12, 16, 4)  # d_out, d_in, r
SHAPES = {"r above d_out": (3, 16, 4), "r above d_in": (16, 3, 4), "d_out 1": (1, 16, 4), "d_in 1": (12, 1, 4)}
SHAPES |= {"all of size 1": (1, 1, 1)}
FACTORS = ["b = 0", "zero row of a", "zero column of b", "equal rows and columns"]
SCALES = {"gradients of 1e-8": 1e-8, "gradients of 1e4": 1e4, "zero gradients": 0.0}
EDGES = [*SHAPES, *FACTORS, *SCALES, "learning rate 0", "NaN in one pair", "Inf in one pair"]
BAD = {"NaN in one pair": math.nan, "Inf in one pair": math.inf}
CASES = list(itertools.product(METHODS, DTYPES, EDGES))
assert len(CASES) == 21 * 3 * 15 == 945


def make_pair(generator, dtype, edge, weight_dtype):
    """Returns lora_A, lora_B, their scaling and the weight, at the edge."""
    d_out, d_in, r = SHAPES.get(edge, ORDINARY)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    a, b, w = draw(r, d_in) / d_in**0.5, draw(d_out, r) / 4, draw(d_out, d_in) / 4
    if edge == "b = 0":
        b.zero_()
    elif edge == "zero row of a":
        a[1] = 0
    elif edge == "zero column of b":
        b[:, 2] = 0
    elif edge == "equal rows and columns":
        a[1], b[:, 1] = a[0], b[:, 0]
    return nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype)), 1.0, w.to(weight_dtype)


def make_pairs(edges, dtype):
    """Returns a pair for each edge, whose weights have float32 and the adapters' dtype in turn."""
    generator = torch.Generator().manual_seed(0)
    return [make_pair(generator, dtype, edge, (torch.float32, dtype)[i % 2]) for i, edge in enumerate(edges)]


def set_gradients(pairs, edges):
    """Sets the gradients of the factors that belong to one direction of each weight."""
    generator = torch.Generator().manual_seed(1)
    for (a, b, s, w), edge in zip(pairs, edges, strict=True):
        full = torch.randn(w.shape, generator=generator) / 4 * SCALES.get(edge, 1.0)
        a.grad, b.grad = ((s * x).to(a.dtype) for x in (b.detach().float().T @ full, full @ a.detach().float().T))
        if edge in BAD:
            b.grad[0, 0] = BAD[edge]


def make_optimizer(pairs, name, dtype, lr=LR):
    # float16's second moments underflow and overflow, as torch's do.
    state_dtype = torch.float32 if dtype == torch.float16 else None
    return lf.optim.LoRAAdamW(pairs, lr=lr, methods=METHODS[name], state_dtype=state_dtype)


def effective(pairs):
    return [w.double() + s * b.detach().double() @ a.detach().double() for a, b, s, w in pairs]


def check_proportion(pairs, edges, before, after):
    for pair, edge, old, new in zip(pairs, edges, before, after, strict=True):
        assert pair[3].isfinite().all(), f"the weight of the pair with {edge}"
        if edge not in BAD:
            assert all(p.isfinite().all() for p in pair[:2]), f"factors with {edge}"
            moved = (new - old).abs().max().item() / LR
            assert moved < LARGEST, f"{edge}: the effective weight moves by {moved:.3g} lr"


def lost_by_rounding(name, pairs):
    """Returns how far one step with the learning rate 0 may move each effective weight. A factor of 16 bits that BaLoRA
    has changed, or a weight of 16 bits into which ScaLoRA has merged, is off by at most a unit in the last place; in
    float32 the error is that of the sums."""
    bounds = []
    for a, b, s, w in pairs:
        unit = torch.finfo(a.dtype).eps if "balora" in name else 0.0
        unit += 64 * torch.finfo(torch.float32).eps
        size = b.detach().double().abs() @ a.detach().double().abs()
        bound = s * (2 * unit + unit**2) * size + 4 * torch.finfo(torch.float32).eps * w.double().abs()
        if "scalora" in name and w.dtype.itemsize == 2:
            bound = bound + roundings.spacing(w.double(), w.dtype)
        bounds.append(bound)
    return bounds


def check_spared(pairs, alone, merges_by_kernel):
    """Checks that pairs are bitwise those that trained without the bad one. The kernels' merges into weights of 16 bits
    draw noise by the batch, so that such a weight may differ by a unit in the last place for each step."""
    for pair, other in zip(pairs, alone, strict=True):
        assert same(bits([pair])[:2], bits([other])[:2]), "a bad pair changes factors of another one"
        w, right = pair[3], other[3]
        if merges_by_kernel and w.dtype.itemsize == 2:
            units = roundings.spacing(right.double(), w.dtype)
            assert ((w.double() - right.double()).abs() <= STEPS * units).all(), "a bad pair changes another weight"
        else:
            assert torch.equal(w, right), "a bad pair changes another weight"


def check(name, dtype, edges, steps=STEPS):
    """Runs a few steps over a pair for each edge, and checks each of them."""
    lr = 0.0 if "learning rate 0" in edges else LR
    bad = [edge in BAD for edge in edges]
    good = [edge for edge in edges if edge not in BAD]
    pairs, others = make_pairs(edges, dtype), make_pairs(edges, dtype)
    others = [pair for pair, is_bad in zip(others, bad, strict=True) if not is_bad]
    optimizer, start = make_optimizer(pairs, name, dtype, lr), bits(pairs)
    alone = make_optimizer(others, name, dtype, lr) if any(bad) else None
    for _ in range(steps):
        set_gradients(pairs, edges)
        before = effective(pairs)
        optimizer.step()
        after = effective(pairs)
        check_proportion(pairs, edges, before, after)
        if alone is not None:
            set_gradients(others, good)
            alone.step()
            spared = [pair for pair, is_bad in zip(pairs, bad, strict=True) if not is_bad]
            check_spared(spared, others, lf.backend.chosen() == "triton" and "scalora" in name)
        if lr == 0:
            for old, new, bound in zip(before, after, lost_by_rounding(name, pairs), strict=True):
                assert ((new - old).abs() <= bound).all()
    if lr == 0 and not any(isinstance(method, (M.BaLoRA, M.ScaLoRA)) for method in METHODS[name]):
        assert same(bits(pairs), start)
    if edges == ["zero gradients"] * len(edges) and not any(
        method.has_after or isinstance(method, M.ScaleReg) for method in METHODS[name]
    ):
        assert same(bits(pairs), start)
    for pair, old, is_bad in zip(pairs, start[2::3], bad, strict=True):
        assert not is_bad or torch.equal(pair[3], old), "something of a bad pair is merged"


@pytest.mark.parametrize("name, dtype, edge", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_steps_at_an_edge_stay_in_proportion(name, dtype, edge):
    """A pair that is not finite stands beside ordinary ones, which must not notice; other edges have two pairs."""
    edges = ["ordinary", "ordinary", edge] if edge in BAD else [edge, edge]
    check(name, dtype, edges)


ON_TRITON = ["lora+", "scale-reg decoupled, lora+", "pilora", "balora", "scalora"]
TOGETHER = [edge for edge in EDGES if edge not in SCALES and edge not in ("all of size 1", "learning rate 0")]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_TRITON)
def test_steps_of_the_kernels_at_every_edge_stay_in_proportion(name):
    """All edges are one batch, of rank 4."""
    dtype = DTYPES[ON_TRITON.index(name) % 3]
    with lf.set_backend("triton"):
        check(name, dtype, ["ordinary", *TOGETHER], steps=2)


@pytest.mark.gpu
@pytest.mark.budget
@pytest.mark.parametrize("name, dtype, edge", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_steps_of_the_kernels_at_an_edge_stay_in_proportion(name, dtype, edge):
    edges = ["ordinary", edge] if edge in BAD else [edge]
    with lf.set_backend("triton"):
        check(name, dtype, edges, steps=2)
