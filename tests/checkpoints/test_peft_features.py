"""For each feature of PEFT's LoraConfig, PEFT and load_adapter read what save_adapter writes, or refuse it by name. The
result is never silently another model."""

from collections import Counter

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft_features import ATTENTION, FEATURES, PEFT_ONLY, UNSAVED, base, outputs, peft_model, small, trained

import lora_fast as lf


def into_itself(model, name, folder):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    lf.load_adapter(model, folder)
    return model


def into_new_peft_model(model, name, folder):
    fresh = peft_model(name)
    lf.load_adapter(fresh, folder)
    return fresh


def into_plain_model(model, name, folder):
    plain = base(name)
    lf.load_adapter(plain, folder)
    return plain


def by_peft(model, name, folder):
    return PeftModel.from_pretrained(base(name), folder)


def saved_again_for_peft(model, name, folder):
    plain = into_plain_model(model, name, folder)
    lf.save_adapter(plain, folder / "again")
    return by_peft(model, name, folder / "again")


@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied embeddings, fan_in_fan_out and ranks above the shapes
def test_every_feature_is_saved_and_loaded_or_refused_by_name(tmp_path, record_property):
    counts, wrong = Counter(), []
    for name in FEATURES:
        model, folder = trained(peft_model(name)), tmp_path / name
        want = outputs(model)
        try:
            lf.save_adapter(model, folder)
        except lf.CheckpointError:
            counts["refused at saving"] += 1
            assert not folder.exists() and name in UNSAVED, name
            continue
        for load in (by_peft, into_new_peft_model, into_plain_model, saved_again_for_peft, into_itself):
            try:
                error = (outputs(load(model, name, folder)) - want).abs().max()
                result = "right" if error <= 1e-5 * want.abs().max() else "WRONG"
            except lf.CheckpointError:
                result = "refused"
            refusable = name in PEFT_ONLY and load in (into_plain_model, saved_again_for_peft)
            counts[f"{load.__name__}: {result}"] += 1
            if result == "WRONG" or (result == "refused" and not refusable):
                wrong.append((name, load.__name__, result))
    record_property(f"{len(FEATURES)} features of PEFT's LoraConfig", dict(counts))
    assert not wrong


def test_scale_that_was_set_is_saved(tmp_path):
    model = trained(peft_model("patterns"))
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.set_scale("default", 0.25)
    want = outputs(model)
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])  # as in a model that is hot-swapped
    lf.save_adapter(model, tmp_path)
    for load in (by_peft, into_plain_model):
        torch.testing.assert_close(outputs(load(model, "patterns", tmp_path)), want)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"trainable_token_indices": [3, 6]}, "trainable_token_indices"),
        ({"trainable_token_indices": None}, "trainable_token_indices"),
    ],
    ids=["others", "none"],
)
def test_model_of_another_kind_is_refused(config, says, tmp_path):
    lf.save_adapter(trained(peft_model("tokens")), tmp_path)
    model = get_peft_model(small(), LoraConfig(r=4, lora_alpha=8, **ATTENTION, **config))
    with pytest.raises(lf.CheckpointError, match=rf"^{says} in adapter_config.json: expected .* in the model's config"):
        lf.load_adapter(model, tmp_path)


def test_trained_parameter_that_peft_does_not_save_is_refused(tmp_path):
    model = peft_model("list")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(lf.CheckpointError, match=r"modules_to_save.*, got model.norm.weight"):
        lf.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("feature", ["list", "lm-head", "lm-head-tied"])
@pytest.mark.parametrize("merge", ["ours", "peft"])
def test_merged_adapter_is_saved_without_its_merge(feature, merge, tmp_path):
    model = trained(peft_model(feature))
    want = outputs(model)
    if merge == "ours":
        lf.merge_(model)
    else:
        lf.unfuse_(model)
        model.merge_adapter()
    if merge == "peft" and feature != "list":  # lm_head's frozen weight belongs into the file
        with pytest.raises(lf.CheckpointError, match="lm_head merged by PEFT, which keeps no original"):
            lf.save_adapter(model, tmp_path)
        return
    lf.save_adapter(model, tmp_path)
    for load in (by_peft, into_plain_model):
        torch.testing.assert_close(outputs(load(model, feature, tmp_path)), want)


def test_adapter_of_another_method_is_refused_at_saving(tmp_path):
    model = get_peft_model(small(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(lf.CheckpointError, match="peft_type: expected 'LORA', got 'IA3'"):
        lf.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
