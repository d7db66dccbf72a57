"""What LoRAAdamW trains of a model, and the models that it refuses: those without a trained adapter."""

import peft
import pytest
import torch
from torch import nn

import lora_fast as lf

TUNERS = {
    "lora": peft.LoraConfig(r=2, target_modules=["0", "2"]),
    "dora": peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True),
    "embedding": peft.LoraConfig(r=2, target_modules=["3"]),
    "ia3": peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "loha": peft.LoHaConfig(r=2, target_modules=["0"]),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["0", "2"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"]),
    "vera": peft.VeraConfig(r=2, target_modules=["0"]),
}
CONFIGS = {"LoRA": lf.LoRAConfig(r=2), "NB-LoRA": lf.NBLoRAConfig(r=2), "SingLoRA": lf.SingLoRAConfig(r=2)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.Embedding(8, 4))


def tuned(name="lora", **settings):
    return peft.get_peft_model(net(), TUNERS[name], **settings)


def trained(model):
    return {id(p) for p in model.parameters() if p.requires_grad}


def in_groups(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_of_peft_is_trained(name):
    model = tuned(name)
    assert in_groups(lf.optim.LoRAAdamW(model)) == trained(model) != set()


@pytest.mark.parametrize("name", CONFIGS)
def test_injected_models_are_trained(name):
    model = net()
    lf.inject_(model, CONFIGS[name])
    assert in_groups(lf.optim.LoRAAdamW(model)) == trained(model) != set()


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, nn.Sequential], ids=["compile", "DataParallel", "Seq"]
)
def test_adapters_in_a_wrapper_are_found(wrap):
    model = tuned()
    assert in_groups(lf.optim.LoRAAdamW(wrap(model), methods=[lf.methods.ILoRA()])) == trained(model)


def test_model_on_meta_is_taken_as_by_torch():
    model = tuned().to("meta")
    for methods in ([], [lf.methods.ILoRA()]):
        optimizer = lf.optim.LoRAAdamW(model, methods=methods)
        optimizer.step()
        assert in_groups(optimizer) == trained(model)
        assert all(p.is_meta for group in optimizer.param_groups for p in group["params"])


def head_only():
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_" not in name)
    return model


def trained_but_inactive():
    model = tuned()
    model.add_adapter("other", TUNERS["lora"])
    model.set_adapter("other")
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name and "default" in name)
    return model


def disabled():
    model = tuned()
    model.base_model.disable_adapter_layers()
    return model


def fused_and_frozen():
    model = tuned().requires_grad_(False)
    lf.fuse_(model)
    return model


REFUSED = {
    "no adapters": (net, "a Sequential without adapter layers"),
    "a frozen model": (lambda: net().requires_grad_(False), "a Sequential without adapter layers"),
    "frozen adapters": (
        lambda: tuned().requires_grad_(False),
        r"adapter layers \(2\) whose active adapters are all frozen",
    ),
    "fused, frozen": (fused_and_frozen, r"adapter layers \(2\) whose active adapters are all frozen"),
    "disabled adapters": (disabled, r"adapter layers \(2\) whose active adapters are all frozen"),
    "only a module to save": (head_only, r"adapter layers \(1\) whose active adapters are all frozen"),
    "trained but inactive": (trained_but_inactive, r"adapter layers \(2\) whose active adapters are all frozen"),
    "compiled": (lambda: torch.compile(net()), "without adapter layers"),
    "merged and unloaded": (lambda: tuned().merge_and_unload().requires_grad_(True), "without adapter layers"),
    "a list of modules": (lambda: nn.ModuleList([net()]), "a ModuleList without adapter layers"),
}


@pytest.mark.parametrize("methods", [[], [lf.methods.ILoRA()]], ids=["plain", "ilora"])
@pytest.mark.parametrize("case", REFUSED)
def test_model_without_a_trained_adapter_is_refused(case, methods):
    build, message = REFUSED[case]
    with pytest.raises(lf.ArgumentError, match=f"^model: expected a model with trained adapters.*{message}"):
        lf.optim.LoRAAdamW(build(), methods=methods)


def test_modules_to_save_and_magnitudes_are_trained_beside_adapters():
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], use_dora=True)
    model = peft.get_peft_model(net(), config)
    optimizer = lf.optim.LoRAAdamW(model, methods=[lf.methods.ILoRA()])
    others = optimizer.param_groups[1]["param_names"]
    assert in_groups(optimizer) == trained(model) and len(others) == 3
    assert any("magnitude" in name for name in others) and any("modules_to_save" in name for name in others)
