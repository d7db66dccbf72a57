"""transformers' Trainer and Seq2SeqTrainer."""

import pytest

pytest.importorskip("transformers", reason="pip install '.[works-with]'")
import tiny
import tiny_model
import torch
import transformers
from paired_runs import adapted, assert_same, language_model, logs, lora_config, optimizer_choice, train, trained
from safetensors.torch import load_file
from workflows import workflow

import lora_fast as lf

LIBRARY = "transformers"
PAIRED = "losses, logged metrics and trained factors: 1e-12"
ROWS = [{"input_ids": ids, "labels": ids} for ids in tiny.batch(rows=12, length=8)]


def base():
    return language_model(tiny.VOCABULARY)


def arguments(folder, kind=transformers.TrainingArguments, **changes):
    settings = {"max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2}
    return kind(str(folder), **settings | changes)


def trainer_of(model, args, kind=transformers.Trainer, **options):
    return kind(model, args, train_dataset=ROWS, **options)


def run(folder, change, methods=None, dtype=torch.float64, **changes):
    """Trains with Trainer's own AdamW, or with LoRAAdamW if there are methods."""
    args, model = arguments(folder, **changes), change(adapted(base().to(dtype)))
    choice = None if methods is None else lf.hf.optimizer_cls_and_kwargs(model, args, methods)
    return train(trainer_of(model, args, optimizer_cls_and_kwargs=choice))


@workflow("`Trainer(model, args, train_dataset)`", PAIRED)
def test_trainer(tmp_path):
    assert_same(lambda change: run(tmp_path, change))


@workflow("`Trainer` in float32", "losses, logged metrics and trained factors: 1e-6")
def test_trainer_in_float32(tmp_path):
    assert_same(lambda change: run(tmp_path, change, dtype=torch.float32), 1e-6)


@workflow("A model adapted by transformers' own `model.add_adapter`", PAIRED)
def test_trainer_of_a_model_with_add_adapter(tmp_path):
    def workflow(change):
        model = base()
        model.add_adapter(lora_config())
        return train(trainer_of(change(model), arguments(tmp_path)))

    assert_same(workflow)


@workflow("Resized embeddings, trained with the head (`modules_to_save`)", PAIRED)
def test_trainer_of_resized_embeddings(tmp_path):
    def workflow(change):
        model = base()
        model.resize_token_embeddings(tiny.VOCABULARY + 3)
        model = change(adapted(model, modules_to_save=["lm_head", "embed_tokens"]))
        return train(trainer_of(model, arguments(tmp_path)))

    assert_same(workflow)


@workflow("Gradient accumulation, a cosine schedule with warmup, weight decay and a small `max_grad_norm`", PAIRED)
def test_accumulation_schedule_and_clipping(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 1}
    assert_same(lambda change: run(tmp_path, change, weight_decay=0.1, max_grad_norm=0.1, **settings))


@workflow("`gradient_checkpointing=True`, reentrant and not", PAIRED)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, use_reentrant):
    def workflow(change):
        how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        model = change(adapted(base()))
        model.enable_input_require_grads()
        return train(trainer_of(model, arguments(tmp_path, **how)))

    assert_same(workflow)


@workflow("`bf16=True`, autocast on the CPU", "losses, logged metrics and trained factors: 5e-3")
def test_bfloat16_autocast(tmp_path):
    assert_same(lambda change: run(tmp_path, change, dtype=torch.float32, bf16=True), 5e-3)


@workflow("`optim=…`: `sgd` and `adafactor`", PAIRED)
@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_other_optimizers_of_the_trainer(tmp_path, optim):
    assert_same(lambda change: run(tmp_path, change, optim=optim))


@workflow("`optim=…`: `adamw_torch`, `adagrad` and `rmsprop`", PAIRED)
@pytest.mark.budget
@pytest.mark.parametrize("optim", ["adamw_torch", "adagrad", "rmsprop"])
def test_more_optimizers_of_the_trainer(tmp_path, optim):
    assert_same(lambda change: run(tmp_path, change, optim=optim))


@workflow("`label_smoothing_factor=0.1` and `neftune_noise_alpha=5`", PAIRED)
def test_label_smoothing_and_neftune(tmp_path):
    assert_same(lambda change: run(tmp_path, change, label_smoothing_factor=0.1, neftune_noise_alpha=5))


@workflow(
    "`LoRAAdamW` by `lf.hf.optimizer_cls_and_kwargs(model, args)`",
    "Trainer's own AdamW, `adamw_torch_fused`; losses, metrics and factors: 1e-12",
)
def test_lora_adamw_is_the_trainer_s_adamw(tmp_path):
    def workflow(change):
        model = change(adapted(base()))
        args = arguments(tmp_path, weight_decay=0.1, lr_scheduler_type="cosine", adam_beta2=0.95, max_steps=4)
        return train(trainer_of(model, args, optimizer_cls_and_kwargs=optimizer_choice(model, args)))

    assert_same(workflow)


@workflow("`LoRAAdamW` with iLoRA, with ScaledAdamW or with LoRA-RITE", PAIRED)
@pytest.mark.parametrize(
    "method", [lf.methods.ILoRA(lam=0.1), lf.methods.ScaledAdamW(), lf.methods.LoRARITE()], ids=repr
)
def test_methods(tmp_path, method):
    assert_same(lambda change: run(tmp_path, change, [method]))


