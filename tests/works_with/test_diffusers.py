"""diffusers' denoisers: LoRA training, adapters, fusing, files, EMA and checkpointing."""

import pytest
import torch
from fused_models import fused_layers
from safetensors import safe_open
from side_by_side import adamw, assert_ran, assert_same, factors, fuse, plain, train, trained
from tiny import fill
from workflows import workflow

import lora_fast as lf

diffusers = pytest.importorskip("diffusers", reason="pip install '.[works-with]'")
peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

from diffusers.training_utils import EMAModel, cast_training_params  # noqa: E402

LIBRARY = "diffusers"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EXACT = 1e-12  # in float64


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


def with_adapter(build, name="default", **options):
    model = build()
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, **options), name)
    return fill(model)


def denoising_loss(output):
    return lambda model, step: (output(model) - torch.randn(2, 1).double().mean()).square().mean()


@workflow("`add_adapter`, then the steps of the LoRA scripts", "losses of three steps and all factors: 1e-12, float64")
@pytest.mark.parametrize("kind", MODELS)
def test_training(kind):
    build, output, layers = MODELS[kind]

    def run(prepare):
        model = prepare(with_adapter(build))
        return train(model, loss=denoising_loss(output)), trained(model)

    assert_same(run, layers, atol=EXACT)


@workflow("`enable_gradient_checkpointing`", "losses and factors: 1e-12, float64")
@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "SD3Transformer2DModel"])
def test_gradient_checkpointing(kind):
    build, output, layers = MODELS[kind]

    def run(prepare):
        model = prepare(with_adapter(build)).train()
        model.enable_gradient_checkpointing()
        return train(model, loss=denoising_loss(output)), trained(model)

    assert_same(run, layers, atol=EXACT)


def two_adapters():
    model = with_adapter(flux)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=ATTENTION), "other")
    return fill(model)


FLUX_LAYERS = 7
LOCAL = {"prefix": None, "use_safetensors": True}  # for load_lora_adapter


@workflow("`set_adapters` with weights, one adapter at a time", "outputs of each: 1e-12, float64")
def test_adapters_with_weights():
    def run(prepare):
        model, outputs = prepare(two_adapters()), []
        for name, weight in (("default", 0.5), ("other", 1.5), ("default", None)):
            model.set_adapters(name, weight)
            outputs.append(flux_output(model))
        return outputs

    assert_same(run, FLUX_LAYERS, atol=EXACT)


@workflow("`set_adapters` with two adapters at once", "outputs: the same bits, by PEFT's forward")
def test_two_adapters_at_once():
    def run(prepare):
        model = prepare(two_adapters())
        model.set_adapters(["default", "other"], [0.5, 1.5])
        return flux_output(model)

    assert_same(run, FLUX_LAYERS, reason="2 active adapters")


@workflow(
    "A scale for one call (`joint_attention_kwargs`, `cross_attention_kwargs`)",
    "outputs before, at and after it: 1e-12, float64",
)
@pytest.mark.parametrize("kind", ["FluxTransformer2DModel", "UNet2DConditionModel"])
def test_scale_for_one_call(kind):
    build, output, layers = MODELS[kind]
    name = "cross_attention_kwargs" if kind.startswith("UNet") else "joint_attention_kwargs"

    def run(prepare):
        model = prepare(with_adapter(build))
        return [output(model, **options) for options in ({}, {name: {"scale": 0.3}}, {})]

    assert_same(run, layers, atol=EXACT)


@workflow(
    "`fuse_lora`, `unfuse_lora`, also of one of two adapters",
    "outputs: 1e-12, float64; the base weights after it: their own bits",
)
def test_fused_lora():
    def run(prepare):
        model = prepare(two_adapters())
        base = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
        model.fuse_lora(lora_scale=1.0, safe_fusing=True, adapter_names=["default"])
        outputs = [flux_output(model)]
        model.unfuse_lora()
        if fused_layers(model):
            assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
        return [*outputs, flux_output(model)]

    assert_same(run, FLUX_LAYERS, atol=EXACT)


@workflow("`disable_adapters`, `enable_adapters`, `delete_adapters`, `set_adapter`", "outputs of each: 1e-12, float64")
def test_adapters_switched():
    def run(prepare):
        model = prepare(two_adapters())
        model.disable_adapters()
        outputs = [flux_output(model)]
        model.enable_adapters()
        model.set_adapter("other")
        outputs.append(flux_output(model))
        model.delete_adapters("default")
        return [*outputs, flux_output(model)]

    assert_same(run, FLUX_LAYERS, atol=EXACT)


@workflow(
    "`save_lora_adapter`, `load_lora_adapter`", "the file of PEFT's layers: the same bits; outputs: 1e-12, float64"
)
def test_files(tmp_path):
    model = fuse(with_adapter(flux), FLUX_LAYERS)
    train(model, loss=denoising_loss(flux_output))
    assert_ran(model, FLUX_LAYERS)
    model.save_lora_adapter(tmp_path / "ours")
    lf.unfuse_(model)
    model.save_lora_adapter(tmp_path / "theirs")
    contents = []
    for name in ("ours", "theirs"):
        with safe_open(tmp_path / name / "pytorch_lora_weights.safetensors", "pt") as file:
            contents.append((file.metadata(), {key: file.get_tensor(key) for key in sorted(file.keys())}))
    assert contents[0][0] == contents[1][0]
    torch.testing.assert_close(contents[0][1], contents[1][1], atol=0, rtol=0)

    def run(prepare):
        model = flux()
        model.load_lora_adapter(tmp_path / "ours", **LOCAL)
        return flux_output(prepare(model))

    assert_same(run, FLUX_LAYERS, atol=EXACT)


