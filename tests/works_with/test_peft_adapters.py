"""PEFT's adapters: added, switched, combined, merged, disabled and deleted, in models whose layers are fused."""

import pytest
import torch
from fused_models import fused_layers
from side_by_side import assert_ran, assert_same, factors, fuse, plain, train, trained
from tiny import batch, fill, llama, loss_of, peft_llama
from workflows import workflow

peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

LIBRARY = "peft"
TARGETS = ["q_proj", "up_proj"]
LAYERS = 4  # two in each of two layers
EXACT = 1e-12  # in float64


def two_adapters():
    model = peft_llama(dtype=torch.float64, targets=TARGETS)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS))
    return fill(model)


@workflow("Two adapters, trained in turn (`set_adapter`)", "losses of six steps and all factors: 1e-12, float64")
def test_adapters_trained_in_turn():
    def run(prepare):
        model, losses = prepare(two_adapters()), []
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            losses += train(model, 2)
        return losses, factors(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow("Adapters added to a fused model, then trained", "losses of three steps and all factors: 1e-12, float64")
def test_adapter_added_after_fusing():
    def run(prepare):
        model = prepare(peft_llama(dtype=torch.float64, targets=TARGETS))
        model.add_adapter("late", peft.LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=TARGETS))
        model.set_adapter("late")
        return train(model), factors(fill(model))

    assert_same(run, LAYERS, atol=EXACT)


@workflow(
    "Two adapters active at once (`base_model.set_adapter`)", "losses and factors: the same bits, by PEFT's forward"
)
def test_stacked_adapters_run_by_peft():
    def run(prepare):
        model = prepare(two_adapters())
        model.base_model.set_adapter(["default", "other"])
        return train(model), factors(model)

    assert_same(run, LAYERS, reason="2 active adapters")


@workflow("One batch with several adapters (`adapter_names=`), without gradients", "logits: 1e-12, float64")
def test_mixed_batch():
    def run(prepare):
        model = prepare(two_adapters()).eval()
        with torch.no_grad():
            return model(input_ids=batch(rows=3), adapter_names=["other", "__base__", "default"]).logits

    assert_same(run, LAYERS, atol=EXACT)


@workflow("`add_weighted_adapter`, nine combinations", "logits of each: 1e-12, float64")
def test_weighted_adapters():
    kinds = {
        "linear": {},
        "cat": {},
        "svd": {"svd_rank": 3},
        "ties": {"density": 0.5},
        "magnitude_prune": {"density": 0.5},
    }
    kinds |= {f"{kind}_svd": {"density": 0.5, "svd_rank": 3} for kind in ("ties", "dare_ties", "magnitude_prune")}
    kinds |= {"dare_linear": {"density": 0.5}}

    def run(prepare):
        model, logits = peft_llama(dtype=torch.float64, targets=TARGETS), []
        model.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
        prepare(fill(model)).eval()
        for kind, options in kinds.items():
            model.add_weighted_adapter(["default", "other"], [0.7, -0.4], kind, combination_type=kind, **options)
            model.set_adapter(kind)
            logits.append(model(input_ids=batch()).logits)
        return logits

    assert_same(run, LAYERS, atol=EXACT)


@workflow("An adapter deleted beside another one", "logits after it: 1e-12, float64; keys of the state")
def test_deleted_adapter():
    def run(prepare):
        model = prepare(two_adapters()).eval()
        model.set_adapter("other")
        model.delete_adapter("default")
        assert not [key for key in model.state_dict() if "default" in key]
        return model(input_ids=batch()).logits

    assert_same(run, LAYERS, atol=EXACT)


@workflow(
    "`disable_adapter` within training (DPO's reference)", "logits without adapters, losses, factors: 1e-12, float64"
)
def test_disabled_adapter():
    def run(prepare):
        model = prepare(two_adapters())
        losses = train(model, 2)
        with torch.no_grad(), model.disable_adapter():
            without = model(input_ids=batch()).logits
        assert torch.equal(without, llama(dtype=torch.float64)(input_ids=batch()).logits)
        return losses + train(model, 2), factors(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow("`merge_and_unload`, also of two adapters", "weights of the plain model: 1e-6 relative, float32")
@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_merge_and_unload(names):
    def run(prepare):
        model = peft_llama(targets=TARGETS)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS))
        model = prepare(fill(model))
        model(input_ids=batch())
        merged = model.merge_and_unload(safe_merge=True, adapter_names=names)
        assert type(merged) is type(llama()) and not fused_layers(merged)
        return merged.state_dict()

    theirs, models = run(plain), []
    ours = run(lambda model: models.append(fuse(model, LAYERS)) or model)
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


