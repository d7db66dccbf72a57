"""save_pretrained of models with layers of ours: an adapter, or a plain model once all layers are merged."""

import copy
import gc
import os
import warnings
import weakref

import peft
import pytest
import safetensors.torch
import torch
from tiny import COPIES, assert_same_tensors, batch, injected_llama, llama
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, Trainer, TrainingArguments

import lora_fast as lf

CONFIGS = {
    "LoRA": lf.LoRAConfig(r=2),
    "NB-LoRA": lf.NBLoRAConfig(r=2),
    "SingLoRA": lf.SingLoRAConfig(r=2, ramp_steps=0),
}


def injected(config, base=None):
    """Returns an injected model whose base is in a folder, if one is given, so that others find it by its name."""
    model = llama(layers=1)
    if base is not None:
        model.save_pretrained(base)
        model = LlamaForCausalLM.from_pretrained(base)
    lf.inject_(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_injected_model_is_saved_as_an_adapter(kind, tmp_path):
    model, folder = injected(CONFIGS[kind], tmp_path / "base"), tmp_path / "adapter"
    report = model.save_pretrained(folder)
    assert report.action == "saved" and len(report.changed) == 7
    files = set(os.listdir(folder))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not files & {"model.safetensors", "config.json", "pytorch_model.bin"}
    logits = model(batch()).logits
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
    assert torch.allclose(theirs(batch()).logits, logits, atol=1e-5)
    by_transformers = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(by_transformers(batch()).logits, logits, atol=1e-5)
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    lf.load_adapter(ours, folder)
    assert torch.allclose(ours(batch()).logits, logits, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("how", ["merge_", "unload_"])
def test_a_merged_model_is_saved_as_a_plain_one(kind, how, tmp_path):
    model = injected(CONFIGS[kind])
    logits = model(batch()).logits
    getattr(lf, how)(model)
    model.save_pretrained(tmp_path)
    assert set(safetensors.torch.load_file(tmp_path / "model.safetensors")) == set(llama(layers=1).state_dict())
    assert "adapter_config.json" not in os.listdir(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(plain(batch()).logits, logits, atol=1e-4)
    if how == "merge_":  # the model itself goes on
        (tmp_path / "adapter_config.json").touch()
        with pytest.raises(lf.ArgumentError, match="would add that adapter"):
            model.save_pretrained(tmp_path)
        lf.unmerge_(model)
        assert torch.allclose(model(batch()).logits, logits, atol=1e-5)


def test_a_partly_merged_model_is_saved_as_an_adapter_of_the_unmerged_one(tmp_path):
    model = injected(lf.LoRAConfig(r=2))
    logits, base = model(batch()).logits, llama(layers=1).eval()
    model.model.layers[0].mlp.up_proj.merge()
    model.save_pretrained(tmp_path)
    lf.load_adapter(base, tmp_path)
    assert torch.allclose(base(batch()).logits, logits, atol=1e-5)


@pytest.mark.parametrize("how", COPIES)
def test_copies_save_their_own_adapter(how, tmp_path):
    model = injected_llama()
    copied = COPIES[how](model)
    nn.init.ones_(copied.model.layers[0].self_attn.q_proj.lora_B)
    copied.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert (saved["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] == 1).all()


def test_the_hook_does_not_keep_the_model_alive():
    model = injected_llama()
    alive = weakref.ref(model.model.layers[0].self_attn.q_proj)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_inner_models_and_wrappers_save_adapters(tmp_path):
    model = injected_llama()
    assert isinstance(model.model, LlamaModel)
    model.model.save_pretrained(tmp_path / "inner")
    torch.compile(model).save_pretrained(tmp_path / "compiled")
    for folder in ("inner", "compiled"):
        assert "adapter_config.json" in os.listdir(tmp_path / folder), folder
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    with pytest.raises(lf.ArgumentError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "no", push_to_hub=True)


@pytest.mark.parametrize("inner", ["model", "model.layers"])
def test_outer_model_warns_that_its_file_loses_the_adapters(inner, tmp_path):
    model = llama(layers=1)
    lf.inject_(model.get_submodule(inner), lf.LoRAConfig(r=2))
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM\.save_pretrained writes, .* lf\.save_adapter writes them"):
        copy.deepcopy(model).save_pretrained(tmp_path / "whole")
    with warnings.catch_warnings(action="error"):
        model.state_dict()
        lf.save_adapter(model, tmp_path / "adapter")
        lf.unload_(model.get_submodule(inner))
        model.save_pretrained(tmp_path / "plain")


def test_unloading_and_other_classes_leave_the_own_method(tmp_path):
    model = injected_llama()
    lf.unload_(model, merge=False)
    assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.model)

    class Mixin(nn.Module):  # as diffusers' models
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def save_pretrained(self, save_directory, safe_serialization=True):
            raise AssertionError

    model = Mixin()
    lf.inject_(model, lf.LoRAConfig(r=2))
    model.save_pretrained(tmp_path)
    assert "adapter_config.json" in os.listdir(tmp_path)
    lf.merge_(model)
    with pytest.raises(lf.ArgumentError, match=r"lf\.unload_"):
        model.save_pretrained(tmp_path)


def test_a_model_that_cannot_be_saved_as_an_adapter_is_an_error(tmp_path):
    model = injected_llama()
    model.model.layers[0].self_attn.q_proj.to("meta")
    with pytest.raises(lf.CheckpointError):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


DATA = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(12)]


def train(model, folder, checkpoint=None, **options):
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 3, "save_steps": 1}
    settings |= {"learning_rate": 3e-2, "logging_steps": 100, **options}
    args = TrainingArguments(str(folder), **settings)
    methods = [lf.methods.ILoRA()] if isinstance(model.model.layers[0].mlp.up_proj, lf.LoRALinear) else []
    choice = lf.hf.optimizer_cls_and_kwargs(model, args, methods)
    trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA, optimizer_cls_and_kwargs=choice)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize("kind", CONFIGS)
def test_trainer_resumes_injected_models_from_what_it_has_saved(kind, tmp_path):
    """Also parameters that are trained beside the adapters, which the checkpoint holds."""
    whole = injected(CONFIGS[kind])
    whole.model.norm.weight.requires_grad_(True)
    trainer = train(copy.deepcopy(whole), tmp_path)
    resumed = train(copy.deepcopy(whole), tmp_path, str(tmp_path / "checkpoint-1"))
    assert_same_tensors(resumed.model.state_dict(), trainer.model.state_dict())
    files = os.listdir(tmp_path / "checkpoint-1")
    assert "config.json" not in files  # else from_pretrained would take the folder for a whole model
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    frozen = {name for name, parameter in whole.named_parameters() if not parameter.requires_grad}
    assert not frozen - {name for name in frozen if "free_scale" in name} & set(saved)
    trainer.save_model(str(tmp_path / "final"))
    model = llama(layers=1).eval()
    model.model.norm.weight.data.copy_(trainer.model.model.norm.weight)
    lf.load_adapter(model, tmp_path / "final")
    assert torch.allclose(model(batch()).logits, trainer.model.eval()(batch()).logits, atol=1e-5)


def test_trainer_loads_the_best_injected_model(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    trainer = train(injected(lf.LoRAConfig(r=2)), tmp_path, metric_for_best_model="eval_loss", **best)
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")  # the worst: not the last
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], abs=1e-6)


def test_a_checkpoint_is_not_lost_where_no_adapter_can_be_saved(tmp_path, monkeypatch):
    model = injected_llama()

    def refuse(model, path):
        raise lf.CheckpointError("model", "something else", "this")

    monkeypatch.setattr("lora_fast.checkpoints.pretrained.save_adapter", refuse)
    with pytest.warns(UserWarning, match="expected something else, got this"):
        model.save_pretrained(tmp_path, state_dict=None)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert len(saved) == 28 and all("lora_" in name for name in saved)
