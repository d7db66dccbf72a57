"""TRL's trainers on demonstrations: SFTTrainer, RewardTrainer, and what is distilled from a teacher."""

import pytest

pytest.importorskip("trl", reason="pip install '.[works-with]'")
import datasets
import peft
import tiny
import torch
import trl
from paired_runs import adapted, assert_same, logs, lora_config, optimizer_choice, train
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl_runs import CHATS, LINES, MESSAGES, PAIRS, PROMPTS, TEXTS, base, options, run, tokenizer
from workflows import workflow

import lora_fast as lf

LIBRARY = "trl"
PAIRED = "losses, logged metrics and trained factors: 1e-12"
IN_FLOAT32 = "losses, logged metrics and trained factors: 1e-6"


def sft(folder, change, data=TEXTS, **changes):
    return run(trl.SFTTrainer, trl.SFTConfig(**options(folder, max_length=32, **changes)), change, data)


@workflow("`SFTTrainer(peft_config=…)`, fused after the trainer has made the PeftModel, float32", IN_FLOAT32)
def test_sft_with_peft_config(tmp_path):
    def workflow(change):
        args = trl.SFTConfig(**options(tmp_path, max_length=32))
        tokens, config = tokenizer(), lora_config()
        trainer = trl.SFTTrainer(base().float(), args, train_dataset=TEXTS, processing_class=tokens, peft_config=config)
        change(trainer.model)
        return train(trainer)

    assert_same(workflow, 1e-6)


@workflow("`SFTTrainer` with gradient checkpointing, TRL's default", PAIRED)
def test_sft_with_gradient_checkpointing(tmp_path):
    assert_same(lambda change: sft(tmp_path, change, gradient_checkpointing=True))


@workflow("`SFTTrainer(packing=True)`", PAIRED)
def test_sft_with_packing(tmp_path):
    run = lambda change: sft(tmp_path, change, packing=True, packing_strategy="wrapped")
    assert_same(run)


