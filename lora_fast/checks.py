"""Errors and the checks of arguments. Each message names the argument, what was expected and what was passed.

The checks read no data, so they run before a kernel starts and cost no device synchronisation.
"""

from __future__ import annotations

import os
import reprlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .kernels.limits import LARGEST_RANK

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUMBERS = (float, int)
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))  # no subclass (DTensor, jagged, fake, …), no quantised weight
STRIDED = torch.strided  # looked up once, because every call of a layer compares it
PLAINLY_SHOWN = (str, torch.device)  # their str has no quotation marks and no type
LARGEST_FLOAT = sys.float_info.max  # math.isfinite raises OverflowError for a larger int
LARGEST_SCALING = torch.finfo(torch.float32).max
LONGEST_NAME = 255  # of a file or folder, in usual file systems
LARGEST_COUNT = 2**31 - 1
LONGEST = 600  # characters of each of the three parts of a message

_repr = reprlib.Repr()  # limits depth and length, so that neither recursion nor a huge number ends a message
_repr.maxstring = _repr.maxother = _repr.maxlong = 200
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = 10


def shown(value: object) -> str:
    """Returns the repr of a value for a message: of a container its first entries, of a tensor its dtype and shape."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} {tuple(value.shape)}"
    try:
        return _repr.repr(value)
    except Exception:  # the repr of a user's object, or of a number of too many digits
        return f"a value of type {type(value).__name__}"


def shortened(text: str) -> str:
    """Returns the text, without its middle where it is longer than ``LONGEST``."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


class ArgumentError(ValueError):
    """An argument does not fit. The message contains its name, what was expected and what was passed, each at most
    about 600 characters long.

    Attributes:
        argument: the argument's name. expected: what was expected. got: what was passed.
    """

    def __init__(self, argument: str, expected: str, got: object):
        self.argument, self.expected, self.got = argument, expected, got
        parts = argument, expected, str(got) if isinstance(got, PLAINLY_SHOWN) else shown(got)
        super().__init__("{}: expected {}, got {}".format(*map(shortened, parts)))

    def __reduce__(self):  # BaseException's would call the constructor with the message alone
        return type(self), (self.argument, self.expected, self.got)


class CheckpointError(ArgumentError):
    """An adapter's files cannot be read or written, or do not fit the model."""


class MissingPackageError(ImportError):
    """The call needs an optional package; the message contains the pip command."""


class BackendError(RuntimeError):
    """The chosen backend cannot run on this machine or these tensors."""


def python_number(value: Any) -> Any:
    """Returns a number of numpy, which may be an array without dimensions, as a number of Python with its repr. Other
    values are returned unchanged."""
    is_of_numpy = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_of_numpy else value


def plain_number(value: Any) -> Any:
    """Returns a number of numpy or a tensor of one element as a number of Python. Other values are returned unchanged.
    To read a tensor waits for its device."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and not value.is_meta else value
    return python_number(value)


# Each of the following functions returns the value, as a number of Python where it is one, or raises ArgumentError. A
# bool is an int in Python and is therefore refused explicitly.


def tensor(value: Any, argument: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(argument, "a torch.Tensor", shown(value))
    return value


def module(value: Any, argument: str = "model") -> torch.nn.Module:
    if not isinstance(value, torch.nn.Module):
        raise ArgumentError(argument, "a torch.nn.Module", type(value).__name__)
    return value


def path(value: object, argument: str = "path") -> str:
    name = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(name, str) or not name:
        raise ArgumentError(argument, "the path of a folder, a str or os.PathLike", shown(value))
    if "\0" in name or max(map(len, name.split(os.sep))) > LONGEST_NAME:
        raise ArgumentError(argument, f"names of at most {LONGEST_NAME} characters, none of them null", shown(value))
    return name


def sequence(value: Any, argument: str) -> Sequence:
    if not isinstance(value, (list, tuple)):
        raise ArgumentError(argument, "a list or tuple", shown(value))
    return value


def placement(device: Any, dtype: Any) -> None:
    """Raises ArgumentError unless a layer can be made on this device in this dtype; None stands for torch's default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        raise ArgumentError("dtype", "None or a dtype among float16, bfloat16, float32, float64", shown(dtype))
    if device is None or isinstance(device, torch.device):
        return
    try:
        is_known = isinstance(device, (str, int)) and not isinstance(device, bool) and torch.device(device) is not None
    except (RuntimeError, ValueError, OverflowError, TypeError):
        is_known = False
    if not is_known:
        raise ArgumentError("device", "None, a torch.device or the name of one", shown(device))