@workflow("`load_lora_adapter(hotswap=True)`, after `enable_lora_hotswap`", "outputs before and after: 1e-12, float64")
def test_hotswap(tmp_path):
    fill(with_adapter(flux), 1).save_lora_adapter(tmp_path / "first")
    fill(with_adapter(flux), 2).save_lora_adapter(tmp_path / "second")

    def run(prepare):
        model = flux()
        model.enable_lora_hotswap(target_rank=6)
        model.load_lora_adapter(tmp_path / "first", adapter_name="default", **LOCAL)
        outputs = [flux_output(prepare(model))]
        model.load_lora_adapter(tmp_path / "second", adapter_name="default", **LOCAL, hotswap=True)
        return [*outputs, flux_output(model)]

    first, second = assert_same(run, FLUX_LAYERS, atol=EXACT)
    assert not torch.allclose(first, second, atol=1e-3)


@workflow(
    "A pipeline's `save_lora_weights`, `lora_state_dict`, `load_lora_into_transformer`", "outputs: 1e-12, float64"
)
def test_pipeline_files(tmp_path):
    model = fuse(with_adapter(flux), FLUX_LAYERS)
    layers = peft.get_peft_model_state_dict(model)
    diffusers.FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    state = diffusers.FluxPipeline.lora_state_dict(tmp_path)

    def run(prepare):
        model = flux()
        diffusers.FluxPipeline.load_lora_into_transformer(dict(state), None, model, adapter_name="default")
        return flux_output(prepare(model))

    assert_same(run, FLUX_LAYERS, atol=EXACT)


@workflow("`EMAModel` of the factors, copied into the model for validation", "shadows and outputs: 1e-12, float64")
def test_ema():
    def run(prepare):
        model = prepare(with_adapter(flux))
        parameters = [p for p in model.parameters() if p.requires_grad]
        ema, optimizer, outputs = EMAModel(parameters, decay=0.5), adamw(model), []
        for _ in range(3):
            train(model, 1, optimizer, denoising_loss(flux_output))
            ema.step(parameters)
        ema.store(parameters)
        ema.copy_to(parameters)
        outputs.append(flux_output(model))
        ema.restore(parameters)
        return [*outputs, flux_output(model)], ema.shadow_params, factors(model)

    assert_same(run, FLUX_LAYERS, atol=EXACT)


@workflow(
    "A bfloat16 base, float32 factors (`cast_training_params`), autocast", "losses: 1e-2; gradients: 5e-2 of their norm"
)
def test_mixed_precision():
    def run(prepare):
        model = with_adapter(flux).to(torch.bfloat16)
        cast_training_params(model, torch.float32)
        prepare(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = flux_output(model, dtype=torch.bfloat16).float().square().mean()
        loss.backward()
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]

    torch.manual_seed(0)
    loss, gradients = run(plain)
    model = None

    def prepare(built):
        nonlocal model
        model = fuse(built, FLUX_LAYERS)

    torch.manual_seed(0)
    our_loss, our_gradients = run(prepare)
    assert_ran(model, FLUX_LAYERS)
    torch.testing.assert_close(our_loss, loss, atol=0, rtol=1e-2)
    for ours, theirs in zip(our_gradients, gradients, strict=True):
        assert (ours - theirs).norm() < 5e-2 * theirs.norm()


@workflow("`LoRAAdamW` without methods in a LoRA script, in place of `torch.optim.AdamW`", "factors: the same bits")
def test_lora_adamw():
    def run(prepare):
        torch.manual_seed(0)
        model = fuse(with_adapter(flux), FLUX_LAYERS)
        parameters = [p for p in model.parameters() if p.requires_grad]
        settings = {"lr": 1e-3, "weight_decay": 1e-2}
        ours = prepare is None
        optimizer = (
            lf.optim.LoRAAdamW(model, **settings) if ours else torch.optim.AdamW(parameters, fused=True, **settings)
        )
        return train(model, 3, optimizer, denoising_loss(flux_output)), factors(model)

    torch.testing.assert_close(run(None), run(plain), atol=0, rtol=0)


@workflow("`LoRAAdamW` with `ILoRA` in a LoRA script", "the loss falls; `ILoRA` shrinks the imbalance")
def test_ilora():
    model = fuse(with_adapter(flux), FLUX_LAYERS)
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[lf.methods.ILoRA(lam=0.1)])

    def loss(model, step):
        torch.manual_seed(0)
        return flux_output(model).square().mean()

    losses = train(model, 6, optimizer, loss)
    assert_ran(model, FLUX_LAYERS)
    assert losses[-1] < 0.9 * losses[0]


@workflow(
    "`lf.inject_` in place of `add_adapter`, with the same config",
    "losses of three steps and all factors: 1e-12, float64",
)
@pytest.mark.parametrize("kind", MODELS)
def test_injected(kind):
    build, output, layers = MODELS[kind]
    theirs, ours = with_adapter(build), build()
    lf.inject_(ours, peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    pairs = zip(factors(theirs).values(), (p for name, p in ours.named_parameters() if "lora_" in name), strict=True)
    for theirs_factor, factor in pairs:
        factor.data.copy_(theirs_factor)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        results.append((train(model, loss=denoising_loss(output)), list(factors(model).values())))
    torch.testing.assert_close(results[1], results[0], atol=EXACT, rtol=0)
    assert [layer.fallback_reason for layer in ours.modules() if isinstance(layer, lf.LoRALinear)] == [None] * layers
