"""Each method against the float64 transcription of its formulas, layer by layer."""

import pytest
import torch
import transcription as T
from torch import nn

import lora_fast as lf
from lora_fast import methods as M

SHAPES = [(24, 40, 4), (24, 40, 4), (24, 40, 4), (33, 17, 3), (17, 33, 3), (40, 40, 8), (40, 40, 8), (9, 50, 1)]
STEPS = 200
ULPS = 8  # of float32, where a case makes no error worth the name

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
}


def layers(dtype, seed=0, shapes=SHAPES, zero_b=False):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for d_out, d_in, r in shapes:
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
        a, b, w = draw(r, d_in) / d_in**0.5, draw(d_out, r) / 4, draw(d_out, d_in) / d_in**0.5
        found.append(T.Layer(a, torch.zeros_like(b) if zero_b else b, 2.0, w))
    return found


def gradient_stream(shapes=SHAPES, seed=1):
    """Gradients of the effective weights: a direction that stays, and noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda d_out, d_in: torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    steady = [draw(d_out, d_in) for d_out, d_in, _ in shapes]
    while True:
        yield [g + draw(*g.shape) for g in steady]


class Ours:
    """The optimizer on the same layers, with the interface of a transcription."""

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
    """Relative L2 error over all factors and weights, each divided by its own norm."""
    errors = [(got - want).norm() / want.norm() for got, want in zip(factors(work), factors(exact), strict=True)]
    return torch.stack(errors).square().mean().sqrt().item()


@pytest.mark.parametrize("name", METHODS)
def test_against_the_transcription(name):
    methods = METHODS[name]
    exact = run(T.Run, torch.float64, methods)
    in_float64, in_float32 = run(Ours, torch.float64, methods), run(Ours, torch.float32, methods)
    formulas = distance(run(T.Run, torch.float32, methods), exact)
    ours = distance(in_float32, exact)
    print(f"{name}: {ours:.3e} / {formulas:.3e} = {ours / formulas:.3f}; float64 {distance(in_float64, exact):.1e}")
    assert distance(in_float64, exact) <= 1e-9
    assert ours <= 1.1 * formulas + ULPS * torch.finfo(torch.float32).eps
