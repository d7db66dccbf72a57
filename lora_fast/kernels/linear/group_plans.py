"""The plans of forward and backward of several layers that read the same x (groups.py).

Forward is one pass over x for all S (group.py), then one GEMM for all members (group_linear.py), or one a member where
a single layer would not use the fused GEMM. Backward is one pass over every dy and one pass over x for all da
(group_grads.py), and one dx for all members (group_gemm.py). Plans are kept by the signature of all members, as in
``linear/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .. import tiles
from ..grouping import group_by
from ..launch import allocator, contiguous_rows, thin_dtype
from . import signature, strategies
from .cublas import CublasProject
from .gemm import CublasGemm
from .group import GroupProject, passes
from .group_gemm import Part
from .group_grads import GroupGradA, GroupGradSB, s_b_passes, token_steps
from .group_linear import FusedGroupLinear
from .group_parts import dx_gemm, dx_strategy
from .project import Project
from .signature import flat, share_memory

Members = Sequence[tuple]  # (weight, bias, lora_A, lora_B, scaling, keep) of each member
Columns = tuple  # each of these of all members
Needs = tuple[bool, Sequence[bool], Sequence[bool]]  # which gradients are needed: of x, of each a, of each b


def _way(direction: str, tall: Tensor, member: tuple, rounded: bool) -> strategies.Way:
    """Returns the way in which the member would run alone."""
    weight, _, lora_A, lora_B, _, keep = member
    factor = tall.dtype if rounded else signature.wider(lora_A, lora_B)
    return strategies.way(direction, tall, weight, factor, len(lora_A), keep is not None)


def _thin_way(tall: Tensor, member: tuple, rounded: bool) -> strategies.Way:
    """Returns the way of the backward's thin products of a member without a weight."""
    _, _, lora_A, lora_B, _, keep = member
    factor = tall.dtype if rounded else signature.wider(lora_A, lora_B)
    return strategies.thin_way(tall, lora_A.shape[1], factor, len(lora_A), keep is not None)


def _gemm_key(x: Tensor, member: tuple, way: strategies.Way, i: int, rounded: bool) -> tuple:
    """Returns what members must have in common for their GEMMs to be one launch, or the member's number if its GEMM
    has a launch of its own."""
    weight, _, lora_A, lora_B, *_ = member
    if way.gemm != "fused":
        return (i,)
    return thin_dtype(x, lora_A, rounded), lora_B.dtype, tiles.uses_tma(x, weight, len(weight))


def _laid_out(member: tuple, any_weight_strides: bool) -> tuple:
    """Returns the member with the strides that the kernels need. cuBLAS takes a weight with any strides."""
    weight, bias, lora_A, lora_B, *numbers = member
    weight = weight if any_weight_strides or weight is None else contiguous_rows(weight)
    bias = None if bias is None else bias.contiguous()
    return weight, bias, contiguous_rows(lora_A), contiguous_rows(lora_B), *numbers


def tensors_of(members: Members, *others: Tensor | None) -> tuple:
    """Returns all tensors of the members, and the others that are not None."""
    return tuple([t for tensors in (*[member[:4] for member in members], others) for t in tensors if t is not None])


class ProjectPasses:
    """The passes over x that compute S of each member (lora_A, keep), by these ways."""

    def __init__(self, x: Tensor, factors: Sequence[tuple], ways: Sequence[strategies.Way], rounded: bool):
        self.count = len(factors)
        key = lambda i: None if factors[i][1] or ways[i].thin == "cublas" else (ways[i].thin, factors[i][0].dtype)
        self.passes = [
            (where, _project(ways[where[0]], x, [factors[i] for i in where], rounded, where))
            for where in passes(range(self.count), key, lambda i: len(factors[i][0]))
        ]

    def __call__(self, x: Tensor, lora_As: Sequence[Tensor], keeps: Sequence, stream: int | None) -> list[Tensor]:
        ss: list = [None] * self.count
        for where, project in self.passes:
            if len(where) == 1:
                (i,) = where
                ss[i] = project(x, lora_As[i], keeps[i], stream)
            else:
                for i, s in zip(where, project(x, lora_As, stream), strict=True):
                    ss[i] = s
        return ss


