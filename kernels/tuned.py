"""What ``lora-fast tune`` has measured on this machine, looked up by tiles.py before its own defaults.

One JSON file, ``tuned.json`` in the user's cache folder: device → choice for each (op, dtype, tokens, d_in, d_out, r).
A device is its name, its arch and Triton's version: other code is other timings. A launch takes a choice only if all of
these agree (tokens up to the next power of two), and only the tuned ops are asked for:

    "project", "project_short", "grad_s_b", "grad_a"
                                         a tile
    "linear", "grad_x", "grad_x_dropout" the GEMM's strategy; with "_tma" or "_pointer" after it, its tile

A damaged file is a warning at the first launch, and the defaults; ``read`` itself raises.
"""

import json
import os
import warnings
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from . import atomic_file

FORMAT = 1
STRATEGIES = ("fused", "cublas", "gluon")
TILE_FIELDS = 5  # t, outer, inner, warps, stages, as in the rows of tiles.TABLE


class Key(NamedTuple):
    """``tokens``: a power of two. d_in: what is summed over in a GEMM. 0: the op has no such size."""

    op: str
    dtype: str
    tokens: int
    d_in: int
    d_out: int
    r: int


Choice = str | tuple[int, ...]  # a strategy, or a tile
Table = dict[Key, Choice]

_used: list[Table] = []  # of ``using``
_changes = 0


def changes() -> int:
    """How often what ``find`` looks in has changed: a launch plan made before is void."""
    return _changes


def _changed() -> None:
    global _changes
    _changes += 1
    _table.cache_clear()


def key(op: str, dtype: torch.dtype, n_tokens: int, d_in: int, d_out: int, r: int) -> Key:
    return Key(op, str(dtype).removeprefix("torch."), triton.next_power_of_2(n_tokens), d_in, d_out, r)


def find(op: str, tensor: torch.Tensor, d_in: int, d_out: int, r: int) -> Choice | None:
    """The choice for a launch whose tall operand is ``tensor`` (n_tokens, …), if one was measured."""
    table = _used[-1] if _used else _table(tensor.device)
    return table.get(key(op, tensor.dtype, tensor.shape[0], d_in, d_out, r)) if table else None


@contextmanager
def using(table: Table):
    """Within: launches on any device look here instead, for tuning and tests."""
    _used.append(table)
    _changed()
    try:
        yield
    finally:
        _used.pop()
        _changed()


def path() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "lora_fast" / "tuned.json"


def device_name(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, triton {triton.__version__}"


def read() -> dict[str, Table]:
    """Device → its table; nothing where nothing was tuned.

    Raises:
        ValueError: a file that ``write`` has not written, with what is wrong in it.
    """
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path()}: {error}") from error
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return {device: dict(map(_entry, rows)) for device, rows in content["devices"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path()}: {type(error).__name__}: {error}") from error


def write(devices: dict[str, Table]) -> None:
    """Writes the file atomically."""
    rows = {device: [[*key, choice] for key, choice in table.items()] for device, table in devices.items()}
    atomic_file.write_text(path(), json.dumps({"format": FORMAT, "devices": rows}, indent=1))
    _changed()


def clear() -> bool:
    """Forget everything; whether there was something."""
    found = path().exists()
    path().unlink(missing_ok=True)
    _changed()
    return found


@lru_cache
def _table(device: torch.device) -> Table:
    """Of one device, read once. Nothing on a CPU."""
    if device.type != "cuda":
        return {}
    try:
        return read().get(device_name(device), {})
    except ValueError as error:
        warnings.warn(f"lora_fast: tuned choices ignored ({error}): lora-fast tune --clear", stacklevel=2)
        return {}


def _entry(row: list) -> tuple[Key, Choice]:
    *fields, choice = row
    found = Key(*fields)
    sizes = [*found[2:], *(choice if isinstance(choice, list) else ())]
    if not (isinstance(found.op, str) and isinstance(found.dtype, str) and all(type(n) is int for n in sizes)):
        raise ValueError(f"an entry of {row}")
    if isinstance(choice, list):
        if len(choice) != TILE_FIELDS or min(choice) < 0:
            raise ValueError(f"a tile of {choice}")
        return found, tuple(choice)
    if choice not in STRATEGIES:
        raise ValueError(f"a strategy of {choice!r}")
    return found, choice
