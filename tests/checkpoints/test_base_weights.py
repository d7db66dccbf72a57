"""Adapters whose training changed the frozen weights are saved and restored together with the changes."""

import copy
import json

import budget
import pytest
import safetensors.torch
import torch
from changed_bases import (
    BASE,
    CONFIG,
    KINDS,
    LAYER,
    LAYERS,
    PREFIX,
    RANK,
    TARGETS,
    WEIGHTS,
    fused,
    injected,
    merge_some,
    peft,
    read,
    scalora,
    train,
    weights_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import assert_same_tensors, assert_unchanged, batch, fill, injected_llama, llama, snapshot
from torch import nn

import lora_fast as lf
from lora_fast.batches import pairs
from lora_fast.layers import merge_log
from lora_fast.layers.find import adapter_layers

# whole weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_weights_are_restored_bit_for_bit(kind, dtype, tmp_path):
    model = merge_some(KINDS[kind](dtype=dtype)).eval()
    report = lf.save_adapter(model, tmp_path)
    assert len(report.changed) == LAYERS
    mib = "0.1" if dtype == torch.float32 else "0.0"
    assert str(report).endswith(f". The base has changed: {LAYERS} weights saved whole, {mib} MiB")
    for fresh in (KINDS[kind](dtype=dtype), llama(dtype=dtype)):
        report = lf.load_adapter(fresh, tmp_path)
        assert f"{LAYERS} weights restored whole" in str(report)
        assert_same_tensors(weights_of(fresh), weights_of(model))
        if kind == "injected":
            assert torch.equal(fresh.eval()(batch()).logits, model(batch()).logits)


def test_peft_restores_whole_weights(tmp_path):
    model = merge_some(fused()).eval()
    lf.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    lf.fuse_(theirs)
    assert_same_tensors(weights_of(lf_trainable(theirs)), weights_of(model))
    assert torch.equal(theirs.eval()(batch()).logits, model(batch()).logits)


def lf_trainable(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def test_unchanged_base_adds_nothing_to_the_files(tmp_path):
    report = lf.save_adapter(injected(), tmp_path)
    tensors, metadata = read(tmp_path)
    assert metadata == {"format": "pt"} and len(tensors) == 2 * LAYERS and report.note == ""


def test_16_bit_weight_widens_exactly(tmp_path):
    model = merge_some(injected(dtype=torch.bfloat16))
    lf.save_adapter(model, tmp_path)
    wide = injected()
    lf.load_adapter(wide, tmp_path)
    assert_same_tensors(weights_of(wide), {name: tensor.float() for name, tensor in weights_of(model).items()})


# terms


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_ranks_for_peft_and_restored_into_the_weights(kind, use_rslora, tmp_path):
    options = {"alpha": 5, "use_rslora": use_rslora}
    model, before = merge_some(KINDS[kind](**options), "terms"), weights_of(KINDS[kind](**options))
    report = lf.save_adapter(model, tmp_path)
    assert str(report).endswith(f". The base has changed: {LAYERS} saved as terms, rank up to {2 * RANK}")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == 3 * RANK and not config["rank_pattern"] and not config["alpha_pattern"]
    theirs, ours = PeftModel.from_pretrained(llama(), tmp_path), KINDS[kind](**options)
    assert f"{LAYERS} restored as terms" in lf.load_adapter(ours, tmp_path).note
    restored, trained = weights_of(ours), weights_of(model)
    for name in list(before)[::3]:
        assert torch.equal(restored[f"{name}.a"], trained[f"{name}.a"])
        assert torch.equal(restored[f"{name}.b"], trained[f"{name}.b"])
        change = trained[name].double() - before[name].double()
        budget.check(name, restored[name] - before[name], change, 0.0, torch.float32)
        scaling = theirs.get_submodule(PREFIX + name).scaling["default"]
        delta = theirs.get_submodule(PREFIX + name).get_delta_weight("default")
        adapter = scaling * trained[f"{name}.b"].double() @ trained[f"{name}.a"].double()
        budget.check(name, delta, change + adapter, 0.0, torch.float32)


def test_terms_restore_a_16_bit_weight_to_its_rounding(tmp_path):
    before, model = weights_of(injected(dtype=torch.bfloat16)), injected(dtype=torch.bfloat16)
    lf.save_adapter(merge_some(model, "terms"), tmp_path)
    fresh = llama(dtype=torch.bfloat16)
    lf.load_adapter(fresh, tmp_path)
    for name, module in fresh.named_modules():
        if merge_log.is_changed(module):
            exact = before[name].double() + sum(b.double() @ a.double() for b, a in merge_log.kept_terms(module))
            budget.check(name, module.weight, exact, budget.error(exact.bfloat16(), exact), torch.float32)


def test_merges_that_added_nothing_take_no_rank(tmp_path):
    model = injected()
    for pair in pairs.find_pairs(model):
        merge_log.record(pair.layer, pair.a, pair.b, torch.zeros(RANK), "terms")
    lf.save_adapter(model, tmp_path)
    assert len(read(tmp_path)[0]) == 2 * LAYERS and json.loads((tmp_path / CONFIG).read_text())["r"] == RANK
    lf.load_adapter(injected(), tmp_path)


def test_one_merge_without_terms_saves_whole_weights(tmp_path):
    model = merge_some(merge_some(merge_some(injected(), "terms"), "weights"), "terms")
    assert f"{LAYERS} weights saved whole" in lf.save_adapter(model, tmp_path).note


def test_many_terms_may_exceed_the_largest_rank(tmp_path):
    model = merge_some(injected(r=100), "terms", merges=3)
    lf.save_adapter(model, tmp_path)
    assert read(tmp_path)[0][f"{PREFIX}{LAYER}.lora_A.weight"].shape == (400, 64)
    fresh = llama()
    lf.load_adapter(fresh, tmp_path)
    assert fresh.get_submodule(LAYER).r == 100


def test_terms_and_whole_weights_may_mix(tmp_path):
    """Two layers have terms and so other ranks than the third, whose weight is whole, and the fourth, unchanged."""
    model = injected()
    model_pairs = pairs.find_pairs(model)
    for pair, keep in zip(model_pairs, ("terms", "weights", "terms"), strict=False):
        merge_log.record(pair.layer, pair.a, pair.b, torch.ones(RANK), keep)
        pair.weight.data += pair.b @ pair.a
    report = lf.save_adapter(model, tmp_path)
    assert "1 weights saved whole" in report.note and f"2 saved as terms, rank up to {RANK}" in report.note
    theirs, ours = (twin.eval() for twin in (PeftModel.from_pretrained(llama(), tmp_path), injected()))
    lf.load_adapter(ours, tmp_path)
    for pair in (model_pairs[1], model_pairs[3]):
        assert torch.equal(ours.get_submodule(pair.name).weight, pair.weight)
    exact, eager = (twin.double().eval()(batch()).logits for twin in (model, ours))
    budget.check("logits", theirs.double()(batch()).logits, exact, budget.error(eager, exact), torch.float32)


def test_output_embedding_s_terms_count_once(tmp_path):
    """PEFT stores the weight of an adapted output embedding of its own accord."""
    model = merge_some(fused(targets=["lm_head"]), "terms")
    lf.save_adapter(model, tmp_path)
    theirs, ours = (twin.eval() for twin in (PeftModel.from_pretrained(llama(), tmp_path), llama()))
    lf.load_adapter(ours, tmp_path)
    exact, eager = (twin.double().eval()(batch()).logits for twin in (model, ours))
    budget.check("logits", theirs.double()(batch()).logits, exact, budget.error(eager, exact), torch.float32)


# checkpoints


@pytest.mark.parametrize("keep", ["weights", "terms"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_save_restores_every_bit_and_the_terms(kind, keep, tmp_path):
    model = merge_some(KINDS[kind](dtype=torch.bfloat16), keep)
    lf.save_adapter(model, tmp_path / "checkpoint", exact=True)
    resumed = KINDS[kind](dtype=torch.bfloat16)
    lf.load_adapter(resumed, tmp_path / "checkpoint")
    assert_same_tensors(weights_of(resumed), weights_of(model))
    for which, twin in (("one", model), ("other", resumed)):
        lf.save_adapter(merge_some(twin, keep), tmp_path / which)
    (tensors, metadata), (others, other_metadata) = read(tmp_path / "one"), read(tmp_path / "other")
    assert_same_tensors(tensors, others)
    assert metadata == other_metadata


def test_peft_reads_an_exact_save(tmp_path):
    model = merge_some(fused(), "terms").eval()
    lf.save_adapter(model, tmp_path, exact=True)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    lf.fuse_(theirs)
    assert torch.equal(theirs.eval()(batch()).logits, model(batch()).logits)


def inject(model):
    lf.inject_(model, lf.LoRAConfig(r=2, target_modules=TARGETS))
    return model


def wrap(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS))


@pytest.mark.parametrize("again", [inject, wrap])
def test_base_after_merge_and_unload_is_saved_whole(again, tmp_path):
    """The terms would be incomplete, because the adapter has been merged too."""
    model = again(merge_some(peft(), "terms").merge_and_unload())
    assert f"{LAYERS} weights saved whole" in lf.save_adapter(model, tmp_path).note


# merging the adapter


@pytest.mark.parametrize("kind", ["injected", "fused"])
def test_merged_model_is_saved_with_its_unmerged_weights(kind, tmp_path):
    model = merge_some(KINDS[kind]())
    before = weights_of(model)
    lf.save_adapter(model, tmp_path / "unmerged")
    lf.merge_(model)
    lf.save_adapter(model, tmp_path / "merged")
    lf.unmerge_(model)
    assert_same_tensors(weights_of(model), before)
    assert_same_tensors(read(tmp_path / "merged")[0], read(tmp_path / "unmerged")[0])


def test_model_that_peft_has_merged_is_refused(tmp_path):
    model = merge_some(peft())
    model.merge_adapter()
    with pytest.raises(lf.CheckpointError, match=r"unmerged layers, got .* merged by PEFT"):
        lf.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# several adapters


def test_other_adapter_is_saved_with_the_changed_base(tmp_path):
    model = merge_some(fused(), "terms")
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    model.set_adapter("second")
    lf.save_adapter(fill(model), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 3 + 2 * RANK
    theirs, ours = (twin.eval() for twin in (PeftModel.from_pretrained(llama(), tmp_path), llama()))
    lf.load_adapter(ours, tmp_path)
    exact, eager = (twin.double().eval()(batch()).logits for twin in (model, ours))
    budget.check("logits", theirs.double()(batch()).logits, exact, budget.error(eager, exact), torch.float32)


def test_variant_s_base_is_saved_whole(tmp_path):
    """Further ranks would go through DoRA's normalisation."""
    model = merge_some(peft(), "terms")
    model.add_adapter("dora", LoraConfig(r=3, target_modules=TARGETS, use_dora=True))
    model.set_adapter("dora")
    assert f"{LAYERS} weights saved whole" in lf.save_adapter(model, tmp_path).note


def test_adapter_without_a_layer_on_a_changed_weight_is_refused(tmp_path):
    model = merge_some(peft())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.set_adapter("second")
    with pytest.raises(lf.CheckpointError, match=r"own layers only, got .*down_proj.base_layer.weight, changed by"):
        lf.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# what is refused


def edit(change, metadata=None):
    def spoil(folder):
        tensors, saved = read(folder)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata or saved)

    return spoil


def note(**names):
    return {"format": "pt", "changed_base": json.dumps(names)}


def nothing(tensors):
    pass


SPOILT = {  # what is saved, how it is spoilt, what the error says
    "weight-missing": ({}, edit(lambda t: t.pop(BASE)), [BASE, "missing"]),
    "weight-of-another-shape": (
        {},
        edit(lambda t: t.update({BASE: torch.ones(64, 63)})),
        [BASE, "(64, 64)", "(64, 63)"],
    ),
    "weight-transposed": (
        {},
        edit(lambda t: t.update({BASE.replace("self_attn.q", "mlp.down"): torch.ones(128, 64)})),
        ["down_proj.base_layer", "(64, 128)", "(128, 64)"],
    ),
    "weight-float64": ({}, edit(lambda t: t.update({BASE: t[BASE].double()})), [BASE, "without loss", "float64"]),
    "weight-of-integers": ({}, edit(lambda t: t.update({BASE: t[BASE].int()})), [BASE, "int32"]),
    "weight-not-noted": ({}, edit(nothing, {"format": "pt"}), ["base_layer.weight", "the model's own frozen weight"]),
    "note-of-no-layer": ({}, edit(nothing, note(**{"other.layer": {}})), ["changed_base", "layers of the file"]),
    "note-not-json": ({}, edit(nothing, {"changed_base": "{"}), ["changed_base", "module names"]),
    "note-a-list": ({}, edit(nothing, {"changed_base": "[]"}), ["changed_base", "module names"]),
    "note-of-something": ({}, edit(nothing, note(**{LAYER: {"rank": 1}})), ["changed_base", "rank"]),
    "truncated": (
        {},
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000]),
        [WEIGHTS, "a whole safetensors file"],
    ),
    "own-rank-too-large": (
        {"keep": "terms"},
        edit(nothing, note(**{LAYER: {"r": 13, "lora_alpha": 8}})),
        ["lora_A", "at least 13, its own", "(12, 64)"],
    ),
    "own-rank-0": ({"keep": "terms"}, edit(nothing, note(**{LAYER: {"r": 0, "lora_alpha": 8}})), ["r in", "0"]),
    "terms-cut": (
        {"keep": "terms"},
        edit(lambda t: t.update({f"{PREFIX}{LAYER}.lora_A.weight": torch.ones(11, 64)})),
        ["lora_A", "the rank, 12", "(11, 64)"],
    ),
    "kept-a-missing": (
        {"keep": "terms", "exact": True},
        edit(lambda t: t.pop(f"{PREFIX}{LAYER}.terms_A.weight")),
        ["terms_A", "missing"],
    ),
    "kept-of-another-shape": (
        {"keep": "terms", "exact": True},
        edit(lambda t: t.update({f"{PREFIX}{LAYER}.terms_B.weight": torch.ones(64, 3)})),
        ["terms_B", "(64, 3)"],
    ),
    "kept-of-one-dimension": (
        {"keep": "terms", "exact": True},
        edit(lambda t: t.update({f"{PREFIX}{LAYER}.terms_A.weight": torch.ones(64)})),
        ["terms_A", "a matrix", "(64,)"],
    ),
    "kept-without-a-weight": (
        {},
        edit(
            lambda t: t.update({f"{PREFIX}{LAYER}.terms_{x}.weight": torch.ones(64, 64) for x in "AB"}),
            {"format": "pt"},
        ),
        ["base_layer.weight", "the model's own frozen weight"],
    ),
}


@pytest.fixture(scope="module")
def models():
    return {"plain": llama(), "injected": injected(), "peft": peft()}


@pytest.mark.parametrize("kind", ["plain", "injected", "peft"])
@pytest.mark.parametrize("case", SPOILT)
def test_damaged_files_are_refused_and_change_nothing(case, kind, models, tmp_path):
    options, spoil, says = SPOILT[case]
    lf.save_adapter(merge_some(injected(), options.get("keep", "weights")), tmp_path, exact=options.get("exact", False))
    spoil(tmp_path)
    assert_refused(models[kind], tmp_path, says)


def assert_refused(model, folder, says):
    before, known = snapshot(model), [merge_log.is_changed(module) for module in model.modules()]
    with pytest.raises(lf.CheckpointError) as raised:
        lf.load_adapter(model, folder)
    assert all(part in str(raised.value) for part in says), raised.value
    assert_unchanged(model, before)
    assert [merge_log.is_changed(module) for module in model.modules()] == known


def tied_llama():
    return llama(tied=True)


def with_shared_weights():
    model = injected()
    first, second = (model.model.layers[i].self_attn.q_proj for i in (0, 1))
    second.weight = first.weight
    return model


@pytest.mark.parametrize("keep", ["weights", "terms"])
@pytest.mark.parametrize(
    ("target", "build", "says"),
    [
        (["lm_head"], tied_llama, ["lm_head.weight", "of its own", "model.embed_tokens and lm_head"]),
        (TARGETS, with_shared_weights, ["q_proj.weight", "of its own", "layers.0", "layers.1"]),
    ],
    ids=["tied-head", "shared"],
)
def test_shared_weights_are_refused(target, build, says, keep, tmp_path):
    lf.save_adapter(merge_some(injected_llama(target_modules=target), keep), tmp_path)
    assert_refused(build(), tmp_path, says)


@pytest.mark.parametrize("keep", ["weights", "terms"])
def test_weights_without_data_are_refused(keep, tmp_path):
    lf.save_adapter(merge_some(injected(), keep), tmp_path)
    model = llama().to("meta")
    with pytest.raises(lf.CheckpointError, match=r"a parameter with data in memory .* on the meta device"):
        lf.load_adapter(model, tmp_path)
    assert type(model.get_submodule(LAYER)) is nn.Linear


def test_tied_head_beside_changed_layers_is_accepted(tmp_path):
    model = merge_some(injected(tied=True))
    lf.save_adapter(model, tmp_path)
    fresh = tied_llama()
    lf.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(batch()).logits, model.eval()(batch()).logits)


