"""Steps on adapters whose factors lack full rank, and how far a step moves the product of the factors."""

import torch
from torch import nn

import lora_fast as lf

LR = 1e-3
WIDE = [(3, 32, 8), (1, 32, 4), (32, 1, 4), (32, 3, 8), (4, 32, 4), (3, 32, 4), (32, 4, 4), (32, 3, 4)]
SIZES = [*WIDE, (1, 1, 1), (1, 1, 4), (1, 9, 1), (9, 1, 1), (12, 16, 4)]  # (d_out, d_in, r)


def zero(b):
    return torch.zeros_like(b)


def zero_columns(b):
    return torch.cat([b[:, : b.shape[1] // 2], torch.zeros_like(b[:, b.shape[1] // 2 :])], 1)


def zero_rows(b):
    return torch.cat([b[:1], torch.zeros_like(b[1:])])


def equal_columns(b):
    return b[:, :1].expand_as(b).clone()


def unchanged(b):
    return b


KINDS = (unchanged, zero, zero_columns, zero_rows, equal_columns)


def largest_move(methods, size, kind, dtype, steps, rank_of_gradient=None):
    """Returns the largest change of an entry of W + b a in one step, in units of the learning rate. The gradient of the
    weight is constant."""
    d_out, d_in, r = size
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    a = nn.Parameter((draw(r, d_in) / (2 * d_in) ** 0.5).to(dtype))
    b = nn.Parameter(kind(draw(d_out, r) / 10).to(dtype))
    full = draw(d_out, d_in)
    if rank_of_gradient is not None:
        full = full[:, :rank_of_gradient] @ full[:rank_of_gradient]
    weight = torch.zeros(d_out, d_in, dtype=dtype)
    optimizer = lf.optim.LoRAAdamW([(a, b, 1.0, weight)], lr=LR, methods=methods)
    effective = lambda: weight.double() + b.detach().double() @ a.detach().double()
    moves = []
    for _ in range(steps):
        before = effective()
        a.grad = (b.detach().double().T @ full).to(dtype)
        b.grad = (full @ a.detach().double().T).to(dtype)
        optimizer.step()
        moves.append((effective() - before).abs().max() / LR)
    return torch.stack(moves).max().item()  # NaN, if any is
