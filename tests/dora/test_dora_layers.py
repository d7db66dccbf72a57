"""DoRA in layers: fused PEFT layers against PEFT's own, and the norms that a layer keeps."""

import copy
import gc
import itertools

import peft
import pytest
import torch
from fused_models import PROBE, fused_layers, probe_model
from quantized_layers import peft_model, quantized
from tiny import COPIES, batch, fill, loss_of, peft_llama
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_fast as lf
from lora_fast.functional.dora import weight_norms
from lora_fast.layers.dora import RowNorms

D_IN, D_OUT = 48, 80


def layer(dtype=torch.float32, adapter=None, bias=True, dropout=0.0, conv=False, **options):
    """Returns a PEFT DoRA layer whose magnitudes are not the norms of its rows."""
    torch.manual_seed(0)
    base = Conv1D(D_OUT, D_IN) if conv else nn.Linear(D_IN, D_OUT, bias)
    if conv:
        nn.init.normal_(base.bias)
    model = nn.ModuleDict({"layer": base.to(dtype)})
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, target_modules=["layer"], lora_dropout=dropout, fan_in_fan_out=conv, **options
    )
    peft.inject_adapter_in_model(config, model)
    fill(model)
    made = model["layer"]
    made.lora_magnitude_vector["default"].weight.data.mul_(torch.linspace(0.5, 1.5, D_OUT))
    for part in (made.lora_A, made.lora_B, made.lora_magnitude_vector):
        part.to(adapter or dtype)
    return made


def pair(**options):
    """Returns PEFT's layer and a fused copy."""
    theirs = layer(**options)
    holder = nn.ModuleDict({"layer": copy.deepcopy(theirs)})
    lf.fuse_(holder)
    return theirs, holder["layer"]


def run(module, x, autocast=None, seed=3):
    """Returns y, and the gradients of x and of what is trained."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = module(x)
    y.float().sin().sum().backward()
    trained = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **trained}


def distance(these, those):
    return max(
        ((these[name].double() - those[name].double()).norm() / those[name].double().norm()).item() for name in those
    )


def assert_near(ours, theirs, exact, times=1.05, extra=4e-3):
    """Ours is as near to the exact results as PEFT's, or half a unit in the last place of the dtype more."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype is theirs[name].dtype, name
        assert (
            distance({"": ours[name]}, {"": exact[name]})
            <= times * distance({"": theirs[name]}, {"": exact[name]}) + extra
        ), name


CASES = {
    "float32": ({}, 1e-6, None),
    "float64": ({"dtype": torch.float64}, 1e-14, None),
    "no-bias": ({"bias": False}, 1e-6, None),
    "conv1d": ({"conv": True}, 1e-6, None),
    "bfloat16": ({"dtype": torch.bfloat16}, 4e-3, None),
    "float16": ({"dtype": torch.float16}, 5e-4, None),
    "bfloat16-float32": ({"dtype": torch.bfloat16, "adapter": torch.float32}, 4e-3, None),
    "autocast": ({}, 4e-3, torch.bfloat16),
    "autocast-bfloat16-float32": ({"dtype": torch.bfloat16, "adapter": torch.float32}, 4e-3, torch.bfloat16),
}


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(case, dropout):
    """With dropout the same state of torch's generator gives the same mask, which the tolerances would not hide."""
    options, extra, autocast = CASES[case]
    theirs, ours = pair(dropout=dropout, **options)
    x = torch.randn(6, 7, D_IN, dtype=theirs.base_layer.weight.dtype)
    exact = run(copy.deepcopy(theirs).double(), x.double())
    assert_near(run(ours, x, autocast), run(theirs, x, autocast), exact, extra=extra)
    assert ours.fallback_reason is None and "lora.Linear" in repr(ours)
    theirs.eval(), ours.eval()
    exact = run(copy.deepcopy(theirs).double(), x.double())
    assert_near(run(ours, x, autocast), run(theirs, x, autocast), exact, extra=extra)