def rank(r: object, argument: str = "r") -> int:
    r = python_number(r)
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= LARGEST_RANK:
        raise ArgumentError(argument, f"an integer from 1 to {LARGEST_RANK}", shown(r))
    return r


def positive(value: object, argument: str) -> float:
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, NUMBERS) or not 0 < value <= LARGEST_FLOAT:  # NaN fails too
        raise ArgumentError(argument, "a finite number above 0", shown(value))
    return float(value)


def finite(value: object, argument: str) -> float:
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, NUMBERS) or not abs(value) <= LARGEST_FLOAT:  # NaN fails too
        raise ArgumentError(argument, "a finite number", shown(value))
    return float(value)


def nonnegative(value: object, argument: str) -> float:
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, NUMBERS) or not 0 <= value <= LARGEST_FLOAT:  # NaN fails too
        raise ArgumentError(argument, "a finite number of at least 0", shown(value))
    return float(value)


def count(value: object, argument: str, least: int = 1) -> int:
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(argument, f"an integer of at least {least}", shown(value))
    if value > LARGEST_COUNT:
        raise ArgumentError(argument, f"an integer of at most {LARGEST_COUNT}", shown(value))
    return value


def flag(value: object, argument: str) -> bool:
    value = python_number(value)
    if not isinstance(value, bool):
        raise ArgumentError(argument, "True or False", shown(value))
    return value


def betas(value: object, argument: str = "betas") -> tuple[float, float]:
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or any(isinstance(beta, bool) for beta in value)
        or not all(isinstance(beta, NUMBERS) and 0.0 <= beta < 1.0 for beta in value)  # NaN fails too
    ):
        raise ArgumentError(argument, "two numbers from 0 to below 1", shown(value))
    beta1, beta2 = value
    return beta1, beta2


def beta(value: object, argument: str = "beta") -> float:
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, NUMBERS) or not 0.0 <= value < 1.0:  # NaN fails too
        raise ArgumentError(argument, "a number from 0 to below 1", shown(value))
    return float(value)


def probability(value: object, argument: str = "dropout") -> float:
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:  # NaN fails too
        raise ArgumentError(argument, "a probability from 0 to 1", shown(value))
    return float(value)


