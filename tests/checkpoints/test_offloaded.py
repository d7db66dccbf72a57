"""Adapters of models that accelerate has offloaded, and of models on the meta device."""

import accelerate
import peft
import pytest
import torch
from tiny import injected_llama, llama
from torch import nn

import lora_fast as lf

X = torch.linspace(-1, 1, 48).view(3, 16)
CPU = torch.device("cpu")


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


def peft_model():
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    return peft.get_peft_model(base(), config).eval()


def fused():
    model = peft_model()
    lf.fuse_(model)
    return model


def injected(config):
    model = base()
    lf.inject_(model, config, progress=False)
    return model


KINDS = {
    "peft": peft_model,
    "fused": fused,
    "lora": lambda: injected(lf.LoRAConfig(r=4)),
    "nb-lora": lambda: injected(lf.NBLoRAConfig(r=4)),
    "sing-lora": lambda: injected(lf.SingLoRAConfig(r=4, ramp_steps=0)),
}


def filled(kind, seed):
    model = KINDS[kind]()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def offload(model, place, folder, **options):
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device=CPU, **options)
    else:
        accelerate.disk_offload(model, folder / "disk", execution_device=CPU, **options)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_offloaded_adapter_is_saved(kind, place, tmp_path):
    model = filled(kind, seed=1)
    want = model(X)
    offload(model, place, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(model(X), want)
    lf.save_adapter(model, tmp_path / "adapter")
    assert all(parameter.is_meta for parameter in model.parameters())
    lf.load_adapter(plain := base(), tmp_path / "adapter")
    torch.testing.assert_close(plain(X), want)
    torch.testing.assert_close(model(X), want)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_adapter_is_loaded_into_a_model_offloaded_to_the_cpu(kind, tmp_path):
    source, model = filled(kind, seed=2), filled(kind, seed=1)
    lf.save_adapter(source, tmp_path)
    offload(model, "cpu", tmp_path)
    model(X)
    lf.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), source(X))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_model_offloaded_to_the_disk_refuses_an_adapter(kind, tmp_path):
    source, model = filled(kind, seed=2), filled(kind, seed=1)
    want = model(X)
    lf.save_adapter(source, tmp_path)
    offload(model, "disk", tmp_path)
    with pytest.raises(lf.CheckpointError, match=r"a parameter with data in memory .* offloaded to the disk"):
        lf.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), want)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_offloaded_buffers_do_not_matter(kind, tmp_path):
    model = filled(kind, seed=1)
    want = model(X)
    offload(model, "cpu", tmp_path, offload_buffers=True)
    torch.testing.assert_close(model(X), want)
    lf.save_adapter(model, tmp_path)
    lf.load_adapter(plain := base(), tmp_path)
    torch.testing.assert_close(plain(X), want)


def low_cpu_memory():
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return peft.get_peft_model(llama(), config, low_cpu_mem_usage=True)


def nb_lora():
    model = llama()
    lf.inject_(model, lf.NBLoRAConfig(r=4), progress=False)
    return model


@pytest.mark.parametrize("build", [llama, injected_llama, nb_lora, low_cpu_memory])
def test_parameters_without_data_are_not_reported_as_loaded(build, tmp_path):
    lf.save_adapter(injected_llama(), tmp_path)
    model = build()
    if build is not low_cpu_memory:
        model.to("meta")
    with pytest.raises(lf.CheckpointError, match=r"a parameter with data in memory .* got one on the meta device"):
        lf.load_adapter(model, tmp_path)
