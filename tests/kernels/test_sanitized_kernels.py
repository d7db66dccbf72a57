"""Runs every kernel of the package in every way under the sanitizer, which must have no finding. Shapes are small and
odd by default, and larger with ``-m budget``."""

import importlib
import itertools
import pkgutil
from functools import partial

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("checked in Triton's interpreter, which a CUDA machine does not use", allow_module_level=True)

from launching import poisoned_empty, randn
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import lora_fast as lf
import lora_fast.kernels
from lora_fast import methods as M
from lora_fast.batches.pairs import Pair
from lora_fast.kernels import batched, cayley, dora, experts, limits, linear, records, tiles
from lora_fast.kernels.inspection import sanitizer
from lora_fast.kernels.linalg import inverse, spd
from lora_fast.kernels.linear import cublas as thin
from lora_fast.kernels.linear import four_bit
from lora_fast.kernels.pairs import (
    adamw,
    add_low_rank,
    gram,
    inverse_mean,
    regularizers,
    scalora_scales,
    scalora_system,
    transform,
)

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about lanes whose values are not used


def run_layer(
    shape=(33, 40, 72), r=5, padding=8, dtype=FLOAT32, adapter=None, rounded=False, strategy="fused", thin="pass",
    dropout=0.0, seed_in_memory=False, bias=True, arch=90,
) -> None:  # fmt: skip
    """Runs forward and backward. ``shape`` is (tokens, d_in, d_out). On arch 90 the fused GEMM uses TMA for 16-bit
    operands if sizes and padding are multiples of 8."""
    n_tokens, d_in, d_out = shape
    matrix = lambda rows, columns, dtype: randn(rows, columns + padding, dtype=dtype)[:, :columns]
    x, dy, weight = matrix(n_tokens, d_in, dtype), matrix(n_tokens, d_out, dtype), matrix(d_out, d_in, dtype)
    a, b = matrix(r, d_in, adapter or dtype), matrix(d_out, r, adapter or dtype)
    bias = randn(d_out, dtype=dtype) if bias else None
    seed = torch.tensor(1 << 40) if seed_in_memory else 1 << 40
    keep = linear.draw_mask(x, dropout, seed) if dropout else None
    with tiles.assume(arch=arch, strategy=strategy, thin=thin), poisoned_empty():
        _, s = linear.forward(x, weight, bias, a, b, 2.0, keep, rounded)
        linear.backward(dy, x, s, weight, a, b, 2.0, keep, rounded)


def run_group(
    shape=(33, 40), d_outs=(72, 24, 8), ranks=(5, 16, 3), padding=8, dtype=FLOAT32, adapter=None, strategy="fused",
    thin="pass", dropout=0.0, arch=90,
) -> None:  # fmt: skip
    """Runs forward and backward of a group. ``shape`` is (tokens, d_in)."""
    n_tokens, d_in = shape
    matrix = lambda rows, columns, dtype: randn(rows, columns + padding, dtype=dtype)[:, :columns]
    x, members, dys = matrix(n_tokens, d_in, dtype), [], []
    for i, (d_out, r) in enumerate(zip(d_outs, ranks, strict=True)):
        factors = matrix(r, d_in, adapter or dtype), matrix(d_out, r, adapter or dtype)
        keep = linear.draw_mask(x, dropout, (1 << 40) + i) if dropout else None
        members.append((matrix(d_out, d_in, dtype), None, *factors, 2.0, keep))
        dys.append(matrix(n_tokens, d_out, dtype))
    needed = [True] * len(members)
    with tiles.assume(arch=arch, strategy=strategy, thin=thin), poisoned_empty():
        _, ss = linear.group_forward(x, members)
        linear.group_backward(dys, x, ss, members, False, (True, needed, needed))


