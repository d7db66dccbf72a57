"""Models whose frozen weights merges during training have changed."""

import safetensors.torch
import torch
from safetensors import safe_open
from tiny import batch, fill, injected_llama, loss_of, peft_llama

import lora_fast as lf
from lora_fast.batches import pairs
from lora_fast.layers import merge_log

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYER = "model.layers.0.self_attn.q_proj"
BASE = f"{PREFIX}{LAYER}.base_layer.weight"


TARGETS = ["q_proj", "down_proj"]


LAYERS = 4  # with these targets, in two blocks
RANK = 4


def injected(seed=0, dtype=torch.float32, **config):
    return injected_llama(seed, dtype, **{"target_modules": TARGETS, **config})


def peft(seed=0, dtype=torch.float32, **config):
    return peft_llama(seed, dtype, **{"targets": TARGETS, **config})


def fused(seed=0, dtype=torch.float32, **config):
    model = peft(seed, dtype, **config)
    lf.fuse_(model)
    return model


KINDS = {"injected": injected, "fused": fused, "peft": peft}


def merge_some(model, keep="weights", merges=2):
    """What ScaLoRA does to the base: W += b diag(rest) a, noted. The model is returned."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(merges):
        for pair in pairs.find_pairs(model):
            rest = torch.rand(len(pair.a), generator=generator)
            merge_log.record(pair.layer, pair.a, pair.b, rest, keep)
            pair.weight.data += ((pair.b * rest) @ pair.a).to(pair.weight.dtype)
            fill(model, seed=int(generator.initial_seed()) + 1)
    return model


def weights_of(model):
    """Layer's name → its frozen weight and its adapter, in any kind of model."""
    found = {}
    for pair in pairs.find_pairs(model):
        name = pair.name.removeprefix(PREFIX).removesuffix(".default")
        found |= {name: pair.weight.detach(), f"{name}.a": pair.a.detach(), f"{name}.b": pair.b.detach()}
    return found


def read(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        return safetensors.torch.load_file(folder / WEIGHTS), file.metadata()


# in training


def train(model, optimizer, steps, first=0):
    for i in range(first, first + steps):
        loss_of(model, batch(seed=i)).backward()
        optimizer.step()
        optimizer.zero_grad()


def scalora(model, **options):
    return lf.optim.LoRAAdamW(model, lr=1e-2, methods=[lf.methods.ScaLoRA(interval=2, **options)])
