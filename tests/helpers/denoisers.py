"""diffusers' denoisers, tiny and with random weights, in float64 with adapters on their attention."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import peft
import torch
from tiny import fill
from torch import nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FLUX_LAYERS = 7


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).double()


def unet_output(model, **options):
    noise, text = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 12).double()
    return model(noise, torch.tensor([3, 7]), text, **options).sample


def sd3():
    torch.manual_seed(0)
    shape = {"sample_size": 8, "patch_size": 2, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    shape |= {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    return diffusers.SD3Transformer2DModel(in_channels=4, out_channels=4, pos_embed_max_size=8, **shape).double()


def sd3_output(model, **options):
    latents, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 10)
    inputs = (latents.double(), text.double(), pooled.double())
    return model(*inputs, timestep=torch.tensor([3.0, 7.0]).double(), **options).sample


def flux():
    torch.manual_seed(0)
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    shape |= {"joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4)}
    return diffusers.FluxTransformer2DModel(patch_size=1, in_channels=4, **shape).double()


def flux_output(model, dtype=torch.float64, **options):
    inputs = torch.randn(2, 16, 4), torch.randn(2, 5, 12), torch.randn(2, 10), torch.tensor([0.3, 0.7])
    ids = {"img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(5, 3)}
    return model(*(x.to(dtype) for x in inputs), **ids, **options).sample


def wan():
    torch.manual_seed(0)
    shape = {"num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "ffn_dim": 32, "freq_dim": 16}
    shape |= {"patch_size": (1, 2, 2), "text_dim": 12, "rope_max_seq_len": 32}
    return diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, **shape).double()


def wan_output(model, **options):
    frames, text = torch.randn(2, 4, 2, 4, 4).double(), torch.randn(2, 5, 12).double()
    return model(frames, torch.tensor([3, 7]), text, **options).sample


MODELS = {  # how to build and to call it, and how many layers of attention it has
    "UNet2DConditionModel": (unet, unet_output, 32),
    "SD3Transformer2DModel": (sd3, sd3_output, 8),
    "FluxTransformer2DModel": (flux, flux_output, 7),
    "WanTransformer3DModel": (wan, wan_output, 16),
}


def with_adapter(build: Callable, name: str = "default", **options) -> nn.Module:
    """Returns a model with a LoRA adapter on its attention, as the LoRA scripts make it."""
    model = build()
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, **options), name)
    return fill(model)


def denoising_loss(output: Callable) -> Callable:
    """Returns a loss for ``side_by_side.train``, on random latents and texts."""
    return lambda model, step: (output(model) - torch.randn(2, 1).double().mean()).square().mean()


def two_adapters() -> nn.Module:
    """Returns a Flux transformer with the adapters "default" and "other"."""
    model = with_adapter(flux)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=ATTENTION), "other")
    return fill(model)