class GroupForwardPlan:
    """Computes every y and S for one signature."""

    def __init__(self, x: Tensor, columns: Columns, rounded: bool):
        members = [*zip(*columns, strict=True)]
        ways = [_way("forward", flat(x), member, rounded) for member in members]
        self.any_strides = [way.gemm == "cublas" for way in ways]
        arguments, shape = (members, x), x.shape
        x, columns = self._lay_out(x, columns)
        members = [*zip(*columns, strict=True)]
        copies = not share_memory(tensors_of(*arguments), tensors_of(members, x))
        self.needs_layout = copies or (len(shape) != 2 and any(way.thin == "cublas" for way in ways))
        self.project = ProjectPasses(x, [(a, keep) for _, _, a, _, _, keep in members], ways, rounded)
        passes_of = self.project.passes
        parts = {i: project.splits for where, project in passes_of for i in where if ways[i].thin == "split"}
        shapes = [(*shape[:-1], len(member[0])) for member in members]
        self.gemms, self.empty_s = [], [None] * len(members)
        for where in group_by(range(len(members)), lambda i: _gemm_key(x, members[i], ways[i], i, rounded)).values():
            i, (weight, bias, a, b, *_) = where[0], members[where[0]]
            operands = x, weight, bias, b, len(a), False, True, shapes[i]
            if len(where) > 1:
                gemm = FusedGroupLinear(x, [members[j] for j in where], [shapes[j] for j in where], where)
            elif i in parts:
                gemm = CublasGemm(*operands, n_parts=parts[i])
                self.empty_s[i] = allocator((len(x), len(a)), thin_dtype(x, a, rounded), x.device)
            else:
                gemm = signature.gemm_of(ways[i], a, b)(*operands)
            self.gemms.append((where, gemm))

    def __call__(self, x: Tensor, columns: Columns, stream: int | None) -> tuple[list[Tensor], list[Tensor]]:
        if self.needs_layout:
            x, columns = self._lay_out(x, columns)
        weights, biases, a, b, scalings, keeps = columns
        scalings = tuple(map(float, scalings))
        ss = self.project(x, a, keeps, stream)
        ys: list = [None] * len(b)
        for where, gemm in self.gemms:
            if len(where) > 1:
                for i, y in zip(where, gemm(x, weights, biases, b, scalings, ss, stream), strict=True):
                    ys[i] = y
                continue
            (i,) = where
            arguments = x, weights[i], biases[i], ss[i], b[i], scalings[i], None, stream
            empty_s = self.empty_s[i]
            if empty_s is None:
                ys[i] = gemm(*arguments)
            else:  # the GEMM's update adds the parts and writes S
                ss[i] = empty_s()
                ys[i] = gemm(*arguments, ss[i])
        return ys, ss

    def _lay_out(self, x: Tensor, columns: Columns) -> tuple[Tensor, Columns]:
        """Returns x and the members with the shapes and strides that the kernels need."""
        members = [_laid_out(*each) for each in zip(zip(*columns, strict=True), self.any_strides, strict=True)]
        return flat(x), tuple(zip(*members, strict=True))


def _project(way: strategies.Way, x: Tensor, factors: Sequence[tuple], rounded: bool, where: list[int]):
    """Returns the pass over x for members (lora_A, keep) with the same way."""
    short, split = way.thin != "pass", way.thin == "split"
    if len(factors) > 1:
        return GroupProject(x, [lora_A for lora_A, _ in factors], rounded, short, split, where)
    (lora_A, keep), = factors  # fmt: skip
    by_cublas = way.thin == "cublas"
    return CublasProject(x, lora_A, rounded) if by_cublas else Project(x, lora_A, bool(keep), rounded, short, split)