def test_an_evaluated_layer_with_a_trained_dropout_drops_nothing():
    theirs, ours = pair(dropout=0.5)
    x = torch.randn(5, D_IN)
    for module in (theirs, ours):
        module.eval()
        module.lora_dropout.train()  # DoRA looks at the layer's own mode
    assert torch.allclose(ours(x), theirs(x), atol=1e-6) and ours.fallback_reason is None


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
def test_a_model_trains_as_with_peft(dropout):
    """20 steps in float64 with micro-batches."""
    theirs = peft_llama(dtype=torch.float64, use_dora=True, dropout=dropout)
    ours = copy.deepcopy(theirs)
    lf.fuse_(ours)
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(5)
        for _ in range(20):
            for micro in range(2):
                loss = loss_of(model, batch(micro))
                loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[20:] == pytest.approx(losses[:20], rel=1e-10) and losses[19] < losses[0]
    assert {module.fallback_reason for module in fused_layers(ours)} == {None}
    groups = lf.groups(ours)
    assert not groups.changed and {*groups.left.values()} == {"DoRA, of which each layer has an op of its own"}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_checkpointing_changes_no_bit(reentrant, dropout):
    ours = pair(dropout=dropout)[1]
    x = torch.randn(5, D_IN)
    plain = run(ours, x)
    again = run(Checkpointed(ours, reentrant), x)
    assert plain["y"].equal(again["y"]) and plain["x"].equal(again["x"])
    for name, gradient in plain.items():
        assert name in ("x", "y") or torch.equal(again[f"inner.{name}"], gradient), name


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_the_result_may_be_changed_in_place(dropout):
    results = []
    for module in pair(dropout=dropout):
        x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        module(x).mul_(3).relu_().sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    assert all(torch.allclose(ours, theirs, atol=1e-5) for theirs, ours in zip(*results, strict=True))


def test_a_compiled_layer_computes_the_norms_anew():
    ours = pair()[1]
    compiled, x = torch.compile(ours, fullgraph=True, backend="aot_eager"), torch.randn(5, D_IN)
    for _ in range(2):
        assert torch.allclose(compiled(x), ours(x), atol=1e-6)
        ours.lora_B["default"].weight.data.mul_(3)


# zero norms


def test_rows_of_norm_zero_and_magnitudes_of_zero_are_those_of_peft():
    theirs, ours = pair()
    for module in (theirs, ours):
        module.base_layer.weight.data[:2] = 0
        module.lora_B["default"].weight.data[:2] = 0
        module.lora_magnitude_vector["default"].weight.data[1:4] = 0
    x = torch.randn(5, D_IN)
    results = [run(module, x) for module in (theirs, ours)]
    assert results[0]["y"][:, :2].isnan().all() and torch.equal(results[0]["y"].isnan(), results[1]["y"].isnan())
    assert torch.allclose(results[1]["y"], results[0]["y"], atol=1e-5, equal_nan=True)


# what the norms depend on


def edit_in_place(module):
    with torch.no_grad():
        module.lora_A["default"].weight.mul_(2)


def edit_data(module):
    module.lora_B["default"].weight.data[3, 1] += 0.5


def edit_through_numpy(module):
    module.lora_A["default"].weight.detach().numpy()[2, 5] = 3


def load(module):
    state = {key: torch.randn_like(value) for key, value in module.state_dict().items()}
    module.load_state_dict(state)


def swap(module):
    module.lora_B["default"].weight = nn.Parameter(torch.randn(D_OUT, 4))


def swap_data(module):
    module.base_layer.weight.data = torch.randn(D_OUT, D_IN)


def step_by(**options):
    def step(module):
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1, **options)
        module(torch.randn(3, D_IN)).sum().backward()
        optimizer.step()

    return step


def step_of_ours(module):
    optimizer = lf.optim.LoRAAdamW(nn.ModuleDict({"layer": module}), lr=0.1)
    module(torch.randn(3, D_IN)).sum().backward()
    optimizer.step()


def merge_into_the_weight(module):
    """As PEFT does: another adapter's product, through .data."""
    module.base_layer.weight.data += torch.randn(D_OUT, 2) @ torch.randn(2, D_IN)


