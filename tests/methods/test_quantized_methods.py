"""Methods over 4-bit weights: those that need no W train and reduce the loss, the others are refused by name."""

import peft
import pytest
import torch
from quantized_models import quantized_injected_llama, quantized_llama, quantized_peft_llama
from tiny import assert_unchanged, batch, snapshot

import lora_fast as lf
from lora_fast import methods as M

METHODS = {
    "adamw": [],
    "lora-plus": [M.LoRAPlus(ratio=4)],
    "scale-reg": [M.ScaleReg()],
    "scaled-adamw": [M.ScaledAdamW()],
    "ilora": [M.ILoRA(lam=0.1)],
    "pilora": [M.PiLoRA(lam=0.1)],
    "balora": [M.BaLoRA()],
    "reflora": [M.RefLoRA()],
    "lora-rite": [M.LoRARITE()],
    "lora-muon": [M.LoRAMuon()],
}
CHANGING = ("pissa", "olora", "loftq", "pissa_niter_4")


def frozen(model):
    """Returns the bytes of all frozen tensors, scales included."""
    state = model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if "lora_" not in name and "free_" not in name}


def train(model, steps=6, **settings):
    """Returns the losses of some steps on one batch."""
    optimizer = lf.optim.LoRAAdamW(model, **({"lr": 5e-3} | settings))
    tokens, losses = batch(), []
    for _ in range(steps):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_need_no_weight_train(name):
    model = quantized_injected_llama()
    before = frozen(model)
    losses, _ = train(model, methods=METHODS[name])
    assert losses[-1] < losses[0] - 0.02, losses
    assert all(torch.equal(tensor, before[key]) for key, tensor in frozen(model).items())


@pytest.mark.parametrize(
    "settings", [{"bound": 2.0}, {"bound_ratio": 0.5}, {"bound": 2.0, "norm": "frobenius"}], ids=str
)
def test_norm_bounded_layers_train(settings):
    model = quantized_llama()
    lf.inject_(model, lf.NBLoRAConfig(r=4, **settings), progress=False)
    before = frozen(model)
    losses, _ = train(model, lr=2e-2)
    assert losses[-1] < losses[0] - 0.02, losses
    assert all(torch.equal(tensor, before[key]) for key, tensor in frozen(model).items())


def test_a_saved_state_goes_on_to_the_same_bits():
    model = quantized_injected_llama()
    _, optimizer = train(model, steps=2, methods=METHODS["ilora"])
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    saved = optimizer.state_dict()
    again = quantized_injected_llama()
    again.load_state_dict(adapter, strict=False)
    resumed = lf.optim.LoRAAdamW(again, lr=5e-3, methods=METHODS["ilora"])
    resumed.load_state_dict(saved)
    for each, its in ((model, optimizer), (again, resumed)):
        tokens = batch()
        each.train()(input_ids=tokens, labels=tokens).loss.backward()
        its.step()
    for name in adapter:
        assert torch.equal(again.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize("make", [quantized_injected_llama, quantized_peft_llama], ids=["ours", "peft"])
def test_scalora_is_refused_by_name(make):
    model = make()
    before = snapshot(model)
    with pytest.raises(lf.ArgumentError, match=r"ScaLoRA can merge into.*bitsandbytes nf4.*dequantize_ first"):
        lf.optim.LoRAAdamW(model, methods=[M.ScaLoRA()])
    assert_unchanged(model, before)


@pytest.mark.parametrize("init", CHANGING)
def test_initialisations_that_replace_the_weight_are_refused_by_name(init):
    model = quantized_llama()
    before = snapshot(model)
    options = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init, **options)
    with pytest.raises(lf.ArgumentError, match=rf"init_lora_weights: .*quantised.*{init}.*q_proj"):
        lf.inject_(model, config, progress=False)
    assert_unchanged(model, before)