def run_four_bit(
    shape=(19, 192, 37), r=5, blocksize=128, nested=False, padding=3, dtype=FLOAT32, adapter=FLOAT32, dropout=0.0,
    arch=90,
) -> None:  # fmt: skip
    """Runs both GEMMs over a 4-bit weight. ``shape`` is (tokens, d_in, d_out)."""
    n_tokens, d_in, d_out = shape
    n = -(-d_in * d_out // blocksize)
    byte = lambda count: randn(count).abs().mul(40).to(torch.uint8)
    second = records.NestedScales(randn(256), randn(-(-n // 256)), randn(1)) if nested else None
    absmax = byte(n) if nested else randn(n)
    weight = records.FourBit(byte(d_in * d_out // 2), randn(16), absmax, blocksize, (d_out, d_in), second)
    x, dy = (randn(n_tokens, width + padding, dtype=dtype)[:, :width] for width in (d_in, d_out))
    s, a, b = randn(n_tokens, r), randn(r, d_in, dtype=adapter), randn(d_out, r, dtype=adapter)
    with tiles.assume(arch=arch), poisoned_empty():
        four_bit.four_bit_linear(x, weight, None if padding else randn(d_out, dtype=dtype), s, b, 2.0)
        four_bit.four_bit_grad_x(dy, weight, s, a, linear.draw_mask(dy, dropout, 1 << 40) if dropout else None)


def run_experts(
    counts=(3, 0, 40, 17, 0), rest=5, shape=(40, 72), r=5, padding=8, dtype=FLOAT32, adapter=None, wrong=0, arch=90
) -> None:
    """Runs the products and gradients of experts with these numbers of rows. ``shape`` is (d_in, d_out). The offsets
    are by ``wrong`` too large."""
    n, (d_in, d_out), n_experts = sum(counts) + rest, shape, len(counts)
    offsets = torch.tensor(counts).cumsum(0).int() + wrong
    x, dy = (randn(n, d + padding, dtype=dtype)[:, :d] for d in shape)
    a, b = randn(n_experts, r, d_in, dtype=adapter or dtype), randn(d_out, r, n_experts, dtype=adapter or dtype)
    b = b.permute(2, 0, 1)
    with tiles.assume(arch=arch), poisoned_empty():
        s, ds = experts.project(x, a, offsets), experts.grad_s(dy, b, 2.0, offsets)
        experts.grad_factors(x, dy, s, ds, a, b, 2.0, offsets)
        experts.add_product(dy, s, b.mT, 2.0, offsets)
        experts.add_product(x, ds, a, 1.0, offsets)


def run_batched(
    counts=(3, 0, 40, 17), rest=5, shape=(40, 72), ranks=(5, 16, 3, 8), padding=8, dtype=FLOAT32, adapter=None, wrong=0,
    arch=90,
) -> None:  # fmt: skip
    """Runs S and the update of several adapters with these numbers of rows. ``shape`` is (d_in, d_out). The ends are by
    ``wrong`` too large."""
    n, (d_in, d_out) = sum(counts) + rest, shape
    x, y = (randn(n, d + padding, dtype=dtype)[:, :d] for d in shape)
    a, b = (
        [randn(*s, dtype=adapter or dtype) for s in sizes]
        for sizes in ([(r, d_in) for r in ranks], [(d_out, r) for r in ranks])
    )
    rows, ends = torch.arange(n).flip(0).int(), torch.tensor(counts).cumsum(0).int() + wrong
    with tiles.assume(arch=arch), poisoned_empty():
        table = batched.adapter_table(a, b, [2.0] * len(ranks))
        batched.add_product(y, batched.project(x, table, rows, ends), table, rows, ends)


def run_dora(
    shape=(33, 40, 72), r=5, padding=8, dtype=FLOAT32, adapter=None, transposed=False, bias=True, arch=90
) -> None:  # fmt: skip
    """Runs the norms, the column scale and a layer, with their gradients. ``shape`` is (tokens, d_in, d_out)."""
    n_tokens, d_in, d_out = shape
    matrix = lambda rows, columns, dtype: randn(rows, columns + padding, dtype=dtype)[:, :columns]
    weight = matrix(d_in, d_out, dtype).t() if transposed else matrix(d_out, d_in, dtype)
    a, b = matrix(r, d_in, adapter or dtype), matrix(d_out, r, adapter or dtype)
    u, dy, magnitude = matrix(n_tokens, d_out, dtype), matrix(n_tokens, d_out, dtype), randn(d_out)
    x, bias, rounded = matrix(n_tokens, d_in, dtype), magnitude if bias else None, not bias and adapter is not None
    with tiles.assume(arch=arch), poisoned_empty():
        norms = dora.weight_norms(weight, a, b, 2.0)
        dora.column_scale(u, magnitude, norms, bias)
        for need_u in (True, False):
            dora.column_scale_backward(dy, u, magnitude, norms, need_u)
        _, s, kept = dora.forward(x, weight, bias, a, b, magnitude, norms, 2.0, rounded)
        for needs in ((True,) * 4, (False, True, False, True), (True, False, True, False)):
            dora.backward(dy, x, s, kept, weight, a, b, magnitude, norms, 2.0, rounded, needs)


def factor_pairs(ranks, lengths, dtype=FLOAT32):
    """Returns a (r, d_in) and b (d_out, r) of every pair."""
    a = [randn(r, d, seed=i, dtype=dtype) for i, (r, d) in enumerate(zip(ranks, lengths, strict=True))]
    b = [randn(d, r, seed=i + 50, dtype=dtype) for i, (r, d) in enumerate(zip(ranks, reversed(lengths), strict=True))]
    return a, b


def run_gram(ranks, lengths, dtype=FLOAT32, gradient_dtype=FLOAT32) -> None:
    factors, gradients = factor_pairs(ranks, lengths, dtype), factor_pairs(ranks, lengths, gradient_dtype)
    with poisoned_empty():
        gram.gram(*factors, *gradients, gram.Grams._fields)


def run_step(ranks, lengths, dtype=FLOAT32, state=FLOAT32, add=False, matrix=False, scale=False, want_gram=False):
    a, b = factor_pairs(ranks, lengths, dtype)
    n, r_max, is_a = len(a + b), max(ranks), [True] * len(a) + [False] * len(b)
    factors = [(p, torch.ones_like(p), *(torch.ones_like(p, dtype=state) for _ in range(2))) for p in a + b]
    hyper, steps = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1]] * n, dtype=torch.float64), torch.arange(0.0, n)
    scales = randn(n, r_max) if scale else None
    additive, matrices = randn(n) if add else None, randn(n, r_max, r_max) if matrix else None
    with poisoned_empty():
        adamw.step_(factors, is_a, hyper, steps, adamw.StepWork(additive, matrices, scales, scales, want_gram))


def run_optimizer(methods, ranks, lengths, dtype=FLOAT32, experts=1, rests=False) -> None:
    """Runs one optimizer step for the factors of each rank, with the factors of ``experts`` stored interleaved. With
    ``rests`` it also runs a second step, in which the first pair of each rank has no gradients."""
    for r in dict.fromkeys(ranks):
        chosen = [length for rank, length in zip(ranks, lengths, strict=True) if rank == r]
        a, b = factor_pairs([r * experts] * len(chosen), chosen, dtype)
        pairs = [Pair(f"{i}", *both, experts=experts) for i, both in enumerate(zip(a, b, strict=True))]
        for p in a + b:
            p.grad = torch.ones_like(p.requires_grad_())
        with lf.set_backend("triton"), poisoned_empty():
            optimizer = lf.optim.LoRAAdamW(pairs, methods=methods)
            optimizer.step()
            if rests:
                pairs[0].a.grad = pairs[0].b.grad = None
                optimizer.step()


def run_transform(ranks, lengths, dtype=FLOAT32) -> None:
    a, b = factor_pairs(ranks, lengths, dtype)
    matrices = randn(len(a + b), max(ranks), max(ranks))
    for add in (False, True):
        transform.transform_(a + b, [True] * len(a) + [False] * len(b), matrices, add)


def run_middle(r, in_memory) -> None:
    grams, rows = spd_matrices(3, r), torch.ones(3)
    rate = torch.tensor(1e-3) if in_memory else 1e-3
    with poisoned_empty():
        regularizers.imbalance(grams, grams, rows, rate, rate, 0.1)
        regularizers.scale_reg(grams, grams, rows, rows, 0.1, 1e-8)


def run_muon(r, in_memory) -> None:
    grams = spd_matrices(3, r)
    rate = torch.tensor(1e-3) if in_memory else 1e-3
    with poisoned_empty():
        inverse_mean.muon(grams, grams, grams, grams, rate, rate, 3e-4)


def spd_matrices(n, r):
    x = randn(n, r, r)
    return x @ x.mT / r + 0.1 * torch.eye(r)


def run_solve(r, k=3, n=3) -> None:
    """Runs both solves and both inverses. The last matrix is not definite, so that its inverse needs a second
    attempt."""
    matrices = spd_matrices(n, r)
    matrices[-1] = 1.0
    with poisoned_empty():
        spd.spd_solve(matrices, randn(n, r, k), 0.1)
        spd.spd_solve(matrices, randn(n, r, k))
        spd.spd_inverse(matrices, 0.0)
        inverse.small_inverse(matrices + torch.eye(r))


def run_scalora(r, solver, in_memory) -> None:
    """Runs ScaLoRA's solver and scales. The rows are correlated, so that the unconstrained optimum of most pairs has
    negative values."""
    a, b, g = randn(3, r, 3 * r + 5) + 1.0, randn(3, 2 * r + 7, r) + 1.0, randn(3, 2 * r + 7, 3 * r + 5)
    p, q = b.mT @ g, g @ a.mT
    with poisoned_empty():
        x, active, _ = scalora_system.scalora_solve(a @ a.mT, b.mT @ b, p @ p.mT, q.mT @ q, p @ a.mT, solver)
        kappa = torch.tensor(1.0, dtype=torch.float64) if in_memory else 1.0
        scalora_scales.scales(x, active, kappa, torch.ones(3), 0.25, 4.0 if in_memory else None)


def run_in_memory(run, *args, **options) -> None:
    """Runs small matrices in memory, as if they were too large for registers, with fewer programs than matrices."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (scalora_system, inverse, inverse_mean, spd):
            patch.setattr(module, "IN_REGISTERS", 1)
        for module in (cayley, inverse, inverse_mean, spd):
            patch.setattr(module, "SLOTS", 2)
        run(*args, **options)


def run_merge(layers, dtype, rounding, seed_in_memory) -> None:
    """Runs a merge. ``layers`` has (r, d_out, d_in) for each layer."""
    weights = [randn(d_out, d_in, seed=i, dtype=dtype) for i, (_, d_out, d_in) in enumerate(layers)]
    a = [randn(r, d_in, seed=i) for i, (r, _, d_in) in enumerate(layers)]
    b = [randn(d_out, r, seed=i) for i, (r, d_out, _) in enumerate(layers)]
    residuals = [torch.zeros_like(w) for w in weights] if rounding == "compensated" else None
    seed = torch.tensor(7) if seed_in_memory else 7
    add_low_rank.add_low_rank_(weights, a, b, randn(len(layers), max(r for r, *_ in layers)), rounding, seed, residuals)


def run_cayley(ranks, lengths, dtype=FLOAT32, scaled=False) -> None:
    free_a, free_b = factor_pairs(ranks, lengths, dtype)
    scales = [randn(r).abs() for r in ranks] if scaled else None
    with poisoned_empty():
        a, b, inverses = cayley.cayley(free_a, free_b, scales)
        cayley.cayley_backward(free_a, free_b, scales, inverses, [x.cos() for x in a], [x.sin() for x in b])


def run_halves(n_rows, n_columns) -> None:
    matrix = randn(n_rows, n_columns + 3)[:, :n_columns]
    for above in (False, True):
        thin.Halves(matrix, above)(matrix, 2.0)


WAYS = [("fused", "pass"), ("fused", "cublas"), ("cublas", "short"), ("cublas", "cublas"), ("cublas", "split")]
DTYPES = {"float32": (FLOAT32, None), "float16": (FLOAT16, None), "bfloat16": (BFLOAT16, FLOAT32)}  # x's, the factors'
LAYERS = {
    f"layer {strategy} {way} {name}": {"strategy": strategy, "thin": way, "dtype": dtype, "adapter": adapter}
    for strategy, way in WAYS
    for name, (dtype, adapter) in DTYPES.items()
}
ODD = {"shape": (19, 37, 53), "padding": 3, "bias": False}
RANKS = (33, 64, 100, 256)
MIXED = (5, 16, 1, 9), (37, 600, 5, 24)  # ranks, lengths
ALIGNED = (16, 16), (520, 64)
WORK = {
    "adamw": (),
    "matrix": ("matrix",),
    "add, matrix": ("add", "matrix"),
    "scale": ("scale",),
    "gram": ("want_gram",),
    "everything": ("add", "matrix", "scale", "want_gram"),
}


def layer_runs(rest: bool = False) -> dict:
    """Returns half of a layer's runs, in which each way and each dtype meets both shapes with and without dropout, or
    the other half."""
    runs = {}
    for i, (words, way) in enumerate(LAYERS.items()):
        if i % 2 == rest:
            runs[words] = partial(run_layer, **way)
            rounded = way["adapter"] is not None
            runs[f"{words} odd dropout"] = partial(run_layer, **way, **ODD, r=17, dropout=0.3, rounded=rounded)
        else:
            runs[f"{words} odd"] = partial(run_layer, **way, **ODD)
            runs[f"{words} dropout"] = partial(run_layer, **way, dropout=0.3, seed_in_memory=True)
    return runs


def step_runs() -> dict:
    runs = {}
    for words, names in WORK.items():
        work = dict.fromkeys(names, True)
        runs[f"step {words} mixed"] = partial(run_step, *MIXED, **work)
        runs[f"step {words} bfloat16"] = partial(run_step, *ALIGNED, BFLOAT16, BFLOAT16, **work)
    return runs


def optimizer_runs() -> dict:
    runs = {}
    for method in (M.PiLoRA(), M.LoRAMuon()):
        name = type(method).__name__
        runs[f"{name} mixed"] = partial(run_optimizer, [method], *MIXED)
        runs[f"{name} aligned bfloat16"] = partial(run_optimizer, [method], *ALIGNED, BFLOAT16)
        runs[f"{name} experts"] = partial(run_optimizer, [method], (3, 16), (40, 24), experts=3)
    for name, methods in {"AdamW": [], "PiLoRA": [M.PiLoRA()], "LoRAMuon": [M.LoRAMuon()]}.items():
        runs[f"{name} rests"] = partial(run_optimizer, methods, (3, 3), (5500, 2100), rests=True)
    runs["LoRAMuon chunks"] = partial(run_optimizer, [M.LoRAMuon()], (3, 3), (2100, 5500))
    runs["AdamW of numbers"] = partial(run_optimizer, [], *MIXED)
    return runs


def scalora_runs() -> dict:
    runs = {}
    for solver in limits.SOLVERS:
        runs[f"scalora {solver}"] = partial(run_scalora, 5, solver, False)
        runs[f"scalora {solver} in memory"] = partial(run_in_memory, run_scalora, 9, solver, True)
    return runs


RUNS = {
    **layer_runs(),
    "layer without TMA": partial(run_layer, dtype=FLOAT16, arch=80, dropout=0.1),
    "layer float16 beside float32": partial(run_layer, dtype=FLOAT16, adapter=FLOAT32, r=40),
    "layer partial sums": partial(run_layer, shape=(290, 70, 81), r=3),
    "layer partial sums, dropout": partial(run_layer, shape=(290, 70, 81), r=3, dropout=0.5),
    "layer few tokens, many columns": partial(run_layer, shape=(3, 1100, 70), r=33, strategy="cublas", thin="split"),
    "group": partial(run_group),
    "group odd": partial(run_group, (19, 37), (53, 1), (17, 1), 3, dropout=0.3),
    "group TMA": partial(run_group, dtype=BFLOAT16, adapter=FLOAT32),
    "group TMA dropout": partial(run_group, dtype=FLOAT16, dropout=0.3),
    "group of four": partial(run_group, d_outs=(8, 24, 8, 40), ranks=(4, 4, 4, 4), dtype=BFLOAT16, arch=80),
    "group partial sums": partial(run_group, (290, 70), (81, 81, 5), (3, 3, 3), 3),
    "group split": partial(run_group, dtype=BFLOAT16, strategy="cublas", thin="split", padding=3, dropout=0.3),
    "group split, many columns": partial(run_group, (3, 700), ranks=(33, 5, 40), strategy="cublas", thin="split"),
    "four bit": partial(run_four_bit, nested=True),
    "four bit odd dropout": partial(run_four_bit, (3, 64, 1), 17, dtype=BFLOAT16, dropout=0.3),
    "four bit TMA": partial(run_four_bit, (140, 192, 136), dtype=BFLOAT16, padding=0, nested=True, dropout=0.3),
    "four bit without TMA": partial(run_four_bit, (33, 192, 40), 40, 64, dtype=FLOAT16, adapter=FLOAT16, arch=80),
    "experts": partial(run_experts, dtype=BFLOAT16, adapter=FLOAT32),
    "experts odd": partial(run_experts, (0, 19), 0, (37, 1), 17, 3, FLOAT16, arch=80),
    "experts aligned": partial(run_experts, (16, 0, 32), 0, (64, 48), 16, 0),
    "experts of wrong offsets": partial(run_experts, wrong=200),
    "batched": partial(run_batched, dtype=BFLOAT16, adapter=FLOAT32),
    "batched odd": partial(run_batched, (0, 19), 0, (37, 1), (17, 1), 3, FLOAT16, arch=80),
    "batched aligned": partial(run_batched, (16, 0, 32), 0, (64, 48), (16, 8, 16), 0),
    "batched of wrong ends": partial(run_batched, wrong=200),
    "dora": partial(run_dora),
    "dora odd": partial(run_dora, (19, 37, 53), 17, 3, FLOAT16, FLOAT32, bias=False),
    "dora transposed": partial(run_dora, dtype=BFLOAT16, transposed=True),
    "dora rank 100, partial sums": partial(run_dora, (590, 40, 70), 100, dtype=BFLOAT16, adapter=FLOAT32),
    "halves": partial(run_halves, 5, 333),
    "gram mixed": partial(run_gram, *MIXED, FLOAT16),
    "gram chunks": partial(run_gram, (16, 3), (2100, 4100)),
    "gram aligned": partial(run_gram, *ALIGNED, BFLOAT16, BFLOAT16),
    "gram blocks": partial(run_gram, (70,), (33,)),
    **step_runs(),
    "step chunks": partial(run_step, (3,), (1500,)),
    "step rank 70": partial(run_step, (70, 3), (21, 40), add=True, matrix=True, want_gram=True),
    **optimizer_runs(),
    "transform mixed": partial(run_transform, *MIXED),
    "transform aligned": partial(run_transform, *ALIGNED, BFLOAT16),
    "transform rank 70": partial(run_transform, (70, 3), (21, 40)),
    "middle rank 5": partial(run_middle, 5, False),
    "middle rank 70": partial(run_middle, 70, True),
    "muon rank 5": partial(run_muon, 5, False),
    "muon in memory": partial(run_in_memory, run_muon, 9, True),
    "solve rank 1": partial(run_solve, 1),
    "solve rank 7": partial(run_solve, 7, k=70),
    "solve in memory": partial(run_in_memory, run_solve, 19, k=37),
    **scalora_runs(),
    "merge nearest": partial(run_merge, [(4, 40, 24), (17, 1, 9), (3, 33, 520)], FLOAT32, "nearest", False),
    "merge stochastic": partial(run_merge, [(4, 40, 24), (7, 1, 9), (3, 33, 520)], BFLOAT16, "stochastic", True),
    "merge compensated": partial(run_merge, [(4, 40, 24), (7, 1, 9), (3, 1030, 40)], FLOAT16, "compensated", False),
    "merge aligned": partial(run_merge, [(16, 40, 24)] * 2, BFLOAT16, "stochastic", False),
    "merge stochastic float16": partial(run_merge, [(4, 40, 24), (7, 1, 9)], FLOAT16, "stochastic", True),
    "cayley chunks": partial(run_cayley, (3, 2), (4100, 24)),
    "cayley mixed": partial(run_in_memory, run_cayley, *MIXED),
    "cayley mixed bfloat16": partial(run_cayley, *MIXED, BFLOAT16, scaled=True),
    "cayley aligned": partial(run_cayley, *ALIGNED, scaled=True),
    "cayley rank 67": partial(run_cayley, (67, 1), (80, 70), scaled=True),
}


def large_runs() -> dict:
    everything = dict.fromkeys(WORK["everything"], True)
    runs = {
        "layer, programs on three axes": partial(run_layer, (40, 2000, 300), 100, strategy="cublas", thin="split"),
        "group, tiles and splits": partial(run_group, (700, 600), (1100, 40, 300), (16, 16, 16), dtype=BFLOAT16),
        "group, ranks": partial(run_group, (150, 300), (70, 40), (100, 100), 3, FLOAT16, FLOAT32),
        "experts, tiles": partial(run_experts, (0, 700, 1, 64), 70, (600, 300), 100, 3, FLOAT16, FLOAT32),
        "batched, tiles": partial(run_batched, (0, 700, 1, 64), 70, (600, 300), (100, 3, 16, 7), 3, FLOAT16, FLOAT32),
        "gram, blocks and chunks": partial(run_gram, (100,), (8200,)),
        "step, chunks": partial(run_step, (16, 16), (5000, 4100), want_gram=True),
    }
    for words, way in LAYERS.items():
        runs[f"{words}, tiles and splits"] = partial(run_layer, (700, 600, 1100), 16, **way, dropout=0.1)
        runs |= {f"{words} rank {r}": partial(run_layer, (150, 300, 170), r, 3, **way) for r in RANKS}
    for r in RANKS:
        runs[f"gram rank {r}"] = partial(run_gram, (r, 3), (300, 170))
        runs[f"step rank {r}"] = partial(run_step, (r, 3), (1100, 70), **everything)
        runs[f"transform rank {r}"] = partial(run_transform, (r, 3), (1100, 70))
        runs[f"middle rank {r}"] = partial(run_middle, r, True)
        runs[f"muon rank {r}"] = partial(run_muon, r, True)
        runs[f"solve rank {r}"] = partial(run_solve, r, k=70, n=2)
        runs[f"cayley rank {r}"] = partial(run_cayley, (r, 3), (r + 300, 2100), scaled=True)
        runs[f"merge rank {r}"] = partial(run_merge, [(r, 1030, 520), (3, 70, 33)], BFLOAT16, "stochastic", True)
    runs["cayley, blocks and chunks"] = partial(run_cayley, (70,), (8300,), scaled=True)
    for r, solver in itertools.product((33, 64, 100), limits.SOLVERS):
        runs[f"scalora {solver} rank {r}"] = partial(run_scalora, r, solver, True)
    return runs


LARGE_RUNS = large_runs()


def check_run(run) -> None:
    with sanitizer.checked() as report:
        run()
    assert not report.findings, "\n".join(map(str, report.findings))
    assert report.launches
    for summary in report.launches:
        assert min(summary.n_programs, summary.loads, summary.stores) > 0, summary


REST = [pytest.param(run, id=name, marks=pytest.mark.budget) for name, run in layer_runs(rest=True).items()]


@pytest.mark.parametrize("run", [*(pytest.param(run, id=name) for name, run in RUNS.items()), *REST])
def test_kernels_have_no_findings(run):
    check_run(run)


@pytest.mark.budget
@pytest.mark.parametrize("run", LARGE_RUNS.values(), ids=LARGE_RUNS)
def test_kernels_have_no_findings_at_larger_sizes(run):
    check_run(run)


def kernel_names() -> set[str]:
    """Returns the jit functions of the package that no other jit function calls."""
    names = [module.name for module in pkgutil.walk_packages(lora_fast.kernels.__path__, "lora_fast.kernels.")]
    modules = [importlib.import_module(name) for name in names]
    values = [value for module in modules for value in vars(module).values()]
    functions = {value.fn for value in values if isinstance(value, InterpretedFunction)}
    called = {name for function in functions for name in function.__code__.co_names}
    return {function.__name__ for function in functions} - called


def test_runs_launch_every_kernel(monkeypatch):
    """Records the launches of all runs above without executing them. The GEMM must be launched with and without
    descriptors."""
    launched = set()

    def record(kernel, *args, **options):
        launched.add((kernel.__name__, any(isinstance(argument, TensorDescriptor) for argument in args)))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    for run in RUNS.values():
        run()
    assert {name for name, _ in launched} == kernel_names()
    assert {("lora_linear_kernel", True), ("lora_linear_kernel", False)} <= launched
