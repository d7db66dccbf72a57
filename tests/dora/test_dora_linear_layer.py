"""DoRALinear and its files: injected, trained, merged, saved and loaded as PEFT's DoRA."""

import copy
import json

import peft
import pytest
import torch
from expert_models import METHODS
from safetensors.torch import load_file, save_file
from tiny import COPIES, assert_same_tensors, batch, fill, injected_llama, llama, loss_of, peft_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fast as lf
from lora_fast.layers.find import adapter_layers

SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
FILE = "adapter_model.safetensors"


def ours(**settings):
    """Returns a model whose magnitudes are not the norms of their rows."""
    return spread(injected_llama(**{"target_modules": SETTINGS["target_modules"], "use_dora": True, **settings}))


def spread(model):
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.linspace(0.5, 1.5, parameter.numel()))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(batch()).logits


def test_a_new_layer_computes_its_frozen_layer():
    model = llama()
    before = logits(model)
    report = lf.inject_(model, lf.LoRAConfig(r=4, use_dora=True))
    assert set(report.changed.values()) == {"DoRALinear(r=4)"}
    assert torch.allclose(logits(model), before, atol=1e-6)
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.allclose(layer.lora_magnitude_vector, layer.weight.norm(dim=1), rtol=1e-6)
    assert repr(layer).startswith("DoRALinear(in_features=64, out_features=64, r=4")
    layer.reset_parameters()
    assert torch.allclose(layer.lora_magnitude_vector, layer.weight.norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pefts_config_gives_pefts_values(init, dtype):
    if init == "pissa" and dtype is torch.bfloat16:
        pytest.skip("torch has no decomposition in bfloat16")
    config = peft.LoraConfig(**SETTINGS, init_lora_weights=init)
    theirs = peft.get_peft_model(llama(dtype=dtype), config)
    model = llama(dtype=dtype)  # which seeds the generator
    lf.inject_(model, config)
    plain = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    values = {name.replace(".default", "").replace(".weight", ""): p for name, p in plain.items()}
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == values.keys() and len(mine) == 12
    assert all(torch.equal(p, values[name]) for name, p in mine.items())
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert torch.allclose(logits(model), logits(theirs), atol=tolerance)


def test_it_trains_as_pefts_do():
    model = ours(dropout=0.2).double()
    theirs = spread(peft_llama(dropout=0.2, **{"targets": SETTINGS["target_modules"], "use_dora": True})).double()
    copy_values(model, theirs)
    losses = []
    for each in (theirs, model):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(5)
        for _ in range(10):
            loss = loss_of(each, batch())
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[10:] == pytest.approx(losses[:10], rel=1e-10) and losses[9] < losses[0]


def copy_values(model, theirs):
    state = {key.replace(".base_layer", "").replace(".default", ""): v for key, v in theirs.state_dict().items()}
    for name, parameter in model.named_parameters():
        bare = f"base_model.model.{name}"
        parameter.data.copy_(state[bare] if bare in state else state[f"{bare}.weight"])


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype, conv):
    torch.manual_seed(0)
    layer = lf.DoRALinear.from_linear((Conv1D(24, 16) if conv else nn.Linear(16, 24)).to(dtype), r=4, alpha=8)
    fill(layer), spread(layer)
    x, before = torch.randn(9, 16, dtype=dtype), layer.weight.detach().clone()
    y = layer(x)
    wide = before.double().mT if conv else before.double()
    exact = wide + 2 * (layer.lora_B.double() @ layer.lora_A.double())
    exact = exact * (layer.lora_magnitude_vector.double() / exact.norm(dim=1))[:, None]
    layer.merge()
    unit = torch.finfo(dtype).eps / 2
    merged = layer.weight.double().mT if conv else layer.weight.double()
    assert ((merged - exact).abs() <= 1.01 * unit * exact.abs() + 1e-6).all()
    assert (layer(x) - y).double().norm() <= 4 * unit * y.double().norm()
    state = layer.state_dict()
    assert torch.equal(state["weight"], before)
    layer.unmerge()
    assert torch.equal(layer.weight, before) and torch.equal(layer(x), y)


def test_a_weight_changed_while_it_was_merged_is_divided_and_subtracted():
    layer = lf.DoRALinear(16, 24, r=4, alpha=8, dtype=torch.float64)
    fill(layer), spread(layer)
    before = layer.weight.detach().clone()
    layer.merge()
    layer.weight.data.add_(0)  # the same values
    layer.weight.data[3] *= 2
    assert layer.weight[3].norm() > 0
    expected = before.clone()
    term = layer.merge_term()
    expected[3] = 2 * before[3] + (term.b[3] @ term.a) * term.scaling
    assert torch.allclose(layer.original_weight(), expected, atol=1e-12)
    layer.unmerge()
    assert torch.allclose(layer.weight, expected, atol=1e-12)


