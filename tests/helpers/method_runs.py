"""Runs a method on a few layers, in the optimizer and in the transcription of its formulas."""

import torch
import transcription as T
from torch import nn

import lora_fast as lf
from lora_fast import methods as M

SHAPES = [(24, 40, 4), (24, 40, 4), (24, 40, 4), (33, 17, 3), (17, 33, 3), (40, 40, 8), (40, 40, 8), (9, 50, 1)]

METHODS = {
    "plain": [],
    "lora+": [M.LoRAPlus(4.0)],
    "scale-reg": [M.ScaleReg(lam=0.05)],
    "scale-reg decoupled": [M.ScaleReg(lam=0.05, decoupled=True)],
    "scale-reg lora+": [M.ScaleReg(lam=0.05), M.LoRAPlus(2.0)],
    "scaled adamw": [M.ScaledAdamW(damping=1e-2)],
    "ilora": [M.ILoRA(lam=2.0)],
    "ilora clipped": [M.ILoRA(lam=1e4)],
    "ilora rho": [M.ILoRA(lam=1.0, rho_scale=2.0, rho_exponent=0.5)],
    "ilora lora+": [M.ILoRA(lam=1.0), M.LoRAPlus(4.0)],
    "pilora": [M.PiLoRA(lam=1.0, damping=1e-2)],
    "balora": [M.BaLoRA()],
    "balora every 3, m": [M.BaLoRA(every=3, transport="m")],
    "balora mv, lora+": [M.BaLoRA(transport="mv"), M.LoRAPlus(2.0)],
    "balora svd": [M.BaLoRA(every=50, gauge="svd_signed")],
    "balora scaled": [M.BaLoRA(), M.ScaledAdamW(damping=1e-2)],
    "scalora": [M.ScaLoRA(interval=5)],
    "scalora kappa": [M.ScaLoRA(kappa=30.0, interval=10), M.LoRAPlus(2.0)],
    "scalora paper": [M.ScaLoRA(kappa=30.0, interval=1, solver="paper")],
    "scalora column": [M.ScaLoRA(interval=4, solver="column"), M.LoRAPlus(2.0)],
    "scalora scalar": [M.ScaLoRA(interval=4, solver="scalar")],
    "lora-rite": [M.LoRARITE()],
    "lora-rite ilora": [M.LoRARITE(), M.ILoRA(lam=2.0)],
    "lora-rite scale-reg": [M.LoRARITE(), M.ScaleReg(lam=0.05, decoupled=True)],
    "lora-muon": [M.LoRAMuon()],
    "lora-muon ilora": [M.LoRAMuon(beta=0.8), M.ILoRA(lam=2.0)],
    "ref-lora": [M.RefLoRA()],
    "ref-lora lora+, scale-reg": [M.RefLoRA(), M.LoRAPlus(2.0), M.ScaleReg(lam=0.05, decoupled=True)],
}

STEPS = 200
ULPS = 8  # slack in units of float32's ε, for cases whose formulas have almost no error


def layers(dtype, seed=0, shapes=SHAPES, zero_b=False):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for d_out, d_in, r in shapes:
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
        a, b, w = draw(r, d_in) / d_in**0.5, draw(d_out, r) / 4, draw(d_out, d_in) / d_in**0.5
        result.append(T.Layer(a, torch.zeros_like(b) if zero_b else b, 2.0, w))
    return result


def gradient_stream(shapes=SHAPES, seed=1):
    """Yields gradients of the effective weights: a constant direction plus noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda d_out, d_in: torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    steady = [draw(d_out, d_in) for d_out, d_in, _ in shapes]
    while True:
        yield [g + draw(*g.shape) for g in steady]


class Ours:
    """Runs the optimizer on the same layers, with the interface of a transcription."""

    def __init__(self, layers, methods, **settings):
        self.layers = layers
        for layer in layers:
            layer.a, layer.b = nn.Parameter(layer.a), nn.Parameter(layer.b)
        pairs = [(layer.a, layer.b, layer.s, layer.w) for layer in layers]
        self.optimizer = lf.optim.LoRAAdamW(pairs, methods=methods, **settings)

    def step(self, gs):
        for layer, g in zip(self.layers, gs, strict=True):
            with torch.no_grad():
                layer.a.grad, layer.b.grad = T.gradients(layer, g)
        self.optimizer.step()


def run(kind, dtype, methods, steps=STEPS, zero_b=False, seed=0, **settings):
    work = kind(layers(dtype, seed=seed, zero_b=zero_b), methods, **{"lr": 1e-2, "weight_decay": 0.1, **settings})
    stream = gradient_stream(seed=seed + 1)
    for _ in range(steps):
        work.step(next(stream))
    return work


def factors(work):
    return [p.detach().double() for x in work.layers for p in (x.a, x.b, x.w)]


def distance(work, exact):
    """Returns the relative L2 error over all factors and weights, each divided by its own norm."""
    errors = [(got - want).norm() / want.norm() for got, want in zip(factors(work), factors(exact), strict=True)]
    return torch.stack(errors).square().mean().sqrt().item()


def layer_with_gradients(seed, r=4, d_in=9, d_out=7, s=2.0, correlated=False):
    """Returns a pair in float64, the gradient of its effective weight, and its consistent factor gradients."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    a, b, full = draw(r, d_in), draw(d_out, r), draw(d_out, d_in)
    if correlated:  # ScaLoRA's column solution then has negative entries
        a, b = a + 3 * a[:1], b + 2 * b[:, :1]
    layer = T.Layer(a, b, s, draw(d_out, d_in))
    return layer, full, *T.gradients(layer, full)
