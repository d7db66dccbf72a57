"""diffusers' adapters: their weights, scales, files and pipelines."""

import pytest
import torch
from fused_models import fused_layers
from safetensors import safe_open
from side_by_side import assert_ran, assert_same, fuse, train
from tiny import fill
from workflows import workflow

import lora_fast as lf

pytest.importorskip("diffusers", reason="pip install '.[works-with]'")
peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

import diffusers  # noqa: E402
from denoisers import FLUX_LAYERS, MODELS, denoising_loss, flux, flux_output, two_adapters, with_adapter  # noqa: E402

LIBRARY = "diffusers"
EXACT = 1e-12  # in float64
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
    "`fuse_lora` of one of two adapters, `unfuse_lora`",
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


@workflow("A pipeline (`FluxPipeline`) with an adapter and a scale, in float32", "images: 1e-5")
def test_pipeline():
    def run(prepare):
        torch.manual_seed(0)
        shape = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
        shape |= {"latent_channels": 1, "use_quant_conv": False, "use_post_quant_conv": False}
        pipeline = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=diffusers.AutoencoderKL(in_channels=3, out_channels=3, shift_factor=0.0, scaling_factor=1.0, **shape),
            transformer=prepare(with_adapter(flux).float()),
            **dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]),
        )
        pipeline.set_progress_bar_config(disable=True)
        texts = {"prompt_embeds": torch.randn(1, 5, 12), "pooled_prompt_embeds": torch.randn(1, 10)}
        options = {"num_inference_steps": 2, "output_type": "pt", "joint_attention_kwargs": {"scale": 0.5}}
        return pipeline(height=8, width=8, **texts, **options).images

    assert_same(run, FLUX_LAYERS, atol=1e-5)


@workflow("Weights of each block (`set_adapters` of a UNet), FreeU", "outputs: 1e-12, float64")
def test_weights_of_blocks():
    build, output, layers = MODELS["UNet2DConditionModel"]

    def run(prepare):
        model = prepare(with_adapter(build))
        model.set_adapters(["default"], [{"down": 0.5, "up": {"block_1": 0.2}, "mid": 0.9}])
        outputs = [output(model)]
        model.enable_freeu(0.9, 0.2, 1.2, 1.4)
        return [*outputs, output(model)]

    assert_same(run, layers, atol=EXACT)


@workflow("`fuse_lora`, then `fuse_qkv_projections`", "outputs: 1e-12, float64")
def test_fused_projections():
    def run(prepare):
        model = prepare(with_adapter(flux))
        outputs = [flux_output(model)]
        model.fuse_lora()
        model.fuse_qkv_projections()
        outputs.append(flux_output(model))
        model.unfuse_qkv_projections()
        model.unfuse_lora()
        return [*outputs, flux_output(model)]

    assert_same(run, FLUX_LAYERS, atol=EXACT)


@workflow("`enable_layerwise_casting` to float8, `enable_group_offload`", "outputs: the same bits, by PEFT's forward")
@pytest.mark.parametrize("kind", ["casting", "offload"])
def test_hooks_on_all_layers(kind):
    def run(prepare):
        model = prepare(with_adapter(flux).float())
        if kind == "casting":
            model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        else:
            cpu = torch.device("cpu")
            model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
        return flux_output(model, dtype=torch.float32)

    assert_same(run, FLUX_LAYERS, reason="hooks, or a replaced forward, on the base layer or the adapter")


@pytest.mark.budget
@workflow("`compile_repeated_blocks`", "outputs: 1e-12, float64")
def test_compiled_blocks():
    results = []
    for compiled in (False, True):
        model = fuse(with_adapter(flux), FLUX_LAYERS)
        if compiled:
            model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        results.append(flux_output(model))
    torch.testing.assert_close(results[1], results[0], atol=EXACT, rtol=0)