def test_terms_are_not_added_twice(tmp_path):
    model = merge_some(injected(), "terms")
    lf.save_adapter(model, tmp_path)
    assert_refused(model, tmp_path, ["q_proj.weight", "the unchanged weight", "another load, has changed"])
    fresh = injected()
    lf.load_adapter(fresh, tmp_path)
    assert_refused(fresh, tmp_path, ["the unchanged weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_of_the_unchanged_base_does_not_fit_a_changed_one(kind, tmp_path):
    lf.save_adapter(injected(), tmp_path)
    assert_refused(merge_some(KINDS[kind]()), tmp_path, ["the base that the adapter was trained on", "q_proj"])


def test_whole_weights_may_be_loaded_over_a_changed_base(tmp_path):
    saved = merge_some(injected())
    lf.save_adapter(saved, tmp_path)
    other = merge_some(injected(), "terms", merges=1)
    lf.load_adapter(other, tmp_path)
    assert_same_tensors(weights_of(other), weights_of(saved))


@pytest.mark.parametrize("keep", ["weights", "terms"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_trained_by_scalora_are_restored(kind, keep, tmp_path):
    model, before = KINDS[kind](), weights_of(KINDS[kind]())
    train(model, scalora(model, keep=keep), 3)
    assert {"weights": "saved whole", "terms": "saved as terms"}[keep] in lf.save_adapter(model, tmp_path).note
    fresh = KINDS[kind]()
    lf.load_adapter(fresh, tmp_path)
    trained, restored = weights_of(model), weights_of(fresh)
    for name in list(before)[::3]:
        exact = trained[name].double() - before[name].double()
        assert exact.any(), f"{name} has not changed"
        budget.check(name, restored[name] - before[name], exact, 0.0, torch.float32)
    if keep == "weights":
        assert_same_tensors(restored, trained)


@pytest.mark.parametrize(
    ("kind", "keep", "rounding"),
    [
        ("injected", "weights", "stochastic"),
        ("fused", "terms", "stochastic"),
        ("peft", "weights", "compensated"),
        ("injected", "terms", "nearest"),
    ],
)
def test_scalora_continues_to_the_same_bits_after_a_checkpoint(kind, keep, rounding, tmp_path):
    model = KINDS[kind](dtype=torch.bfloat16)
    optimizer = scalora(model, keep=keep, rounding=rounding)
    train(model, optimizer, 3)
    lf.save_adapter(model, tmp_path / "checkpoint", exact=True)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3, first=3)

    resumed = KINDS[kind](seed=0, dtype=torch.bfloat16)
    lf.load_adapter(resumed, tmp_path / "checkpoint")
    optimizer = scalora(resumed, keep=keep, rounding=rounding)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, 3, first=3)
    assert_same_tensors(weights_of(resumed), weights_of(model))
    for which, twin in (("one", model), ("other", resumed)):
        lf.save_adapter(twin, tmp_path / which)
    assert_same_tensors(read(tmp_path / "one")[0], read(tmp_path / "other")[0])


@pytest.mark.parametrize("kind", ["injected", "fused"])
def test_terms_of_an_adapter_with_scale_0_are_saved_as_weights(kind, tmp_path):
    model = merge_some(KINDS[kind](), "terms")
    for layer in adapter_layers(model).values():
        if kind == "injected":
            layer.scaling = 0.0
        else:
            layer.set_scale("default", 0.0)
    lf.save_adapter(model, tmp_path)
    tensors, _ = read(tmp_path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    lf.load_adapter(plain := llama(), tmp_path)
    ids = batch()
    torch.testing.assert_close(plain.eval()(ids).logits, model.eval()(ids).logits)
