# SPDX-License-Identifier: Apache-2.0
"""The layer's ops against formulas in float64, with the roundings of the kernels spelled out.

A result may err by its own rounding and by the rounding of float32 sums. Where a factor, S or dS is float32 beside 16
bits, kernels multiply it as two bfloat16 halves, which adds 2^-15 of the sum of the terms' magnitudes. Rows of x, y and
the weight have gaps, results and workspace are full of NaN at first, and nothing beyond them may be written.
"""

import torch
from library import DTYPES, Layer, Library

from lora_fast.ops.reference.linear import philox_mask

SEED, DROP, SCALING, GUARD = (1 << 40) + 3, 0.25, 1.5, 173
FLOAT32_SUMS, HALVES = 2.0**-20, 2.0**-15


def compare(name: str, got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, halves: bool, more=0.0) -> None:
    """Raises an error unless ``got`` is ``exact`` but for roundings. ``size``: the sum of the terms' magnitudes;
    ``more``: what the terms' own roundings allow besides."""
    limits = torch.finfo(got.dtype)
    rounding = limits.eps / 2 * exact.abs() + limits.smallest_normal * limits.eps
    allowed = rounding + size * (FLOAT32_SUMS + halves * HALVES) + more
    error = (got.double() - exact).abs()
    worst = (error / allowed).nan_to_num(torch.inf).max().item() if got.numel() else 0.0
    assert worst <= 1, f"{name}: an error of {worst:.3g} times what roundings allow"


