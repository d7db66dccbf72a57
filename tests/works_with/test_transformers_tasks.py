"""Models of transformers for tasks on text, images and sound."""

import pytest

pytest.importorskip("transformers", reason="pip install '.[works-with]'")
import torch
import transformers
from paired_runs import adapted, assert_same, gradients
from workflows import workflow

LIBRARY = "transformers"
PAIRED = "loss, logits and gradients of all factors (and of the head): 1e-12"
TEXT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
del VISION["vocab_size"]
TWO_STACKS = {f"{stack}_layers": 1 for stack in ("encoder", "decoder")}
TWO_STACKS |= {f"{stack}_attention_heads": 4 for stack in ("encoder", "decoder")}
TWO_STACKS |= {f"{stack}_ffn_dim": 64 for stack in ("encoder", "decoder")}
IDS = torch.randint(4, 97, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def check(kind, config, inputs, targets="all-linear", **options):
    """Compares a forward and backward pass of a model of ``kind`` with adapters."""

    def workflow(change):
        torch.manual_seed(0)
        model = change(adapted(kind(config).double(), targets, **options)).eval()  # no dropout: the masks differ
        result = model(**inputs)
        result.loss.backward()
        tensors = {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}
        return tensors, gradients(model)

    assert_same(workflow)


@workflow('Sequence classification (BERT, `task_type="SEQ_CLS"`)', PAIRED)
def test_sequence_classification():
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 2])}
    config = transformers.BertConfig(**TEXT, num_labels=3)
    check(transformers.BertForSequenceClassification, config, inputs, task_type="SEQ_CLS")


@workflow('Token classification (RoBERTa, `task_type="TOKEN_CLS"`)', PAIRED)
def test_token_classification():
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS % 3}
    config = transformers.RobertaConfig(**TEXT, num_labels=3, max_position_embeddings=32)
    check(transformers.RobertaForTokenClassification, config, inputs, ["query", "value"], task_type="TOKEN_CLS")


@workflow('Question answering (DistilBERT, `task_type="QUESTION_ANS"`)', PAIRED)
def test_question_answering():
    inputs = {"input_ids": IDS, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    config = transformers.DistilBertConfig(vocab_size=97, dim=32, n_layers=1, n_heads=4, hidden_dim=64)
    check(
        transformers.DistilBertForQuestionAnswering,
        config,
        inputs,
        ["q_lin", "v_lin", "lin1"],
        task_type="QUESTION_ANS",
    )


@workflow("Multiple choice (ELECTRA)", PAIRED)
def test_multiple_choice():
    inputs = {"input_ids": IDS[:, None].expand(2, 3, 8).contiguous(), "labels": torch.tensor([0, 2])}
    config = transformers.ElectraConfig(**TEXT, embedding_size=32)
    check(transformers.ElectraForMultipleChoice, config, inputs, modules_to_save=["classifier"])


@workflow("Masked language modelling (ModernBERT)", PAIRED)
def test_masked_language_model():
    config = transformers.ModernBertConfig(
        **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )
    check(transformers.ModernBertForMaskedLM, config, {"input_ids": IDS, "attention_mask": MASK, "labels": IDS})


@workflow("Causal language modelling over `Conv1D` (GPT-2)", PAIRED)
def test_gpt2():
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    check(transformers.GPT2LMHeadModel, config, inputs, ["c_attn", "c_fc", "c_proj"], task_type="CAUSAL_LM")


@workflow("Causal language modelling with a tied, adapted head (Qwen3)", PAIRED)
def test_tied_head():
    config = transformers.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    check(transformers.Qwen3ForCausalLM, config, {"input_ids": IDS, "labels": IDS}, ["q_proj", "down_proj", "lm_head"])


@workflow("Mixture of experts, the attention adapted (Mixtral)", PAIRED)
def test_mixture_of_experts():
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4, output_router_logits=True)
    config._experts_implementation = "eager"  # the default computes no float64
    check(transformers.MixtralForCausalLM, config, {"input_ids": IDS, "labels": IDS}, ["q_proj", "v_proj", "o_proj"])


@workflow('Sequence to sequence (BART, `task_type="SEQ_2_SEQ_LM"`)', PAIRED)
def test_sequence_to_sequence():
    sizes = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in [("layers", 1), ("attention_heads", 4), ("ffn_dim", 64)]
    }
    config = transformers.BartConfig(vocab_size=97, d_model=32, max_position_embeddings=32, **sizes)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    check(transformers.BartForConditionalGeneration, config, inputs, task_type="SEQ_2_SEQ_LM")


@workflow("Image classification (ViT)", PAIRED)
def test_image_classification():
    config = transformers.ViTConfig(**VISION, num_labels=3)
    targets = ["query", "value", "q_proj", "v_proj"]  # transformers 5.0 has the first two names
    inputs = {"pixel_values": randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    check(transformers.ViTForImageClassification, config, inputs, targets, modules_to_save=["classifier"])


@workflow("Semantic segmentation (SegFormer)", PAIRED)
def test_segmentation():
    one_block = {"depths": [1], "sr_ratios": [1], "hidden_sizes": [16], "patch_sizes": [4], "strides": [4]}
    one_block |= {"num_encoder_blocks": 1, "num_attention_heads": [2], "mlp_ratios": [2]}
    config = transformers.SegformerConfig(**one_block, decoder_hidden_size=16, num_labels=3, initializer_range=0.2)
    inputs = {"pixel_values": randn(2, 3, 16, 16), "labels": torch.ones(2, 16, 16, dtype=torch.long)}
    check(transformers.SegformerForSemanticSegmentation, config, inputs, ["q_proj", "v_proj", "query", "value"])


@workflow("Contrastive training of text and images (CLIP)", "loss, similarities and gradients of all factors: 1e-12")
def test_contrastive():
    text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 96}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    check(transformers.CLIPModel, config, {"input_ids": IDS, "pixel_values": randn(2, 3, 16, 16), "return_loss": True})


@workflow("Speech recognition by CTC (wav2vec 2.0)", PAIRED)
def test_speech_ctc():
    config = transformers.Wav2Vec2Config(
        **TEXT,
        conv_dim=[16, 16],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        ctc_loss_reduction="mean",
    )
    inputs = {"input_values": randn(2, 400), "labels": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    check(transformers.Wav2Vec2ForCTC, config, inputs, ["q_proj", "v_proj"])


@workflow("Speech recognition by a decoder (Whisper)", PAIRED)
def test_whisper():
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, **TWO_STACKS}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(vocab_size=97, **sizes, **special)
    inputs = {"input_features": randn(2, 8, 32), "labels": IDS}
    check(transformers.WhisperForConditionalGeneration, config, inputs, ["q_proj", "v_proj", "fc1"])


@workflow("A state-space model, the projections that it calls adapted (Mamba)", PAIRED)
def test_mamba():
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    check(transformers.MambaForCausalLM, config, {"input_ids": IDS, "labels": IDS}, ["in_proj", "x_proj"])
