"""Our layers over a Conv1D of transformers, whose weight is (d_in, d_out): as over an nn.Linear of the same values."""

import copy

import peft
import pytest
import torch
from tiny import VOCABULARY, assert_same_tensors, batch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import lora_fast as lf

KINDS = {
    "lora": (lf.LoRALinear, {"r": 4, "alpha": 8, "dropout": 0.3}),
    "nb-lora": (lf.NBLoRALinear, {"r": 4, "bound": 0.5}),
    "sing-lora": (lf.SingLoRALinear, {"r": 4, "alpha": 8, "ramp_steps": 0}),
}
SIZES = {"wide": (16, 24), "square": (16, 16)}


def both(kind, sizes, dtype=torch.float32):
    """Returns our layer over a Conv1D and one over the nn.Linear with the same values."""
    (d_in, d_out), (layer, settings) = SIZES[sizes], KINDS[kind]
    torch.manual_seed(0)
    conv1d, linear = Conv1D(d_out, d_in).to(dtype), nn.Linear(d_in, d_out).to(dtype)
    nn.init.normal_(conv1d.bias)
    linear.weight.data, linear.bias.data = conv1d.weight.data.T.clone(), conv1d.bias.data.clone()
    layers = []
    for base in (conv1d, linear):
        layers.append(layer.from_linear(base, **settings))
        assert layers[-1].weight is base.weight and layers[-1].bias is base.bias
        torch.manual_seed(1)
        for name in layer.TRAINABLE:
            nn.init.normal_(getattr(layers[-1], name), std=0.3)
    return layers


def run(layer, x, dy):
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad} | {name: getattr(layer, name).grad for name in layer.TRAINABLE}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_conv1d_computes_as_the_linear(kind, sizes, dtype, backend):
    conv1d, linear = both(kind, sizes, dtype)
    x, dy = torch.randn(2, 5, SIZES[sizes][0]).to(dtype), torch.randn(2, 5, SIZES[sizes][1]).to(dtype)
    with lf.set_backend(backend):
        got, wanted = run(conv1d, x, dy), run(linear, x, dy)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_conv1d_merges_as_the_linear_and_gets_every_bit_back(kind, sizes, dtype):
    conv1d, linear = both(kind, sizes, dtype)
    before, x = conv1d.weight.data.clone(), torch.randn(3, SIZES[sizes][0]).to(dtype)
    for layer in (conv1d, linear):
        layer.fold_()
    assert torch.equal(conv1d.weight.T, linear.weight) and not torch.equal(conv1d.weight, before)
    torch.testing.assert_close(conv1d(x), linear(x))
    assert (conv1d.merge_note() == "") == (linear.merge_note() == "")
    plain = copy.deepcopy(conv1d).to_linear()
    assert type(plain) is Conv1D and torch.equal(plain(x), conv1d(x))
    conv1d.unmerge()
    assert torch.equal(conv1d.weight, before)


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)).eval()


@pytest.mark.parametrize("init", [False, "pissa"], ids=["random", "pissa"])
def test_gpt2_is_injected_saved_and_loaded_as_with_peft(init, tmp_path):
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init, fan_in_fan_out=True)
    ours, base = gpt2(), gpt2()
    torch.manual_seed(3)
    assert len(lf.inject_(ours, config).changed) == 4
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base, config).eval()
    logits = ours.eval()(batch()).logits
    torch.testing.assert_close(logits, theirs(batch()).logits)
    lf.save_adapter(ours, tmp_path)
    fresh = gpt2()
    lf.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(batch()).logits, logits)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(gpt2(), tmp_path)(batch()).logits, logits)
    plain = gpt2().state_dict()
    lf.unload_(ours, merge=False)
    assert ours.state_dict().keys() == plain.keys()
    if init is False:
        assert_same_tensors(ours.state_dict(), plain)


def test_olora_of_a_conv1d_is_refused_by_name():
    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights="olora")
    with pytest.raises(lf.ArgumentError, match=r"init_lora_weights: expected .* factors of shape \(8, 32\)"):
        lf.inject_(gpt2(), config)


def test_scalora_refuses_the_weight_of_a_conv1d_by_name():
    model = gpt2()
    lf.inject_(model, lf.LoRAConfig(r=4, target_modules=["attn.c_proj"]))  # a square weight
    with pytest.raises(lf.ArgumentError, match=r"c_proj.weight: .*weight of a Conv1D, stored as \(d_in, d_out\)"):
        lf.optim.LoRAAdamW(model, methods=[lf.methods.ScaLoRA()])
    assert len(lf.metrics.adapter_stats(model)) == 1