class GroupBackwardPlan:
    """Computes dx, every da and every db for one signature. Nothing is computed for a member whose dy is None. If
    ``thin``, the members have no weights, and every dS takes the place of dx."""

    def __init__(self, dys, x: Tensor, ss, columns: Columns, rounded: bool, needs: Needs, thin: bool = False):
        members = [*zip(*columns, strict=True)]
        need_x, need_a, need_b = needs
        used = self.used = [i for i, dy in enumerate(dys) if dy is not None and (need_x or need_a[i] or need_b[i])]
        self.reads_x = any(need_a[i] for i in used)
        rows = {i: flat(dys[i]) for i in used}
        way = _thin_way if thin else partial(_way, "backward")
        self.thin, ways = thin, {i: way(rows[i], members[i], rounded) for i in used}
        dtypes = {i: thin_dtype(rows[i], members[i][3], rounded) for i in used}
        part_of = lambda i: Part(dys[i], members[i][0], None, members[i][2], members[i][5])
        parts = [part_of(i)._replace(dy=rows[i]) for i in used] if need_x and not thin else []
        strategy = dx_strategy(parts, list(dtypes.values())) if parts else "cublas"
        self.any_strides = strategy == "cublas"
        arguments, shape = (members, x if self.reads_x else None, *dys, *ss), x.shape
        dys, x, ss, columns = self._lay_out(dys, x, ss, columns)
        members = [*zip(*columns, strict=True)]
        copies = not share_memory(tensors_of(*arguments), tensors_of(members, x if self.reads_x else None, *dys, *ss))
        by_cublas = (bool(parts) and strategy == "cublas") or any(way.thin == "cublas" for way in ways.values())
        self.needs_layout = copies or (len(shape) != 2 and by_cublas)
        thin_needs = {i: (need_x or need_a[i], need_b[i]) for i in used}
        self.grad_s_b = _s_b_passes(dys, ss, members, ways, thin_needs, rounded)
        self.grad_a = _grad_a_passes([i for i in used if need_a[i]], x, members, ways, dtypes)
        self.grad_x = dx_gemm([part_of(i) for i in used], shape, used, strategy) if parts else None
        # One after the other, the passes of several members can use one buffer.
        rooms = [compute.parts for where, compute in (*self.grad_s_b, *self.grad_a) if len(where) > 1]
        self.empty_buffer = max(rooms, key=lambda parts: parts.size).empty if rooms else lambda: None

    def __call__(self, dys, x: Tensor, ss, columns: Columns, stream: int | None):
        if self.needs_layout:
            dys, x, ss, columns = self._lay_out(dys, x, ss, columns)
        weights, _, a, b, scalings, keeps = columns
        scalings, count = tuple(map(float, scalings)), len(b)
        das, dbs, dss, buffer = [None] * count, [None] * count, [None] * count, self.empty_buffer()
        for where, grad_s_b in self.grad_s_b:
            if len(where) == 1:
                (i,) = where
                s = dys[i] if ss[i] is None else ss[i]
                dss[i], dbs[i] = grad_s_b(dys[i], s, b[i], scalings[i], stream)
            else:
                for i, ds, db in zip(where, *grad_s_b(dys, ss, b, scalings, stream, buffer), strict=True):
                    dss[i], dbs[i] = ds, db
        for where, grad_a in self.grad_a:
            if len(where) == 1:
                (i,) = where
                das[i] = grad_a(x, dss[i], a[i], keeps[i], stream)
            else:
                for i, da in zip(where, grad_a(x, dss, stream, buffer), strict=True):
                    das[i] = da
        dx = None if self.grad_x is None else self.grad_x(dys, weights, dss, a, keeps, stream)
        return dss if self.thin else dx, das, dbs

    def _lay_out(self, dys, x: Tensor, ss, columns: Columns) -> tuple:
        """Returns the arguments with the shapes and strides that the kernels need."""
        dys = [None if dy is None else flat(dy) for dy in dys]
        ss = [None if s is None else s.contiguous() for s in ss]
        members = [_laid_out(member, self.any_strides) for member in zip(*columns, strict=True)]
        return dys, flat(x) if self.reads_x else x, ss, tuple(zip(*members, strict=True))


def _s_b_passes(dys, ss, members: Members, ways: dict, needs: dict, rounded: bool) -> list[tuple]:
    """Returns the passes over dy that compute dS and db, each with its members. ``ways`` and ``needs`` (dS, db) have an
    item for each member that is used."""
    factors = [lora_B for _, _, _, lora_B, _, _ in members]
    ss = [dy if s is None else s for dy, s in zip(dys, ss, strict=True)]
    result = []
    for where in s_b_passes([i for i in ways if ways[i].thin != "cublas"], dys, ss, factors, needs):
        if len(where) > 1:
            columns = ([column[i] for i in where] for column in (dys, ss, factors))
            result.append((where, GroupGradSB(*columns, needs[where[0]], rounded, where)))
    shared = {i for where, _ in result for i in where}
    alone = [i for i in ways if i not in shared]
    by = lambda i: signature.grad_s_b_by(ways[i], dys[i], ss[i], factors[i], needs[i], rounded)
    return [*result, *(([i], by(i)) for i in alone)]


def _grad_a_passes(wanted: list[int], x: Tensor, members: Members, ways: dict, dtypes: dict) -> list[tuple]:
    """Returns the passes over x that compute da of these members, each with its members. ``dtypes`` are those of dS."""

    def key(i: int) -> tuple | None:
        lora_A, keep = members[i][2], members[i][5]
        if keep is not None or (ways[i].thin == "cublas" and dtypes[i] is x.dtype):
            return None
        return dtypes[i], lora_A.dtype, token_steps(x, dtypes[i], len(lora_A))

    result = []
    for where in passes(wanted, key, lambda i: len(members[i][2])):
        i, factors = where[0], [members[j][2] for j in where]
        if len(where) > 1:
            result.append((where, GroupGradA(x, dtypes[i], factors, where)))
        else:
            grad_a = signature.grad_a_by(ways[i], x, dtypes[i], factors[0], members[i][5] is not None)
            result.append((where, grad_a))
    return result
