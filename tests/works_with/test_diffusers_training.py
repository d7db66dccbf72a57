"""diffusers' LoRA scripts: training of denoisers, EMA, checkpointing, mixed precision."""

import pytest
import torch
from side_by_side import adamw, assert_ran, assert_same, factors, fuse, plain, train, trained
from workflows import workflow

import lora_fast as lf

pytest.importorskip("diffusers", reason="pip install '.[works-with]'")
peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

from denoisers import ATTENTION, FLUX_LAYERS, MODELS, denoising_loss, flux, flux_output, with_adapter  # noqa: E402
from diffusers.training_utils import EMAModel, cast_training_params  # noqa: E402

LIBRARY = "diffusers"
EXACT = 1e-12  # in float64


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


@workflow("`LoRAAdamW` with `ILoRA` in a LoRA script", "the loss falls; all layers ran fused")
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
