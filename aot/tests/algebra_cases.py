# SPDX-License-Identifier: Apache-2.0
"""The cases of the methods' r×r algebra."""

import torch
from case import Case

from lora_fast.kernels import limits
from lora_fast.kernels.linalg import inverse, spd
from lora_fast.kernels.pairs import regularizers, scalora_scales, scalora_system


def square_case(library, device, r, n: int = 3) -> Case:
    """Returns a case with symmetric positive definite matrices, at least I."""
    case = Case(library, device, torch.float32, r)
    case.add("matrices", n, r, r)
    x = case.tensors["matrices"]
    x.copy_(x @ x.mT / r + torch.eye(r, device=device))
    return case


def spd_solve(library, device, dtype, r):
    case = square_case(library, device, r)
    case.add("rhs", 3, r, r)
    case.python = lambda t: list(spd.spd_solve(t["matrices"], t["rhs"], 0.5))

    def c(t):
        x, info = torch.empty_like(t["rhs"]), case.empty(3, dtype=torch.int32)
        parts = case.scratch(library.workspace("small_", 3, r))
        library("spd_solve", 3, r, r, t["matrices"], t["rhs"], 0.5, x, info, parts)
        case.memory = [{"solutions": x, "info": info, "uppers": parts}]
        return [x, info]

    case.c = c
    return case


def spd_inverse(library, device, dtype, r):
    case = square_case(library, device, r)
    case.python = lambda t: [spd.spd_inverse(t["matrices"], 0.5)]

    def c(t):
        x, info = torch.empty_like(t["matrices"]), case.empty(3, dtype=torch.int32)
        parts = case.scratch(library.workspace("small_", 3, r))
        library("spd_inverse", 3, r, t["matrices"], 0.5, x, info, parts)
        case.memory = [{"solutions": x, "info": info, "uppers": parts}]
        return [x]

    case.c = c
    return case


def small_inverse(library, device, dtype, r):
    case = square_case(library, device, r)
    case.python = lambda t: [inverse.small_inverse(t["matrices"])]

    def c(t):
        inverses, parts = torch.empty_like(t["matrices"]), case.scratch(library.workspace("small_", 3, r))
        library("small_inverse", 3, r, t["matrices"], inverses, parts)
        case.memory = [{"inverses": inverses, "scratch": parts}]
        return [inverses]

    case.c = c
    return case


def grams_case(library, device, r) -> Case:
    """Returns a case with Grams of three pairs, and numbers of each pair."""
    case = square_case(library, device, r, 6)
    case.tensors["ka"], case.tensors["kb"] = case.tensors.pop("matrices").view(2, 3, r, r)
    case.add("first", 3, fill=0.5), case.add("second", 3, fill=0.25)
    return case


def imbalance(library, device, dtype, r):
    case = grams_case(library, device, r)
    case.add("lr_a", dtype=torch.float64, fill=1e-3), case.add("lr_b", dtype=torch.float64, fill=2e-3)
    names = ("ka", "kb", "first", "lr_a", "lr_b")
    case.python = lambda t: [regularizers.imbalance(*(t[name] for name in names), 0.1)]

    def c(t):
        matrices = case.empty(6, r, r)
        library("imbalance", 3, r, *(t[name] for name in names), 0.1, matrices)
        case.memory = [{"matrices": matrices}]
        return [matrices]

    case.c = c
    return case


def scale_reg(library, device, dtype, r):
    case = grams_case(library, device, r)
    names = ("ka", "kb", "first", "second")
    case.python = lambda t: [regularizers.scale_reg(*(t[name] for name in names), 0.1, 1e-6)]

    def c(t):
        coefficients = case.empty(6)
        library("scale_reg", 3, r, *(t[name] for name in names), 0.1, 1e-6, coefficients)
        case.memory = [{"coefficients": coefficients}]
        return [coefficients]

    case.c = c
    return case


def scalora(library, device, dtype, r, solver):
    case = square_case(library, device, r, 15)
    case.tensors["matrices"] = case.tensors["matrices"].view(5, 3, r, r)
    case.add("kappa", dtype=torch.float64, fill=2.0), case.add("scaling", 3, fill=2.0)

    def python(t):
        x, active, info = scalora_system.scalora_solve(*t["matrices"], solver)
        return [x, active, info, *scalora_scales.scales(x, active, t["kappa"], t["scaling"], 0.25, 4.0)]

    def c(t):
        x, active = case.empty(3, 2 * r), case.empty(3, 2 * r, dtype=torch.bool)
        info, parts = case.empty(3, dtype=torch.int32), case.scratch(library.workspace("scalora_", 3, r))
        library("scalora_solve", 3, r, t["matrices"], limits.SOLVERS.index(solver), x, active, info, parts)
        scale_p, scale_g, residual_scale = case.empty(6, r), case.empty(6, r), case.empty(3, r)
        library(
            "scalora_scales", 3, r, x, active, t["kappa"], t["scaling"], 0.25, 4.0, scale_p, scale_g, residual_scale
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
