"""States that LoRAAdamW.load_state_dict refuses, by name and before anything has changed."""

import copy
import re

import pytest
import torch
from adapter_pairs import bits, pairs, same, train
from torch import nn

import lora_fast as lf
from lora_fast import methods as M

METHODS = {"plain": [], "lora+": [M.LoRAPlus(2.0)], "ilora": [M.ILoRA()], "lora-rite": [M.LoRARITE()]}


def trained(methods):
    """Returns an optimizer that has taken two steps, its pairs and a third parameter that is in no pair."""
    chosen, other = pairs(shapes=[(12, 20, 4), (12, 20, 4)]), nn.Parameter(torch.ones(3))
    optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods)
    optimizer.add_param_group({"params": [("other", other)]})
    other.grad = torch.ones_like(other)
    train(optimizer, chosen, 2)
    return optimizer, chosen


def first(state):
    """Returns the state of the first parameter."""
    return state["state"][0]


def moment(state):
    """Returns the name of a moment of the first parameter."""
    return next(name for name in first(state) if name != "step")


def replace_moment(change):
    return lambda state: first(state).update({moment(state): change(first(state)[moment(state)])})


def replace_step(value):
    return lambda state: first(state).update(step=value)


def group(**values):
    return lambda state: state["param_groups"][0].update(values)


CHANGES = {
    "moment of another shape": (replace_moment(lambda x: x[:-1]), "expected moments of shape"),
    "moment transposed": (replace_moment(lambda x: x.mT), "expected moments of shape"),
    "moment of numbers": (replace_moment(lambda x: 1.0), "expected moments of a floating dtype"),
    "moment None": (replace_moment(lambda x: None), "expected moments of a floating dtype"),
    "moment of int64": (replace_moment(torch.Tensor.long), "expected moments of a floating dtype"),
    "moment complex": (replace_moment(lambda x: x.to(torch.complex64)), "expected moments of a floating dtype"),
    "moment sparse": (replace_moment(torch.Tensor.to_sparse), "expected moments of a floating dtype"),
    "moment on meta": (replace_moment(lambda x: x.to("meta")), "got a tensor on meta"),
    "moment missing": (lambda state: first(state).pop(moment(state)), r"expected .*step for"),
    "step missing": (lambda state: first(state).pop("step"), r"expected .*step for"),
    "entry of another optimizer": (lambda state: first(state).update(momentum_buffer=1), r"got .*momentum_buffer"),
    "step None": (replace_step(None), "expected a number of steps"),
    "step negative": (replace_step(-1), "expected a number of steps"),
    "step NaN": (replace_step(torch.tensor(float("nan"))), "expected a number of steps"),
    "step infinite": (replace_step(float("inf")), "expected a number of steps"),
    "step of two": (replace_step(torch.ones(2)), "expected a number of steps"),
    "step a bool": (replace_step(True), "expected a number of steps"),
    "step a str": (replace_step("2"), "expected a number of steps"),
    "one parameter more": (
        lambda state: state["state"].update({99: {}}),
        "expected the state of 5 different parameters",
    ),
    "a parameter twice": (
        lambda state: group(params=[0] * len(state["param_groups"][0]["params"]))(state),
        "expected the state of 5 different parameters",
    ),
    "a group less": (lambda state: state["param_groups"].pop(), "expected groups of"),
    "a group more": (lambda state: state["param_groups"].append(state["param_groups"][-1]), "expected groups of"),
    "names too few": (group(param_names=["x"]), "expected the names of"),
    "other names": (
        lambda state: group(param_names=["x" * 3000] * len(state["param_groups"][0]["params"]))(state),
        "expected parameter .* in this place",
    ),
    "other methods": (group(methods=["PiLoRA()"]), "expected methods"),
    "methods missing": (
        lambda state: [g.pop("methods") for g in state["param_groups"]] and group(methods=["x"])(state),
        "expected methods",
    ),
    "lr missing": (lambda state: state["param_groups"][0].pop("lr"), "expected the keys lr"),
    "lr a str": (group(lr="fast"), "^lr: expected"),
    "lr negative": (group(lr=-1.0), "^lr: expected"),
    "betas of one": (group(betas=(0.9,)), "^betas: expected"),
    "maximize": (group(maximize=True), "^maximize: expected"),
    "params missing": (lambda state: state["param_groups"][0].pop("params"), "expected the keys params"),
    "params None": (group(params=None), "expected a list of numbers or names"),
    "params of tensors": (group(params=[torch.ones(1)] * 4), "expected a list of numbers or names"),
    "method state None": (group(method_state=None), "expected a dict"),
    "method state of None": (group(method_state={"kappa": None}), "expected a dict of tensors"),
    "groups None": (lambda state: state.update(param_groups=None), "expected a list of dicts"),
    "groups of numbers": (lambda state: state.update(param_groups=[1]), "expected a list of dicts"),
    "state a list": (lambda state: state.update(state=[1]), "expected a dict of the state"),
    "state of numbers": (lambda state: state.update(state={0: 1}), "expected a dict of the state"),
    "state missing": (lambda state: state.pop("state"), "expected an optimizer's state_dict"),
}