@workflow("`SFTTrainer` on prompts and completions, `completion_only_loss=True`", PAIRED)
def test_sft_of_completions(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": line[:9], "completion": line[9:]} for line in LINES])
    assert_same(lambda change: sft(tmp_path, change, data, completion_only_loss=True))


@workflow("`SFTTrainer` on conversations with a chat template", PAIRED)
def test_sft_of_conversations(tmp_path):
    assert_same(lambda change: sft(tmp_path, change, MESSAGES))


@workflow("`SFTTrainer(assistant_only_loss=True)`, evaluated after each step", PAIRED)
def test_sft_of_assistants(tmp_path):
    def workflow(change):
        tokens = tokenizer()
        tokens.chat_template = (
            "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
            "{% endgeneration %}{% else %}<{{ message.content }}>{% endif %}{% endfor %}"
        )
        when = {"eval_strategy": "steps", "eval_steps": 1}
        args = trl.SFTConfig(**options(tmp_path, max_length=32, assistant_only_loss=True, **when))
        return train(trl.SFTTrainer(change(adapted(base())), args, None, MESSAGES, MESSAGES, tokens))

    assert_same(workflow)


@workflow('`SFTTrainer(loss_type="dft")`', PAIRED)
def test_sft_with_dft_loss(tmp_path):
    assert_same(lambda change: sft(tmp_path, change, loss_type="dft"))


@workflow(
    "`SFTTrainer(optimizer_cls_and_kwargs=lf.hf.optimizer_cls_and_kwargs(model, args))`",
    "Trainer's own AdamW; losses, logged metrics and trained factors: 1e-12",
)
def test_sft_with_lora_adamw(tmp_path):
    def workflow(change):
        args = trl.SFTConfig(**options(tmp_path, max_length=32, weight_decay=0.1, max_steps=4))
        model = change(adapted(base()))
        choice = optimizer_choice(model, args)
        tokens = tokenizer()
        return train(
            trl.SFTTrainer(model, args, train_dataset=TEXTS, processing_class=tokens, optimizer_cls_and_kwargs=choice)
        )

    assert_same(workflow)


@workflow(
    "`SFTTrainer` under `lf.hf.ExactCheckpoints` with ScaLoRA, resumed from a checkpoint",
    "losses, metrics, factors and merged weights: 1e-12; resumed and whole run: the same bits",
)
def test_sft_with_scalora_resumed(tmp_path):
    class Exact(lf.hf.ExactCheckpoints, trl.SFTTrainer):
        pass

    def workflow(change):
        results = []
        for checkpoint in (None, str(tmp_path / "checkpoint-2")):
            args = trl.SFTConfig(**options(tmp_path, max_length=32, max_steps=4, save_strategy="steps", save_steps=2))
            model = change(adapted(base()))
            choice = lf.hf.optimizer_cls_and_kwargs(model, args, [lf.methods.ScaLoRA(interval=2)])
            data, tokens = TEXTS, tokenizer()
            trainer = Exact(model, args, None, data, None, tokens, optimizer_cls_and_kwargs=choice)
            trainer.train(checkpoint)
            results.append(model.state_dict())
        tiny.assert_same_tensors(*results)
        return {"logs": logs(trainer), "weights": results[0]}

    assert_same(workflow)


@workflow(
    "`SFTTrainer.save_model`, the folder loaded by `PeftModel.from_pretrained`",
    "names and tensors of the files, and the loaded model's logits: 1e-12",
)
def test_sft_saves_peft_s_files(tmp_path):
    def workflow(change):
        folder = tmp_path / "adapter"
        args = trl.SFTConfig(**options(tmp_path, max_length=32))
        trainer = trl.SFTTrainer(change(adapted(base())), args, None, TEXTS, None, tokenizer())
        train(trainer)
        trainer.save_model(str(folder))
        files = sorted(path.name for path in folder.iterdir())
        state = load_file(folder / "adapter_model.safetensors")
        loaded = peft.PeftModel.from_pretrained(base(), folder)
        return files, (folder / "adapter_config.json").read_text(), state, loaded(tiny.batch()).logits

    assert_same(workflow)


@workflow("`RewardTrainer`, a trained head beside the adapters", PAIRED)
def test_reward_model(tmp_path):
    def workflow(change):
        config = base().config
        config.num_labels = 1
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).double()
        model.config.pad_token_id = tokenizer().pad_token_id
        model = change(adapted(model, task_type="SEQ_CLS", modules_to_save=["score"]))
        data = PAIRS.remove_columns("prompt")
        args = trl.RewardConfig(**options(tmp_path, max_length=32))
        return train(trl.RewardTrainer(model, args, train_dataset=data, processing_class=tokenizer()))

    assert_same(workflow)


@workflow("`DistillationTrainer`, the student's own samples scored by a teacher", PAIRED)
def test_distillation(tmp_path):
    args = trl.DistillationConfig(**options(tmp_path, max_completion_length=4))
    teacher = base(hidden_size=16)
    assert_same(lambda change: run(trl.DistillationTrainer, args, change, PROMPTS, teacher_model=teacher))


@workflow("`GKDTrainer`, half of the batches sampled from the student", PAIRED)
def test_gkd(tmp_path):
    args = GKDConfig(**options(tmp_path, max_length=64, max_new_tokens=4, lmbda=0.5))
    data = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS])
    assert_same(lambda change: run(GKDTrainer, args, change, data, teacher_model=base(hidden_size=16)))


@workflow("`GOLDTrainer`, a teacher's logits distilled", PAIRED)
@pytest.mark.budget
def test_gold(tmp_path):
    args = GOLDConfig(**options(tmp_path, max_length=64, max_completion_length=4, lmbda=0.5))
    assert_same(lambda change: run(GOLDTrainer, args, change, MESSAGES, teacher_model=base(hidden_size=16)))
