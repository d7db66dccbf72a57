"""Reads and writes the choices that ``lora-fast tune`` measured on this machine. tiles.py prefers them to its defaults.

They are stored in one JSON file, ``tuned.json`` in the user's cache folder: device → choice for each (op, dtype,
tokens, d_in, d_out, r). A device is identified by its name, its arch and Triton's version, because another version
compiles other code. A launch uses a choice only if all of these match (tokens are rounded up to a power of two). These
ops are tuned:

    "project", "project_short", "grad_s_b", "grad_a"
                                         a tile
    "linear", "grad_x", "grad_x_dropout" the GEMM's strategy; with the suffix "_tma" or "_pointer", its tile
    the same with the prefix "four_bit_" the same of the GEMM over a 4-bit weight

If the file is damaged, the first launch warns and the defaults are used; ``read`` itself raises.
"""

import json
import os
import threading
import warnings
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from . import atomic_file
from .scopes import Scopes

FORMAT = 1
STRATEGIES = ("fused", "cublas", "gluon")
TILE_FIELDS = 5  # t, outer, inner, warps, stages, as in the rows of tiles.TABLE


class Key(NamedTuple):
    """The sizes for which a choice was measured. An op that does not have one of the sizes has 0 there."""

    op: str
    dtype: str
    tokens: int  # rounded up to a power of two
    d_in: int  # the summed dimension of a GEMM
    d_out: int
    r: int


Choice = str | tuple[int, ...]  # a strategy, or a tile
Table = dict[Key, Choice]

_used: Scopes[Table] = Scopes()
_changes = 0
_changes_lock = threading.Lock()


def changes() -> int:
    """Returns a counter of changes to the tables. It is part of the key of launch plans, so that a change invalidates
    the plans made before it."""
    return _changes


def _changed() -> None:
    global _changes
    with _changes_lock:
        _changes += 1
    _table.cache_clear()


def key(op: str, dtype: torch.dtype, n_tokens: int, d_in: int, d_out: int, r: int) -> Key:
    return Key(op, str(dtype).removeprefix("torch."), 1 << (n_tokens - 1).bit_length(), d_in, d_out, r)


def find(op: str, tensor: torch.Tensor, d_in: int, d_out: int, r: int) -> Choice | None:
    """Returns the choice for a launch whose tall operand is ``tensor`` (n_tokens, …), or None if none was measured."""
    used = _used.values
    table = used[-1] if used else _table(tensor.device, _changes)
    return table.get(key(op, tensor.dtype, tensor.shape[0], d_in, d_out, r)) if table else None


@contextmanager
def using(table: Table):
    """Makes launches of all threads on any device use this table instead of the file, for tuning and tests."""
    try:
        with _used.within(table):
            _changed()
            yield
    finally:
        _changed()


def path() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "lora_fast" / "tuned.json"


def device_name(device: torch.device) -> str:
    import triton  # here, since the file can be shown and deleted without Triton

    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, triton {triton.__version__}"


def read() -> dict[str, Table]:
    """Returns the table of each device; an empty dict if nothing was tuned.

    Raises:
        ValueError: the file is damaged. The message contains the path and the error.
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
    """Deletes the file. Returns whether there was one."""
    existed = path().exists()
    path().unlink(missing_ok=True)
    _changed()
    return existed


@lru_cache
def _table(device: torch.device, changes: int) -> Table:
    """Returns the table of one device, which is empty for a CPU. The file is read once after each of the ``changes``: a
    thread that has read the file before a change does not cache what it read for the calls after it."""
    if device.type != "cuda":
        return {}
    try:
        return read().get(device_name(device), {})
    except ValueError as error:
        warnings.warn(f"lora_fast: tuned choices ignored ({error}): lora-fast tune --clear", stacklevel=2)
        return {}


def _entry(row: list) -> tuple[Key, Choice]:
    *fields, choice = row
    key = Key(*fields)
    sizes = [*key[2:], *(choice if isinstance(choice, list) else ())]
    if not (isinstance(key.op, str) and isinstance(key.dtype, str) and all(type(n) is int for n in sizes)):
        raise ValueError(f"expected an entry [op, dtype, tokens, d_in, d_out, r, choice], got {row}")
    if isinstance(choice, list):
        if len(choice) != TILE_FIELDS or min(choice) < 0:
            raise ValueError(f"expected a tile of {TILE_FIELDS} numbers, none negative, got {choice}")
        return key, tuple(choice)
    if choice not in STRATEGIES:
        raise ValueError(f"expected a strategy of {STRATEGIES}, got {choice!r}")
    return key, choice
