"""Adapter pairs to train, with gradients, and comparisons of all bits of their state."""

import torch
from torch import nn

SHAPES = [(12, 20, 4), (12, 20, 4), (9, 7, 3), (20, 12, 4)]


def pairs(seed=0, dtype=torch.float32, weight_dtype=None, zero_b=False, shapes=SHAPES):
    """Returns (lora_A, lora_B, scaling, weight) for each of the shapes (d_out, d_in, r)."""
    g = torch.Generator().manual_seed(seed)
    layers = []
    for d_out, d_in, r in shapes:
        draw = lambda *shape: torch.randn(*shape, generator=g)
        a, b, w = draw(r, d_in) / d_in**0.5, draw(d_out, r) * (not zero_b), draw(d_out, d_in) / 4
        layers.append((nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype)), 2.0, w.to(weight_dtype or dtype)))
    return layers


def set_gradients(chosen, seed, scale=1.0):
    """Sets consistent gradients, a daᵀ = dbᵀb, from a random gradient of each effective weight."""
    g = torch.Generator().manual_seed(seed)
    for a, b, s, w in chosen:
        full = torch.randn(w.shape, generator=g) * scale
        a.grad = (s * b.detach().float().T @ full).to(a.dtype)
        b.grad = (s * full @ a.detach().float().T).to(b.dtype)


def train(optimizer, chosen, steps, first=0):
    for i in range(first, first + steps):
        set_gradients(chosen, i)
        optimizer.step()


def bits(chosen, optimizer=None):
    """Returns copies of all factors and weights and, with an optimizer, of its state."""
    tensors = [x.detach().clone() for a, b, _, w in chosen for x in (a, b, w)]
    if optimizer is not None:
        states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
        tensors += [value.clone() for state in states for _, value in sorted(state.items())]
    return tensors


def same(tensors, others):
    """Returns whether the lists are bitwise equal."""
    return len(tensors) == len(others) and all(torch.equal(x, y) for x, y in zip(tensors, others, strict=True))
