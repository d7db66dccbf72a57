"""PEFT's files, state dictionaries, hot-swapping and helpers, with models whose layers are fused."""

import copy

import pytest
import torch
from fused_models import fused_layers
from side_by_side import assert_ran, assert_same, factors, fuse, plain, train
from tiny import batch, fill, llama, loss_of, peft_llama
from workflows import workflow

import lora_fast as lf

peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale  # noqa: E402
from peft.utils import hotswap  # noqa: E402

LIBRARY = "peft"
TARGETS = ["q_proj", "up_proj"]
LAYERS = 4  # two in each of two layers
EXACT = 1e-12  # in float64


def saved(folder, seed=1, **options):
    """Writes an adapter for ``llama``, by PEFT, and returns its folder."""
    model = fill(peft_llama(targets=TARGETS, **options), seed)
    model.save_pretrained(str(folder))
    return str(folder)


@workflow("`save_pretrained` after training", "both files: byte for byte those of PEFT's layers with the same values")
def test_saved_files(tmp_path):
    model = peft_llama(targets=TARGETS, modules_to_save=["lm_head"])
    train(fuse(model, LAYERS))
    assert_ran(model, LAYERS)
    model.save_pretrained(str(tmp_path / "ours"))
    lf.unfuse_(model)
    model.save_pretrained(str(tmp_path / "theirs"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@workflow("`PeftModel.from_pretrained`, trained further (`is_trainable=True`)", "losses and factors: 1e-12, float64")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_adapter_trains(low_cpu_mem_usage, tmp_path):
    folder = saved(tmp_path, dtype=torch.float64)

    def run(prepare):
        options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        model = prepare(peft.PeftModel.from_pretrained(llama(dtype=torch.float64), folder, **options))
        return train(model), factors(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow("`AutoPeftModelForCausalLM` from a folder with base and adapter", "logits: 1e-5, float32")
def test_auto_peft_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape))
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    assert check_if_peft_model(str(tmp_path / "adapter")) and not check_if_peft_model(str(tmp_path / "base"))

    def run(prepare):
        model = prepare(peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter")))
        return model.eval()(input_ids=batch()).logits

    assert_same(run, LAYERS, atol=1e-5)


@workflow(
    "`get_peft_model_state_dict`, `set_peft_model_state_dict`", "values: the same bits; losses after it: 1e-12, float64"
)
def test_state_dict_helpers():
    state = peft.get_peft_model_state_dict(fill(peft_llama(dtype=torch.float64, targets=TARGETS), seed=5))

    def run(prepare):
        model = prepare(peft_llama(dtype=torch.float64, targets=TARGETS))
        result = peft.set_peft_model_state_dict(model, state)
        assert not result.unexpected_keys
        read = peft.get_peft_model_state_dict(model)
        assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)
        return train(model), factors(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow(
    "`inject_adapter_in_model`, also by the keys of a state (`state_dict=`)", "losses and factors: 1e-12, float64"
)
@pytest.mark.parametrize("by_state", [False, True])
def test_injected_by_peft(by_state):
    whole = peft.get_peft_model_state_dict(peft_llama(targets=TARGETS))
    state = {key.removeprefix("base_model.model."): value for key, value in whole.items()} if by_state else None

    def run(prepare):
        config = peft.LoraConfig(r=4, target_modules=None if by_state else TARGETS)
        model = prepare(peft.inject_adapter_in_model(config, llama(dtype=torch.float64), state_dict=state))
        return train(model), factors(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow("`load_adapter` of a second adapter into a fused model, then `set_adapter`", "logits: 1e-12, float64")
def test_second_adapter_loaded(tmp_path):
    folder = saved(tmp_path, seed=4, dtype=torch.float64, r=2)

    def run(prepare):
        model = prepare(peft_llama(dtype=torch.float64, targets=TARGETS))
        model.load_adapter(folder, "second", low_cpu_mem_usage=True)
        model.set_adapter("second")
        return model(input_ids=batch()).logits

    assert_same(run, LAYERS, atol=EXACT)


@workflow("`hotswap_adapter`: another adapter's files in place of one", "logits before and after: 1e-12, float64")
@pytest.mark.parametrize("prepared", [False, True])
def test_hotswap(prepared, tmp_path):
    """Also as prepared for compiled models, with scalings that are tensors and padded ranks."""
    first = saved(tmp_path / "first", dtype=torch.float64)
    second = saved(tmp_path / "second", seed=4, dtype=torch.float64, r=6 if prepared else 4, alpha=3)

    def run(prepare):
        model = prepare(peft.PeftModel.from_pretrained(llama(dtype=torch.float64), first))
        if prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        before = model(input_ids=batch()).logits
        hotswap.hotswap_adapter(model, second, "default")
        return before, model(input_ids=batch()).logits

    before, after = assert_same(run, LAYERS, atol=EXACT)
    assert not torch.allclose(before, after, atol=1e-3)


@workflow("`rescale_adapter_scale`, `set_scale`, `scale_layer`, `unscale_layer`", "logits of each: 1e-12, float64")
def test_scales():
    def run(prepare):
        model = prepare(peft_llama(dtype=torch.float64, targets=TARGETS)).eval()
        logits = lambda: model(input_ids=batch()).logits
        with rescale_adapter_scale(model, 0.25):
            results = [logits()]
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale("default", 3)
                layer.scale_layer(0.5)
        results.append(logits())
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.unscale_layer()
        return results + [logits()]

    results = assert_same(run, LAYERS, atol=EXACT)
    assert len({logits.sum().item() for logits in results}) == 3


@workflow("`disable_input_dtype_casting`", "loss: the same bits, by PEFT's forward")
def test_input_dtype_casting():
    def run(prepare):
        model = prepare(peft_llama(targets=TARGETS))
        with disable_input_dtype_casting(model):
            return loss_of(model, batch()).detach()

    assert_same(run, LAYERS, reason="casting of the input is off")


@workflow("A model copied (`copy.deepcopy`) and trained on", "losses of the copy: 1e-12, float64")
def test_copied_model():
    def run(prepare):
        model = prepare(peft_llama(dtype=torch.float64, targets=TARGETS))
        train(model)
        other = copy.deepcopy(model)
        return train(other), factors(other), train(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow("`unload`", "logits of the base model: the same bits")
def test_unloaded():
    ids, base = batch(), llama(dtype=torch.float64)
    model = fuse(peft_llama(dtype=torch.float64, targets=TARGETS), LAYERS)
    train(model)
    assert_ran(model, LAYERS)
    assert torch.equal(model.unload()(input_ids=ids).logits, base(input_ids=ids).logits)
    assert not fused_layers(model)


@workflow(
    "`create_loraplus_optimizer`, `create_lorafa_optimizer`, `create_riemannian_optimizer`",
    "losses, factors: 1e-9, float64",
)
@pytest.mark.parametrize("kind", ["loraplus", "lorafa", "riemannian"])
def test_pefts_optimizers(kind):
    from peft import optimizers

    if not hasattr(optimizers, f"create_{kind}_optimizer"):
        pytest.skip(f"PEFT {peft.__version__} has no create_{kind}_optimizer")

    def run(prepare):
        model = prepare(peft_llama(dtype=torch.float64, targets=TARGETS))
        if kind == "loraplus":
            options = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16}
            optimizer = optimizers.create_loraplus_optimizer(model, **options)
        elif kind == "lorafa":
            optimizer = optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
        else:
            optimizer = optimizers.create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)
        return train(model, optimizer=optimizer), factors(model)

    assert_same(run, LAYERS, atol=1e-9)


@workflow("`lf.methods.LoRAPlus` in place of `create_loraplus_optimizer`", "losses and factors: 1e-12, float64")
def test_loraplus_of_both():
    def run(prepare):
        model = prepare(peft_llama(dtype=torch.float64, targets=TARGETS))
        if prepare is plain:
            options = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16, "weight_decay": 0.0}
            optimizer = peft.optimizers.create_loraplus_optimizer(model, **options)
        else:
            optimizer = lf.optim.LoRAAdamW(model, lr=1e-3, methods=[lf.methods.LoRAPlus(16)])
        return train(model, optimizer=optimizer), factors(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow(
    "`LoRAAdamW` without methods in place of `torch.optim.AdamW(fused=True)`", "losses and factors: the same bits"
)
def test_lora_adamw_of_both():
    def run(prepare):
        model = fuse(peft_llama(targets=TARGETS), LAYERS)
        kinds = {"lr": 1e-2, "weight_decay": 0.1}
        if prepare is plain:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, **kinds)
        else:
            optimizer = lf.optim.LoRAAdamW(model, **kinds)
        return train(model, optimizer=optimizer), factors(model)

    torch.testing.assert_close(run(None), run(plain), atol=0, rtol=0)