def merge_and_unmerge_another(module):
    module.update_layer("other", 4, 8, config=peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    module.set_adapter(["other"]), module.merge(), module.unmerge(), module.set_adapter(["default"])


def edit_of(part):
    def edit(module):
        part(module.base_layer.weight.data)

    return edit


EDITS = {
    "in-place": edit_in_place,
    "data": edit_data,
    "numpy": edit_through_numpy,
    "load": load,
    "swap": swap,
    "swap-data": swap_data,
    "foreach": step_by(foreach=True),
    "fused": step_by(fused=True),
    "LoRAAdamW": step_of_ours,
    "merge": merge_into_the_weight,
    "merge-and-unmerge": merge_and_unmerge_another,
    "set-scale": lambda module: module.set_scale("default", 3.0),
    "scaling-tensor": lambda module: module.scaling.update(default=torch.tensor(3.0)),
    "scale-weight": edit_of(lambda weight: weight.mul_(2)),
    "row-of-weight": edit_of(lambda weight: weight[-1].zero_()),
    "column-of-weight": edit_of(lambda weight: weight[:, 5].add_(1)),
    "dtype": lambda module: module.double(),
    "dtype-of-adapter": lambda module: module.lora_A.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("edit", EDITS)
def test_norms_follow_every_change(edit, grad):
    """In a second edit there are the squares of the first one's weight, too."""
    ours = pair()[1]
    for _ in range(2):
        x = torch.randn(5, D_IN, dtype=ours.base_layer.weight.dtype)
        with torch.set_grad_enabled(grad):
            ours(x)
        EDITS[edit](ours)
        theirs = copy.deepcopy(ours)
        lf.unfuse_(holder := nn.ModuleDict({"layer": theirs}))
        x = x.to(ours.base_layer.weight.dtype)
        with torch.set_grad_enabled(grad):
            assert torch.allclose(ours(x), holder["layer"](x), rtol=1e-5, atol=1e-5)
        assert ours.fallback_reason is None


def test_norms_are_computed_once_a_step(monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr("lora_fast.layers.dora.weight_norms", lambda *args: (next(calls), weight_norms(*args))[1])
    ours, x = pair()[1], torch.randn(5, D_IN)
    for _ in range(3):  # micro-batches
        ours(x).sum().backward()
    with torch.no_grad():
        ours(x)
    assert next(calls) == 1
    step_by()(ours), ours(x)
    assert next(calls) == 3  # and one that this counter has counted itself
    ours.eval(), ours(x)
    assert next(calls) == 5


def test_norms_of_a_call_in_inference_mode_serve_later_calls():
    theirs, ours = pair()
    x = torch.randn(5, D_IN)
    with torch.inference_mode():
        ours(x)
    assert_near(run(ours, x), run(theirs, x), run(copy.deepcopy(theirs).double(), x.double()), extra=1e-6)


@pytest.mark.parametrize("way", COPIES)
def test_norms_are_neither_saved_nor_copied(way):
    ours, x = pair()[1], torch.randn(5, D_IN)
    before, keys = ours(x), set(ours.state_dict())
    twin = COPIES[way](ours)
    assert twin._norms._kept is None and set(twin.state_dict()) == keys
    assert not any("norms" in key for key in keys) and torch.equal(twin(x), before)


def test_norms_keep_no_memory_of_replaced_tensors():
    norms = RowNorms()
    weight, a, b = torch.randn(D_OUT, D_IN), torch.randn(4, D_IN), torch.randn(D_OUT, 4)
    first = norms.of(weight, a, b, 1.0)
    assert norms.of(weight, a, b, 1.0) is first
    address, storage = weight.data_ptr(), norms._kept.sources[0].storage
    del weight
    gc.collect()
    assert storage.expired()
    weight = torch.randn(D_OUT, D_IN)  # where the allocator may have put the old one
    assert torch.allclose(norms.of(weight, a, b, 1.0), (weight + b @ a).norm(dim=1)), address


# what is left to PEFT


def two_active(module):
    module.update_layer("other", 4, 8, config=peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False))
    module.set_adapter(["default", "other"])


def hook_magnitude(module):
    module.lora_magnitude_vector["default"].register_forward_hook(lambda module, args, y: y * 2)


LEFT = {
    "two": (two_active, "2 active adapters"),
    "trained-base": (lambda module: module.base_layer.weight.requires_grad_(), "trainable base weight"),
    "hook": (hook_magnitude, "hooks"),
    "offload": (lambda module: setattr(module, "ephemeral_gpu_offload", True), "ephemeral_gpu_offload"),
}


@pytest.mark.parametrize("case", LEFT)
def test_peft_computes_what_the_op_does_not(case):
    change, reason = LEFT[case]
    theirs, ours = pair()
    for module in (theirs, ours):
        torch.manual_seed(4)
        change(module)
    x = torch.randn(5, D_IN)
    assert torch.equal(ours(x), theirs(x)) and reason in ours.fallback_reason


def test_embeddings_and_convolutions_stay_pefts():
    parts = {"linear": nn.Linear(6, 6), "embedding": nn.Embedding(9, 6), "conv": nn.Conv1d(6, 6, 1)}
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=list(parts))
    model = peft.get_peft_model(nn.ModuleDict(parts), config)
    report = lf.fuse_(model)
    assert len(report.changed) == 1
    reasons = sorted(report.left.values())
    assert "Conv1d" in reasons[0] and "Embedding" in reasons[1]


# merging


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_and_unmerged_outputs_are_within_one_rounding(dtype, conv):
    theirs, ours = pair(dtype=dtype, adapter=torch.float32, conv=conv)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    exact = copy.deepcopy(theirs).double()
    exact.merge(), theirs.merge(safe_merge=True), ours.merge()
    goal = exact.base_layer.weight
    unit = torch.finfo(dtype).eps / 2
    assert ((ours.base_layer.weight - goal).abs() <= unit * 1.01 * goal.abs() + 1e-7).all()
    x = torch.randn(9, D_IN, dtype=dtype)
    merged = ours(x)
    assert ours.fallback_reason == "merged"
    ours.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    assert not ours._caches
    unmerged = ours(x)
    assert (merged - unmerged).double().norm() <= 4 * unit * unmerged.double().norm()


def test_merge_of_the_library_merges_dora():
    model = probe_model(use_dora=True)
    model.get_submodule(PROBE).lora_magnitude_vector["default"].weight.data.mul_(1.5)
    lf.fuse_(model)
    logits, weight = model(batch()).logits, model.get_submodule(PROBE).base_layer.weight
    before = weight.detach().clone()
    assert PROBE in lf.merge_(model).changed
    assert torch.allclose(model(batch()).logits, logits, atol=1e-5) and not torch.equal(weight, before)
    lf.unmerge_(model)
    assert torch.equal(weight, before)
    plain = model.merge_and_unload()
    assert torch.allclose(plain(batch()).logits, logits, atol=1e-5)


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]], ids=",".join)
@pytest.mark.parametrize("use_dora", [True, False], ids=["two-dora", "dora-and-lora"])
@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "in-turn"])
def test_several_adapters_are_merged_by_peft(order, use_dora, at_once):
    theirs, ours = (module.double() for module in pair())
    for module in (theirs, ours):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=4, use_dora=use_dora, init_lora_weights=False)
        module.update_layer("other", 4, 8, config=config)
        module.lora_A["other"].double(), module.lora_B["other"].double()
        if use_dora:
            module.lora_magnitude_vector["other"].double()
    before = ours.base_layer.weight.detach().clone()
    for module in (theirs, ours):
        for names in [order] if at_once else [[name] for name in order]:
            module.merge(adapter_names=names)
    assert torch.allclose(ours.base_layer.weight, theirs.base_layer.weight, atol=1e-12)
    ours.unmerge()
    assert torch.allclose(ours.base_layer.weight, before, atol=1e-12)


