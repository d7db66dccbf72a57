"""The sidecar of SingLoRA layers and of models with several kinds of layers: every bit of the trained parameters is
restored. (Norm-bounded layers: test_sidecar_nb_lora.py.)"""

import pytest
import torch
from adapter_folders import assert_peft_logits, logits, rewritten
from nb_lora_models import scatter
from peft import PeftModel
from tiny import assert_unchanged, batch, llama, loss_of, snapshot

import lora_fast as lf
from lora_fast.checkpoints.sidecar import SIDECAR
from lora_fast.layers.find import ADAPTER_LAYERS

ALPHA, RAMP = 6.1, 7  # 6.1 is not a sum of few powers of two


def single_llama(**config):
    model = llama()
    lf.inject_(model, lf.SingLoRAConfig(**{"r": 4, "alpha": ALPHA, "ramp_steps": RAMP, **config}))
    return model.eval()


def trained(steps=3, **config):
    """Scattered, and this many steps into the ramp."""
    model = scatter(single_llama(**config))
    for layer in layers_of(model).values():
        layer.steps += steps
    return model


def layers_of(model) -> dict:
    return {name: module for name, module in model.named_modules() if isinstance(module, ADAPTER_LAYERS)}


def assert_bitwise(model, other) -> None:
    ours, theirs = layers_of(model), layers_of(other)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        assert type(layer) is type(theirs[name])
        assert all(
            torch.equal(getattr(layer, role), getattr(theirs[name], role))
            for role in layer.SAVED_STATE + layer.TRAINABLE
        )
        assert all(getattr(layer, key) == getattr(theirs[name], key) for key in (*layer.INIT_ARGUMENTS, "scaling", "r"))
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("fresh", [single_llama, llama], ids=["with layers", "plain"])
@pytest.mark.parametrize("steps", [0, 3, 9], ids=["before the ramp", "in it", "after it"])
def test_load_restores_every_bit(steps, fresh, tmp_path):
    model, other = trained(steps), fresh()
    lf.save_adapter(model, tmp_path)
    assert len(lf.load_adapter(other, tmp_path).changed) == 14
    assert_bitwise(other.eval(), model)
    assert {int(layer.steps) for layer in layers_of(other).values()} == {steps}


def test_training_continues_to_the_same_bits(tmp_path):
    def train(model, optimizer):
        loss_of(model, batch()).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, other = trained(), llama()
    lf.save_adapter(model, tmp_path)
    lf.load_adapter(other, tmp_path)
    for each in (model, other):
        optimizer = lf.optim.LoRAAdamW(each.train(), lr=1e-2)
        for _ in range(2):
            train(each, optimizer)
    assert_bitwise(other, model)
    assert {int(layer.steps) for layer in layers_of(other).values()} == {5}


@pytest.mark.parametrize("steps", [3, 9], ids=["in the ramp", "after it"])
def test_peft_reads_the_plain_adapter(steps, tmp_path):
    model = trained(steps)
    lf.save_adapter(model, tmp_path)
    assert_peft_logits(model, PeftModel.from_pretrained(llama(), tmp_path))


def test_model_with_three_kinds_of_layers_is_restored(tmp_path):
    def mixed():
        model = llama()
        lf.inject_(model, lf.NBLoRAConfig(r=4, norm="spectral", bound=0.7, target_modules=["q_proj"]))
        lf.inject_(model, lf.SingLoRAConfig(r=3, alpha=ALPHA, target_modules=["up_proj"]))
        lf.inject_(model, lf.LoRAConfig(r=2, alpha=6, target_modules=["down_proj"]))
        return scatter(model.eval())

    model = mixed()
    torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.lora_B)
    lf.save_adapter(model, tmp_path)
    for other in (mixed(), llama()):
        lf.load_adapter(other, tmp_path)
        assert_bitwise(other, model)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def saved(tmp_path):
    lf.save_adapter(trained(), tmp_path)
    return tmp_path


def each(role, change):
    """Returns a function that changes the tensor of this role of every layer."""
    return lambda m, t: t.update({key: change(value) for key, value in t.items() if key.endswith(role)})


def replaced(old, new):
    """Returns a function that replaces a string in the metadata."""
    return lambda m, t: m.update(layers=m["layers"].replace(old, new))


DAMAGES = {
    "another shape": (each("free_s", lambda x: x[:-1].clone()), r"^key model.*\.free_s: .*\(64, 4\).* \(63, 4\)$"),
    "float64": (each("free_s", lambda x: x.double()), r"^key model.*\.free_s: .*float32.* got torch.float64"),
    "half a step": (each("steps", lambda x: x + 0.5), r"^key model.*\.steps: .*int64.* got torch.float32"),
    "steps of each row": (each("steps", lambda x: x.expand(4).clone()), r"^key model.*\.steps: .*shape \(\)"),
    "alpha of 0": (replaced(str(ALPHA), "0.0"), r"^alpha of model.* in free_parameters.safetensors: .*above 0"),
    "a ramp of -7": (replaced(f'"ramp_steps": {RAMP}', '"ramp_steps": -7'), r"^ramp_steps of model.*at least 0"),
    "another kind": (replaced("SingLoRALinear", "NBLoRALinear"), "class, settings and tensors of each layer"),
    "an unknown kind": (replaced("SingLoRALinear", "Other"), "class, settings and tensors of each layer"),
    "not JSON": (replaced("}", ""), "class, settings and tensors of each layer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sidecar_is_refused(damage, saved):
    change, message = DAMAGES[damage]
    rewritten(saved, change)
    for model in (single_llama(), llama()):
        before = snapshot(model)
        with pytest.raises(lf.CheckpointError, match=message):
            lf.load_adapter(model, saved)
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    "config, message",
    [
        (lf.SingLoRAConfig(r=4, alpha=2.0, ramp_steps=RAMP), r"^alpha of model.* got 6\.1$"),
        (lf.SingLoRAConfig(r=4, alpha=ALPHA, ramp_steps=0), r"^ramp_steps of model.*expected 0, .* got 7$"),
        (lf.SingLoRAConfig(r=3, alpha=ALPHA, ramp_steps=RAMP), r"^key model.*\.free_s: .*shape \(64, 3\).* \(64, 4\)$"),
        (lf.NBLoRAConfig(r=4), r"^kind of model.*expected 'NBLoRALinear', .* got 'SingLoRALinear'$"),
    ],
    ids=["alpha", "ramp", "rank", "norm-bounded"],
)
def test_model_that_does_not_fit_is_refused(config, message, saved):
    model = llama()
    lf.inject_(model, config)
    before = snapshot(model)
    with pytest.raises(lf.CheckpointError, match=message):
        lf.load_adapter(model, saved)
    assert_unchanged(model, before)


def test_sing_lora_layers_refuse_a_plain_adapter(saved):
    (saved / SIDECAR).unlink()
    model = single_llama()
    before = snapshot(model)
    with pytest.raises(
        lf.CheckpointError, match=r"^adapter of model.*parameters of a SingLoRALinear beside it.* got plain LoRA$"
    ):
        lf.load_adapter(model, saved)
    assert_unchanged(model, before)


def test_merged_layers_are_refused(saved):
    model = single_llama()
    lf.merge_(model)
    with pytest.raises(lf.CheckpointError, match="unmerged layers"):
        lf.load_adapter(model, saved)