def test_layers_of_one_weight_are_not_merged_together():
    base = nn.Linear(16, 24)
    layers = [lf.DoRALinear.from_linear(base, r=4, alpha=8), lf.LoRALinear.from_linear(base, r=4, alpha=8)]
    for first, second in (layers, layers[::-1]):
        first.merge()
        with pytest.raises(lf.ArgumentError, match="DoRA, which scales the weight"):
            second.merge()
        first.unmerge()


@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same(way):
    model = ours()
    before = logits(model)
    twin = COPIES[way](model)
    assert torch.equal(logits(twin), before)
    assert_same_tensors(twin.state_dict(), model.state_dict())


def test_statistics_are_those_of_the_product():
    stats = lf.metrics.adapter_stats(ours())
    plain = lf.metrics.adapter_stats(injected_llama(target_modules=SETTINGS["target_modules"]))
    assert stats.keys() == plain.keys() and len(stats) == 4


@pytest.mark.parametrize("of_peft", [False, True], ids=["ours", "peft"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_dora_or_refuses_it_by_name(name, of_peft):
    """Magnitudes are trained as torch's AdamW trains them, whatever the method does with the pairs."""
    methods, model = METHODS[name], ours()
    if of_peft:
        model = spread(peft_llama(targets=SETTINGS["target_modules"], use_dora=True))
        lf.fuse_(model)
    if name.startswith("scalora"):
        with pytest.raises(lf.ArgumentError, match="more than scaling"):
            lf.optim.LoRAAdamW(model, methods=methods)
        return
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = lf.optim.LoRAAdamW(model, methods=copy.deepcopy(methods), **settings)
    magnitudes = {name: p for name, p in model.named_parameters() if "magnitude" in name}
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in magnitudes.items()}
    theirs = torch.optim.AdamW(twins.values(), fused=True, **settings)
    losses = []
    for _ in range(6):
        loss = loss_of(model, batch())
        loss.backward()
        for name, p in magnitudes.items():
            twins[name].grad = p.grad.clone()
        optimizer.step(), theirs.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(torch.equal(p, twins[name]) for name, p in magnitudes.items())


# files


def test_files_are_pefts_both_ways(tmp_path):
    model = ours()
    before = logits(model)
    assert len(lf.save_adapter(model, tmp_path / "ours").changed) == 4
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert torch.allclose(logits(theirs), before, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(*(load_file(tmp_path / folder / FILE) for folder in ("ours", "theirs")))
    plain, injected, fused = llama(), ours(seed=0), peft_llama(targets=SETTINGS["target_modules"], use_dora=True)
    lf.fuse_(fused)
    for loaded in (plain, injected, fused):
        spread(loaded)
        assert len(lf.load_adapter(loaded, tmp_path / "theirs").changed) == 4
        assert torch.allclose(logits(loaded), before, atol=1e-5)
    assert {type(layer) for layer in adapter_layers(plain).values()} == {lf.DoRALinear}


def edited(tmp_path, change=None, **config):
    lf.save_adapter(ours(), tmp_path)
    if change:
        tensors = load_file(tmp_path / FILE)
        change(tensors)
        save_file(tensors, tmp_path / FILE)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return tmp_path


BAD = {
    "missing": ({"change": lambda tensors: tensors.pop(NAME)}, [NAME, "missing"]),
    "shape": ({"change": lambda tensors: tensors.update({NAME: torch.ones(63)})}, [NAME, "(64,)", "(63,)"]),
    "dtype": ({"change": lambda tensors: tensors.update({NAME: torch.ones(64).double()})}, [NAME, "float64"]),
    "plain": ({"use_dora": False}, ["lora_magnitude_vector"]),
}


@pytest.mark.parametrize("into", [llama, ours], ids=["plain", "injected"])
@pytest.mark.parametrize("case", BAD)
def test_files_that_do_not_fit_are_refused_by_name(case, into, tmp_path):
    options, says = BAD[case]
    folder, model = edited(tmp_path, **options), into()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(lf.CheckpointError) as raised:
        lf.load_adapter(model, folder)
    says = ["use_dora"] if case == "plain" and into is ours else says
    assert all(part in str(raised.value) for part in says), raised.value
    assert_same_tensors(model.state_dict(), before)


def test_models_of_both_kinds_are_not_saved(tmp_path):
    model = injected_llama(target_modules=["q_proj"])
    lf.inject_(model, lf.LoRAConfig(r=4, target_modules=["v_proj"], use_dora=True))
    with pytest.raises(lf.CheckpointError, match=r"use_dora in adapter_config.json: expected DoRALinear layers alone"):
        lf.save_adapter(model, tmp_path)


@pytest.mark.parametrize("config", [lf.NBLoRAConfig, lf.SingLoRAConfig])
def test_other_parametrisations_have_no_dora(config):
    with pytest.raises(TypeError, match="use_dora"):
        config(use_dora=True)
    with pytest.raises(lf.ArgumentError, match="use_dora"):
        lf.LoRAConfig(use_dora="yes")
