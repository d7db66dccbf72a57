"""Names of layers and parameters do not depend on the wrappers around a model or its blocks."""

import copy

import pytest
from tiny import assert_same_tensors, batch, injected_llama, loss_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora_fast as lf
from lora_fast.layers.find import bare_name


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.q_proj",
        "module.layers.0.q_proj",
        "_orig_mod.module.layers.0.q_proj",
        "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.q_proj",
        "layers.0._checkpoint_wrapped_module.q_proj",
    ],
)
def test_bare_name_has_no_part_of_a_wrapper(name):
    assert bare_name(name) == "layers.0.q_proj"


def test_bare_name_keeps_names_that_contain_a_wrapper_s():
    assert bare_name("modules.module_list.my_orig_mod") == "modules.module_list.my_orig_mod"


def plain_llama():
    return injected_llama(target_modules=["q_proj", "down_proj"])


def checkpointed_llama():
    model = plain_llama()
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(block)
    return model


def train(model, optimizer):
    loss_of(model, batch()).backward()
    optimizer.step()
    optimizer.zero_grad()


def adapters(model):
    return {bare_name(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("methods", [[], [lf.methods.LoRAPlus(), lf.methods.BaLoRA()]], ids=["adamw", "methods"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(checkpointed_llama, plain_llama), (plain_llama, checkpointed_llama)],
    ids=["saved-wrapped", "loaded-wrapped"],
)
def test_optimizer_states_load_with_and_without_checkpoint_wrapper(before, after, methods, tmp_path):
    model, other = before(), after()
    optimizer, resumed = (lf.optim.LoRAAdamW(each, lr=1e-2, methods=methods) for each in (model, other))
    train(model, optimizer)
    lf.save_adapter(model, tmp_path)
    lf.load_adapter(other, tmp_path)
    assert any(
        "_checkpoint_wrapped_module" in name for name, _ in [*model.named_parameters(), *other.named_parameters()]
    )
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, steps in ((model, optimizer), (other, resumed)):
        train(each, steps)
    assert_same_tensors(adapters(other), adapters(model))


def test_optimizer_states_of_another_layer_are_still_refused():
    model, other = plain_llama(), injected_llama(target_modules=["k_proj", "down_proj"])
    optimizer, resumed = (lf.optim.LoRAAdamW(each) for each in (model, other))
    with pytest.raises(lf.ArgumentError, match=r"^state_dict: expected parameter .*k_proj.* got .*q_proj"):
        resumed.load_state_dict(optimizer.state_dict())
