# SPDX-License-Identifier: Apache-2.0
"""What the library embeds: calls of the package's own launchers, whose launches are compiled for every arch."""

import math
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: it would leave nothing to compile

import torch

from lora_fast.kernels import batched, factor_tiles, launch, tiles
from lora_fast.kernels import linear as layer
from lora_fast.kernels.inspection import compiler
from lora_fast.kernels.inspection.catalogue import OPS, variants
from lora_fast.kernels.linear import grads
from lora_fast.kernels.linear.gemm import Update
from lora_fast.kernels.pairs import regularizers
from lora_fast.kernels.records import AdapterTable

SMALL = (16, 32, 64, 128, 256)  # rank classes of spd_solve, spd_inverse and small_inverse
SCALORA = (8, 16, 32, 64, 128)  # of ScaLoRA's system
# What the methods add to AdamW: ScaleReg additive, with the matrices of ScaledAdamW and RefLoRA or alone; ScaLoRA
# scales; iLoRA, BaLoRA, πLoRA and decoupled ScaleReg Grams.
STEPS = ((), ("add",), ("matrix",), ("add", "matrix"), ("scale",), ("gram",), ("matrix", "gram"))
MOST_ADAPTERS = 1024  # in a batch
D = 4096  # d_in and d_out of the launches that are compiled
# kernel → enum kind of kernels.h. Where it depends on the op, the entry is (op, kernel).
KINDS = {
    "lora_project_kernel": "PROJECT", ("linear", "lora_linear_kernel"): "LINEAR",
    ("grad_x", "lora_linear_kernel"): "GRAD_X", ("add_to_y", "lora_update_kernel"): "ADD_TO_Y",
    ("add_parts_to_y", "lora_update_kernel"): "ADD_TO_Y",
    ("add_to_dx", "lora_update_kernel"): "ADD_TO_DX", "lora_grad_s_b_kernel": "GRAD_S_B",
    "lora_grad_a_kernel": "GRAD_A", "lora_batched_project_kernel": "BATCH_PROJECT",
    "lora_batched_update_kernel": "BATCH_ADD", ("sum", "lora_sum_partials_kernel"): "SUM", "lora_gram_kernel": "GRAM",
    "lora_step_kernel": "STEP", "lora_transform_kernel": "TRANSFORM", "lora_merge_kernel": "MERGE",
    "lora_cayley_sums_kernel": "CAYLEY_SUMS", "lora_cayley_inverse_kernel": "CAYLEY_INVERSE",
    "lora_cayley_backward_kernel": "CAYLEY_BACKWARD", "lora_cayley_products_kernel": "CAYLEY_PRODUCTS",
    ("spd_solve", "lora_spd_solve_kernel"): "SPD_SOLVE", ("spd_solve", "lora_spd_solve_blocked_kernel"): "SPD_SOLVE",
    ("spd_inverse", "lora_spd_solve_kernel"): "SPD_INVERSE",
    ("spd_inverse", "lora_spd_solve_blocked_kernel"): "SPD_INVERSE",
    "lora_small_inverse_kernel": "SMALL_INVERSE", "lora_small_inverse_blocked_kernel": "SMALL_INVERSE",
    "lora_scalora_solve_kernel": "SCALORA_SOLVE", "lora_scales_kernel": "SCALORA_SCALES",
    "lora_imbalance_kernel": "IMBALANCE", "lora_scale_reg_kernel": "SCALE_REG",
}  # fmt: skip


def add_to_y(r: int, dtype: torch.dtype, adapter: str) -> None:
    """Runs the update of y behind another library's product."""
    y, b = torch.empty(1, D, dtype=dtype), torch.empty(D, r, dtype=getattr(torch, adapter))
    layer.add_to_y(y, torch.empty(1, r, dtype=b.dtype), b, 2.0)


def project_parts(r: int, dtype: torch.dtype, adapter: str, tokens: str) -> None:
    """Runs project for few tokens, which stores partial sums of S."""
    OPS["project"].run(r, dtype, adapter, 0.0, tokens)