def test_a_weight_that_others_changed_while_it_was_merged_is_divided_and_subtracted():
    theirs, ours = (module.double() for module in pair())
    for module in (theirs, ours):
        module.merge()
        module.base_layer.weight.data.mul_(2)
        module.unmerge()
    assert torch.allclose(ours.base_layer.weight, theirs.base_layer.weight, atol=1e-12)


# quantised weights


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("name", ["nf4", "fp4-nested-stored-in-float32", "int8", "hqq-4"])
def test_quantised_layers_are_those_of_peft(name, dropout):
    """The library adds its bias to the product, which is not scaled."""
    _, ours = models = [peft_model(name, quantized(name), use_dora=True, lora_dropout=dropout) for _ in range(2)]
    for model in models:
        model[0].lora_magnitude_vector["default"].weight.data.copy_(torch.linspace(0.5, 1.5, 64))
    lf.fuse_(ours)
    x = torch.randn(5, 256)
    for mode in (True,) if name == "int8" else (True, False):  # bitsandbytes' own layer fails in turns of them
        results = [run(model.train(mode), x) for model in models]
        assert ours[0].fallback_reason is None
        assert results[0].keys() == results[1].keys()
        for key in results[0]:
            assert distance({key: results[1][key]}, {key: results[0][key]}) < 1e-5, key
