"""S, dS, db and da by cuBLAS. This is faster than our kernels for large ranks (they would move more bytes) and for few
tokens (they would need one more launch).

Math      S = x aᵀ, dS = scaling dy b, db = scaling dyᵀ S, da = dSᵀ x, all without dropout. A float32 a, b or S beside
          bfloat16 activations is split into two bfloat16 halves that form one matrix. One product multiplies both
          halves with a float32 result, and the sum of both parts is as exact as the kernels' (``primitives.dot_wide``).
Grid      ``lora_halves_kernel``: one program for each block of elements.
Shapes    as in project.py and grads.py; halves: of a (2 r, d_in), of b (d_out, 2 r), of S (n_tokens, 2 r).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..launch import DropoutMask, Launch, allocator, thin_dtype
from ..primitives import halves

BLOCK = 1024


@triton.jit(do_not_specialize=["n_rows"])
def lora_halves_kernel(
    source, result,
    scaling,
    n_rows, n_columns, stride_source, stride_result, stride_half,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores both halves of scaling · source (n_rows, n_columns). The low half is stored ``stride_half`` elements after
    the high half."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_row, i_column = i // n_columns, i % n_columns
    m_i = i_row < n_rows
    b_source = tl.load(source + i_row * stride_source + i_column, mask=m_i, other=0.0)
    high, low = halves(b_source.to(tl.float32) * scaling)
    p_result = result + i_row * stride_result + i_column
    tl.store(p_result, high, mask=m_i)
    tl.store(p_result + stride_half, low, mask=m_i)


class Halves:
    """Splits a matrix into bfloat16 halves, for one signature. The result is (2 rows, columns) if ``above``, else
    (rows, 2 columns)."""

    def __init__(self, matrix: torch.Tensor, above: bool):
        n_rows, n_columns = matrix.shape
        shape = (2 * n_rows, n_columns) if above else (n_rows, 2 * n_columns)
        self.empty = allocator(shape, torch.bfloat16, matrix.device)
        strides = (n_columns, n_rows * n_columns) if above else (2 * n_columns, n_columns)
        self.launch = Launch(
            lora_halves_kernel,
            (triton.cdiv(n_rows * n_columns, BLOCK),),
            (n_rows, n_columns, matrix.stride(0), *strides),
            {"BLOCK": BLOCK, "num_warps": 4},
        )  # fmt: skip

    def __call__(self, matrix: torch.Tensor, scaling: float = 1.0, stream: int | None = None) -> torch.Tensor:
        result = self.empty()
        self.launch.go(stream, (matrix, result), (scaling,))
        return result


class CublasProject:
    """Computes S for one signature of x and a."""

    def __init__(self, x: torch.Tensor, lora_A: torch.Tensor, rounded: bool):
        self.halves = Halves(lora_A, above=True) if thin_dtype(x, lora_A, rounded) is not x.dtype else None

    def __call__(
        self, x: torch.Tensor, lora_A: torch.Tensor, keep: DropoutMask | None = None, stream: int | None = None
    ) -> torch.Tensor:
        if self.halves is None:
            return F.linear(x, lora_A.to(x.dtype))
        return _sum_halves(_product(x, self.halves(lora_A, stream=stream).t()))


class CublasGradA:
    """Computes da for one signature. x and dS have one dtype; da has a's."""

    def __call__(self, x, ds, lora_A, keep: DropoutMask | None = None, stream: int | None = None) -> torch.Tensor:
        return torch.mm(ds.t(), x).to(lora_A.dtype)


class CublasGradSB:
    """Computes dS and db for one signature of dy, S and b. ``needs`` (dS, db): a gradient that is not needed is
    None."""

    def __init__(
        self, dy: torch.Tensor, s: torch.Tensor, lora_B: torch.Tensor, needs: tuple[bool, bool], rounded: bool
    ):
        self.needs = needs
        self.halves_b = Halves(lora_B, above=False) if thin_dtype(dy, lora_B, rounded) is not dy.dtype else None
        self.halves_s = Halves(s, above=False) if s.dtype is not dy.dtype else None

    def __call__(self, dy, s, lora_B, scaling: float, stream: int | None = None):
        need_s, need_b = self.needs
        ds = self._scaled(dy, lora_B, self.halves_b, scaling, stream) if need_s else None
        db = self._scaled(dy.t(), s, self.halves_s, scaling, stream).to(lora_B.dtype) if need_b else None
        return ds, db

    @staticmethod
    def _scaled(tall, thin, halves: Halves | None, scaling: float, stream: int | None) -> torch.Tensor:
        """Returns scaling · tall thin. addmm with beta = 0 does not read its first argument, which only has to
        broadcast."""
        if halves is not None:
            return _sum_halves(_product(tall, halves(thin, scaling, stream)))
        thin = thin.to(tall.dtype)
        return torch.addmm(thin[:1, :1], tall, thin, beta=0, alpha=scaling)


def _product(tall: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """Returns tall @ halves in float32, for bfloat16 operands."""
    if tall.is_cuda:
        return torch.mm(tall, halves, out_dtype=torch.float32)
    assert tall.dtype is halves.dtype, f"halves: expected {tall.dtype} as on a GPU, got {halves.dtype}"
    return torch.mm(tall.float(), halves.float())  # torch has no out_dtype on a CPU


def _sum_halves(products: torch.Tensor) -> torch.Tensor:
    """Adds the products of the high halves (first columns) and of the low halves (last columns)."""
    high, low = products.chunk(2, dim=1)
    return high + low
