"""Adapters on the experts of mixtures (`target_parameters`): models of transformers, trained, generated with, saved."""

import pytest
import torch
from moe_models import MODELS, base_model, experts_of, moe_model
from side_by_side import assert_same, factors, train, trained
from tiny import batch, loss_of
from workflows import workflow

import lora_fast as lf

peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

LIBRARY = "peft"
EXACT = 1e-12  # in float64


@workflow(
    "`target_parameters`: the experts of Qwen3-MoE, Mixtral, gpt-oss, OLMoE, DeepSeek-V3, Granite-MoE and JetMoe",
    "losses and factors of 20 steps: 1e-5, float32",
)
@pytest.mark.parametrize("name", MODELS)
def test_experts_train_as_with_peft(name):
    # AdamW divides each gradient by its size, so its relative error (1e-7, more where it nearly vanishes) becomes that
    # of a step of lr = 1e-3. 1e-5 is a hundredth of one step, of which there are 20; 1.4e-6 was measured.
    def run(prepare):
        model = prepare(moe_model(name))
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        return train(model, 20, adamw), factors(model)

    losses, _ = assert_same(run, 4 if name == "jetmoe" else 2, atol=1e-5)  # whose attention has experts, too
    model = moe_model(name)
    with model.disable_adapter():  # the losses tell whether the experts' adapters take part
        assert abs(loss_of(model, batch(0)).item() - losses[0]) > 1e-4


@workflow("The same in bfloat16 (Qwen3-MoE)", "losses of 20 steps: 3e-2")
def test_experts_train_in_bfloat16():
    def run(prepare):
        model = prepare(moe_model("qwen3_moe", "grouped_mm", torch.bfloat16))
        return train(model, 20, loss=lambda model, step: model(input_ids=batch(), labels=batch()).loss)  # in float32

    losses = assert_same(run, 2, atol=3e-2)
    assert losses[-1] < losses[0] - 0.1


@workflow(
    "Experts beside linear layers, the router trained too (`modules_to_save`)", "losses, factors, router: 1e-5, float32"
)
def test_router_is_trained_through_the_experts():
    def run(prepare):
        model = moe_model("qwen3_moe", modules=["q_proj"])
        (router,) = [module for module in model.modules() if type(module).__name__ == "Qwen3MoeTopKRouter"]
        router.weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
        router.weight.requires_grad_()
        before = router.weight.detach().clone()
        losses = train(prepare(model), 3, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5))
        assert not torch.equal(router.weight, before)
        return losses, trained(model)

    assert_same(run, 3, atol=1e-5)


@workflow("Experts under gradient checkpointing, both kinds", "losses and factors: 1e-5, float32")
@pytest.mark.parametrize("reentrant", [False, True])
def test_experts_under_gradient_checkpointing(reentrant):
    def run(prepare):
        model = moe_model("gpt_oss", modules=["q_proj"])
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = prepare(model.train())
        return train(model), factors(model)

    assert_same(run, 3, atol=1e-5)


@workflow("`generate` with adapted experts", "tokens; logits: 1e-5, float32")
def test_generate_with_adapted_experts():
    def run(prepare):
        model = prepare(moe_model("mixtral", use_cache=True).eval())
        tokens = model.generate(input_ids=batch(length=4), max_new_tokens=6, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            return tokens, model(input_ids=tokens).logits

    assert_same(run, 2, atol=1e-5)


@workflow(
    "Adapted experts saved, loaded into a new model and fused", "the files: the same bits; logits: 1e-12, float64"
)
def test_adapted_experts_are_saved_and_loaded(tmp_path):
    saved = []

    def run(prepare):
        model = prepare(moe_model("granitemoe", dtype=torch.float64))
        folder = tmp_path / str(len(saved))
        model.save_pretrained(folder)
        saved.append((folder / "adapter_model.safetensors").read_bytes())
        base = base_model("granitemoe", dtype=torch.float64)
        return prepare(peft.PeftModel.from_pretrained(base, folder))(input_ids=batch()).logits

    theirs = run(lambda model: model)
    ours = run(lambda model: (lf.fuse_(model), model)[1])
    assert saved[0] == saved[1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


@workflow("`merge_adapter`, `unmerge_adapter`, two adapters of experts in turn", "logits of each: 1e-12, float64")
def test_methods_of_peft_with_adapted_experts():
    def run(prepare):
        model = prepare(moe_model("olmoe", dtype=torch.float64).eval())
        targets = experts_of(base_model("olmoe"))
        other = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
        torch.manual_seed(3)
        try:
            model.add_adapter("other", other)
        except ValueError as error:
            pytest.skip(f"this PEFT has one adapter of parameters: {error}")
        logits = [model(input_ids=batch()).logits]
        model.merge_adapter()
        logits.append(model(input_ids=batch()).logits)
        model.unmerge_adapter()
        model.set_adapter("other")
        return [*logits, model(input_ids=batch()).logits]

    assert_same(run, 2, atol=EXACT)
