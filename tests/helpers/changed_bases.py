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
    """Changes the base as ScaLoRA does, W += b diag(residual_scale) a, records it, and returns the model."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(merges):
        for pair in pairs.find_pairs(model):
            residual_scale = torch.rand(len(pair.a), generator=generator)
            merge_log.record(pair.layer, pair.a, pair.b, residual_scale, keep)
            pair.weight.data += ((pair.b * residual_scale) @ pair.a).to(pair.weight.dtype)
            fill(model, seed=int(generator.initial_seed()) + 1)
    return model


def weights_of(model):
    """Returns a layer's name → its frozen weight and its adapter, for any kind of model."""
    weights = {}
    for pair in pairs.find_pairs(model):
        name = pair.name.removeprefix(PREFIX).removesuffix(".default")
        weights |= {name: pair.weight.detach(), f"{name}.a": pair.a.detach(), f"{name}.b": pair.b.detach()}
    return weights


def read(folder):
    """Returns the tensors and the metadata of an adapter's file."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return safetensors.torch.load_file(folder / WEIGHTS), file.metadata()


def train(model, optimizer, steps, first=0):
    for i in range(first, first + steps):
        loss_of(model, batch(seed=i)).backward()
        optimizer.step()
        optimizer.zero_grad()


def scalora(model, **options):
    return lf.optim.LoRAAdamW(model, lr=1e-2, methods=[lf.methods.ScaLoRA(interval=2, **options)])
