"""Adapters of PEFT in models that are no PeftModel: save_adapter writes PEFT's two files, from which PEFT, transformers
and load_adapter restore the model, or refuses by name before it writes anything. PEFT's own round trip is the
reference."""

import copy
import json
from collections import Counter

import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft_features import ATTENTION, FEATURES, PEFT_ONLY, Mixed, base, outputs, small, trained
from tiny import assert_same_tensors, batch
from torch import nn

import lora_fast as lf

NOT_IN_A_PART = {"tokens-tied", "replication"}  # PEFT has these for whole models alone


class Outer(nn.Module):
    """A model around the adapted one, whose module names would be taken for those of the part."""

    def __init__(self, part):
        super().__init__()
        self.q_proj, self.parts = nn.Linear(1, 1), nn.ModuleList([nn.Identity(), part])

    def forward(self, ids):
        return self.parts[1](ids)


def config(name):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **copy.deepcopy(FEATURES[name][1])})


def injected(name, **options):
    return inject_adapter_in_model(config(name), base(name), **options).eval()


def frozen(model):
    return model.requires_grad_(False)


def part_injected(name):
    torch.manual_seed(3)
    outer = frozen(Outer(nn.Identity()))
    outer.parts[1] = injected(name)
    return outer.eval()


def part_is_peft_model(name):
    outer = part_injected("list")
    outer.parts[1] = get_peft_model(base(name), config(name))
    return outer.eval()


def outer_base(name):
    outer = part_injected("list")
    outer.parts[1] = base(name)
    return outer.eval()


KINDS = {
    "injected": (injected, base),
    "part": (part_injected, outer_base),
    "peft-part": (part_is_peft_model, outer_base),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied embeddings, fan_in_fan_out and ranks above the shapes
@pytest.mark.parametrize("kind", ["injected", "part"])
def test_every_feature_is_saved_and_loaded_or_refused_by_name(kind, tmp_path, record_property):
    build, plain = KINDS[kind]
    counts, wrong = Counter(), []
    for name in FEATURES:
        model, folder = trained(build(name)), tmp_path / name
        want = outputs(model)
        if kind == "part" and name in NOT_IN_A_PART:
            with pytest.raises(lf.CheckpointError, match="part of the model"):
                lf.save_adapter(model, folder)
            assert not folder.exists()
            continue
        lf.save_adapter(model, folder)
        restored = {
            "by_peft": PeftModel.from_pretrained(plain(name), folder),
            "same": build(name),
            "plain": plain(name),
        }
        for load, other in restored.items():
            try:
                if load != "by_peft":
                    lf.load_adapter(other, folder)
                error = (outputs(other) - want).abs().max()
                result = "right" if error <= 1e-5 * want.abs().max() else "WRONG"
            except lf.CheckpointError:
                result = "refused"
            counts[f"{load}: {result}"] += 1
            if result == "WRONG" or (result == "refused" and not (load == "plain" and name in PEFT_ONLY)):
                wrong.append((name, load, result))
    record_property(f"{len(FEATURES)} features without a PeftModel, {kind}", dict(counts))
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["patterns", "modules"])
def test_files_are_read_everywhere(kind, name, tmp_path):
    build, plain = KINDS[kind]
    model = trained(build(name))
    lf.save_adapter(model, tmp_path)
    ours, by_peft = plain(name), PeftModel.from_pretrained(plain(name), tmp_path, is_trainable=True)
    lf.load_adapter(ours, tmp_path)
    restored = {"ours": ours, "peft": by_peft}
    if kind == "injected":
        restored["transformers"] = plain(name)
        restored["transformers"].load_adapter(str(tmp_path))
    for other in (ours, by_peft):
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
        lf.load_adapter(other, tmp_path)
    lf.save_adapter(by_peft, tmp_path / "again")
    restored["again"] = build(name)
    lf.load_adapter(restored["again"], tmp_path / "again")
    for other in restored.values():
        torch.testing.assert_close(outputs(other), outputs(model))


