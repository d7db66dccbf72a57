"""The routing of tokens to experts: rows sorted by expert, and the sum over the experts of each token.

A router gives each of n tokens k experts. The n·k pairs are sorted by expert, stably, so that each expert has one range
of rows. Both directions are gathers, and so are their backwards: nothing is added by atomics, and the same inputs give
the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """This record says where the n·k pairs of a token and an expert are.

    Attributes:
        order: int64 (n·k,), the pair in each sorted row; pair i · k + j is the j-th expert of token i.
        places: int64 (n·k,), the sorted row of each pair.
        offsets: int32 (E,), the end of each expert's rows. Rows from ``offsets[-1]`` on are those of expert numbers
            from E on, by which models mark pairs that are not computed.
        top_k: how many experts a token has.
    """

    order: Tensor
    places: Tensor
    offsets: Tensor
    top_k: int


def route(experts: Tensor, n_experts: int) -> Routing:
    """Returns the routing of tokens to experts, numbers (n, k) of any integer dtype. It does not wait for a device."""
    ordered, order = torch.sort(experts.reshape(-1), stable=True)
    places = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), dtype=order.dtype, device=order.device)
    )
    numbers = torch.arange(n_experts, dtype=ordered.dtype, device=ordered.device)
    offsets = torch.searchsorted(ordered, numbers, right=True, out_int32=True)
    return Routing(order, places, offsets, experts.shape[-1])


def to_experts(x: Tensor, routing: Routing) -> Tensor:
    """Returns the rows of tokens (n, d) for each pair, sorted by expert: (n·k, d)."""
    return _ToExperts.apply(x, routing.order, routing.places, routing.top_k)


def to_tokens(rows: Tensor, routing: Routing) -> Tensor:
    """Returns sorted rows (n·k, d) in the order of the pairs, by token: (n, k, d)."""
    return _ToTokens.apply(rows, routing.order, routing.places).unflatten(0, (-1, routing.top_k))


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, places, top_k):
        ctx.save_for_backward(order, places)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, dy):
        order, places = ctx.saved_tensors
        rows = _ToTokens.apply(dy, order, places)  # of which legacy vmap (is_grads_batched) can view, not unflatten
        return rows.view(-1, ctx.top_k, rows.shape[1]).sum(1), None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, order, places):
        ctx.save_for_backward(order, places)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx, dy):
        order, places = ctx.saved_tensors
        return _ToTokens.apply(dy, places, order), None, None