@workflow("`Trainer.evaluate` and `predict` with `compute_metrics`", "metrics, predictions and labels: 1e-12")
def test_evaluation(tmp_path):
    def workflow(change):
        hits = lambda result: {"hits": float((result.predictions.argmax(-1) == result.label_ids).mean())}
        model = change(adapted(base()))
        trainer = trainer_of(model, arguments(tmp_path), eval_dataset=ROWS, compute_metrics=hits)
        result = trainer.predict(ROWS)
        trainer.evaluate()
        return logs(trainer), torch.from_numpy(result.predictions), torch.from_numpy(result.label_ids)

    assert_same(workflow)


@workflow(
    "`load_best_model_at_end=True` with `EarlyStoppingCallback`",
    "all evaluations and the loaded factors: 1e-12",
)
def test_best_model_is_loaded(tmp_path):
    def workflow(change):
        when = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 6}
        model = change(adapted(base()))
        args = arguments(tmp_path, load_best_model_at_end=True, learning_rate=0.03, save_total_limit=1, **when)
        stop = transformers.EarlyStoppingCallback(early_stopping_patience=2)
        trainer = trainer_of(model, args, eval_dataset=ROWS, callbacks=[stop])
        trainer.train()
        return logs(trainer), trained(model)

    assert_same(workflow)


@workflow(
    "A checkpoint of PEFT's layers, resumed with fused ones",
    "PEFT's layers resumed; losses, metrics and factors: 1e-12",
)
def test_peft_s_checkpoint_resumed_fused(tmp_path):
    when = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer_of(adapted(base()), arguments(tmp_path, **when)).train()

    def workflow(change):
        model = change(adapted(base()))
        trainer = trainer_of(model, arguments(tmp_path, **when))
        trainer.train(str(tmp_path / "checkpoint-2"))
        return logs(trainer), trained(model)

    assert_same(workflow)


@workflow("A checkpoint of fused layers with `LoRAAdamW`, resumed", "the whole run: the same bits")
def test_fused_checkpoint_resumed(tmp_path):
    def workflow(change):
        results = []
        for checkpoint in (None, str(tmp_path / "checkpoint-2")):
            model, args = change(adapted(base())), arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
            choice = lf.hf.optimizer_cls_and_kwargs(model, args)
            trainer = trainer_of(model, args, optimizer_cls_and_kwargs=choice)
            trainer.train(checkpoint)
            results.append(trained(model))
        tiny.assert_same_tensors(*results)
        return results[0]

    assert_same(workflow)


@workflow("`Trainer.save_model`", "names of the files, `adapter_config.json` as text, and all tensors: 1e-12")
def test_saved_files(tmp_path):
    def workflow(change):
        trainer = trainer_of(change(adapted(base())), arguments(tmp_path))
        train(trainer)
        folder = tmp_path / "adapter"
        trainer.save_model(str(folder))
        names = sorted(path.name for path in folder.iterdir())
        config = (folder / "adapter_config.json").read_text(encoding="utf-8")
        return names, config, load_file(folder / "adapter_model.safetensors")

    assert_same(workflow)


@workflow("`AdapterStatsCallback` in the logs", "every logged figure: 1e-12")
def test_statistics(tmp_path):
    def workflow(change):
        trainer = trainer_of(change(adapted(base())), arguments(tmp_path))
        trainer.add_callback(lf.hf.AdapterStatsCallback(trainer, every=1))
        trainer.train()
        return logs(trainer)

    assert_same(workflow)


@workflow("A Trainer subclass with its own `compute_loss` (distillation from the model without adapters)", PAIRED)
def test_own_loss(tmp_path):
    class Distilled(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad(), model.disable_adapter():
                teacher = model(input_ids=inputs["input_ids"]).logits.softmax(-1)
            student = model(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
            return -(teacher * student).sum(-1).mean()

    assert_same(lambda change: train(trainer_of(change(adapted(base())), arguments(tmp_path), Distilled)))


@workflow("`Seq2SeqTrainer` of a T5 with `predict_with_generate`", "losses, factors and generated tokens: 1e-12")
def test_seq2seq_trainer(tmp_path):
    config = transformers.T5Config(
        vocab_size=tiny.VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )

    def workflow(change):
        torch.manual_seed(0)
        model = change(adapted(transformers.T5ForConditionalGeneration(config).double(), task_type="SEQ_2_SEQ_LM"))
        kind = transformers.Seq2SeqTrainingArguments
        args = arguments(tmp_path, kind, predict_with_generate=True, generation_max_length=6)
        tokens = tiny_model.byte_tokenizer()
        trainer = trainer_of(model, args, transformers.Seq2SeqTrainer, processing_class=tokens)
        result = train(trainer)
        return result, torch.from_numpy(trainer.predict(ROWS).predictions)

    assert_same(workflow)


@workflow("`Trainer` with `torch_compile=True` (backend `aot_eager`)", PAIRED)
@pytest.mark.budget
def test_compiled_trainer(tmp_path):
    def workflow(change):
        torch.compiler.reset()
        return run(tmp_path, change, torch_compile=True, torch_compile_backend="aot_eager")

    assert_same(workflow, calls_are_seen=False)
