"""Training steps of whole blocks on a GPU: what NB-LoRA and ScaLoRA cost over plain LoRA."""

from __future__ import annotations

import copy

import torch
from gpu_goals import TRAINING
from gpu_section import Jobs, Options
from measure import Provider, Unavailable, simply, spread, timed

import lora_fast as lf

RANK, STEPS, INTERVAL = 16, 10, 10


def training(options: Options) -> Jobs:
    """Ten training steps of Llama-3-8B's blocks, random weights: NB-LoRA and ScaLoRA (every 10) over plain LoRA."""
    yield TRAINING, lambda: measured(options)


class Training:
    """Steps of one model on random tokens: forward, backward, optimizer."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, steps: int, methods=()):
        self.model, self.ids, self.steps = model, ids, steps
        self.optimizer = lf.optim.LoRAAdamW(model, lr=1e-5, methods=methods)

    def run(self) -> None:
        for _ in range(self.steps):
            self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def blocks(tiny: bool, device: torch.device) -> torch.nn.Module:
    """Four of Llama-3-8B's blocks with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, count = (32, 64, 1) if tiny else (4096, 14336, 4)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=count,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 8,
        vocab_size=1024,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).bfloat16()


def sides(options: Options) -> dict:
    """Name → function that builds its provider; LoRA and NB-LoRA share their frozen weights."""
    tiny, device = options.dry_run, options.device
    base = blocks(tiny, device)
    ids = torch.randint(1024, (1, 16 if tiny else 4096), device=device)
    r, steps = (4, 1) if tiny else (RANK, STEPS)

    def build(adapter, methods=(), own_weights: bool = False) -> Provider:
        model = copy.deepcopy(base, None if own_weights else {id(p): p for p in base.parameters()})
        lf.inject_(model, adapter)
        return Provider(Training(model.train(), ids, steps, methods).run)

    plain = lf.LoRAConfig(r=r, alpha=2 * r)
    scalora = lf.methods.ScaLoRA(interval=INTERVAL)
    return {
        "LoRA": lambda: build(plain),
        "NB-LoRA": lambda: build(lf.NBLoRAConfig(r=r)),
        "ScaLoRA": lambda: build(plain, (scalora,), own_weights=True),  # its merges change the weights
    }


def measured(options: Options) -> dict:
    """Of each side, µs a step and the ratio to LoRA's of the same round; p20, p50, p80. Or why there is none."""
    ready, figures = {}, {}
    for name, build in sides(options).items():
        try:
            ready[name] = options.surviving(name, build)()
        except Unavailable as reason:
            figures[name] = {"unavailable": str(reason)}
    if not ready:
        return figures
    rounds = timed(ready, options.device, 0.0 if options.dry_run else options.seconds / 4, simply)
    steps = 1 if options.dry_run else STEPS
    for name in ready:
        times = rounds.times(name, "forward")
        figures[name] = {"microseconds a step": [t / steps for t in spread(times)]}
        if "LoRA" in ready:
            pairs = zip(times, rounds.times("LoRA", "forward"), strict=True)
            figures[name]["over LoRA"] = spread([mine / other for mine, other in pairs])
    return figures
