"""Layers in a model that accelerate has dispatched (``device_map="auto"``): every module has a hook that moves its
input.

A map of "cpu" and torch.device("cpu") counts as two devices for accelerate, so it attaches the hooks of a map of two
GPUs. The meta device stands for a second GPU where the move itself is tested, and fake tensors where the values must
come back.
"""

import copy
import functools
import sys

import accelerate
import peft
import pytest
import torch
from accelerate import hooks
from tiny import batch, llama, loss_of, peft_llama
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import LlamaForCausalLM

import lora_fast as lf
from lora_fast.layers import fused_peft
from lora_fast.layers.find import ADAPTER_LAYERS
from lora_fast.layers.fused_peft import FusedLoraLinear

CPU = torch.device("cpu")
REASON = "hooks, or a replaced forward"
CONFIGS = {
    "LoRALinear": lf.LoRAConfig(r=4),
    "NBLoRALinear": lf.NBLoRAConfig(r=4),
    "SingLoRALinear": lf.SingLoRAConfig(r=4, ramp_steps=0),
}
PEFT = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
INNER = "base_model.model."  # prefix of a PEFT model's names


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))


def peft_net(model=None):
    model = net() if model is None else model
    torch.manual_seed(1)
    return peft.get_peft_model(model, PEFT)


def dispatch(model, prefix="", last=CPU):
    """Dispatches the first layer to "cpu" and the last one to the device ``last``, where the model's result stays."""
    device_map = {f"{prefix}0": "cpu", f"{prefix}1": CPU, f"{prefix}2": last}
    model = accelerate.dispatch_model(model, device_map, main_device="cpu")
    model._hf_hook.io_same_device = False
    return model


def ours(model):
    return [module for module in model.modules() if isinstance(module, (*ADAPTER_LAYERS, FusedLoraLinear))]


def reasons(model):
    return {layer.fallback_reason for layer in ours(model)}


