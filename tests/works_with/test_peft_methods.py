"""PEFT's initialisations, its variants of LoRA and the other kinds of adapters beside fused layers."""

import pytest
import torch
from fused_models import fused_layers
from side_by_side import assert_same, factors, train, trained
from tiny import batch, fill, llama, loss_of, peft_llama
from torch import nn
from workflows import workflow

import lora_fast as lf

peft = pytest.importorskip("peft", reason="pip install '.[works-with]' with PEFT 0.21", minversion="0.21")

LIBRARY = "peft"
TARGETS = ["q_proj", "up_proj"]
LAYERS = 4  # two in each of two layers
EXACT = 1e-12  # in float64


@workflow("Initialisations that need no data: Gaussian, orthogonal, PiSSA, OLoRA", "losses and factors: 1e-12, float64")
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_initialisation(init):
    def run(prepare):
        options = {"init_lora_weights": init, "filled": False, "targets": TARGETS, "dtype": torch.float32}
        model = prepare(peft_llama(**options).double())
        return train(model), trained(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow(
    "EVA, on the activations of a fused model (`initialize_lora_eva_weights`)", "losses and factors: 1e-9, float64"
)
def test_eva():
    def run(prepare):
        config = peft.LoraConfig(
            r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)
        )
        model = prepare(peft.get_peft_model(llama(dtype=torch.float64), config))
        data = [{"input_ids": batch(seed), "attention_mask": torch.ones(2, 12)} for seed in range(2)]
        peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
        return train(model), {name: p.abs() for name, p in trained(model).items()}

    assert_same(run, LAYERS, atol=1e-9)


@workflow("CorDA and LoRA-GA, prepared on data", "losses and factors: 1e-12, float64")
@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_initialisation_from_data(init):
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    extra = {"corda": {"corda_config": CordaConfig(corda_method="kpm")}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}

    def run(prepare):
        config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init, **extra[init])
        base = llama()
        losses = lambda: [loss_of(base, batch(seed, rows=1)) for seed in range(6)]
        if init == "corda":
            preprocess_corda(base, config, losses)
        else:
            preprocess_loraga(base, config, lambda: sum(losses()).backward())
        model = prepare(peft.get_peft_model(base, config).double())
        return train(model), trained(model)

    assert_same(run, LAYERS, atol=EXACT)


@workflow("PiSSA, trained, saved as an adapter for the unchanged base", "file's values: 3e-5, float32")
def test_pissa_saved_for_the_base(tmp_path):
    from safetensors.torch import load_file

    def run(prepare):
        model = peft_llama(init_lora_weights="pissa", filled=False, targets=TARGETS)
        model.save_pretrained(str(tmp_path / "first"))
        model = prepare(model)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(tmp_path / "first"))
        model.peft_config["default"].init_lora_weights = "pissa"
        train(model)
        model.save_pretrained(str(tmp_path / "last"), path_initial_model_for_weight_conversion=str(tmp_path / "first"))
        return load_file(tmp_path / "last" / "adapter_model.safetensors")

    assert next(iter(assert_same(run, LAYERS, atol=3e-5).values())).shape[0] == 8  # of twice the rank


@workflow("DoRA, also beside plain LoRA", "losses, factors and magnitudes: 1e-12, float64")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_dora(beside):
    def run(prepare):
        model = prepare(peft_llama(targets=TARGETS, dtype=torch.float64, use_dora=not beside))
        if beside:
            model.add_adapter("dora", peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True))
            fill(model.double()).set_adapter("dora")
        return train(model), trained(model)

    assert_same(run, LAYERS, atol=EXACT)


VARIANTS = {
    "ALoraLinearVariant": {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
    "MiCALinearVariant": {"init_lora_weights": "mica"},
    "VeloraLinearVariant": {"velora_config": {}},
    "MontecloraLinearVariant": {"monteclora_config": {}},
    "BdLoraLinearVariant": {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"], "match_strict": False}},
}


@workflow("aLoRA, MiCA, VeLoRA, MonteCLoRA, BD-LoRA on a fused model", "losses, factors: 1e-9, by PEFT's forward")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_beside_plain_lora(variant):
    def run(prepare):
        model = prepare(peft_llama(targets=["q_proj"]))
        model.add_adapter("variant", peft.LoraConfig(r=4, target_modules=["q_proj"], **VARIANTS[variant]))
        model.double().set_adapter("variant")
        return train(fill(model)), factors(model)

    assert_same(run, 2, atol=1e-9, reason=f"variant {variant}")


@workflow("A model with aLoRA or MiCA alone", "`fuse_` raises, and with `allow_empty=True` reports the reasons")
@pytest.mark.parametrize("variant", list(VARIANTS)[:2])
def test_variant_alone(variant):
    model = peft_llama(targets=["q_proj"], filled=False, **VARIANTS[variant])
    with pytest.raises(lf.checks.ArgumentError, match=f"variant {variant}"):
        lf.fuse_(model)
    assert set(lf.fuse_(model, allow_empty=True).left.values()) == {f"variant {variant}"}
    assert not fused_layers(model)


@workflow("`lora_bias=True`, `bias='all'`, `bias='lora_only'`", "losses and all trained parameters: 1e-12, float64")
@pytest.mark.parametrize("options", [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_biases(options):
    def run(prepare):
        base = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 8)).double()
        model = prepare(fill(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "3"], **options))))
        losses = train(model, loss=lambda model, _: model(torch.randn(5, 12, dtype=torch.float64)).square().mean())
        assert any(name.endswith("bias") for name in trained(model))
        return losses, trained(model)

    assert_same(run, 2, atol=EXACT)


