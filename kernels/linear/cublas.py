"""S, dS, db and da by cuBLAS, where a pass of ours would move more (at many ranks) or be a launch more (among few
tokens).

Math      S = x aᵀ, dS = scaling dy b, db = scaling dyᵀ S, da = dSᵀ x, all without dropout. Of a float32 a, b or S
          beside bfloat16 activations both bfloat16 halves stand side by side, one product gives the results of both
          in float32, and their sum is the result: as exact as the kernels' own (``primitives.dot_wide``).
Grid      ``lora_halves_kernel``: one program a block of elements.
Shapes    as in project.py and grads.py; halves: of a (2 r, d_in), of b (d_out, 2 r), of S (n_tokens, 2 r).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..launch import Keep, Launch, allocator, thin_dtype
from ..primitives import halves

BLOCK = 1024


@triton.jit(do_not_specialize=["n_rows"])
def lora_halves_kernel(
    source, result,
    scaling,
    n_rows, n_columns, stride_source, stride_result, stride_half,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Both halves of scaling · source (n_rows, n_columns); the low one lies ``stride_half`` behind the high one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_row, i_column = i // n_columns, i % n_columns
    m_i = i_row < n_rows
    b_source = tl.load(source + i_row * stride_source + i_column, mask=m_i, other=0.0)
    high, low = halves(b_source.to(tl.float32) * scaling)
    p_result = result + i_row * stride_result + i_column
    tl.store(p_result, high, mask=m_i)
    tl.store(p_result + stride_half, low, mask=m_i)


class Halves:
    """bfloat16 halves of a matrix, for one signature: above each other (2 rows, columns), or beside (rows, 2
    columns)."""

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
        )

    def __call__(self, matrix: torch.Tensor, scaling: float = 1.0, stream: int | None = None) -> torch.Tensor:
        result = self.empty()
        self.launch.go(stream, (matrix, result), (scaling,))
        return result


class CublasProject:
    """S for one signature of x and a."""

    def __init__(self, x: torch.Tensor, lora_A: torch.Tensor, rounded: bool):
        self.halves = Halves(lora_A, above=True) if thin_dtype(x, lora_A, rounded) is not x.dtype else None

    def __call__(
        self, x: torch.Tensor, lora_A: torch.Tensor, keep: Keep | None = None, stream: int | None = None
    ) -> torch.Tensor:
        if self.halves is None:
            return F.linear(x, lora_A.to(x.dtype))
        return _added(_product(x, self.halves(lora_A, stream=stream).t()))


class CublasGradA:
    """da for one signature of x, dS and a, in one dtype but for a's."""

    def __call__(self, x, ds, lora_A, keep: Keep | None = None, stream: int | None = None) -> torch.Tensor:
        return torch.mm(ds.t(), x).to(lora_A.dtype)


class CublasGradSB:
    """dS and db for one signature of dy, S and b; ``needs``: which of both."""

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
        """scaling · tall thin. addmm with beta = 0 reads no more of its first argument than its shape."""
        if halves is not None:
            return _added(_product(tall, halves(thin, scaling, stream)))
        thin = thin.to(tall.dtype)
        return torch.addmm(thin[:1, :1], tall, thin, beta=0, alpha=scaling)


def _product(tall: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """tall @ both in float32, of bfloat16 operands."""
    if tall.is_cuda:
        return torch.mm(tall, both, out_dtype=torch.float32)
    assert tall.dtype is both.dtype  # as a GPU demands
    return torch.mm(tall.float(), both.float())  # torch multiplies so on a GPU only


def _added(both: torch.Tensor) -> torch.Tensor:
    high, low = both.chunk(2, dim=1)
    return high + low
