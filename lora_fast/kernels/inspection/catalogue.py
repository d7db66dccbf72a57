"""Lists every launch of the package, op by op, at the sizes of a real layer. rules.py compiles and counts these
launches, the tests check them against the rules, and the ahead-of-time library embeds them. A new kernel is added here
once.

An op is a function (r, dtype, **variant) that runs its launcher. A counted op returns the bytes that any implementation
must move, which is each operand once. The GEMM is not counted, because it reads its operands again from L2 by design;
r×r work is not counted, because it fits in a cache. Compiling and counting do not depend on values, so large tensors
are left empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from .. import batched, cayley, dora, experts, launch, pointer_table, tiles
from .. import linear as layer
from ..dora.layer import ScaledGrads, ScaledUpdate
from ..linalg import inverse, spd
from ..linear.cublas import Halves
from ..linear.four_bit import four_bit_grad_x, four_bit_linear
from ..linear.group import GroupProject
from ..linear.group_grads import GroupGradA, GroupGradSB
from ..linear.group_linear import FusedGroupLinear
from ..linear.project import Project
from ..pairs import adamw, add_low_rank, inverse_mean, momentum, regularizers, scalora_scales, scalora_system
from ..pairs import gram as grams
from ..pairs.transform import Noise, transform_tables_
from ..records import AdapterTable, FourBit, NestedScales, Scaled

N_TOKENS, SHORT, FEW, D_IN, D_OUT = 8192, 1024, 16, 4096, 4096
GROUP = 4096, 1024, 1024, 4096  # d_out of the members of a group: q, k, v and one more
EXPERTS = 8
PAIRS = ((4096, 4096), (4096, 1024))  # (d_in, d_out) of the adapter pairs of a grouped launch
SEED = 1 << 40


class Op(NamedTuple):
    """An operation with all ranks, dtypes and variants that are compiled."""

    run: Callable[..., int | None]
    ranks: Mapping[str, tuple[int, ...]]  # dtype → ranks
    variants: Iterable[dict] = ({},)
    tensor_cores: tuple[str, ...] = ()  # kernels whose 16-bit products must use them
    counted: bool = False


class Case(NamedTuple):
    """An op with one dtype, rank and variant."""

    op: str
    dtype: str
    r: int
    variant: dict

    def run(self) -> int | None:
        return OPS[self.op].run(self.r, getattr(torch, self.dtype), **self.variant)

    @property
    def counted(self) -> bool:
        """Returns whether traffic is counted. A dropout mask adds no traffic, and few tokens add too little to
        compare."""
        return OPS[self.op].counted and not self.variant.get("dropout") and self.variant.get("tokens") in (None, "many")

    def runs_on(self, arch: int) -> bool:
        return self.variant.get("strategy") != "gluon" or arch == tiles.GLUON_ARCH

    def __str__(self) -> str:
        words = [name if value is True else f"{name} {value}" for name, value in self.variant.items() if value]
        return " ".join([self.op, self.dtype, f"r={self.r}", *words])


def cases(ops: Iterable[str] | None = None, ranks: Iterable[int] | None = None) -> list[Case]:
    """Returns the cases of these ops and ranks. None stands for all of them."""
    return [
        Case(name, dtype, r, variant)
        for name in (OPS if ops is None else ops)
        for dtype, known in OPS[name].ranks.items()
        for r in known
        if ranks is None or r in ranks
        for variant in OPS[name].variants
        if dtype != "float32" or not _needs_16_bits(variant)
    ]


def _needs_16_bits(variant: dict) -> bool:
    """Returns whether a variant is only for 16-bit activations: one that sets the adapter's dtype, or Gluon's GEMM."""
    return variant.get("adapter") is not None or variant.get("strategy") == "gluon"


def variants(**values: Iterable) -> list[dict]:
    """Returns every combination of the values."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def size(*tensors: torch.Tensor | None) -> int:
    """Returns the bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# ---- The layer


def _adapter(adapter: str | None, dtype: torch.dtype) -> torch.dtype:
    return dtype if adapter is None else getattr(torch, adapter)


def _matrix(rows: int, columns: int, dtype: torch.dtype, padding: int = 0) -> torch.Tensor:
    """Returns a matrix without defined values whose rows have ``padding`` unused elements after them."""
    return torch.empty(rows, columns + padding, dtype=dtype)[:, :columns]


def _keep(dropout: float) -> launch.DropoutMask | None:
    return layer.draw_mask(torch.empty(0), dropout, SEED) if dropout else None


def _thin(rows: int, r: int, dtype: torch.dtype, adapter: str | None) -> torch.Tensor:
    """Returns an S or dS."""
    return _matrix(rows, r, torch.promote_types(dtype, _adapter(adapter, dtype)))


def project(r: int, dtype: torch.dtype, adapter: str | None, dropout: float, tokens: str) -> int:
    """Runs project. ``tokens`` is "many", "short" (small blocks of tokens) or "few" (d_in is split)."""
    n_tokens = {"many": N_TOKENS, "short": SHORT, "few": FEW}[tokens]
    x, a = _matrix(n_tokens, D_IN, dtype), _matrix(r, D_IN, _adapter(adapter, dtype))
    keep = _keep(dropout)
    return size(x, a, Project(x, a, keep is not None, False, tokens != "many", tokens == "few")(x, a, keep))


def _gemm_tokens(strategy: str) -> int:
    """Returns the number of tokens. cuBLAS computes its part even if launches are only recorded, so it gets few."""
    return 1 if strategy == "cublas" else N_TOKENS


def linear(r: int, dtype: torch.dtype, adapter: str | None, strategy: str, padding: int, bias: bool = True) -> None:
    n_tokens = _gemm_tokens(strategy)
    x, weight = _matrix(n_tokens, D_IN, dtype, padding), _matrix(D_OUT, D_IN, dtype, padding)
    s, b = _thin(n_tokens, r, dtype, adapter), _matrix(D_OUT, r, _adapter(adapter, dtype))
    with tiles.assume(strategy=strategy):
        layer.linear(x, weight, torch.zeros(D_OUT, dtype=dtype) if bias else None, s, b, 2.0)


def few_tokens(r: int, dtype: torch.dtype, adapter: str | None, dropout: float) -> None:
    """Runs a forward with S in parts, cuBLAS's GEMM, and the update that adds the parts."""
    x, weight = _matrix(FEW, D_IN, dtype), _matrix(16, D_IN, dtype)
    a, b = _matrix(r, D_IN, _adapter(adapter, dtype)), _matrix(16, r, _adapter(adapter, dtype))
    with tiles.assume(strategy="cublas", thin="split"):
        layer.forward(x, weight, None, a, b, 2.0, _keep(dropout))