def scaling(value: object, device: torch.device | None) -> float | torch.Tensor:
    """Returns a finite number as a number of Python, and a real tensor of one element, on the device or the CPU, as one
    without dimensions. The tensor is not read, so that nothing waits for its device."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex() or value.device not in (device, torch.device("cpu")):
            expected = f"a finite number, or a real tensor of one element on {device} or the CPU"
            raise ArgumentError("scaling", expected, f"{value.dtype} {_shape(value)} on {value.device}")
        return value.reshape(())
    number = python_number(value)
    if not isinstance(number, NUMBERS) or not abs(number) <= LARGEST_SCALING:  # NaN fails too
        raise ArgumentError("scaling", "a finite number, as float32 can hold it", shown(value))
    return float(number)


def choice(value: object, argument: str, options: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ArgumentError(argument, f"one of {', '.join(options)}", shown(value))
    return value


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, autocast: bool) -> None:
    """Checks the arguments of ``functional.lora_linear``. A quantised weight, whose dtype is None, takes x in any. One
    expression accepts valid arguments, because this function runs at every call of every layer; only a failure is
    examined piece by piece, for its message."""
    try:
        if _fits(x, weight, bias, lora_A, lora_B, scaling, dropout_p, autocast):
            return
    except (AttributeError, IndexError, TypeError, ValueError):  # an argument is no tensor or no matrix: named below
        pass
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor is None and name == "bias":
            continue
        is_quantized = name == "weight" and getattr(tensor, "dtype", x) is None
        if not isinstance(tensor, torch.Tensor) and not is_quantized:
            raise ArgumentError(name, "a torch.Tensor", type(tensor).__name__)
        if tensor.dtype not in FLOATS and not is_quantized:
            raise ArgumentError(name, "a dtype among float16, bfloat16, float32, float64", tensor.dtype)
        if not is_quantized and tensor.layout is not STRIDED and tensor is not x:
            raise ArgumentError(name, "a dense tensor", tensor.layout)
        if tensor.device != x.device:
            raise ArgumentError(name, f"a tensor on x's device {x.device}", tensor.device)
    if len(weight.shape) != 2:
        raise ArgumentError("weight", "shape (d_out, d_in)", _shape(weight))
    d_out, d_in = weight.shape
    if x.dim() < 1 or x.shape[-1] != d_in:
        raise ArgumentError("x", f"shape (..., {d_in}) to fit weight {_shape(weight)}", _shape(x))
    if bias is not None and _shape(bias) != (d_out,):
        raise ArgumentError("bias", f"shape ({d_out},) to fit weight {_shape(weight)}", _shape(bias))
    if lora_A.dim() != 2 or lora_A.shape[1] != d_in or not 1 <= lora_A.shape[0] <= LARGEST_RANK:
        raise ArgumentError("lora_A", f"shape (r, {d_in}) with r from 1 to {LARGEST_RANK}", _shape(lora_A))
    if _shape(lora_B) != (d_out, lora_A.shape[0]):
        raise ArgumentError("lora_B", f"shape ({d_out}, {lora_A.shape[0]}) to fit weight and lora_A", _shape(lora_B))
    if weight.requires_grad:
        raise ArgumentError("weight", "a frozen tensor (its gradient is never formed)", "requires_grad=True")
    if type(scaling) not in NUMBERS or not -LARGEST_SCALING <= scaling <= LARGEST_SCALING:
        raise ArgumentError("scaling", "a finite number, as float32 can hold it", shown(scaling))
    probability(dropout_p, "dropout_p")
    if x.dtype != weight.dtype and weight.dtype is not None:
        raise ArgumentError("x", f"weight's dtype {weight.dtype} (or an autocast region)", x.dtype)
    raise ArgumentError("bias", f"weight's dtype {weight.dtype}, or float32 beside 16 bits", bias.dtype)


def _fits(x, weight, bias, lora_A, lora_B, scaling, dropout_p, autocast: bool) -> bool:
    d_out, d_in = weight.shape
    r, a_in = lora_A.shape
    device, dtype = x.device, x.dtype
    return (
        x.shape[-1] == d_in == a_in
        and lora_B.shape == (d_out, r)
        and 0 < r <= LARGEST_RANK
        and dtype in FLOATS
        and (weight.dtype is dtype or weight.dtype is None or (autocast and weight.dtype in FLOATS))
        and lora_A.dtype in FLOATS
        and lora_B.dtype in FLOATS
        and weight.device == device
        and lora_A.device == device
        and lora_B.device == device
        and not weight.requires_grad
        and weight.layout is lora_A.layout is lora_B.layout is STRIDED
        and (bias is None or _bias_fits(bias, d_out, device, dtype, autocast))
        and type(scaling) in NUMBERS
        and -LARGEST_SCALING <= scaling <= LARGEST_SCALING
        and type(dropout_p) in NUMBERS
        and 0.0 <= dropout_p <= 1.0
    )


def _bias_fits(bias, d_out: int, device: torch.device, dtype: torch.dtype, autocast: bool) -> bool:
    return (
        bias.shape == (d_out,)
        and bias.layout is STRIDED
        and bias.device == device
        and (bias.dtype is dtype or _is_wide(bias, dtype) or (autocast and bias.dtype in FLOATS))
    )


def _is_wide(bias, dtype: torch.dtype) -> bool:
    """Returns whether the bias is float32 beside 16-bit activations, as a sum with an adapter's bias is."""
    return bias.dtype is torch.float32 and dtype.itemsize == 2