def add_parts_to_y(r: int, dtype: torch.dtype, adapter: str, tokens: str) -> None:
    """Runs the update of y that adds the partial sums of S of few tokens."""
    y, b = torch.empty(1, D, dtype=dtype), torch.empty(D, r, dtype=getattr(torch, adapter))
    parts, s = torch.empty(2, 1, r), torch.empty(1, r, dtype=b.dtype)
    Update(y, b, r, False, True, D, n_parts=2)(y, y, parts, b, 2.0, None, None, s)


def add_to_dx(r: int, dtype: torch.dtype, adapter: str, dropout: float) -> None:
    """Runs the update of dx behind another library's product."""
    dx, a = torch.empty(1, D, dtype=dtype), torch.empty(r, D, dtype=getattr(torch, adapter))
    keep = launch.draw_mask(dx, dropout, 1 << 40) if dropout else None
    layer.add_to_dx(dx, [(torch.empty(1, r, dtype=a.dtype), a, keep)])


def sum_partials(r: int, dtype: torch.dtype, accumulate: str) -> None:
    """Runs the sum of two results' partial sums, where the first, the second or none is added to what is there."""
    parts, total = torch.empty(2, D), torch.empty(D, dtype=dtype)
    add = grads.sum_launch((D, 2), (D, 2), (accumulate == "first", accumulate == "second"))
    assert add is not None
    add.go(None, (parts, total, parts, total), ())


def batch_project(r: int, dtype: torch.dtype, adapter: str, tokens: str) -> None:
    """Runs S of several adapters. ``tokens`` chooses the tile: "many" or "short"."""
    table, rows, ends = _batch(r, adapter, {"many": tiles.SHORT + 1, "short": tiles.SHORT}[tokens])
    batched.project(torch.empty(1, D, dtype=dtype).expand(len(rows), D), table, rows, ends)


def batch_add(r: int, dtype: torch.dtype, adapter: str, tokens: str) -> None:
    """Runs the update of y by several adapters. ``tokens`` chooses the tile: "many" or "few"."""
    table, rows, ends = _batch(r, adapter, {"many": tiles.FEW + 1, "few": tiles.FEW}[tokens])
    y, s = torch.empty(1, D, dtype=dtype).expand(len(rows), D), torch.empty(len(rows), r, dtype=getattr(torch, adapter))
    batched.add_product(y, s, table, rows, ends)


def _batch(r: int, adapter: str, n_rows: int) -> tuple[AdapterTable, torch.Tensor, torch.Tensor]:
    """Returns the table of as many adapters as the library allows, and rows and ends without defined values."""
    a, b = (torch.empty(*shape, dtype=getattr(torch, adapter)) for shape in ((r, D), (D, r)))
    entries = torch.empty(MOST_ADAPTERS, 4, dtype=torch.int64)
    lists = [a] * MOST_ADAPTERS, [b] * MOST_ADAPTERS, [2.0] * MOST_ADAPTERS
    table = AdapterTable(*lists, r, entries, aligned=True)
    return table, torch.empty(n_rows, dtype=torch.int32), torch.empty(MOST_ADAPTERS, dtype=torch.int32)


def imbalance(r: int, dtype: torch.dtype) -> None:
    """Runs iLoRA's algebra with learning rates in device memory."""
    square, lr = torch.empty(3, r, r, dtype=dtype), torch.ones((), dtype=torch.float64)
    regularizers.imbalance(square, square, torch.empty(3), lr, lr, 0.1)


OWN_OPS: dict[str, Callable] = {
    "add_to_y": add_to_y,
    "project_parts": project_parts,
    "add_parts_to_y": add_parts_to_y,
    "add_to_dx": add_to_dx,
    "batch_project": batch_project,
    "batch_add": batch_add,
    "sum": sum_partials,
    "imbalance": imbalance,
}


class Case(NamedTuple):
    """A call whose launches the library embeds: of an op of the catalogue or of ``OWN_OPS``."""

    op: str
    dtype: str
    r: int
    variant: dict

    def run(self) -> None:
        run = OWN_OPS.get(self.op) or OPS[self.op].run
        run(self.r, getattr(torch, self.dtype), **self.variant)


def cases(ops: list[str] | None, dtypes: list[str], ranks: list[int]) -> list[Case]:
    """Returns the calls whose launches the library embeds for each arch."""
    chosen = layer_cases(dtypes, ranks) + step_cases(dtypes, ranks) + algebra_cases(ranks)
    return [case for case in chosen if ops is None or case.op in ops]