@workflow("`merge_adapter`, `unmerge_adapter`", "logits while merged: 1e-12; after it the weights' own bits")
def test_merge_and_unmerge():
    def run(prepare):
        model = prepare(two_adapters()).eval()
        base = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
        model.merge_adapter(["default"])
        merged = model(input_ids=batch()).logits
        model.unmerge_adapter()
        if fused_layers(model):
            assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
        return merged, model(input_ids=batch()).logits

    assert_same(run, LAYERS, atol=EXACT)


@workflow("`modules_to_save` (an output head) with two adapters", "losses, both heads and factors: 1e-12, float64")
def test_modules_to_save():
    def run(prepare):
        model = peft_llama(dtype=torch.float64, targets=TARGETS, modules_to_save=["lm_head"])
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]))
        model = prepare(fill(model))
        losses = train(model, 2)
        model.set_adapter("other")
        return losses + train(model, 2), {
            name: p for name, p in model.state_dict().items() if "modules_to_save" in name
        }

    assert_same(run, LAYERS, atol=EXACT)


@workflow("`rank_pattern`, `alpha_pattern`, `layers_to_transform`", "losses and factors: 1e-12, float64")
def test_patterns():
    options = {"rank_pattern": {"up_proj": 7, "1.self_attn.q_proj": 1}, "alpha_pattern": {"q_proj": 3}}

    def run(prepare):
        model = prepare(
            peft_llama(dtype=torch.float64, targets=[*TARGETS, "o_proj"], layers_to_transform=[1], **options)
        )
        return train(model), trained(model)

    assert_same(run, 3, atol=EXACT)


@workflow("`layer_replication`", "losses and factors: 1e-12, float64")
def test_layer_replication():
    def run(prepare):
        model = prepare(peft_llama(dtype=torch.float64, targets=TARGETS, layer_replication=[[0, 2], [1, 2]]))
        return train(model), trained(model)

    assert_same(run, 6, atol=EXACT)


@workflow(
    "Adapters of 16 bits (`autocast_adapter_dtype=False`) and of 32 over a bfloat16 base",
    "losses and gradients: 2e-2 relative",
)
@pytest.mark.parametrize("autocast", [False, True])
def test_adapter_dtype(autocast):
    def run(prepare):
        config = peft.LoraConfig(r=4, target_modules=TARGETS)
        model = fill(peft.get_peft_model(llama(dtype=torch.bfloat16), config, autocast_adapter_dtype=autocast))
        dtypes = {p.dtype for p in factors(model).values()}
        assert dtypes == {torch.float32 if autocast else torch.bfloat16}
        loss = loss_of(prepare(model), batch())
        loss.backward()
        return loss.detach(), [p.grad.float() for p in model.parameters() if p.requires_grad]

    assert_same(run, LAYERS, atol=2e-3, rtol=2e-2)


@workflow("`get_layer_status`, `get_model_status`, `print_trainable_parameters`", "all fields and the printed text")
def test_status(capsys):
    def run(prepare):
        model = prepare(two_adapters())
        model(input_ids=batch())
        model.print_trainable_parameters()
        return str(model.get_layer_status()), str(model.get_model_status()), capsys.readouterr().out

    models = []
    assert run(lambda model: models.append(fuse(model, LAYERS)) or model) == run(plain)
    assert_ran(models[0], LAYERS)


@workflow(
    "LoRA beside another tuner (`PeftMixedModel` with LoHa)",
    "losses and LoRA's factors: the same bits, by PEFT's forward",
)
def test_mixed_model():
    def run(prepare):
        config = peft.LoraConfig(r=4, target_modules=TARGETS)
        model = peft.get_peft_model(llama(dtype=torch.float64), config, mixed=True)
        model.add_adapter("loha", peft.LoHaConfig(r=2, target_modules=["o_proj"], init_weights=False))
        model.set_adapter(["default", "loha"])
        model = prepare(fill(model))
        return train(model), factors(model)

    assert_same(run, LAYERS, reason="2 active adapters")


@workflow("`set_requires_grad`: adapters frozen and trained again", "losses and all factors: 1e-12, float64")
def test_frozen_adapter():
    def run(prepare):
        model = prepare(two_adapters())
        model.set_requires_grad("default", requires_grad=False)
        assert not loss_of(model, batch()).requires_grad
        model.set_requires_grad(["default", "other"])
        losses = train(model, 2)
        model.set_requires_grad(["default", "other"], requires_grad=False)
        assert not loss_of(model, batch()).requires_grad
        return losses, factors(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow("Gradient checkpointing of a PeftModel, both kinds", "losses and factors: 1e-12, float64")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    def run(prepare):
        base = llama(dtype=torch.float64)
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = prepare(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS)))
        return train(model), factors(model)

    assert_same(run, LAYERS, atol=EXACT)