def outcome(model, x):
    """Returns the output and the gradients of one step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


# inject_


@pytest.mark.parametrize("kind", CONFIGS)
def test_inject_replaces_the_layers_of_a_dispatched_model(kind):
    dispatched, plain, x = dispatch(net()), net(), torch.randn(3, 16)
    before = [dispatched[i]._hf_hook for i in (0, 2)]
    for model in (dispatched, plain):
        torch.manual_seed(2)
        report = lf.inject_(model, CONFIGS[kind], progress=False)
        assert list(report.changed) == ["0", "2"] and not report.left
    assert [layer._hf_hook for layer in ours(dispatched)] == before
    for got, expected in zip(outcome(dispatched, x), outcome(plain, x), strict=True):
        assert torch.equal(got, expected)
    hooks.remove_hook_from_submodules(dispatched)
    assert not any(hasattr(module, "_hf_hook") for module in dispatched.modules())
    for got, expected in zip(outcome(dispatched, x), outcome(plain, x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["LoRALinear", "SingLoRALinear"])  # autocast, which NB-LoRA disables, has no meta
@pytest.mark.parametrize("order", ["dispatch, inject", "inject, dispatch"])
def test_injected_layer_takes_its_input_to_the_weights_device(kind, order):
    model = net()
    if order == "dispatch, inject":
        dispatch(model, last="meta")
    lf.inject_(model, CONFIGS[kind], progress=False)
    if order == "inject, dispatch":
        dispatch(model, last="meta")
    assert {p.device.type for p in model[0].parameters()} == {"cpu"}
    assert {p.device.type for p in model[2].parameters()} == {"meta"}
    y = model(torch.randn(3, 16))
    assert y.is_meta and y.requires_grad


def test_from_linear_carries_the_hook():
    model, x = dispatch(net(), last="meta"), torch.randn(3, 16)
    model[2] = lf.LoRALinear.from_linear(model[2], r=4, alpha=8)
    assert model[2](x).is_meta


def test_hook_carried_to_a_layer_is_not_initialised_again():
    """Its table of tied weights has addresses, which a tensor of the new layer may have by chance."""
    model = dispatch(net())
    hook = model[0]._hf_hook
    hook.init_hook = lambda module: pytest.fail("initialised")
    lf.inject_(model, lf.LoRAConfig(r=4))
    assert isinstance(model[0], lf.LoRALinear) and model[0]._hf_hook is hook


def test_dispatched_model_trains_as_the_plain_one():
    states = []
    for model in (dispatch(net()), net()):
        torch.manual_seed(2)
        lf.inject_(model, lf.LoRAConfig(r=4), progress=False)
        optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[lf.methods.ILoRA()])
        for step in range(3):
            outcome(model, torch.full((3, 16), step + 1.0))
            optimizer.step()
        states.append(list(model.parameters()))
    assert all(map(torch.equal, *states))


def test_load_adapter_carries_the_hooks(tmp_path):
    model, x = dispatch(net()), torch.randn(3, 16)
    lf.inject_(model, lf.LoRAConfig(r=4), progress=False)
    nn.init.normal_(model[0].lora_B)
    lf.save_adapter(model, tmp_path)
    other = dispatch(net())
    lf.load_adapter(other, tmp_path)
    assert all(hasattr(layer, "_hf_hook") for layer in ours(other))
    assert torch.equal(other(x), model(x))


# fuse_ and unfuse_


@pytest.mark.parametrize("order", ["dispatch, PEFT, fuse", "PEFT, dispatch, fuse", "PEFT, fuse, dispatch"])
def test_fused_layer_of_a_dispatched_model_computes_as_peft(order):
    model, plain, x = net(), peft_net(), torch.randn(3, 16)
    for act in order.split(", "):
        if act == "PEFT":
            model = peft_net(model)
        elif act == "fuse":
            assert len(lf.fuse_(model, strict=True).changed) == 2
        else:
            dispatch(model, INNER if isinstance(model, peft.PeftModel) else "")
    torch.testing.assert_close(outcome(model, x), outcome(plain, x))
    assert reasons(model) == {None}
    assert len(lf.unfuse_(model).changed) == 2
    for got, expected in zip(outcome(model, x), outcome(plain, x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("order", ["dispatch, fuse", "fuse, dispatch"])
def test_fused_layer_takes_its_input_to_the_weights_device(order):
    if order == "dispatch, fuse":
        model = peft_net(dispatch(net(), last="meta"))
        lf.fuse_(model)
    else:
        model = peft_net()
        lf.fuse_(model)
        dispatch(model, INNER, last="meta")
    layer = model.base_model.model[2]
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert model(torch.randn(3, 16)).is_meta and FusedLoraLinear.forward(layer, torch.randn(3, 16)).is_meta
    assert reasons(model) == {None}


@pytest.mark.parametrize("same", [False, True], ids=["io_same_device=False", "io_same_device=True"])
def test_fused_layer_on_another_gpu_returns_its_output_where_the_hook_does(same, monkeypatch):
    monkeypatch.setattr(fused_peft, "PLAIN", (nn.Parameter, torch.Tensor, FakeTensor))
    model = peft_net()
    lf.fuse_(model)
    with lf.set_backend("torch"), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        layer = model.base_model.model[0]
        for linear in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            for name, parameter in list(linear.named_parameters()):
                other = fake.from_tensor(parameter.detach()).to("cuda:1").requires_grad_(parameter.requires_grad)
                linear._parameters[name] = other
        hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook(None, io_same_device=same))
        y = layer(torch.empty(3, 16, device="cuda:0"))
    assert layer.fallback_reason is None
    assert y.device == torch.device("cuda:0" if same else "cuda:1")


@pytest.mark.parametrize("fused", [False, True], ids=["then fused", "then unfused"])
def test_class_changes_after_the_hooks_were_removed(fused):
    model, plain, x = peft_net(), peft_net(), torch.randn(3, 16)
    if fused:
        lf.fuse_(model)
    dispatch(model, INNER)
    hooks.remove_hook_from_submodules(model)
    (lf.unfuse_ if fused else lf.fuse_)(model)
    torch.testing.assert_close(outcome(model, x), outcome(plain, x))
    assert reasons(model) == (set() if fused else {None})


def test_fused_layer_whose_hooks_were_removed_runs_fused():
    model = peft_net(dispatch(net()))
    lf.fuse_(model)
    hooks.remove_hook_from_submodules(model.base_model.model)
    model(torch.randn(3, 16))
    assert reasons(model) == {None}


def test_inject_takes_a_model_whose_hooks_were_removed():
    model = dispatch(net())
    hooks.remove_hook_from_submodules(model)
    assert len(lf.inject_(model, lf.LoRAConfig(r=4)).changed) == 2


def test_unfuse_leaves_a_layer_whose_forward_was_replaced():
    model = peft_net()
    lf.fuse_(model)
    layer = model.base_model.model[0]
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    assert lf.unfuse_(model).left == {f"{INNER}0": "its forward was replaced"}
    model(torch.randn(3, 16))


def test_dispatched_fused_model_merges_and_unmerges():
    model, x = peft_net(dispatch(net())), torch.randn(3, 16)
    lf.fuse_(model)
    before, weight = model(x), model.base_model.model[0].base_layer.weight.clone()
    assert len(lf.merge_(model).changed) == 2
    torch.testing.assert_close(model(x), before)
    lf.unmerge_(model)
    assert torch.equal(model.base_model.model[0].base_layer.weight, weight) and torch.equal(model(x), before)


@pytest.mark.parametrize("kind", [*CONFIGS, "fused PEFT layer"])
def test_copy_of_a_dispatched_model_calls_its_own_layers(kind):
    model, x = dispatch(net()), torch.randn(3, 16)
    if kind in CONFIGS:
        lf.inject_(model, CONFIGS[kind], progress=False)
    else:
        model = peft_net(model)
        lf.fuse_(model)
    other = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(other(x), expected)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(other(x), expected)


def test_dispatched_model_compiles():
    model, x = peft_net(dispatch(net())), torch.randn(3, 16)
    lf.fuse_(model)
    expected = outcome(model, x)
    torch.testing.assert_close(outcome(torch.compile(model, backend="aot_eager"), x), expected)
    torch._dynamo.reset()


# a real device map


def test_model_loaded_with_a_device_map_runs_fused_but_for_offloaded_layers(tmp_path):
    """PEFT creates their adapters on the meta device."""
    llama().save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    load = functools.partial(
        LlamaForCausalLM.from_pretrained, tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    config = peft.LoraConfig(r=4, target_modules=r".*layers\.0\..*_proj", init_lora_weights=False)
    fused, injected = peft.get_peft_model(load(), config), load()
    with torch.no_grad():
        expected = fused(batch()).logits
        assert len(lf.fuse_(fused, strict=True).changed) == 7
        torch.testing.assert_close(fused(batch()).logits, expected)
    assert reasons(fused) == {None}
    report = lf.fuse_(peft.get_peft_model(load(), peft.LoraConfig(r=4, target_modules="all-linear")))
    assert len(report.changed) == 7 and len(report.left) == 7
    assert all(".layers.1." in name and REASON in reason for name, reason in report.left.items())
    report = lf.inject_(injected, lf.LoRAConfig(r=4))
    assert len(report.changed) == 7 and all(".layers.0." in name for name in report.changed)
    assert len([reason for reason in report.left.values() if REASON in reason]) == 7
    loss_of(injected, batch()).backward()
    assert all(p.grad is not None for p in injected.parameters() if p.requires_grad)


def test_fused_layers_that_are_offloaded_later_keep_their_bits():
    model = peft_llama(targets=["q_proj"])
    lf.fuse_(model)
    with torch.no_grad():
        expected = model(batch()).logits
        accelerate.cpu_offload(model, execution_device=CPU)
        for _ in range(2):
            assert torch.equal(model(batch()).logits, expected)
    assert reasons(model) == {None} and all(p.is_meta for p in model.parameters())
    with pytest.raises(lf.ArgumentError):
        model.base_model.model.model.layers[0].self_attn.q_proj(torch.ones(3, 3))
    assert all(p.is_meta for p in model.parameters())


# hooks that are a reason


class OtherAlignment(hooks.AlignDevicesHook):
    """A hook of another library, with a forward of its own perhaps."""


def without_gradient():
    hook = hooks.AlignDevicesHook(CPU)
    hook.no_grad = True
    return hook


OFFLOADING = {
    "offloading": lambda: hooks.AlignDevicesHook(CPU, offload=True),
    "offloading, in a sequence": lambda: hooks.SequentialHook(
        hooks.AlignDevicesHook(CPU), hooks.AlignDevicesHook(CPU, offload=True)
    ),
}
REASONS = {
    "offloading until the next model": lambda: hooks.CpuOffload(CPU),
    "casting": lambda: hooks.LayerwiseCastingHook(torch.float32, torch.float32, non_blocking=False),
    "subclass": lambda: OtherAlignment(CPU),
    "no gradient": without_gradient,
}


def wrap_again(module):
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(CPU))
    wrapper = module.forward
    module.forward = lambda x: wrapper(x)


def hook_other_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) + 1
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(CPU))


def adding(hooks_):
    return {name: lambda module, make=make: hooks.add_hook_to_module(module, make()) for name, make in hooks_.items()}


CHANGES = adding(REASONS)
CHANGES |= {"forward replaced afterwards": wrap_again, "forward replaced before": hook_other_forward}


@pytest.mark.parametrize("case", [*CHANGES, *OFFLOADING])
def test_inject_leaves_a_layer_whose_hook_does_more_than_align(case):
    model = net()
    (CHANGES | adding(OFFLOADING))[case](model[0])
    report = lf.inject_(model, lf.LoRAConfig(r=4))
    assert list(report.changed) == ["2"] and REASON in report.left["0"]


@pytest.mark.parametrize("inner", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("case", CHANGES)
def test_hook_that_does_more_than_align_is_a_reason_for_pefts_forward(case, inner):
    if case == "offloading until the next model" and inner == "lora_dropout.default":
        pytest.skip("accelerate's hook needs a module with parameters")
    hooked, fused, x = peft_net(), peft_net(), torch.randn(3, 16)
    lf.fuse_(fused)
    for model in (hooked, fused):
        CHANGES[case](model.base_model.model[0].get_submodule(inner))
    assert REASON in lf.fuse_(hooked).left[f"{INNER}0"]
    assert torch.equal(fused(x), hooked(x))
    assert REASON in fused.base_model.model[0].fallback_reason


@pytest.mark.parametrize("inner", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("case", OFFLOADING)
def test_offloaded_part_of_a_fused_layer_is_loaded_for_its_call(case, inner):
    plain, fused, late, x = peft_net(), peft_net(), peft_net(), torch.randn(3, 16)
    lf.fuse_(fused)
    for model in (fused, late):
        adding(OFFLOADING)[case](model.base_model.model[0].get_submodule(inner))
    assert len(lf.fuse_(late).changed) == 2
    for model in (fused, late):
        torch.testing.assert_close(model(x), plain(x))
        assert model.base_model.model[0].fallback_reason is None
        if inner == "base_layer":  # an offloaded adapter gets no gradient: the loaded copy has it, as in PEFT
            torch.testing.assert_close(outcome(model, x), outcome(plain, x))


def test_sequence_of_aligning_hooks_is_no_reason():
    model = net()
    for _ in range(3):
        hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(CPU), append=True)
    assert len(lf.inject_(model, lf.LoRAConfig(r=4)).changed) == 2
    assert type(model[0]._hf_hook) is hooks.SequentialHook
    model(torch.randn(3, 16))


def test_any_hook_around_a_whole_peft_layer_is_kept_by_fuse():
    model, x = peft_net(), torch.randn(3, 16)
    layer = model.base_model.model[0]
    hooks.add_hook_to_module(layer, without_gradient())
    lf.fuse_(model)
    assert type(layer) is FusedLoraLinear and not layer(x).requires_grad and layer.fallback_reason is None


def test_shallow_copy_that_calls_another_modules_forward_is_a_reason():
    model = peft_net(dispatch(net()))
    lf.fuse_(model)
    layer = model.base_model.model[0]
    layer._modules["base_layer"] = copy.copy(layer.base_layer)  # its wrapper calls the original
    layer(torch.randn(3, 16))
    assert REASON in layer.fallback_reason


def test_replaced_forward_is_a_reason_without_accelerate(monkeypatch):
    model = net()
    model[0].forward = functools.partial(lambda module, x: x, model[0])
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setitem(sys.modules, "accelerate.hooks", None)
    report = lf.inject_(model, lf.LoRAConfig(r=4))
    assert list(report.changed) == ["2"] and REASON in report.left["0"]