def layer_cases(dtypes: list[str], ranks: list[int]) -> list[Case]:
    masks, gemm = {"dropout": (0.0, 0.1)}, {"strategy": ("fused",), "padding": (0,)}
    ops = {
        "project": masks | {"tokens": ("many", "short")},
        "project_parts": {"tokens": ("few",)},
        "linear": gemm | {"bias": (False, True)},
        "add_to_y": {},
        "add_parts_to_y": {"tokens": ("few",)},
        "grad_s_b": {},
        "grad_a": masks,
        "grad_x": gemm | masks,
        "add_to_dx": masks,
        "batch_project": {"tokens": ("many", "short")},
        "batch_add": {"tokens": ("many", "few")},
    }
    return [
        case
        for op, choices in ops.items()
        for dtype in dtypes
        for case in _cases(op, dtype, ranks, variants(adapter=tuple({dtype: 0, "float32": 0}), **choices))
    ]


def step_cases(dtypes: list[str], ranks: list[int]) -> list[Case]:
    """Returns the sums of the layer's gradients, the step, and Cayley's transform, for factors of these dtypes and of
    float32. Only factors of 16 bits are rounded stochastically."""
    chosen = []
    for dtype in {**dict.fromkeys(dtypes), "float32": None}:
        chosen += [Case("sum", dtype, 1, {"accumulate": which}) for which in ("none", "first", "second")]
        chosen += _cases("gram", dtype, ranks, [{}])
        noise = (False,) if dtype == "float32" else (False, True)
        names = ("add", "matrix", "scale", "gram")
        steps = [{name: name in on for name in names} | {"stochastic": yes} for on in STEPS for yes in noise]
        stepping = _cases("adamw_step", dtype, ranks, steps)
        chosen += [case for case in stepping if case.r <= factor_tiles.GRAM_RANK or not case.variant["gram"]]
        chosen += _cases("transform", dtype, ranks, [{"add": False}, *variants(add=(True,), stochastic=noise)])
        chosen += _cases("cayley", dtype, ranks, variants(backward=(False, True)))
    for dtype in dtypes:
        merges = [{"rounding": "nearest"}]
        if dtype != "float32":
            merges += [*variants(rounding=("stochastic",), seed_in_memory=(False, True)), {"rounding": "compensated"}]
        chosen += _cases("merge", dtype, ranks, merges)
    return chosen


def algebra_cases(ranks: list[int]) -> list[Case]:
    """Returns the methods' algebra, whose kernels are those of a rank class."""
    classes = sorted({1 << (r - 1).bit_length() for r in ranks})
    chosen = _cases("imbalance", "float32", classes, [{}]) + _cases("scale_reg", "float32", classes, [{}])
    for op in ("spd_solve", "spd_inverse", "small_inverse"):
        chosen += _cases(op, "float32", SMALL, [{}])
    return chosen + _cases("scalora", "float32", SCALORA, variants(solver=("nnls", "paper", "column", "scalar")))


def _cases(op: str, dtype: str, ranks: Iterable[int], options: list[dict]) -> list[Case]:
    return [Case(op, dtype, r, variant) for r in ranks for variant in options]


class AlwaysSplit(grads.Split):
    """A result that is stored as float32 partial sums even where there is one, so that one kernel serves every size."""

    def __init__(self, shape: tuple[int, ...], dtype, count: int, *more):
        super().__init__(shape, dtype, count, *more)
        self.in_parts, self.sizes = True, (math.prod(shape), count)


@contextmanager
def as_embedded(arch: int):
    """A context in which Python's launchers choose the kernels that the library has."""
    with tiles.assume(arch=arch, strategy="fused"), mock.patch.object(grads, "Split", AlwaysSplit):
        yield


def launches_of(case: Case, arch: int) -> list[compiler.Launch]:
    """Returns the launches of the case that the library embeds. The sums of partial results are a case of their own."""
    with as_embedded(arch), compiler.recorded() as launches:
        case.run()
    return [each for each in launches if kind_of(case.op, each.kernel.__name__)]


def kind_of(op: str, kernel: str) -> str | None:
    """Returns the name in enum kind of kernels.h of an op's launch, or None for one that is not embedded."""
    return KINDS.get((op, kernel)) or KINDS.get(kernel)