def grad_x(r: int, dtype: torch.dtype, adapter: str | None, strategy: str, padding: int, dropout: float) -> None:
    n_tokens = _gemm_tokens(strategy)
    dy, weight = _matrix(n_tokens, D_OUT, dtype, padding), _matrix(D_OUT, D_IN, dtype, padding)
    ds, a = _thin(n_tokens, r, dtype, adapter), _matrix(r, D_IN, _adapter(adapter, dtype))
    with tiles.assume(strategy=strategy):
        layer.grad_x(dy, weight, ds, a, _keep(dropout))


def _four_bit(nested: bool) -> FourBit:
    """Returns a 4-bit weight (D_OUT, D_IN) without defined values."""
    n = D_OUT * D_IN // 64
    second = NestedScales(torch.empty(256), torch.empty(n // 256), torch.empty(1)) if nested else None
    packed, absmax = torch.empty(32 * n, dtype=torch.uint8), torch.empty(n, dtype=torch.uint8 if nested else None)
    return FourBit(packed, torch.empty(16), absmax, 64, (D_OUT, D_IN), second)


def four_bit(
    r: int, dtype: torch.dtype, adapter: str | None, padding: int, nested: bool = False, bias: bool = True
) -> None:
    """Runs the forward GEMM over a 4-bit weight."""
    x, weight = _matrix(N_TOKENS, D_IN, dtype, padding), _four_bit(nested)
    s, b = _thin(N_TOKENS, r, dtype, adapter), _matrix(D_OUT, r, _adapter(adapter, dtype))
    four_bit_linear(x, weight, torch.zeros(D_OUT, dtype=dtype) if bias else None, s, b, 2.0)


def four_bit_dx(
    r: int, dtype: torch.dtype, adapter: str | None, padding: int, dropout: float, nested: bool = False
) -> None:
    """Runs the GEMM for dx over a 4-bit weight."""
    dy, weight = _matrix(N_TOKENS, D_OUT, dtype, padding), _four_bit(nested)
    ds, a = _thin(N_TOKENS, r, dtype, adapter), _matrix(r, D_IN, _adapter(adapter, dtype))
    four_bit_grad_x(dy, weight, ds, a, _keep(dropout))


def grad_s_b(r: int, dtype: torch.dtype, adapter: str | None) -> int:
    dy, s = _matrix(N_TOKENS, D_OUT, dtype), _thin(N_TOKENS, r, dtype, adapter)
    b = _matrix(D_OUT, r, _adapter(adapter, dtype))
    return size(dy, s, b, *layer.grad_s_b(dy, s, b, 2.0))


def grad_a(r: int, dtype: torch.dtype, adapter: str | None, dropout: float) -> int:
    x, ds = _matrix(N_TOKENS, D_IN, dtype), _thin(N_TOKENS, r, dtype, adapter)
    a = _matrix(r, D_IN, _adapter(adapter, dtype))
    return size(x, ds, layer.grad_a(x, ds, a, _keep(dropout)))


def group_project(r: int, dtype: torch.dtype, adapter: str | None, tokens: str, members: int) -> int:
    """Runs the pass over x for S of a group. ``tokens`` is as in ``project``."""
    n_tokens = {"many": N_TOKENS, "short": SHORT, "few": FEW}[tokens]
    x = _matrix(n_tokens, D_IN, dtype)
    a = [_matrix(r, D_IN, _adapter(adapter, dtype)) for _ in range(members)]
    return size(x, *a, *GroupProject(x, a, False, tokens != "many", tokens == "few")(x, a))


def group_linear(
    r: int, dtype: torch.dtype, adapter: str | None, padding: int, members: int, bias: bool = False
) -> None:
    """Runs the GEMM for y of a group. Every second member has the bias."""
    n_tokens, calls = _gemm_tokens("fused"), []
    for i, d_out in enumerate(GROUP[:members]):
        weight, a_b = _matrix(d_out, D_IN, dtype, padding), [(r, D_IN), (d_out, r)]
        a, b = (_matrix(*shape, _adapter(adapter, dtype)) for shape in a_b)
        calls.append((weight, torch.zeros(d_out, dtype=dtype) if bias and i % 2 else None, a, b, 2.0, None))
    ss = [_thin(n_tokens, r, dtype, adapter) for _ in calls]
    x, shapes = _matrix(n_tokens, D_IN, dtype, padding), [(n_tokens, d_out) for d_out in GROUP[:members]]
    weights, biases, _, b, scalings, _ = zip(*calls, strict=True)
    FusedGroupLinear(x, calls, shapes)(x, weights, biases, b, scalings, ss)


def group_grad_s_b(r: int, dtype: torch.dtype, adapter: str | None, members: int) -> int:
    """Runs the pass over every dy for dS and db of a group."""
    dys = [_matrix(N_TOKENS, d_out, dtype) for d_out in GROUP[:members]]
    ss = [_thin(N_TOKENS, r, dtype, adapter) for _ in dys]
    b = [_matrix(d_out, r, _adapter(adapter, dtype)) for d_out in GROUP[:members]]
    dss, dbs = GroupGradSB(dys, ss, b, (True, True))(dys, ss, b, [2.0] * members)
    return size(*dys, *ss, *b, *dss, *dbs)


def group_grad_a(r: int, dtype: torch.dtype, adapter: str | None, members: int) -> int:
    """Runs the pass over x for da of a group."""
    x, ds = _matrix(N_TOKENS, D_IN, dtype), [_thin(N_TOKENS, r, dtype, adapter) for _ in range(members)]
    a = [_matrix(r, D_IN, _adapter(adapter, dtype)) for _ in range(members)]
    return size(x, *ds, *GroupGradA(x, ds[0].dtype, a)(x, ds))


def group_grad_x(
    r: int, dtype: torch.dtype, adapter: str | None, strategy: str, padding: int, dropout: float, members: int
) -> None:
    n_tokens, parts = _gemm_tokens(strategy), []
    for d_out in GROUP[:members]:
        dy, weight = _matrix(n_tokens, d_out, dtype, padding), _matrix(d_out, D_IN, dtype, padding)
        ds, a = _thin(n_tokens, r, dtype, adapter), _matrix(r, D_IN, _adapter(adapter, dtype))
        parts.append((dy, weight, ds, a, _keep(dropout)))
    with tiles.assume(strategy=strategy):
        layer.group_grad_x(_matrix(n_tokens, D_IN, dtype), parts)


def halves(r: int, dtype: torch.dtype) -> int:
    """Splits a float32 factor beside bfloat16 activations."""
    a = _matrix(r, D_IN, torch.float32)
    return size(a, Halves(a, above=True)(a))


# ---- Experts


def _experts(
    r: int, dtype: torch.dtype, adapter: str | None, n_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns rows of x or dy, a, b, S or dS, and the offsets of experts with as many rows each."""
    a, b = (torch.empty(EXPERTS, *shape, dtype=_adapter(adapter, dtype)) for shape in ((r, D_IN), (D_OUT, r)))
    offsets = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (n_rows // EXPERTS)
    return _matrix(n_rows, D_IN, dtype), a, b, _thin(n_rows, r, dtype, adapter), offsets


def expert_project(r: int, dtype: torch.dtype, adapter: str | None, tokens: str, forward: bool) -> int:
    """Runs the product for S, or backward for dS. ``tokens`` is "many" or "short" (small blocks of rows)."""
    rows, a, b, thin, offsets = _experts(r, dtype, adapter, {"many": N_TOKENS, "short": SHORT}[tokens])
    if forward:
        experts.project(rows, a, offsets)
    else:
        experts.grad_s(rows, b, 2.0, offsets)
    return size(rows, a, thin)


def expert_update(r: int, dtype: torch.dtype, adapter: str | None, forward: bool) -> int:
    """Runs the update of y, or backward of dx."""
    rows, a, b, thin, offsets = _experts(r, dtype, adapter, N_TOKENS)
    experts.add_product(rows, thin, b.mT if forward else a, 2.0, offsets)
    return size(rows, rows, a, thin)


def expert_grads(r: int, dtype: torch.dtype, adapter: str | None) -> int:
    rows, a, b, thin, offsets = _experts(r, dtype, adapter, N_TOKENS)
    gradients = experts.grad_factors(rows, rows, thin, thin, a, b, 2.0, offsets, True, True)
    return size(rows, rows, thin, thin, *gradients)


def _batched(
    r: int, dtype: torch.dtype, adapter: str | None, n_rows: int, aligned: bool
) -> tuple[torch.Tensor, AdapterTable, torch.Tensor, torch.Tensor]:
    """Returns rows of x or y, the table of as many adapters as there are experts, and rows and ends of as many rows
    each. The factors start at multiples of 16 bytes if ``aligned``."""
    factor = lambda *shape: torch.empty(r * D_IN + 1, dtype=_adapter(adapter, dtype))[not aligned :][: r * D_IN].view(
        shape
    )
    a, b = ([factor(*shape) for _ in range(EXPERTS)] for shape in ((r, D_IN), (D_OUT, r)))
    rows, offsets = torch.arange(n_rows, dtype=torch.int32), torch.arange(1, EXPERTS + 1, dtype=torch.int32)
    return (
        _matrix(n_rows, D_IN, dtype),
        batched.adapter_table(a, b, [2.0] * EXPERTS),
        rows,
        offsets * (n_rows // EXPERTS),
    )


def batched_project(r: int, dtype: torch.dtype, adapter: str | None, tokens: str, aligned: bool) -> int:
    """Runs S of several adapters. ``tokens`` is "many" or "short" (small blocks of rows)."""
    x, table, *places = _batched(r, dtype, adapter, {"many": N_TOKENS, "short": SHORT}[tokens], aligned)
    return size(x, *table.lora_A, *places, batched.project(x, table, *places))


def batched_update(r: int, dtype: torch.dtype, adapter: str | None, tokens: str, aligned: bool) -> int:
    """Runs the update of y of several adapters. ``tokens`` is "many" or "few" (small blocks of rows)."""
    y, table, *places = _batched(r, dtype, adapter, {"many": N_TOKENS, "few": FEW}[tokens], aligned)
    s = _thin(len(y), r, dtype, adapter)
    batched.add_product(y, s, table, *places)
    return size(y, y, *table.lora_B, *places, s)


def weight_norms(r: int, dtype: torch.dtype, adapter: str | None, transposed: bool = False) -> int:
    """Runs the norms of DoRA, of a weight that is stored transposed, too."""
    weight = _matrix(D_IN, D_OUT, dtype).t() if transposed else _matrix(D_OUT, D_IN, dtype)
    a, b = _matrix(r, D_IN, _adapter(adapter, dtype)), _matrix(D_OUT, r, _adapter(adapter, dtype))
    return size(weight, a, b, dora.weight_norms(weight, a, b, 2.0))


def column_scale(r: int, dtype: torch.dtype, bias: bool, backward: bool) -> int:
    """Runs the column scale of DoRA, or its backward."""
    u, (magnitude, norms, of_bias) = _matrix(N_TOKENS, D_OUT, dtype), torch.empty(3, D_OUT)
    if backward:
        dy = _matrix(N_TOKENS, D_OUT, dtype)
        return size(dy, u, magnitude, norms, *dora.column_scale_backward(dy, u, magnitude, norms))
    y = dora.column_scale(u, magnitude, norms, of_bias if bias else None)
    return size(u, magnitude, norms, of_bias if bias else None, y)


def scaled_update(r: int, dtype: torch.dtype, adapter: str | None, bias: bool) -> int:
    """Runs what follows the product x Wᵀ of a DoRA layer."""
    base, s = _matrix(N_TOKENS, D_OUT, dtype), _thin(N_TOKENS, r, dtype, adapter)
    b, (magnitude, norms, of_bias) = _matrix(D_OUT, r, _adapter(adapter, dtype)), torch.empty(3, D_OUT)
    vectors = magnitude, norms, of_bias if bias else None
    return size(base, s, b, *vectors, ScaledUpdate(base, b, base.shape, bias)(base, s, b, *vectors, 2.0))


def scaled_grads(r: int, dtype: torch.dtype, adapter: str | None) -> int:
    """Runs the pass over dy of a DoRA layer."""
    dy, base, s = (*(_matrix(N_TOKENS, D_OUT, dtype) for _ in range(2)), _thin(N_TOKENS, r, dtype, adapter))
    b, (magnitude, norms) = _matrix(D_OUT, r, _adapter(adapter, dtype)), torch.empty(2, D_OUT)
    operands = dy, base, s, b, magnitude, norms
    return size(*operands, *ScaledGrads(dy, s, b, magnitude, (True,) * 4)(*operands, 2.0))


# ---- The step

NUMBERS = adamw.Settings((1e-3, 0.9, 0.999, 1e-8, 0.1) * 2)


def _pairs(r: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    a = [torch.zeros(r, d_in, dtype=dtype) for d_in, _ in PAIRS]
    return a, [torch.zeros(d_out, r, dtype=dtype) for _, d_out in PAIRS]


def gram(r: int, dtype: torch.dtype) -> int:
    (a, b), (da, db) = _pairs(r, dtype), _pairs(r, dtype)
    return size(*a, *b, *da, *db, *grams.gram(a, b, da, db, grams.Grams._fields))


def adamw_step(
    r: int,
    dtype: torch.dtype,
    add: bool,
    matrix: bool,
    scale: bool,
    gram: bool,
    numbers: bool = False,
    stochastic: bool = False,
) -> int:
    """Runs a step with p and g in ``dtype``, m and v in float32. With ``numbers`` hyperparameters are kernel arguments,
    as in the optimizer, else they are in a tensor."""
    a, b = _pairs(r, dtype)
    n, is_a = len(a + b), [True] * len(a) + [False] * len(b)
    p, g = a + b, [torch.zeros_like(x) for x in a + b]
    m, v = ([torch.zeros_like(x, dtype=torch.float32) for x in p] for _ in range(2))
    steps, rows = torch.ones(n), torch.zeros(n, r) if scale else None
    additive, matrices = torch.zeros(n) if add else None, torch.zeros(n, r, r) if matrix else None
    keys = torch.zeros(n, dtype=torch.int64) if stochastic else None
    work = adamw.StepWork(additive, matrices, rows, rows, gram, keys)
    if numbers:
        factors = [factors.with_gradients(g) for factors in pointer_table.build_tables([p, m, v], is_a, range(n))]
        summed = adamw.step_tables_(factors, n, r, NUMBERS, steps, work)
    else:
        hyper = torch.ones(1, adamw.HYPER, dtype=torch.float64)
        summed = adamw.step_(list(zip(p, g, m, v, strict=True)), is_a, hyper, steps, work)
    return size(*p, *p, *g, *m, *m, *v, *v, *(t for t in (*work[:4], summed) if t is not None))


def _noise(n: int, stochastic: bool) -> Noise | None:
    return Noise(torch.ones(n), torch.zeros(n, dtype=torch.int64)) if stochastic else None


def transform(r: int, dtype: torch.dtype, add: bool, stochastic: bool = False) -> int:
    a, b = _pairs(r, dtype)
    n, is_a = len(a + b), [True] * len(a) + [False] * len(b)
    matrices = torch.zeros(n, r, r)
    tables = pointer_table.build_tables([a + b], is_a, range(n))
    transform_tables_(tables, matrices, 0, add, _noise(n, stochastic))
    return 2 * size(*a, *b) + size(matrices)


def muon_step(r: int, dtype: torch.dtype, stochastic: bool = False) -> int:
    """Runs LoRA-Muon's averaging of the momentum, its Grams and its move, all in ``dtype``."""
    a, b = _pairs(r, dtype)
    n, p = len(a + b), a + b
    g, m = ([torch.zeros_like(x) for x in p] for _ in range(2))
    tables = pointer_table.build_tables([p, m], [True] * len(a) + [False] * len(b), range(n))
    matrices = torch.zeros(n, r, r)
    momentum.average_([factors.with_gradients(g) for factors in tables], 0.95, torch.ones(n))
    summed = grams.table_grams([factors.with_column(1) for factors in tables], len(a), r, ("ka", "kb", "kp", "kq"))
    momentum.move_(tables, matrices, NUMBERS, _noise(n, stochastic))
    return size(*g, *m, *m, *p, *m, summed, *p, *p, *m, matrices)


def imbalance(r: int, dtype: torch.dtype) -> None:
    square = torch.zeros(3, r, r, dtype=dtype)
    regularizers.imbalance(square, square, torch.zeros(3), 1e-3, 1e-3, 0.1)


def scale_reg(r: int, dtype: torch.dtype) -> None:
    square, row = torch.zeros(3, r, r, dtype=dtype), torch.zeros(3)
    regularizers.scale_reg(square, square, row, row, 0.1, 1e-8)


def muon(r: int, dtype: torch.dtype) -> None:
    square = torch.zeros(3, r, r, dtype=dtype)
    inverse_mean.muon(square, square, square, square, 1e-3, 1e-3, 3e-4)


def spd_solve(r: int, dtype: torch.dtype) -> None:
    matrices = torch.zeros(3, r, r, dtype=dtype)
    spd.spd_solve(matrices, matrices, damping=0.5)


def spd_inverse(r: int, dtype: torch.dtype) -> None:
    spd.spd_inverse(torch.zeros(3, r, r, dtype=dtype), 0.5)


def small_inverse(r: int, dtype: torch.dtype) -> None:
    inverse.small_inverse(torch.zeros(3, r, r, dtype=dtype))


def cayley_transform(r: int, dtype: torch.dtype, backward: bool) -> None:
    free_a, free_b = _pairs(r, dtype)
    scales = [torch.zeros(r) for _ in free_a]
    if backward:
        inverses = [torch.zeros(r, r, dtype=torch.float64) for _ in free_a]
        cayley.cayley_backward(free_a, free_b, scales, inverses, *_pairs(r, torch.float32))
    else:
        cayley.cayley(free_a, free_b, scales)


def scalora(r: int, dtype: torch.dtype, solver: str) -> None:
    ka, kb, kp, kq, k = torch.zeros(5, 3, r, r, dtype=dtype)
    x, active, _ = scalora_system.scalora_solve(ka, kb, kp, kq, k, solver)
    scalora_scales.scales(x, active, torch.ones((), dtype=torch.float64), torch.ones(3), 0.25, None)


def merge_weights(r: int, dtype: torch.dtype, rounding: str, scaled: bool = False, seed_in_memory: bool = False) -> int:
    """Merges adapters into weights of ``dtype``: float32 ones, or with ``scaled`` what those of 16 bits lose."""
    a, b = _pairs(r, dtype if scaled else torch.float32)
    weights = [_matrix(d_out, d_in, dtype) for d_in, d_out in PAIRS]
    residuals = [torch.empty_like(w) for w in weights] if rounding == "compensated" else []
    scale = torch.zeros(len(a), r)
    scales = Scaled(torch.ones(len(a)), scale, scale) if scaled else None
    seed = torch.full((), SEED, dtype=torch.int64) if seed_in_memory else SEED
    add_low_rank.add_low_rank_(weights, a, b, scale, rounding, seed, residuals or None, scales)
    return 2 * size(*weights, *residuals) + size(*a, *b, scale)


# ---- The table

_GEMMS = ("lora_linear_kernel", "lora_gluon_linear_kernel", "lora_four_bit_kernel", "lora_update_kernel")
_LAYER = {"bfloat16": (8, 16, 32, 64, 128, 256), "float16": (16,), "float32": (16, 128, 256)}
_ADAPTERS, _DROPOUT = (None, "float32"), (0.0, 0.1)
_GEMM = variants(adapter=_ADAPTERS, strategy=("fused",), padding=(0, 4))  # rows of 4 more: no TMA
_GEMM += variants(adapter=_ADAPTERS, strategy=("cublas", "gluon"), padding=(0,))
_EXPERTS = {"bfloat16": (8, 16, 64, 256), "float16": (16, 256), "float32": (16, 256)}
_BATCHED = {"bfloat16": (16, 64, 256), "float16": (16, 256), "float32": (16, 256)}
_DORA = {"bfloat16": (16, 64, 256), "float16": (16, 64, 256), "float32": (16, 64, 256)}
_GROUP = {"bfloat16": (8, 16, 32, 64), "float16": (16,), "float32": (16,)}
_GROUP_GEMM = variants(strategy=("cublas",), padding=(0,), adapter=_ADAPTERS, members=(2, 4), dropout=_DROPOUT)
_GROUP_GEMM += variants(strategy=("fused",), padding=(4, 0), adapter=_ADAPTERS, members=(2, 3, 4), dropout=_DROPOUT)
_GROUP_LINEAR = variants(padding=(4, 0), adapter=_ADAPTERS, members=(2, 4))
_FOUR_BIT = {"bfloat16": (8, 16, 64, 256), "float16": (16,), "float32": (16, 256)}
_FOUR_BIT_FORMS = variants(padding=(4, 0), adapter=_ADAPTERS)  # the default tests compile the last one
_SMALL, _SQUARE = {"float32": (16, 32, 64, 128, 256)}, {"float32": (1, 16, 64, 128)}
_WORK = ("add", "matrix", "scale", "gram")
_WORKS = [{name: name in on for name in _WORK} for on in ((), ("matrix",), ("gram",), ("matrix", "gram"), _WORK)]
_ADD_MATRIX = _WORKS[1] | {"add": True}  # of ScaleReg and ScaledAdamW together
_STOCHASTIC = [w | {"numbers": True, "stochastic": True} for w in (_WORKS[0], _WORKS[2], _ADD_MATRIX, _WORKS[-1])]
_NARROW = {"bfloat16": (16, 64, 128), "float16": (16,)}
_STEPS = [work | {"numbers": True} for work in _WORKS] + [_WORKS[0], _WORKS[-1]]

OPS = {
    "project": Op(
        project, _LAYER, variants(adapter=_ADAPTERS, dropout=_DROPOUT, tokens=("many", "short", "few")),
        ("lora_project_kernel",), counted=True,
    ),
    "linear": Op(linear, _LAYER, [*_GEMM, _GEMM[0] | {"bias": False}], _GEMMS),
    "few_tokens": Op(few_tokens, _LAYER, variants(adapter=_ADAPTERS, dropout=_DROPOUT), ("lora_update_kernel",)),
    "halves": Op(halves, {"bfloat16": (64,)}, counted=True),
    "grad_s_b": Op(grad_s_b, _LAYER, variants(adapter=_ADAPTERS), ("lora_grad_s_b_kernel",), counted=True),
    "grad_a": Op(
        grad_a, _LAYER, variants(adapter=_ADAPTERS, dropout=_DROPOUT), ("lora_grad_a_kernel",), counted=True
    ),
    "grad_x": Op(
        grad_x, _LAYER, [form | {"dropout": p} for form in _GEMM for p in _DROPOUT],
        _GEMMS,
    ),
    "four_bit_linear": Op(
        four_bit, _FOUR_BIT, [*({"bias": False} | form for form in _FOUR_BIT_FORMS[:1]), *_FOUR_BIT_FORMS], _GEMMS
    ),
    "four_bit_grad_x": Op(
        four_bit_dx, _FOUR_BIT,
        [form | {"dropout": p, "nested": p > 0} for form in _FOUR_BIT_FORMS for p in _DROPOUT], _GEMMS,
    ),
    "group_project": Op(
        group_project, _GROUP, variants(adapter=_ADAPTERS, tokens=("many", "short", "few"), members=(2, 4)),
        ("lora_group_project_kernel",), counted=True,
    ),
    "group_linear": Op(
        group_linear, _GROUP, [*_GROUP_LINEAR, _GROUP_LINEAR[0] | {"bias": True}], ("lora_group_linear_kernel",)
    ),
    "group_grad_s_b": Op(
        group_grad_s_b, _GROUP, variants(adapter=_ADAPTERS, members=(2, 4)), ("lora_group_grad_s_b_kernel",),
        counted=True,
    ),
    "group_grad_a": Op(
        group_grad_a, _GROUP, variants(adapter=_ADAPTERS, members=(2, 4)), ("lora_group_grad_a_kernel",), counted=True
    ),
    "group_grad_x": Op(
        group_grad_x, _GROUP, _GROUP_GEMM, ("lora_group_grad_x_kernel", "lora_group_update_kernel")
    ),
    "expert_project": Op(
        expert_project, _EXPERTS, variants(adapter=_ADAPTERS, tokens=("many", "short"), forward=(True, False)),
        ("lora_expert_project_kernel",), counted=True,
    ),
    "expert_update": Op(
        expert_update, _EXPERTS, variants(adapter=_ADAPTERS, forward=(True, False)), ("lora_expert_update_kernel",),
        counted=True,
    ),
    "expert_grads": Op(
        expert_grads, _EXPERTS, variants(adapter=_ADAPTERS), ("lora_expert_grads_kernel",), counted=True
    ),
    "batched_project": Op(
        batched_project, _BATCHED, variants(adapter=_ADAPTERS, tokens=("many", "short"), aligned=(True, False)),
        ("lora_batched_project_kernel",), counted=True,
    ),
    "batched_update": Op(
        batched_update, _BATCHED, variants(adapter=_ADAPTERS, tokens=("many", "few"), aligned=(True, False)),
        ("lora_batched_update_kernel",), counted=True,
    ),
    "weight_norms": Op(
        weight_norms, {"bfloat16": (16, 256), "float16": (16,), "float32": (16, 256)},
        variants(adapter=_ADAPTERS, transposed=(True, False)), ("lora_weight_norms_kernel",), counted=True,
    ),
    "column_scale": Op(
        column_scale, {"bfloat16": (1,), "float32": (1,)},
        ({"bias": False, "backward": False}, {"bias": True, "backward": False}, {"bias": False, "backward": True}),
        counted=True,
    ),
    "scaled_update": Op(
        scaled_update, _DORA, variants(adapter=_ADAPTERS, bias=(False, True)), ("lora_scaled_update_kernel",),
        counted=True,
    ),
    "scaled_grads": Op(
        scaled_grads, _DORA, variants(adapter=_ADAPTERS), ("lora_scaled_grads_kernel",), counted=True
    ),
    "gram": Op(
        gram, {"float32": (1, 16, 32, 64, 128), "bfloat16": (8, 64)}, tensor_cores=("lora_gram_kernel",), counted=True
    ),
    "adamw_step": Op(adamw_step, {"float32": (1, 16, 64, 128), "bfloat16": (16, 32)}, _STEPS, counted=True),
    "adamw_step_stochastic": Op(adamw_step, _NARROW, _STOCHASTIC, counted=True),
    "transform": Op(
        transform, {"float32": (8, 16, 64, 128), "bfloat16": (16, 64)}, variants(add=(False, True)), counted=True
    ),
    "transform_stochastic": Op(transform, _NARROW, variants(add=(True,), stochastic=(True,)), counted=True),
    "muon_step": Op(muon_step, {"float32": (1, 16, 64, 128), "bfloat16": (16, 32)}, counted=True),
    "muon_step_stochastic": Op(muon_step, _NARROW, variants(stochastic=(True,)), counted=True),
    "imbalance": Op(imbalance, _SQUARE),
    "scale_reg": Op(scale_reg, _SQUARE),
    "muon": Op(muon, _SMALL),
    "spd_solve": Op(spd_solve, _SMALL),
    "spd_inverse": Op(spd_inverse, _SMALL),
    "small_inverse": Op(small_inverse, _SMALL),
    "cayley": Op(cayley_transform, {"float32": (16, 64, 256), "bfloat16": (64, 128)}, variants(backward=(False, True))),
    "scalora": Op(scalora, {"float32": (32, 128)}, variants(solver=("nnls", "paper"))),
    "merge": Op(
        merge_weights, {"bfloat16": (8, 64), "float16": (16,)}, variants(rounding=("stochastic", "compensated")),
        counted=True,
    ),
    "merge_scaled": Op(
        merge_weights, {"bfloat16": (8, 64), "float16": (16,)}, variants(rounding=("stochastic",), scaled=(True,)),
        counted=True,
    ),
}  # fmt: skip
