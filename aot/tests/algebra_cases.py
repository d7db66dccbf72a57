# SPDX-License-Identifier: Apache-2.0
"""The cases of the methods' r×r algebra."""

import torch
from case import Case
from triton import knobs

from lora_fast.kernels import limits
from lora_fast.kernels.linalg import inverse, spd
from lora_fast.kernels.pairs import regularizers, scalora_scales, scalora_system


def count(r: int) -> int:
    """Returns the number of matrices: one of a large rank takes long in Triton's interpreter."""
    return 1 if knobs.runtime.interpret and r > 32 else 3


def square_case(library, device, r, parts: int = 1) -> Case:
    """Returns a case with symmetric positive definite matrices, at least I, in so many parts of ``count`` each."""
    n = parts * count(r)
    case = Case(library, device, torch.float32, r)
    case.add("matrices", n, r, r)
    x = case.tensors["matrices"]
    x.copy_(x @ x.mT / r + torch.eye(r, device=device))
    return case


def spd_solve(library, device, dtype, r):
    case = square_case(library, device, r)
    case.add("rhs", count(r), r, r)
    case.python = lambda t: list(spd.spd_solve(t["matrices"], t["rhs"], 0.5))

    def c(t):
        x, info = torch.empty_like(t["rhs"]), case.empty(count(r), dtype=torch.int32)
        parts = case.scratch(library.workspace("small_", count(r), r))
        library("spd_solve", count(r), r, r, t["matrices"], t["rhs"], 0.5, x, info, parts)
        case.memory = [{"solutions": x, "info": info, "uppers": parts}]
        return [x, info]

    case.c = c
    return case


def spd_inverse(library, device, dtype, r):
    case = square_case(library, device, r)
    case.python = lambda t: [spd.spd_inverse(t["matrices"], 0.5)]

    def c(t):
        x, info = torch.empty_like(t["matrices"]), case.empty(count(r), dtype=torch.int32)
        parts = case.scratch(library.workspace("small_", count(r), r))
        library("spd_inverse", count(r), r, t["matrices"], 0.5, x, info, parts)
        case.memory = [{"solutions": x, "info": info, "uppers": parts}]
        return [x]

    case.c = c
    return case


def small_inverse(library, device, dtype, r):
    case = square_case(library, device, r)
    case.python = lambda t: [inverse.small_inverse(t["matrices"])]

    def c(t):
        inverses, parts = torch.empty_like(t["matrices"]), case.scratch(library.workspace("small_", count(r), r))
        library("small_inverse", count(r), r, t["matrices"], inverses, parts)
        case.memory = [{"inverses": inverses, "scratch": parts}]
        return [inverses]

    case.c = c
    return case


def grams_case(library, device, r) -> Case:
    """Returns a case with Grams of three pairs, and numbers of each pair."""
    case = square_case(library, device, r, 2)
    case.tensors["ka"], case.tensors["kb"] = case.tensors.pop("matrices").view(2, count(r), r, r)
    case.add("first", count(r), fill=0.5), case.add("second", count(r), fill=0.25)
    return case


def imbalance(library, device, dtype, r):
    case = grams_case(library, device, r)
    case.add("lr_a", dtype=torch.float64, fill=1e-3), case.add("lr_b", dtype=torch.float64, fill=2e-3)
    names = ("ka", "kb", "first", "lr_a", "lr_b")
    case.python = lambda t: [regularizers.imbalance(*(t[name] for name in names), 0.1)]

    def c(t):
        matrices = case.empty(2 * count(r), r, r)
        library("imbalance", count(r), r, *(t[name] for name in names), 0.1, matrices)
        case.memory = [{"matrices": matrices}]
        return [matrices]

    case.c = c
    return case


def scale_reg(library, device, dtype, r):
    case = grams_case(library, device, r)
    names = ("ka", "kb", "first", "second")
    case.python = lambda t: [regularizers.scale_reg(*(t[name] for name in names), 0.1, 1e-6)]

    def c(t):
        coefficients = case.empty(2 * count(r))
        library("scale_reg", count(r), r, *(t[name] for name in names), 0.1, 1e-6, coefficients)
        case.memory = [{"coefficients": coefficients}]
        return [coefficients]

    case.c = c
    return case


def scalora(library, device, dtype, r, solver):
    case = square_case(library, device, r, 5)
    case.tensors["matrices"] = case.tensors["matrices"].view(5, count(r), r, r)
    case.add("kappa", dtype=torch.float64, fill=2.0), case.add("scaling", count(r), fill=2.0)

    def python(t):
        x, active, info = scalora_system.scalora_solve(*t["matrices"], solver)
        return [x, active, info, *scalora_scales.scales(x, active, t["kappa"], t["scaling"], 0.25, 4.0)]

    def c(t):
        n = count(r)
        x, active = case.empty(n, 2 * r), case.empty(n, 2 * r, dtype=torch.bool)
        info, parts = case.empty(count(r), dtype=torch.int32), case.scratch(library.workspace("scalora_", count(r), r))
        library("scalora_solve", count(r), r, t["matrices"], limits.SOLVERS.index(solver), x, active, info, parts)
        scale_p, scale_g, residual_scale = case.empty(2 * n, r), case.empty(2 * n, r), case.empty(n, r)
        library(
            "scalora_scales",
            count(r),
            r,
            x,
            active,
            t["kappa"],
            t["scaling"],
            0.25,
            4.0,
            scale_p,
            scale_g,
            residual_scale,
        )
        case.memory = [{"x": x, "active": active, "info": info, "scratch": parts}]
        case.memory += [
            {"x": x, "active": active, "scale_p": scale_p, "scale_g": scale_g, "residual_scale": residual_scale}
        ]
        return [x, active, info, scale_p, scale_g, residual_scale]

    case.python, case.c = python, c
    return case


CASES = {
    "imbalance": imbalance,
    "scale_reg": scale_reg,
    "spd_solve": spd_solve,
    "spd_inverse": spd_inverse,
    "small_inverse": small_inverse,
    "scalora": scalora,
}