@workflow("`trainable_token_indices`", "losses, tokens and factors: 1e-12, float64")
def test_trainable_tokens():
    def run(prepare):
        model = prepare(
            peft_llama(dtype=torch.float64, targets=TARGETS, trainable_token_indices={"embed_tokens": [3, 7]})
        )
        result = train(model), trained(model)
        assert any("token" in name for name in result[1])
        return result

    assert_same(run, LAYERS, atol=EXACT)


@workflow(
    "Adapters of embeddings and tied heads (`ensure_weight_tying`)", "losses and trained parameters: 1e-12, float64"
)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(tied):
    def run(prepare):
        options = {"target_modules": [*TARGETS, "embed_tokens"], "ensure_weight_tying": tied}
        model = peft.get_peft_model(llama(dtype=torch.float64, tied=tied), peft.LoraConfig(r=4, **options))
        model = prepare(fill(model))
        return train(model), trained(model)

    assert_same(run, LAYERS + tied, atol=EXACT)  # PEFT adapts a tied head, too


@workflow("`target_parameters` (experts of Mixtral) beside linear layers", "losses and factors: 1e-5, float32")
def test_target_parameters():
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 97}

    def run(prepare):
        torch.manual_seed(0)
        base = MixtralForCausalLM(MixtralConfig(**shape, use_cache=False))
        options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
        model = prepare(fill(peft.get_peft_model(base, peft.LoraConfig(r=4, **options))))
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return train(model, optimizer=sgd), trained(model)

    assert_same(run, 2, atol=1e-5)


@workflow(
    "Adapters of convolutions and of `nn.MultiheadAttention` beside fused layers", "losses, factors: 1e-12, float64"
)
def test_other_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.attention = nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2, batch_first=True)
            self.linear, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = self.conv(x).flatten(2).mT
            return self.head(self.linear(self.attention(x, x, x)[0]).relu())

    def run(prepare):
        config = peft.LoraConfig(r=2, target_modules=["conv", "attention", "linear", "head"])
        model = prepare(fill(peft.get_peft_model(Net().double(), config)))
        losses = train(model, loss=lambda model, _: model(torch.randn(2, 3, 6, 6, dtype=torch.float64)).square().mean())
        return losses, factors(model)

    assert_same(run, 2, atol=EXACT)


@workflow("X-LoRA over saved adapters", "`fuse_` leaves all layers to PEFT and reports the reason")
def test_xlora(tmp_path):
    folders = {name: str(tmp_path / name) for name in "01"}
    for name, folder in folders.items():
        fill(peft_llama(targets=TARGETS), int(name)).save_pretrained(folder)
    config = peft.XLoraConfig("CAUSAL_LM", hidden_size=64, xlora_depth=2, xlora_size=16, adapters=folders)
    model = peft.get_peft_model(llama(), config).eval()
    logits = model(input_ids=batch()).logits
    report = lf.fuse_(model, allow_empty=True)
    assert len(report.left) == LAYERS and set(report.left.values()) == {"its forward was replaced"}
    assert torch.equal(model(input_ids=batch()).logits, logits)


@workflow("`reduce_intruder_dimension`, `convert_to_lora`", "logits of the new adapter: 1e-5, float32")
def test_adapter_made_from_another(tmp_path):
    from peft.tuners.lora.conversion import save_as_lora
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    other = peft.get_peft_model(llama(), peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False))
    save_as_lora(str(tmp_path), other, 8)

    def run(prepare):
        model = prepare(peft.PeftModel.from_pretrained(llama(), str(tmp_path))).eval()
        converted = model(input_ids=batch()).logits
        reduce_intruder_dimension(model, logging_sink=None)
        return converted, model(input_ids=batch()).logits

    assert_same(run, LAYERS, atol=1e-5)


TASKS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}


@workflow(
    "PEFT's task classes (classification of texts and tokens, questions)",
    "losses and trained parameters: 1e-9, float64",
)
@pytest.mark.parametrize("task", TASKS)
def test_task(task):
    import transformers

    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    answers = {"SEQ_CLS": {"labels": torch.tensor([0, 1])}, "TOKEN_CLS": {"labels": batch() % 2}}
    answers["QUESTION_ANS"] = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 5])}

    def run(prepare):
        config = transformers.BertConfig(**shape, num_attention_heads=4)
        base = getattr(transformers, f"BertFor{TASKS[task]}")(config).double().eval()
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules=["query", "intermediate.dense"], task_type=task)
        )
        model = prepare(model).eval()
        return train(model, loss=lambda model, _: model(input_ids=batch(), **answers[task]).loss), trained(model)

    assert_same(run, 4, atol=1e-9)