class LayerCall:
    """A layer with random tensors, and what its ops return.

    Args:
        gap: the number of elements between the rows of x, y, dx, dy and the weight.
        in_memory: whether the seed is in memory.
        accumulate: whether da and db are added to what is there.
        padded: the number of ranks that are zero.
    """

    def __init__(
        self, library: Library, dtype: torch.dtype, adapter: torch.dtype, r: int, n_tokens: int, d_in=144, d_out=208,
        dropout=False, gap=0, in_memory=False, accumulate=False, bias=True, padded=0,
    ):  # fmt: skip
        self.library, self.dtype, self.adapter, self.gap = library, dtype, adapter, gap
        self.r, self.n_tokens, self.d_in, self.d_out = r, n_tokens, d_in, d_out
        self.generator = torch.Generator().manual_seed(r + n_tokens)
        self.x, self.dy, self.weight = self.rows(n_tokens, d_in), self.rows(n_tokens, d_out), self.rows(d_out, d_in)
        self.s, self.ds = self.thin(n_tokens, r), self.thin(n_tokens, r)
        self.a, self.b, self.bias = self.thin(r, d_in), self.thin(d_out, r), self.thin(d_out).to(dtype)
        for tensor in (self.a[r - padded :], self.b[:, r - padded :]):
            tensor.zero_()
        self.bias = self.bias if bias else None
        self.halves = adapter is not dtype
        self.keep = philox_mask(SEED, n_tokens, d_in, DROP).double() if dropout else torch.ones(())
        seed = torch.tensor(SEED)
        level = round(DROP * 65536) if dropout else 0
        types = DTYPES.index(dtype), DTYPES.index(adapter)
        seeds = (0, seed.data_ptr()) if in_memory else (SEED, None)
        distances = [width + gap for width in (d_in, d_out, d_in, d_out, d_in)]
        self.held = seed
        self.config = Layer(
            n_tokens, d_in, d_out, r, *types, SCALING, level, *seeds, *(distances if gap else [0] * 5), int(accumulate)
        )

    def rows(self, n: int, width: int, value: float | None = None) -> torch.Tensor:
        """Returns random rows, or rows of a value, with gaps of NaN between them."""
        whole = torch.full((n, width + self.gap), torch.nan, dtype=self.dtype)
        whole[:, :width] = torch.randn(n, width, generator=self.generator) if value is None else value
        return whole[:, :width]

    def thin(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.adapter)

    def result(self, *shape: int) -> torch.Tensor:
        """Returns memory for da or db: NaN, or what they are added to."""
        return self.thin(*shape) if self.config.accumulate else torch.full(shape, torch.nan, dtype=self.adapter)

    def rounded(self, thin: torch.Tensor) -> torch.Tensor:
        """Returns S or dS as a GEMM or an update multiplies it: rounded for a bfloat16 result."""
        return (thin.to(self.dtype) if self.dtype is torch.bfloat16 else thin).double()

    def workspace(self) -> torch.Tensor:
        """Returns the workspace, NaN with guards behind it."""
        size = self.library.workspace("", self.config)
        memory = torch.full((size + GUARD,), 255, dtype=torch.uint8)
        memory[size:] = GUARD
        return memory

    def check_gaps(self, name: str, rows: torch.Tensor) -> None:
        whole = torch.as_strided(rows, (len(rows), rows.stride(0)), rows.stride())
        assert whole[:, rows.shape[1] :].isnan().all(), f"{name}: written between the rows"

    def project(self) -> torch.Tensor:
        s = torch.full_like(self.s, torch.nan)
        self.library("project", self.config, self.x, self.a, s)
        kept, a = self.x.double() * self.keep, self.a.double()
        compare("s", s, kept @ a.T, kept.abs() @ a.abs().T, self.halves)
        return s

    def linear(self) -> None:
        y = self.rows(self.n_tokens, self.d_out, torch.nan)
        self.library("linear", self.config, self.x, self.weight, self.bias, self.s, self.b, y)
        bias = torch.zeros(()) if self.bias is None else self.bias
        self._check_product("y", y, self.x, self.weight.T, self.s, self.b.T, SCALING, bias.double(), torch.ones(()))

    def grad_x(self) -> None:
        dx = self.rows(self.n_tokens, self.d_in, torch.nan)
        self.library("grad_x", self.config, self.dy, self.weight, self.ds, self.a, dx)
        self._check_product("dx", dx, self.dy, self.weight, self.ds, self.a, 1.0, torch.zeros(()), self.keep)

    def _check_product(self, name, got, left, right, thin, factor, scaling, start, keep) -> None:
        left, right, thin, factor = left.double(), right.double(), self.rounded(thin), factor.double()
        exact = start + left @ right + keep * (scaling * (thin @ factor))
        size = start.abs() + left.abs() @ right.abs() + scaling * (thin.abs() @ factor.abs())
        compare(name, got, exact, size, self.halves)
        self.check_gaps(name, got)

    def add_to_y(self) -> None:
        y = self.rows(self.n_tokens, self.d_out)
        before, s, b = y.double(), self.rounded(self.s), self.b.double()
        self.library("add_to_y", self.config, self.s, self.b, y)
        compare("y", y, before + SCALING * (s @ b.T), before.abs() + SCALING * (s.abs() @ b.abs().T), self.halves)
        self.check_gaps("y", y)

    def add_to_dx(self) -> None:
        dx = self.rows(self.n_tokens, self.d_in)
        before, ds, a = dx.double(), self.rounded(self.ds), self.a.double()
        self.library("add_to_dx", self.config, self.ds, self.a, dx)
        compare("dx", dx, before + self.keep * (ds @ a), before.abs() + ds.abs() @ a.abs(), self.halves)
        self.check_gaps("dx", dx)

    def grad_s_b(self) -> tuple[torch.Tensor, torch.Tensor]:
        ds, db, parts = torch.full_like(self.s, torch.nan), self.result(self.d_out, self.r), self.workspace()
        before = db.double().nan_to_num()
        self.library("grad_s_b", self.config, self.dy, self.s, self.b, ds, db, parts)
        dy, s, b = self.dy.double(), self.s.double(), self.b.double()
        compare("ds", ds, SCALING * (dy @ b), SCALING * (dy.abs() @ b.abs()), self.halves)
        size = before.abs() + SCALING * (dy.abs().T @ s.abs())
        compare("db", db, before + SCALING * (dy.T @ s), size, self.halves)
        assert (parts[-GUARD:] == GUARD).all(), "written behind the workspace"
        return ds, db

    def grad_a(self) -> torch.Tensor:
        da, parts = self.result(self.r, self.d_in), self.workspace()
        before = da.double().nan_to_num()
        self.library("grad_a", self.config, self.x, self.ds, da, parts)
        kept, ds = self.x.double() * self.keep, self.ds.double()
        compare("da", da, before + ds.T @ kept, before.abs() + ds.abs().T @ kept.abs(), self.halves)
        assert (parts[-GUARD:] == GUARD).all(), "written behind the workspace"
        return da

    def add_adapter(self) -> None:
        s, y = torch.full_like(self.s, torch.nan), self.rows(self.n_tokens, self.d_out)
        size, before = self.library.workspace("adapter_", self.config), y.double()
        parts = torch.full((size + GUARD,), GUARD, dtype=torch.uint8)
        self.library("add_adapter", self.config, self.x, self.a, self.b, s, y, parts)
        x, a, b = self.x.double(), self.a.double(), self.b.double()
        exact, of_s = x @ a.T, x.abs() @ a.abs().T
        compare("s", s, exact, of_s, self.halves)
        size = before.abs() + SCALING * (of_s @ b.abs().T)
        of_rounding = torch.finfo(self.dtype).eps * SCALING * (exact.abs() @ b.abs().T)  # of S, which is stored between
        compare("y", y, before + SCALING * (exact @ b.T), size, self.halves, of_rounding)
        self.check_gaps("y", y)
        assert (parts[-GUARD:] == GUARD).all(), "written behind the workspace"


def padded(library: Library, dtype: torch.dtype, r: int) -> None:
    """Runs a layer forward and backward for an adapter of rank r - 4, padded to r. Formulas of rank r with zeros are
    those of rank r - 4, and what the padding gets is zero."""
    layer = LayerCall(library, dtype, dtype, r, 67, padded=4)
    layer.s = layer.project()
    layer.linear()
    layer.ds, db = layer.grad_s_b()
    da = layer.grad_a()
    layer.grad_x()
    for name, padding in {"s": layer.s[:, -4:], "ds": layer.ds[:, -4:], "db": db[:, -4:], "da": da[-4:]}.items():
        assert (padding == 0).all(), f"{name}: padding that is not zero"
