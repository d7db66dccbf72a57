"""``--quantize NAME``: the formats in which the frozen weights can be stored, and the model made ready for training."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import util
from typing import TYPE_CHECKING, Any

from ... import checks
from ...checks import ArgumentError, MissingPackageError
from ...quantized import family_of

if TYPE_CHECKING:
    import torch
    import transformers


@dataclass(frozen=True)
class Format:
    """A format of frozen weights, as transformers makes it.

    Attributes:
        sentence: what the format is.
        torchao: the name of torchao's config; empty for the formats of bitsandbytes.
        options: the arguments of transformers' BitsAndBytesConfig, for the formats of bitsandbytes.
    """

    sentence: str
    torchao: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def package(self) -> str:
        return "torchao" if self.torchao else "bitsandbytes"


def _four_bit(kind: str) -> dict[str, Any]:
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True}


FORMATS = {
    "nf4": Format("4-bit NormalFloat with double quantisation, as in QLoRA", options=_four_bit("nf4")),
    "fp4": Format("4-bit float with double quantisation", options=_four_bit("fp4")),
    "int8": Format("LLM.int8(), which rounds activations to 8 bits too", options={"load_in_8bit": True}),
    "torchao-int8": Format("8-bit integers with a scale for each row", torchao="Int8WeightOnlyConfig"),
    "torchao-float8": Format("8-bit floats with a scale for each row", torchao="Float8WeightOnlyConfig"),
}


def choices() -> str:
    """Returns the formats of each package with their sentences, for the help."""
    packages: dict[str, list[str]] = {}
    for name, kind in FORMATS.items():
        packages.setdefault(kind.package, []).append(f"{name} ({kind.sentence})")
    return "; ".join(f"{', '.join(names)} of {package}" for package, names in packages.items())


def check_installed(name: str | None) -> None:
    """Raises MissingPackageError unless the package of the format is installed."""
    if name is not None and util.find_spec(package := FORMATS[name].package) is None:
        raise MissingPackageError(f"--quantize {name} needs the package {package}: pip install {package}")


def arguments(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments of transformers' BitsAndBytesConfig. Its 4-bit layers compute in ``dtype``."""
    options = FORMATS[name].options
    return options | ({"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in options else {})


def config(name: str, dtype: torch.dtype):
    """Returns the ``quantization_config`` of ``from_pretrained``."""
    import transformers

    if not FORMATS[name].torchao:
        return transformers.BitsAndBytesConfig(**arguments(name, dtype))
    from torchao import quantization

    return transformers.TorchAoConfig(getattr(quantization, FORMATS[name].torchao)())


def code(name: str, dtype: torch.dtype) -> str:
    """Returns ``config`` as Python code."""
    if FORMATS[name].torchao:
        return f"transformers.TorchAoConfig(torchao.quantization.{FORMATS[name].torchao}())"
    return f"transformers.BitsAndBytesConfig({', '.join(f'{k}={v!r}' for k, v in arguments(name, dtype).items())})"


def check(name: str | None) -> None:
    """Raises ArgumentError unless ``name`` is None or a format."""
    if name is not None:
        checks.choice(name, "--quantize", tuple(FORMATS))


def format_of(model: torch.nn.Module, name: str | None) -> str:
    """Returns the format of a loaded model's quantised weights: ``name``, or transformers' name for that of the model's
    files; "" if they are not quantised."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return ""
    method = quantizer.quantization_config.quant_method
    return name or str(getattr(method, "value", method))


def prepare(model: transformers.PreTrainedModel) -> None:
    """Prepares a quantised model for training, as scripts with PEFT and TRL do: all weights are frozen, and 16-bit
    norms and embeddings over bitsandbytes' layers become float32. Activations are not checkpointed.

    Raises:
        ArgumentError: transformers trains no adapters over this format.
    """
    from peft import prepare_model_for_kbit_training

    quantizer: Any = model.hf_quantizer
    if not quantizer.is_trainable:
        got = f"a model that is quantised by {format_of(model, None)}"
        raise ArgumentError("--model", "weights in a format over which transformers trains adapters", got)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in model.modules():
        if (family := family_of(module)) is not None:
            family.take_(module)  # PEFT's own layers, too, are trained in turns with evaluations
