"""Beside an injected model's adapters: heads of tasks, modules that were trained, resized embeddings, and what the
config tells PEFT of the model."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from tiny import batch, fill, injected_llama, llama
from torch import nn

import lora_fast as lf
from lora_fast.surgery import tasks

LLAMA = {"num_hidden_layers": 1, "num_key_value_heads": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "eos_token_id": 2}
MODELS = {  # class → PEFT's task, settings, heads
    "LlamaForCausalLM": ("CAUSAL_LM", LLAMA, []),
    "LlamaModel": ("FEATURE_EXTRACTION", LLAMA, []),
    "LlamaForSequenceClassification": ("SEQ_CLS", LLAMA, ["score"]),
    "BertForTokenClassification": ("TOKEN_CLS", {}, ["classifier"]),
    "BertForQuestionAnswering": ("QUESTION_ANS", {}, ["qa_outputs"]),
    "RobertaForSequenceClassification": ("SEQ_CLS", {"pad_token_id": 0}, ["classifier"]),
    "BartForSequenceClassification": ("SEQ_CLS", BART, ["classification_head"]),
    "T5ForConditionalGeneration": ("SEQ_2_SEQ_LM", T5, []),
    "BertForMaskedLM": (None, {}, []),
}
OPENED_BY = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
    "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    None: peft.AutoPeftModel,
}


@torch.no_grad()
def outputs(model):
    ids = batch().clamp(min=3)
    ids[:, -1] = 2  # Bart classifies by the last token of this kind
    given = {"decoder_input_ids": ids} if model.config.model_type == "t5" else {}
    result = model.eval()(input_ids=ids, **given).to_tuple()
    return torch.cat([tensor.flatten() for tensor in result if isinstance(tensor, torch.Tensor)])


@pytest.mark.parametrize("name", MODELS)
def test_peft_s_auto_class_opens_the_folder(name, tmp_path):
    """The pretrained model has no head, so that a head that is not in the files would be a random one."""
    task, settings, heads = MODELS[name]
    kind = getattr(transformers, name)
    pretrained = kind(kind.config_class(**SHAPE | settings))
    (pretrained.base_model if heads else pretrained).save_pretrained(tmp_path / "base")
    model, plain = (kind.from_pretrained(tmp_path / "base") for _ in range(2))
    report = lf.inject_(fill(model), lf.LoRAConfig(r=2))
    fill(model)
    assert all(any(layer.startswith(head) for layer in report.left) for head in heads)
    saved = lf.save_adapter(model, tmp_path / "adapter").changed
    assert all(any(name.startswith(head) for name in saved) for head in heads)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (task, heads or None)
    assert (config["auto_mapping"] is None) == (task is not None)
    want = outputs(model)
    opened = OPENED_BY[task].from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(outputs(opened), want)
    lf.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(outputs(plain), want)


def test_task_is_that_of_transformers_models_only():
    assert tasks.task_type(nn.Linear(2, 2)) is None
    assert tasks.heads(nn.ModuleDict({"classifier": nn.Linear(2, 2)})) == {}


def test_head_with_adapters_is_saved_with_its_frozen_weight(tmp_path):
    build = lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SHAPE | LLAMA))
    torch.manual_seed(0)
    model, plain, theirs = build(), build(), build()
    theirs.model.load_state_dict(model.model.state_dict())
    plain.model.load_state_dict(model.model.state_dict())
    lf.inject_(model, lf.LoRAConfig(r=2, target_modules=["score", "q_proj"]))
    want = outputs(fill(model))
    lf.save_adapter(model, tmp_path)
    lf.load_adapter(plain, tmp_path)
    for twin in (plain, peft.PeftModel.from_pretrained(theirs, tmp_path)):
        torch.testing.assert_close(outputs(twin), want)


TRAINED = {
    "norm": (["model.norm"], False),
    "lm-head": (["lm_head"], False),
    "tied-embeddings": (["model.embed_tokens"], True),
    "block-part": (["model.layers.0.mlp"], False),
}


@pytest.mark.parametrize("case", TRAINED)
def test_module_that_was_trained_is_saved(case, tmp_path):
    names, tied = TRAINED[case]
    model = injected_llama(tied=tied, hidden=32, target_modules=["q_proj"])
    for name in names:
        for parameter in model.get_submodule(name).requires_grad_(True).parameters():
            parameter.data += 0.1
    want = outputs(model)
    lf.save_adapter(model, tmp_path / "first")
    plain, injected = llama(tied=tied, hidden=32), injected_llama(tied=tied, hidden=32, target_modules=["q_proj"])
    report = lf.load_adapter(plain, tmp_path / "first")
    assert all(any(changed.startswith(name) for changed in report.changed) for name in names)
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    lf.load_adapter(injected, tmp_path / "first")
    lf.save_adapter(plain.requires_grad_(False), tmp_path / "again")  # frozen for inference, and still saved
    again = peft.PeftModel.from_pretrained(llama(tied=tied, hidden=32), tmp_path / "again")
    for twin in (
        plain,
        injected,
        again,
        peft.PeftModel.from_pretrained(llama(tied=tied, hidden=32), tmp_path / "first"),
    ):
        torch.testing.assert_close(outputs(twin), want)


def test_trained_parameters_beside_an_adapter_are_refused_at_saving(tmp_path):
    model = injected_llama(target_modules=["q_proj"])
    layer = model.model.layers[0].self_attn.q_proj
    layer.bias = nn.Parameter(torch.zeros(64))
    with pytest.raises(lf.CheckpointError, match=r"modules_to_save.*, got bias in model.layers.0.self_attn.q_proj"):
        lf.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


BAD = {
    "missing": ({"lm_head.weight": None}, "lm_head.weight: expected in the file, for modules_to_save"),
    "other-shape": ({"lm_head.weight": torch.ones(98, 64)}, r"resize_token_embeddings.*\(98, 64\)"),
    "no-such-module": ({"other.weight": torch.ones(2)}, "key base_model.model.other.weight"),
    "not-to-save": ({"model.norm.weight": torch.ones(64)}, "model.norm.weight: .* an extra key"),
}


@pytest.mark.parametrize("kind", ["plain", "injected", "peft"])
@pytest.mark.parametrize("case", BAD)
def test_damaged_whole_modules_are_refused(case, kind, tmp_path):
    model = injected_llama(target_modules=["q_proj"])
    model.lm_head.requires_grad_(True)
    lf.save_adapter(model, tmp_path)
    changes, says = BAD[case]
    tensors = safetensors.torch.load((tmp_path / "adapter_model.safetensors").read_bytes())
    tensors |= {f"base_model.model.{key}": tensor for key, tensor in changes.items()}
    left = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(left, tmp_path / "adapter_model.safetensors")
    target = {"plain": llama, "injected": lambda: injected_llama(target_modules=["q_proj"]), "peft": peft_with_head}[
        kind
    ]()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(lf.CheckpointError, match=says if kind != "peft" else "base_model.model"):
        lf.load_adapter(target, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def peft_with_head():
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return peft.get_peft_model(llama(), config)


def test_16_bit_model_takes_a_module_rounded_and_says_so(tmp_path):
    model = injected_llama(target_modules=["q_proj"])
    model.lm_head.requires_grad_(True)
    lf.save_adapter(model, tmp_path)
    report = lf.load_adapter(llama(dtype=torch.bfloat16), tmp_path)
    assert report.changed["lm_head"] == "weight (97, 64) rounded to torch.bfloat16"


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["injected", "peft"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["q_proj", "lm_head"])
def test_resized_vocabulary_is_saved(kind, tied, targets, tmp_path):
    settings = SHAPE | LLAMA | {"tie_word_embeddings": tied}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).save_pretrained(tmp_path / "base")

    def resized(seed):
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(100, mean_resizing=False)
        model.lm_head.out_features = 100  # transformers 5.0 leaves the old number where the embeddings are tied
        return model

    model = resized(1)
    if kind == "peft":
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    else:
        lf.inject_(model, lf.LoRAConfig(r=4, alpha=8, target_modules=targets))
        fill(model)
    want = outputs(model)
    lf.save_adapter(model, tmp_path / "adapter")
    plain, injected = resized(2), resized(3)
    lf.inject_(injected, lf.LoRAConfig(r=4, alpha=8, target_modules=targets))
    theirs = peft.get_peft_model(resized(4), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for target in (plain, injected, theirs):
        lf.load_adapter(target, tmp_path / "adapter")
    for twin in (plain, injected, theirs, peft.PeftModel.from_pretrained(resized(5), tmp_path / "adapter")):
        torch.testing.assert_close(outputs(twin), want)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(lf.CheckpointError, match=r"model.resize_token_embeddings first\), got \(100, 16\)"):
        lf.load_adapter(base, tmp_path / "adapter")
