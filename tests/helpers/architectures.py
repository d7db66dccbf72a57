"""Tiny random models of 31 architectures of transformers, text, vision and speech, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]
OUTPUTS = ("logits", "last_hidden_state")
VOCABULARY = 64
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZE | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": VOCABULARY} | {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in (("attention_heads", 4), ("ffn_dim", 64))
}
VISION = SIZE | {"image_size": 16, "patch_size": 4}


def tokens() -> Batch:
    return {"input_ids": torch.randint(3, VOCABULARY - 1, (2, 16))}


def labelled_tokens() -> Batch:
    ids = tokens()["input_ids"]
    return {"input_ids": ids, "labels": ids}


def classified_tokens() -> Batch:
    return tokens() | {"labels": torch.tensor([0, 1])}


def image(size: int) -> Batch:
    return {"pixel_values": torch.randn(2, 3, size, size)}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, the arguments of its config, and a function that draws a batch."""

    model: str
    batch: Callable[[], Batch]
    config: dict = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Returns a new model, the same at each call, in training mode. Its nn.Dropout modules drop nothing."""
        kind = getattr(transformers, self.model)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind(kind.config_class(**self.config)).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model


def loss_of(output: transformers.utils.ModelOutput) -> Tensor:
    """Returns the model's own loss, or the mean squared distance of its output from a random target, which is not
    constant where the model ends with a normalisation."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    values = next(output[name] for name in OUTPUTS if name in output)
    target = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    return (values - target).square().mean()


ARCHITECTURES = {
    "albert": Architecture("AlbertModel", tokens, TEXT | {"embedding_size": 16}),
    "bart": Architecture("BartForConditionalGeneration", labelled_tokens, SEQ2SEQ | {"max_position_embeddings": 64}),
    "bert": Architecture("BertForSequenceClassification", classified_tokens, TEXT),
    "bigbird": Architecture("BigBirdModel", tokens, TEXT | {"attention_type": "original_full"}),
    "bloom": Architecture(
        "BloomForCausalLM", labelled_tokens, {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    ),
    "clip": Architecture(
        "CLIPModel",
        lambda: tokens() | image(16) | {"return_loss": True},
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
    ),
    "codegen": Architecture("CodeGenForCausalLM", labelled_tokens, GPT | {"rotary_dim": 4}),
    "deberta": Architecture(
        "DebertaV2Model",
        tokens,
        TEXT | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "esm": Architecture(
        "EsmModel", tokens, TEXT | {"max_position_embeddings": 80, "pad_token_id": 1, "mask_token_id": 2}
    ),
    "funnel": Architecture(
        "FunnelModel",
        tokens,
        {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}
        | {"block_sizes": [1, 1], "num_decoder_layers": 1},
    ),
    "gemma2": Architecture("Gemma2ForCausalLM", labelled_tokens, TEXT | {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", labelled_tokens, TEXT),
    "gptj": Architecture("GPTJForCausalLM", labelled_tokens, GPT | {"rotary_dim": 4}),
    "granite": Architecture("GraniteForCausalLM", labelled_tokens, TEXT | {"num_key_value_heads": 2}),
    "mixtral": Architecture(
        "MixtralForCausalLM", labelled_tokens, TEXT | {"num_key_value_heads": 2, "num_local_experts": 4}
    ),
    "mpnet": Architecture("MPNetModel", tokens, TEXT | {"max_position_embeddings": 80}),
    "nystromformer": Architecture(
        "NystromformerModel", tokens, TEXT | {"segment_means_seq_len": 16, "num_landmarks": 4}
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        labelled_tokens,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "phi": Architecture("PhiForCausalLM", labelled_tokens, TEXT | {"pad_token_id": None}),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        labelled_tokens,
        TEXT
        | {"num_key_value_heads": 2, "num_experts": 4}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "recurrent_gemma": Architecture(
        "RecurrentGemmaForCausalLM",
        labelled_tokens,
        SIZE
        | {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "num_key_value_heads": 1}
        | {"lru_width": 32, "attention_window_size": 8},
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        labelled_tokens,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
        | {"attention_hidden_size": 32, "intermediate_size": 64},
    ),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        lambda: image(32),
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
        | {"num_attention_heads": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
        | {"decoder_hidden_size": 16},
    ),
    "swin": Architecture(
        "SwinModel",
        lambda: image(32),
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        labelled_tokens,
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
    "vit": Architecture("ViTForImageClassification", lambda: image(16) | {"labels": torch.tensor([0, 1])}, VISION),
    "wav2vec2": Architecture(
        "Wav2Vec2Model",
        lambda: {"input_values": torch.randn(2, 400)},
        SIZE
        | {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0},
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        lambda: {"input_features": torch.randn(2, 8, 32), "labels": tokens()["input_ids"]},
        SEQ2SEQ
        | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    "xlnet": Architecture(
        "XLNetModel", tokens, {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    ),
    "xmod": Architecture(
        "XmodModel",
        tokens,
        TEXT | {"languages": ("en_XX",), "default_language": "en_XX", "pad_token_id": 1, "max_position_embeddings": 80},
    ),
    "yoso": Architecture("YosoModel", tokens, TEXT | {"max_position_embeddings": 80}),
}