def snapshot(optimizer, chosen):
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return copy.deepcopy([settings, [[*state] for state in optimizer.state.values()]]), bits(chosen, optimizer)


def refuses(optimizer, chosen, state, message):
    before = snapshot(optimizer, chosen)
    with pytest.raises(lf.ArgumentError) as caught:
        optimizer.load_state_dict(state)
    assert re.search(message, str(caught.value)) and len(str(caught.value)) < 2000
    after = snapshot(optimizer, chosen)
    assert before[0] == after[0] and same(before[1], after[1])


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_state_that_does_not_fit_is_refused_before_anything_changes(methods):
    optimizer, chosen = trained(methods)
    twin, twins = trained(methods)
    saved = copy.deepcopy(optimizer.state_dict())
    for change, message in CHANGES.values():
        state = copy.deepcopy(saved)
        change(state)
        refuses(optimizer, chosen, state, message)
    for layers, trained_optimizer in ((chosen, optimizer), (twins, twin)):
        train(trained_optimizer, layers, 2, first=2)
    assert same(bits(chosen, optimizer), bits(twins, twin))


@pytest.mark.parametrize("state", [None, {}, [], "x", 3, torch.ones(2), {"param_groups": []}], ids=repr)
def test_what_is_no_state_dict_is_refused(state):
    optimizer, chosen = trained([])
    refuses(optimizer, chosen, state, "^state_dict: expected an optimizer's state_dict")


@pytest.mark.parametrize(
    "method", [M.ScaLoRA(interval=1, rounding="compensated"), M.LoRAMuon()], ids=["scalora", "muon"]
)
def test_state_of_a_method_is_refused_in_another_shape(method):
    chosen = pairs(dtype=torch.bfloat16, shapes=[(12, 20, 4)])
    optimizer = lf.optim.LoRAAdamW(chosen, methods=[method])
    train(optimizer, chosen, 1)
    b = optimizer.state_dict()["state"][1]
    for name in b.keys() - {"step"}:
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][1][name] = b[name][..., :-1]
        refuses(optimizer, chosen, state, rf"expected moments of shape .*\({name} of")


OTHERS = {
    "SGD": lambda p: torch.optim.SGD(p, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Adam": lambda p: torch.optim.Adam(p),  # its weight decay is not decoupled
    "NAdam": lambda p: torch.optim.NAdam(p),
}


@pytest.mark.parametrize("name", OTHERS)
def test_state_of_another_optimizer_of_torch_is_refused(name):
    chosen = pairs(shapes=[(12, 20, 4)])
    other = OTHERS[name](list(chosen[0][:2]))
    train(other, chosen, 1)
    optimizer = lf.optim.LoRAAdamW(chosen)
    train(optimizer, chosen, 1)
    refuses(optimizer, chosen, other.state_dict(), "^(state_dict|decoupled_weight_decay)")
