"""Plain-torch twin of every op: the specification, the oracle of the tests, and the backend on a CPU.

Any floating dtype, float64 included. ``x`` and ``dy`` are (n_tokens, d); ``keep`` is the dropout mask, a bool
(n_tokens, d_in), or None. ``scaling`` is s = alpha/r, times ``keep_scale(dropout_p)`` where there is a mask. Nothing
here is autograd-aware.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PHILOX_ROUNDS = 7
DROP_LEVELS = 1 << 16  # a dropout probability is a multiple of 1/65536


def drop_level(dropout_p: float) -> int:
    """How many of the 65536 values of a 16-bit random number drop an element."""
    return round(DROP_LEVELS * dropout_p)


def keep_scale(dropout_p: float) -> float:
    """1/(1-p) for the p that is drawn (a multiple of 1/65536); 0 where everything is dropped."""
    kept = 1.0 - drop_level(dropout_p) / DROP_LEVELS
    return 1.0 / kept if kept else 0.0


def project(x: Tensor, lora_A: Tensor, keep: Tensor | None = None) -> Tensor:
    """S = (keep∘x) aᵀ: (n_tokens, d_in), (r, d_in) → (n_tokens, r) in x's dtype."""
    a = lora_A if lora_A.dtype is x.dtype else lora_A.to(x.dtype)
    return F.linear(x if keep is None else x * keep, a)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y = x Wᵀ + bias + scaling · S bᵀ: → (n_tokens, d_out) in x's dtype."""
    b = lora_B if lora_B.dtype is x.dtype else lora_B.to(x.dtype)
    return F.linear(x, weight, bias).addmm_(s, b.t(), alpha=scaling)


def grad_s_b(
    dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float, need_s: bool = True, need_b: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dS = scaling · dy b: (n_tokens, r) in dy's dtype; db = scaling · dyᵀ S: (d_out, r) in b's dtype; None where not
    needed. The scaled products are addmm with beta = 0, which reads its first argument's shape only."""
    b = lora_B if lora_B.dtype is dy.dtype else lora_B.to(dy.dtype)
    ds = torch.addmm(s, dy, b, beta=0, alpha=scaling) if need_s else None
    db = torch.addmm(b, dy.t(), s, beta=0, alpha=scaling) if need_b else None
    return ds, db if b is lora_B or db is None else db.to(lora_B.dtype)


def grad_a(x: Tensor, ds: Tensor, lora_A: Tensor, keep: Tensor | None = None) -> Tensor:
    """da = dSᵀ (keep∘x): → (r, d_in) in a's dtype."""
    da = torch.mm(ds.t(), x if keep is None else x * keep)
    return da if da.dtype is lora_A.dtype else da.to(lora_A.dtype)


def grad_x(dy: Tensor, weight: Tensor, ds: Tensor, lora_A: Tensor, keep: Tensor | None = None) -> Tensor:
    """dx = dy W + keep∘(dS a): → (n_tokens, d_in) in dy's dtype."""
    a = lora_A if lora_A.dtype is dy.dtype else lora_A.to(dy.dtype)
    dx = torch.mm(dy, weight)
    return dx.addmm_(ds, a) if keep is None else dx.add_(torch.mm(ds, a).mul_(keep))


def draw_mask(seed: int | Tensor, n_tokens: int, d_in: int, dropout_p: float, device: torch.device) -> Tensor:
    """The torch backend's dropout mask, a function of the seed: NumPy's SFC64 on a CPU, where it is 15 times faster
    than torch's Bernoulli and so cheap that backward draws it again; torch's generator elsewhere."""
    seed = int(seed)
    if device.type != "cpu":
        generator = torch.Generator(device).manual_seed(seed)
        drawn = torch.randint(DROP_LEVELS, (n_tokens, d_in), generator=generator, device=device, dtype=torch.int32)
        return drawn >= drop_level(dropout_p)
    words = np.random.SFC64(seed).random_raw(-(-n_tokens * d_in // 4))
    drawn = words.view(np.uint16)[: n_tokens * d_in].reshape(n_tokens, d_in)
    return torch.from_numpy(drawn >= drop_level(dropout_p))


def philox_mask(seed: int, n_tokens: int, d_in: int, dropout_p: float) -> Tensor:
    """The kernels' dropout mask, bit for bit: Philox 4x32-7 (Salmon et al., SC 2011) with key = seed and counter =
    (token, column // 8, 0, 0); its four words are eight 16-bit numbers, low half first, one per column; an element is
    kept when its number is at least ``drop_level``."""
    groups = -(-d_in // 8)
    low = 0xFFFFFFFF
    c0 = torch.arange(n_tokens).view(-1, 1).expand(n_tokens, groups)
    c1 = torch.arange(groups).expand(n_tokens, groups)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(PHILOX_ROUNDS):
        high_a, low_a = _multiply_32(0xD2511F53, c0)
        high_b, low_b = _multiply_32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    halves = torch.stack([half for word in (c0, c1, c2, c3) for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return halves.reshape(n_tokens, groups * 8)[:, :d_in] >= drop_level(dropout_p)


def _multiply_32(constant: int, c: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant · c within int64: c is split into 16-bit halves."""
    low_product = constant * (c & 0xFFFF)
    high_product = constant * (c >> 16) + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)