def test_files_are_those_of_peft(tmp_path):
    models, _ = {}, base("patterns")  # which seeds when it is built first
    for kind, build in (("injected", injected), ("peft", lambda name: get_peft_model(base(name), config(name)))):
        torch.manual_seed(0)
        models[kind] = trained(build("patterns"))
    lf.save_adapter(models["injected"], tmp_path / "ours")
    models["peft"].save_pretrained(tmp_path / "peft")
    ours, theirs = (safetensors.torch.load_file(tmp_path / x / "adapter_model.safetensors") for x in ("ours", "peft"))
    assert_same_tensors(ours, theirs)
    ours, theirs = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("ours", "peft"))
    assert ours.pop("target_modules").sort() == theirs.pop("target_modules").sort() and ours == theirs


def test_names_that_end_alike_get_no_adapter(tmp_path):
    """Full names of a part's modules, which as a list would also select others."""
    outer = nn.ModuleDict({"x": Mixed(), "y": nn.ModuleDict({"x": Mixed()})})
    plain = copy.deepcopy(outer)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"]), outer["x"])
    lf.save_adapter(frozen(outer), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == r"x\.linear"
    model = PeftModel.from_pretrained(plain, tmp_path)
    assert not hasattr(model.base_model.model["y"]["x"].linear, "lora_A")


def test_parts_with_one_config_each_are_one_file(tmp_path):
    outer = nn.ModuleDict({"one": small(), "two": small()})
    plain = copy.deepcopy(outer)
    for part, r in (("one", 4), ("two", 2)):
        outer[part].add_adapter(LoraConfig(r=r, **ATTENTION))
    trained(outer)
    lf.save_adapter(outer, tmp_path)
    model = PeftModel.from_pretrained(plain, tmp_path).base_model.model
    for part in outer:
        torch.testing.assert_close(outputs(model[part]), outputs(outer[part]))
    outer["two"].peft_config["default"].lora_dropout = 0.3
    with pytest.raises(lf.CheckpointError, match=r"lora_dropout .* got 0.0 and 0.3 in parts"):
        lf.save_adapter(outer, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["injected", "part"])
def test_module_that_was_trained_beside_the_adapter_is_saved(kind, tmp_path):
    build, plain = KINDS[kind]
    model = build("list")
    norms = [name for name, _ in model.named_modules() if name.endswith("layers.1.input_layernorm")]
    model.get_submodule(norms[0]).requires_grad_(True)
    trained(model)
    lf.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == norms
    same, ours = build("list"), plain("list")
    for other in (same, ours):
        lf.load_adapter(other, tmp_path)
    lf.save_adapter(same, tmp_path / "again")  # what was loaded is saved again, though it is frozen here
    for other in (same, ours, *(PeftModel.from_pretrained(plain("list"), tmp_path / x) for x in ("", "again"))):
        torch.testing.assert_close(outputs(other), outputs(model))


def test_other_adapters_are_left_out(tmp_path):
    model = small()
    model.add_adapter(LoraConfig(r=2, target_modules=["k_proj", "q_proj"]), "old")
    model.add_adapter(LoraConfig(r=4, **ATTENTION), "new")
    lf.save_adapter(trained(model), tmp_path)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(small_base(model), tmp_path)), outputs(model))


def small_base(model):
    """Returns the plain model with the frozen weights of one with adapters."""
    plain = small().eval()
    known = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    plain.load_state_dict({name: known[name] for name in plain.state_dict()})
    return plain


@pytest.mark.parametrize("how", ["set_scale", "scale_layer", "merge", "merge-peft"])
def test_scales_and_merges_are_saved_as_of_a_peft_model(how, tmp_path):
    model = trained(injected("patterns"))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    if how == "set_scale":
        layers[0].set_scale("default", 0.25)
    if how == "scale_layer":
        layers[1].scale_layer(3)
    want = outputs(model)
    if how == "merge":
        lf.merge_(model)
    if how == "merge-peft":
        lf.unfuse_(model)
        for layer in layers:
            layer.merge()
    lf.save_adapter(model, tmp_path)
    for other in (PeftModel.from_pretrained(base("patterns"), tmp_path), base("patterns")):
        if type(other) is not peft.PeftModel:
            lf.load_adapter(other, tmp_path)
        torch.testing.assert_close(outputs(other), want)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("how", ["inject_adapter_in_model", "add_adapter"])
