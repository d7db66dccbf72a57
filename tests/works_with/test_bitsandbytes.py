"""QLoRA: adapters over weights in 4 and 8 bits, as transformers loads them."""

import pytest

pytest.importorskip("bitsandbytes", reason="pip install '.[quantized]'")
pytest.importorskip("trl", reason="pip install '.[works-with]'")
import peft
import tiny_model
import torch
import transformers
import trl
import trl_runs
from paired_runs import adapted, assert_close, assert_same, gradients, lora_config, train
from workflows import workflow

import lora_fast as lf

LIBRARY = "bitsandbytes"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "initializer_range": 0.2}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
TOLERANCE = 1e-4  # float32: gradients and Adam's steps after two of them
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]], device="cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns a function that loads the same small model with quantised weights."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model.model(len(trl_runs.tokenizer()), **SIZES).save_pretrained(folder)

    def load(**settings):
        config = transformers.BitsAndBytesConfig(**settings)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

    return load


def loss_and_gradients(model):
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.item(), gradients(model)


@workflow(
    "NF4 with double quantisation, `prepare_model_for_kbit_training`, `get_peft_model`, `Trainer`",
    "losses, norms of the gradients and trained factors: 1e-4",
)
def test_trainer(base, tmp_path):
    def run(change):
        model = peft.prepare_model_for_kbit_training(base(**NF4))  # with activation checkpointing
        model = change(adapted(model))
        data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
        args = transformers.TrainingArguments(**trl_runs.options(tmp_path))
        return train(transformers.Trainer(model, args, train_dataset=data))

    assert_same(run, TOLERANCE)


@workflow(
    "`SFTTrainer` of TRL with a quantised model and a `peft_config`: TRL casts the factors to bfloat16",
    "losses, norms of the gradients and trained factors: 1e-2",
)
def test_sft(base, tmp_path):
    def run(change):
        args = trl.SFTConfig(**trl_runs.options(tmp_path, max_length=16))
        settings = {"train_dataset": trl_runs.TEXTS, "processing_class": trl_runs.tokenizer()}
        trainer = trl.SFTTrainer(base(**NF4), args, peft_config=lora_config(), **settings)
        change(trainer.model)
        return train(trainer)

    assert_same(run, 1e-2)


@workflow("`lf.inject_` into a quantised model, `Trainer`", "losses, norms of the gradients, trained factors: 1e-4")
def test_trainer_of_injected_layers(base, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]

    def run(inject):
        transformers.set_seed(1)
        model = base(**NF4).train()
        model.requires_grad_(False)
        model = inject(model)
        args = transformers.TrainingArguments(**trl_runs.options(tmp_path))
        result = train(transformers.Trainer(model, args, train_dataset=data))
        return result["logs"], [value for name, value in sorted(result["trained"].items()) if "lora_B" in name]

    def ours(model):
        lf.inject_(model, config)
        return model

    assert_close(run(lambda model: peft.get_peft_model(model, config)), run(ours), TOLERANCE, TOLERANCE)
    model = ours(base(**NF4))
    assert not model.is_quantized
    lf.unload_(model, merge=False)
    assert model.is_quantized


@workflow("FP4 with a bfloat16 compute dtype, under autocast", "loss and gradients of all factors: 5e-2")
def test_autocast(base):
    def run(change):
        model = change(adapted(base(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)))
        with torch.autocast("cpu", torch.bfloat16):
            return loss_and_gradients(model)

    assert_same(run, 5e-2)


@workflow("`load_in_8bit`", "loss and gradients of all factors: 1e-4")
def test_8_bits(base):
    assert_same(lambda change: loss_and_gradients(change(adapted(base(load_in_8bit=True)))), TOLERANCE)


@workflow("`save_pretrained`, and `PeftModel.from_pretrained` over the quantised model", "logits: 1e-5")
def test_files(base, tmp_path):
    def run(change):
        model = change(adapted(base(**NF4))).train()  # no evaluation: it would repack the weights of PEFT's layers
        model.save_pretrained(tmp_path)
        again = change(peft.PeftModel.from_pretrained(base(**NF4), tmp_path)).train()
        with torch.no_grad():
            return model(input_ids=TOKENS).logits, again(input_ids=TOKENS).logits

    assert_same(run, 1e-5)


@workflow("`generate` in training mode, and training after it", "tokens, loss and gradients: 1e-4")
def test_generation_between_steps(base):
    def run(change):
        model = change(adapted(base(**NF4))).train()
        tokens = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        return tokens, loss_and_gradients(model)

    assert_same(run, TOLERANCE)


@workflow(
    "an evaluation, also with adapters disabled, between two steps", "loss and gradients: the bits from before it"
)
def test_training_goes_on_after_an_evaluation(base):
    """bitsandbytes repacks the weights of PEFT's layers in an evaluation on some CPUs, and rounds them."""
    model = adapted(base(**NF4))
    lf.fuse_(model)
    before = loss_and_gradients(model.train())
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=TOKENS)
    model.zero_grad()
    after = loss_and_gradients(model.train())
    assert before[0] == after[0]
    for name, gradient in before[1].items():
        torch.testing.assert_close(after[1][name], gradient, atol=0.0, rtol=0.0)
