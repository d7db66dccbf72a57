"""sentence-transformers: adapters, training with its Trainer, and encoding."""

import functools

import pytest
import torch
from side_by_side import assert_ran, assert_same, factors, fuse, trained
from tiny import fill
from workflows import workflow

import lora_fast as lf

sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install '.[works-with]'")
peft = pytest.importorskip("peft", reason="pip install '.[works-with]' with PEFT 0.20", minversion="0.20")
datasets = pytest.importorskip("datasets", reason="pip install '.[works-with]'")

from sentence_transformers import losses  # noqa: E402
from transformers import BertConfig, BertModel, BertTokenizerFast  # noqa: E402

LIBRARY = "sentence-transformers"
WORDS = ["a", "the", "green", "red", "bottle", "wall", "hangs", "falls", "on", "under", "dog", "cat", "sleeps", "runs"]
TEXTS = ["the green bottle hangs on the wall", "a red bottle falls", "the dog sleeps under a wall", "a cat runs"]
LONG = functools.partial(pytest.param, marks=pytest.mark.budget)  # variations
LAYERS = 4  # query and value in two layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a random BERT and its tokenizer, as SentenceTransformer reads it."""
    path = tmp_path_factory.mktemp("bert")
    vocabulary = path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(WORDS) + 5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(path)
    return str(path)


def build(folder):
    model = sentence_transformers.SentenceTransformer(folder, device="cpu")
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    return fill(model)


def fit(model, loss, data, path, optimizer=None):
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizers = {"optimizers": (optimizer, None)} if optimizer else {}
    trainer = sentence_transformers.SentenceTransformerTrainer(model, arguments, data, loss=loss, **optimizers)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


PAIRS = datasets.Dataset.from_dict({"anchor": TEXTS * 4, "positive": TEXTS[1:] * 4 + TEXTS[:1] * 4})
SCORED = datasets.Dataset.from_dict({"one": TEXTS * 4, "two": TEXTS[::-1] * 4, "score": [0.1, 0.9, 0.4, 0.6] * 4})
LOSSES = {"MultipleNegativesRankingLoss": PAIRS, "CoSENTLoss": SCORED, "CosineSimilarityLoss": SCORED}


@workflow(
    "`add_adapter`, `SentenceTransformerTrainer` with three losses",
    "losses of four steps and factors: 1e-5, float32",
)
@pytest.mark.parametrize("kind", [kind if kind == "CoSENTLoss" else LONG(kind) for kind in LOSSES])
def test_training(kind, folder, tmp_path):
    def run(prepare):
        model = prepare(build(folder))
        return fit(model, getattr(losses, kind)(model), LOSSES[kind], tmp_path), trained(model)

    assert_same(run, LAYERS, atol=1e-5)


@pytest.mark.budget
@workflow(
    "Nested and cached losses (`MatryoshkaLoss`, `CachedMultipleNegativesRankingLoss`)",
    "losses and factors: 1e-5, float32",
)
@pytest.mark.parametrize("kind", ["cached", "Matryoshka"])
def test_nested_losses(kind, folder, tmp_path):
    def run(prepare):
        model = prepare(build(folder))
        if kind == "cached":
            loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
        else:
            loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 16])
        return fit(model, loss, PAIRS, tmp_path), trained(model)

    assert_same(run, LAYERS, atol=1e-5)


@workflow("`encode`, `similarity`, `encode_query`", "embeddings and similarities: 1e-6, float32")
def test_encoding(folder):
    def run(prepare):
        model = prepare(build(folder))
        embeddings = model.encode(TEXTS, normalize_embeddings=True, convert_to_tensor=True)
        return embeddings, model.similarity(embeddings, model.encode_query(TEXTS[:2], convert_to_tensor=True))

    assert_same(run, LAYERS, atol=1e-6)


@workflow("`save_pretrained` with an adapter, loaded again", "embeddings: 1e-6, float32")
def test_files(folder, tmp_path):
    model = fuse(build(folder), LAYERS)
    wanted = model.encode(TEXTS)
    assert_ran(model, LAYERS)
    model.save_pretrained(str(tmp_path))

    def run(prepare):
        return torch.tensor(
            prepare(sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")).encode(TEXTS)
        )

    torch.testing.assert_close(assert_same(run, LAYERS, atol=1e-6), torch.tensor(wanted), atol=1e-6, rtol=0)


@workflow("`add_adapter`, `set_adapter`, `disable_adapters`, `delete_adapter`", "embeddings of each: 1e-6, float32")
def test_adapters(folder):
    def run(prepare):
        model = prepare(build(folder))
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query", "value"]), "other")
        fill(model).set_adapter("other")
        embeddings = [model.encode(TEXTS)]
        model.disable_adapters()
        embeddings.append(model.encode(TEXTS))
        model.enable_adapters()
        model.set_adapter("default")
        model.delete_adapter("other")
        return [torch.tensor(each) for each in [*embeddings, model.encode(TEXTS)]]

    assert_same(run, LAYERS, atol=1e-6)


@workflow(
    "`LoRAAdamW` without methods in its Trainer (`optimizers=`), in place of AdamW", "losses and factors: the same bits"
)
def test_lora_adamw(folder, tmp_path):
    def run(ours):
        torch.manual_seed(0)
        model = fuse(build(folder), LAYERS)
        parameters = [p for p in model.parameters() if p.requires_grad]
        plain = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=True)
        optimizer = lf.optim.LoRAAdamW(model, lr=1e-2) if ours else plain
        return fit(model, losses.MultipleNegativesRankingLoss(model), PAIRS, tmp_path, optimizer), factors(model)

    torch.testing.assert_close(run(True), run(False), atol=0, rtol=0)


@workflow("`LoRAAdamW` with `ILoRA` in its Trainer", "the loss falls; all layers ran fused")
def test_ilora(folder, tmp_path):
    model = fuse(build(folder), LAYERS)
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, methods=[lf.methods.ILoRA(lam=0.1)])
    result = fit(model, losses.CoSENTLoss(model), SCORED, tmp_path, optimizer)
    assert_ran(model, LAYERS)
    assert result[-1] < result[0]


@workflow("`CrossEncoder` with `add_adapter`", "scores: 1e-6, float32")
def test_cross_encoder(folder):
    def run(prepare):
        torch.manual_seed(0)
        encoder = sentence_transformers.CrossEncoder(folder, num_labels=1, device="cpu")
        encoder.add_adapter(peft.LoraConfig(r=4, target_modules=["query", "value"]))
        prepare(fill(encoder))
        return encoder.predict([(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])], convert_to_tensor=True)

    assert_same(run, LAYERS, atol=1e-6)


@pytest.mark.budget
@workflow("`lf.inject_` in place of `add_adapter`, `CoSENTLoss`", "losses of four steps and factors: 1e-5, float32")
def test_injected(folder, tmp_path):
    theirs, ours = build(folder), sentence_transformers.SentenceTransformer(folder, device="cpu")
    lf.inject_(ours, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    fill(ours)
    results = []
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.data.fill_(0.01).view(-1)[::3] = -0.02
        losses_of_run = fit(model, losses.CoSENTLoss(model), SCORED, tmp_path)
        results.append((losses_of_run, list(factors(model).values())))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)
