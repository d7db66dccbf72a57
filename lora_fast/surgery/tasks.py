"""Infers the task of a transformers model, by PEFT's name for it, and finds its embeddings and the module that the task
adds to a pretrained model: its head, which a checkpoint of the pretrained model does not contain."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

MAPPINGS = {  # PEFT's task type → transformers' mapping from a config's model_type to the class of the task
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
HEADS = {  # PEFT's task type → ends of the names of the modules that PEFT trains and saves whole
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
OTHER_CLASSIFIERS = (  # mappings of tasks with a head for which PEFT has no type
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
)


def task_type(model: nn.Module) -> str | None:
    """Returns PEFT's name of the model's task, if transformers' auto class of the task creates the model's class from
    its config; None for other models."""
    return next((task for task, mapping in MAPPINGS.items() if _is_of(model, mapping)), None)


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """Returns name → module of the heads of a classification task: what is beside the pretrained model, and what PEFT
    takes for a head."""
    task = task_type(model)
    if task not in HEADS and not any(_is_of(model, mapping) for mapping in OTHER_CLASSIFIERS):
        return {}
    ends = HEADS.get(task or "", ())
    modules = {name: module for name, module in model.named_modules() if ends and name.endswith(ends)}
    body = getattr(model, "base_model_prefix", None)
    if body in model._modules:
        modules |= {name: child for name, child in model.named_children() if name != body and [*child.parameters()]}
    return modules


def _is_of(model: nn.Module, mapping: str) -> bool:
    """Returns whether a mapping of transformers has the model's class for its config."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if "transformers" not in sys.modules or not isinstance(model_type, str):
        return False
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, mapping).get(model_type, ())
    return not {kind.__name__ for kind in type(model).__mro__}.isdisjoint((names,) if isinstance(names, str) else names)


def embeddings(model: nn.Module) -> list[str]:
    """Returns the names of a transformers model's input and output embeddings."""
    modules = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            modules.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):  # another kind of model, or one without a single embedding
            continue
    return [name for name, module in model.named_modules() if any(module is embedding for embedding in modules)]


def vocabulary_was_resized(model: nn.Module) -> bool:
    """Returns whether the vocabulary has another size than that of the pretrained model on this machine, as PEFT does.
    Where there is none, it is taken as unchanged."""
    config: Any = getattr(model, "config", None)
    source, size = getattr(config, "_name_or_path", None), getattr(config, "vocab_size", None)
    if not source or not size:
        return False
    try:
        return type(config).from_pretrained(source, local_files_only=True).vocab_size != size
    except (OSError, ValueError):  # no such folder, and no such name
        return False
