"""TRL's trainers on preferences: DPO, KTO, ORPO, CPO, TPO and their callbacks."""

import pytest

pytest.importorskip("trl", reason="pip install '.[works-with]'")
import torch
import trl
from paired_runs import adapted, assert_same, is_fused, train
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl_runs import JUDGED, PAIRS, base, options, run, tokenizer
from workflows import workflow

import lora_fast as lf

LIBRARY = "trl"
PAIRED = "losses, logged metrics and trained factors: 1e-12"


def dpo(folder, change, **changes):
    return run(trl.DPOTrainer, trl.DPOConfig(**options(folder, max_length=32, **changes)), change, PAIRS)


@workflow("`DPOTrainer`, the reference is the model with its adapters disabled", PAIRED)
def test_dpo(tmp_path):
    assert_same(lambda change: dpo(tmp_path, change))


@workflow("`DPOTrainer(ref_model=…)`, another model as the reference", PAIRED)
def test_dpo_with_a_reference_model(tmp_path):
    args = trl.DPOConfig(**options(tmp_path, max_length=32))
    assert_same(lambda change: run(trl.DPOTrainer, args, change, PAIRS, ref_model=base()))


@workflow("`DPOTrainer(precompute_ref_log_probs=True)`", PAIRED)
def test_dpo_with_precomputed_reference(tmp_path):
    assert_same(lambda change: dpo(tmp_path, change, precompute_ref_log_probs=True))


@workflow("`DPOTrainer(loss_type=…)`: `ipo`, and `sigmoid` with `sft`", PAIRED)
@pytest.mark.budget
@pytest.mark.parametrize("loss", [["ipo"], ["sigmoid", "sft"]], ids="+".join)
def test_dpo_with_other_losses(tmp_path, loss):
    assert_same(lambda change: dpo(tmp_path, change, loss_type=loss))


@workflow("`DPOTrainer(optimizers=(LoRAAdamW(model), None))`", "torch's AdamW; losses, metrics and factors: 1e-12")
def test_dpo_with_lora_adamw(tmp_path):
    def workflow(change):
        args = trl.DPOConfig(**options(tmp_path, max_length=32))
        model = change(adapted(base()))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0)
        if is_fused(model):
            optimizer = lf.optim.LoRAAdamW(model, lr=1e-3)
        data, tokens = PAIRS, tokenizer()
        return train(trl.DPOTrainer(model, None, args, None, data, None, tokens, optimizers=(optimizer, None)))

    assert_same(workflow)


@workflow("`KTOTrainer`", PAIRED)
def test_kto(tmp_path):
    args = trl.KTOConfig(**options(tmp_path, max_length=32))
    assert_same(lambda change: run(trl.KTOTrainer, args, change, JUDGED))


@workflow("`ORPOTrainer`", PAIRED)
def test_orpo(tmp_path):
    args = ORPOConfig(**options(tmp_path, max_length=32))
    assert_same(lambda change: run(ORPOTrainer, args, change, PAIRS))


@workflow("`CPOTrainer`", PAIRED)
def test_cpo(tmp_path):
    args = CPOConfig(**options(tmp_path, max_length=32))
    assert_same(lambda change: run(CPOTrainer, args, change, PAIRS))


@workflow('`CPOTrainer(loss_type="simpo")`', PAIRED)
@pytest.mark.budget
def test_simpo(tmp_path):
    args = CPOConfig(**options(tmp_path, max_length=32, loss_type="simpo", cpo_alpha=0.0))
    assert_same(lambda change: run(CPOTrainer, args, change, PAIRS))


@workflow("`TPOTrainer`", PAIRED)
def test_tpo(tmp_path):
    args = TPOConfig(**options(tmp_path, max_length=32))
    data = PAIRS.add_column("reference", [row["chosen"][::-1] for row in PAIRS])
    assert_same(lambda change: run(TPOTrainer, args, change, data))