def test_resized_embeddings_are_saved(how, tmp_path):
    small().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(100, mean_resizing=False)
    plain = copy.deepcopy(model)
    if how == "add_adapter":
        model.add_adapter(LoraConfig(r=2, **ATTENTION))
    else:
        inject_adapter_in_model(LoraConfig(r=2, **ATTENTION), model)
    for name in ("model.embed_tokens", "lm_head"):
        model.get_submodule(name).weight.data[97:] = 3.0
    lf.save_adapter(trained(model), tmp_path / "adapter")
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(plain, tmp_path / "adapter")), outputs(model))


@pytest.mark.parametrize("feature", ["classifier", "tagger"])
def test_adapter_on_a_head_is_read_by_peft(feature, tmp_path):
    """PEFT expects a head without adapters for a task type, so the files have none."""
    head = {"classifier": "score", "tagger": "classifier"}[feature]
    task = {"classifier": "SEQ_CLS", "tagger": "TOKEN_CLS"}[feature]
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=[head], task_type=task), base(feature))
    lf.save_adapter(trained(model), tmp_path)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(base(feature), tmp_path)), outputs(model))


@pytest.mark.parametrize("keep", ["weights", "terms"])
@pytest.mark.parametrize("kind", ["injected", "part"])
def test_changed_frozen_weights_are_saved_and_restored(kind, keep, tmp_path):
    build, plain = KINDS[kind]
    model = trained(build("list"))
    optimizer = lf.optim.LoRAAdamW(model, lr=0.05, methods=[lf.methods.ScaLoRA(interval=1, keep=keep)])
    for _ in range(2):
        result = model(batch())
        getattr(result, "logits", result).square().mean().backward()
        optimizer.step()
    want = outputs(model)
    for folder, exact in (("plain", False), ("exact", True)):
        assert f"4 {'weights' if exact or keep == 'weights' else 'saved as terms'}" in (
            lf.save_adapter(model, tmp_path / folder, exact=exact).note
        )
        ours, by_peft = plain("list"), PeftModel.from_pretrained(plain("list"), tmp_path / folder)
        lf.load_adapter(ours, tmp_path / folder)
        same = build("list")
        lf.load_adapter(same, tmp_path / folder)
        lf.save_adapter(same, tmp_path / f"{folder}-again", exact=exact)
        again = PeftModel.from_pretrained(plain("list"), tmp_path / f"{folder}-again")
        for other in (ours, by_peft, same, again):
            torch.testing.assert_close(outputs(other), want)
        if exact:
            states = (
                safetensors.torch.load_file(tmp_path / x / "adapter_model.safetensors")
                for x in ("exact", "exact-again")
            )
            assert_same_tensors(*states)


def without_config():
    model = injected("list")
    del model.peft_config
    return model


def config_of_a_part_alone():
    outer = part_injected("list")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), outer)
    del outer.peft_config
    return outer


def two_active():
    model = small()
    for name in ("one", "two"):
        model.add_adapter(LoraConfig(r=2, **ATTENTION), name)
    model.set_adapter(["one", "two"])
    return model


def trained_root():
    model = injected("list")
    model.register_parameter("token", nn.Parameter(torch.zeros(3)))
    return model


def trained_bias_under_an_adapter():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"]), Mixed())
    model.linear.base_layer.bias.requires_grad_(True)
    return model


def another_method():
    return inject_adapter_in_model(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), small())


REFUSED = {
    without_config: "config of the adapter 'default', in peft_config.* got none for model.layers.0.self_attn.q_proj",
    config_of_a_part_alone: "config of the adapter 'default'.* got none for q_proj",
    two_active: "one active adapter, got one, two",
    trained_root: "got token in itself",
    trained_bias_under_an_adapter: "got linear.base_layer.bias",
    another_method: "peft_type: expected 'LORA', got 'IA3'",
}


@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
def test_what_files_cannot_hold_is_refused_before_anything_is_written(build, tmp_path):
    with pytest.raises(lf.CheckpointError, match=REFUSED[build]):
        lf.save_adapter(build(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
