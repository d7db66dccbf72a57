"""TRL's trainers that sample from the model while they train it: GRPO, RLOO, online DPO and their relatives."""

import pytest

pytest.importorskip("trl", reason="pip install '.[works-with]'")
import datasets
import torch
import trl
from paired_runs import adapted, assert_same, optimizer_choice, train
from transformers import LlamaForSequenceClassification
from trl.experimental.a2po import A2POConfig, A2POTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl_runs import LINES, PROMPTS, base, letters, options, run, tokenizer
from workflows import workflow

import lora_fast as lf

LIBRARY = "trl"
PAIRED = "sampled lengths, rewards, losses, logged metrics and trained factors: 1e-12"

AS_ADAMW = "Trainer's own AdamW; lengths, rewards, losses, metrics and trained factors: 1e-12"


def online(folder, change, kind, config, data=PROMPTS, **changes):
    args = config(**options(folder, num_generations=2, max_completion_length=6, **changes))
    return run(kind, args, change, data, reward_funcs=letters)


@workflow("`GRPOTrainer`, sampling by `generate`", PAIRED)
def test_grpo(tmp_path):
    assert_same(lambda change: online(tmp_path, change, trl.GRPOTrainer, trl.GRPOConfig))


@workflow("`GRPOTrainer(beta=0.1)`, the reference is the model with its adapters disabled", PAIRED)
def test_grpo_with_a_reference(tmp_path):
    run = lambda change: online(tmp_path, change, trl.GRPOTrainer, trl.GRPOConfig, beta=0.1)
    assert_same(run)


@workflow("`GRPOTrainer` with two updates for each sample and another loss (`dr_grpo`)", PAIRED)
@pytest.mark.budget
def test_grpo_with_two_iterations(tmp_path):
    settings = {"num_iterations": 2, "loss_type": "dr_grpo", "max_steps": 4}
    assert_same(lambda change: online(tmp_path, change, trl.GRPOTrainer, trl.GRPOConfig, **settings))


@workflow("`GRPOTrainer`, then `trainer.optimizer_cls_and_kwargs = lf.hf.optimizer_cls_and_kwargs(…)`", AS_ADAMW)
def test_grpo_with_lora_adamw(tmp_path):
    def workflow(change):
        args = trl.GRPOConfig(**options(tmp_path, num_generations=2, max_completion_length=6, weight_decay=0.1))
        model, data, tokens = change(adapted(base())), PROMPTS, tokenizer()
        trainer = trl.GRPOTrainer(model, letters, args, data, None, tokens)
        trainer.optimizer_cls_and_kwargs = optimizer_choice(model, args)
        return train(trainer)

    assert_same(workflow)


@workflow("`GRPOTrainer` with a reward model, sampling by continuous batching", PAIRED)
@pytest.mark.budget
def test_grpo_with_a_reward_model(tmp_path):
    config = base().config
    config.num_labels, config.pad_token_id = 1, tokenizer().pad_token_id

    def workflow(change):
        torch.manual_seed(0)
        judge = LlamaForSequenceClassification(config)
        settings = {"num_generations": 2, "max_completion_length": 6, "use_transformers_continuous_batching": True}
        args, data, tokens = trl.GRPOConfig(**options(tmp_path, **settings)), PROMPTS, tokenizer()
        model = change(adapted(base()))
        return train(trl.GRPOTrainer(model, judge, args, data, None, tokens, reward_processing_classes=tokens))

    assert_same(workflow)


@workflow("`GRPOTrainer` with `LoRAAdamW` and iLoRA", PAIRED)
def test_grpo_with_ilora(tmp_path):
    def workflow(change):
        args = trl.GRPOConfig(**options(tmp_path, num_generations=2, max_completion_length=6))
        model = change(adapted(base()))
        optimizer = lf.optim.LoRAAdamW(model, lr=1e-3, methods=[lf.methods.ILoRA(lam=0.1)])
        data, tokens = PROMPTS, tokenizer()
        return train(trl.GRPOTrainer(model, letters, args, data, None, tokens, optimizers=(optimizer, None)))

    assert_same(workflow)


@workflow("`RLOOTrainer`", "sampled lengths, rewards, losses, logged metrics and trained factors: 1e-12")
def test_rloo(tmp_path):
    assert_same(lambda change: online(tmp_path, change, trl.RLOOTrainer, trl.RLOOConfig, beta=0.05))


@workflow("`GMPOTrainer`", PAIRED)
def test_gmpo(tmp_path):
    assert_same(lambda change: online(tmp_path, change, GMPOTrainer, GMPOConfig))


@workflow("`OnlineDPOTrainer` with a reward function", PAIRED)
def test_online_dpo(tmp_path):
    args = OnlineDPOConfig(**options(tmp_path, max_new_tokens=6, max_length=32))
    run_it = lambda change: run(OnlineDPOTrainer, args, change, PROMPTS, reward_funcs=letters)
    assert_same(run_it)


@workflow("`SDFTTrainer`, the model teaches itself with privileged context", PAIRED)
def test_sdft(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": line[:9], "privileged_context": line[9:20]} for line in LINES])
    args = SDFTConfig(**options(tmp_path, num_generations=2, max_completion_length=6, max_prompt_length=64))
    assert_same(lambda change: run(SDFTTrainer, args, change, data))


@workflow("`SDPOTrainer`", PAIRED)
def test_sdpo(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": line[:9], "privileged_context": line[9:20]} for line in LINES])
    assert_same(lambda change: online(tmp_path, change, SDPOTrainer, SDPOConfig, data))


@workflow("`A2POTrainer`, values of prompts sampled before training", PAIRED)
@pytest.mark.budget
def test_a2po(tmp_path):
    args = A2POConfig(**options(tmp_path, num_value_samples=2, max_completion_length=6))
    assert_same(lambda change: run(A2POTrainer, args, change, PROMPTS, reward_funcs=letters))
