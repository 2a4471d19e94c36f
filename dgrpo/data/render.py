"""A row becomes a prompt: the columns it is read from, its text, its tokens."""

import re
from dataclasses import dataclass
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from dgrpo.data.books import no_document
from dgrpo.text import BadRow, encode_chat, encode_text
from dgrpo.trainer.config import DataSource

PROMPTS = ("messages", "prompt")  # columns in which a whole prompt is looked for


class Source(DataSource):
    """A source of which the rows themselves may be given, in place of a path."""

    path: str = ""
    """As in the settings; empty with `rows`."""
    rows: Any = None
    """A sequence of dicts."""


@dataclass
class Prompt:
    """A prompt ready for the model, and its target where there is one."""

    ids: Tensor  # (P,) int64
    text: str | list  # what the rewards get as the prompt: a text or chat messages
    completion: str | None  # the target's text
    completion_ids: Tensor | None  # (C,) int64, the target with the end-of-sequence token
    loss_mask: Tensor | None  # (C,) bool, for rows of segments: the tokens that carry loss
    columns: dict  # the row
    source: str  # its name
    id: str  # the row's `id`, or its place in the file
    index: int = -1  # running number in the global stream, the same on every rank


def render_row(row: dict, source: DataSource) -> tuple[str | list, str | None]:
    """Prompt (text or messages) and target of a row. Raises BadRow where it cannot be used."""
    column = source.prompt or next((name for name in PROMPTS if row.get(name)), "")
    prompt = _given(row, column) if column else _filled(row, source.template)
    if not isinstance(prompt, str | list):
        raise BadRow("a prompt that is neither text nor messages", type(prompt).__name__)
    completion = _target(row, source.completion)
    if isinstance(completion, list):
        return _joined(prompt, completion)
    if isinstance(prompt, list) and prompt[-1].get("role") == "assistant":
        completion = completion if source.completion else _said(prompt[-1])
        prompt = prompt[:-1]
    if completion is not None and not isinstance(completion, str):
        raise BadRow("a target that is not text", type(completion).__name__)
    return prompt, completion


def _joined(prompt: str | list, turns: list) -> tuple[str | list, str | None]:
    """Prompt and target of a row whose completion is messages: the last one is the target."""
    last = turns[-1] if turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise BadRow("a completion that does not end with an assistant's message", repr(last)[:80])
    if len(turns) > 1 and isinstance(prompt, str):
        raise BadRow("a text as the prompt of several messages", f"{len(turns)} of completion")
    before = prompt if isinstance(prompt, str) else [*prompt, *turns[:-1]]
    return before, _said(last)


def _said(message: dict) -> str | None:
    """The text of an assistant's turn; None where that is not all of it."""
    return None if message.get("tool_calls") else message.get("content") or None


def _given(row: dict, column: str) -> str | list:
    if column not in row:
        raise BadRow("missing column", column)
    if not row[column]:
        raise BadRow(f"{column} is {'null' if row[column] is None else 'empty'}")
    return row[column]


def _filled(row: dict, template: str) -> str:
    fields = [field for _, field, _, _ in Formatter().parse(template) if field]
    used = [re.split(r"[.[]", field)[0] for field in fields]  # {meta[title]}: the column meta
    if missing := [name for name in used if name not in row]:
        for name in PROMPTS:  # there, but without a prompt in it
            if name in row:
                _given(row, name)
        raise BadRow("missing column", f"{' or '.join(PROMPTS)}, or {missing[0]} of template")
    if nulls := [name for name in used if row[name] is None]:
        raise no_document(row) if nulls[0] == "document" else BadRow(f"{nulls[0]} is null")
    if not (text := template.format_map(row)):
        raise BadRow("empty prompt", "template")
    return text


def _target(row: dict, column: str):
    if column:
        if column not in row:
            raise BadRow("missing column", column)
        return row[column]
    responses = sorted(name for name in row if name.startswith("response_"))
    for name in ("completion", "response_reference", *responses, "answer"):
        if row.get(name):
            return row[name]
    return None


class PromptEncoder:
    """Rows to `Prompt` with one tokenizer.

    Args:
        chat: apply the tokenizer's chat template (None: where it has one). Off, the text stays as
            it is, after the beginning-of-sequence token where the tokenizer adds one.
        system: a system message, or, without a chat template, text before every prompt.
        chat_options: passed to the template.
    """

    def __init__(self, tokenizer, *, chat=None, system=None, chat_options=None):
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            way_out = "use chat=False or set tokenizer.chat_template"
            raise ValueError(f"chat: got True for a tokenizer without a chat template; {way_out}")
        self.tokenizer = tokenizer
        self.chat = has_template if chat is None else chat
        self.system, self.chat_options = system, chat_options or {}
        start = list(tokenizer("")["input_ids"])
        self.start = [token for token in start if token != tokenizer.eos_token_id]
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(self, row: dict, source: DataSource, where: str = "") -> Prompt:
        """Raises BadRow where the row has no usable prompt."""
        name = source.name or source.path
        row = dict(row, reward=source.reward) if source.reward else row
        identifier = str(row.get("id") or where)
        if row.get("segments"):
            before = row.get("prompt") or ""
            ids, target, mask = self._segments(before, row["segments"])
            return Prompt(ids, before, None, target, mask, row, name, identifier)
        text, completion = render_row(row, source)
        ids, target = torch.tensor(self._prompt(text), dtype=torch.int64), None
        if completion is not None:
            tokens = encode_text(self.tokenizer, completion, target=True)
            target = torch.tensor(tokens + self.end, dtype=torch.int64)
        return Prompt(ids, text, completion, target, None, row, name, identifier)

    def _prompt(self, text: str | list) -> list[int]:
        if self.chat:
            messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
            if self.system and messages[0].get("role") != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            return encode_chat(self.tokenizer, messages, **self.chat_options)
        if isinstance(text, list):
            raise BadRow("chat messages without a chat template", "chat is off")
        return self.start + encode_text(self.tokenizer, (self.system or "") + text)

    def _segments(self, prompt: str | list, segments: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """One text of several pieces; each piece with loss is ended by end-of-sequence."""
        ids = self._prompt(prompt) if prompt else list(self.start)
        mask = [False] * len(ids)
        for piece in segments:
            loss = bool(piece["loss"])
            tokens = encode_text(self.tokenizer, piece["text"], target=loss)
            tokens += self.end if loss else []
            ids, mask = ids + tokens, mask + [loss] * len(tokens)
        first = mask.index(True) if True in mask else len(mask)
        if first in (0, len(mask)):
            raise BadRow("segments", "expected some with loss, after some without")
        tokens = torch.tensor(ids, dtype=torch.int64)
        return tokens[:first], tokens[first:], torch.tensor(mask[first:])
