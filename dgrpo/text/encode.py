"""Text and chats to token ids, with the special-token text inside documents kept as text.

A document that quotes `<|endoftext|>` must not end there: text that contains a control token's text
is encoded by a copy of the tokenizer that does not know those tokens.
"""

import json
import re
from collections.abc import Callable
from functools import cached_property, lru_cache

from dgrpo.text.problems import BadRow

CHUNK = 1 << 20  # characters encoded at once: the encoder keeps about 300 bytes per token


def encode_text(tokenizer, text: str, *, target: bool = False) -> list[int]:
    """Token ids of `text` taken literally, without beginning- or end-of-sequence tokens.

    Args:
        target: the text is what a model is to write: added tokens that are not special ones
            (`<think>`, `<tool_call>`) keep their ids; in a document they are text too.

    Raises:
        BadRow: the tokenizer has no other way to write a control token's text.
    """
    return _encoder(tokenizer, target).encode(text)


def encode_chat(tokenizer, messages: list[dict], **options) -> list[int]:
    """Token ids of a chat, up to the opening of the assistant's turn; what messages say is text.

    Args:
        messages: `[{"role": ..., "content": str}, ...]`.
        options: passed to the tokenizer's template (`enable_thinking=False`, `tools=...`).

    Raises:
        ValueError: the tokenizer has no template.
        BadRow: a message has no text content, or control-token text in a template that does not
            render contents verbatim.
    """
    if not getattr(tokenizer, "chat_template", None):
        way_out = "set tokenizer.chat_template or use encode_text"
        raise ValueError(f"tokenizer: got one without a chat template, expected one; {way_out}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow("a chat message without text content", repr(message)[:80])
    encoder = _encoder(tokenizer, False)
    keywords = {"add_generation_prompt": True, **options, "tokenize": False}

    def rendered(contents: list[str]) -> str:
        chat = [dict(m, content=content) for m, content in zip(messages, contents, strict=True)]
        return tokenizer.apply_chat_template(chat, **keywords)

    contents = [message["content"] for message in messages]
    if not any(map(encoder.pattern.search, contents)):
        return encoder.joined(encoder.plain, rendered(contents))
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    text = rendered(marks)
    if any(text.count(mark) != 1 for mark in marks):
        raise BadRow("control-token text in a chat whose template changes the contents")
    ids: list[int] = []
    for i, piece in enumerate(re.split("\ue000|\ue001", text)):
        if i % 2:
            target = messages[int(piece)]["role"] == "assistant"
            ids += encode_text(tokenizer, contents[int(piece)], target=target)
        elif piece:
            ids += encoder.plain(piece)
    return ids


def count_tokens(tokenizer, text: str) -> int:
    """Number of tokens of `text` taken literally; of bytes, with `"bytes"` as the tokenizer."""
    if tokenizer == "bytes":
        return len(text.encode("utf-8", errors="replace"))
    return len(encode_text(tokenizer, text))


class _Encoder:
    """A tokenizer, and a copy of it that knows no control tokens of documents, or of targets."""

    def __init__(self, tokenizer, target: bool):
        self.tokenizer, added = tokenizer, tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {token.content for token in added if token.special}
        tags = {t.content for t in added if re.fullmatch(r"<.+>|\[[A-Z_/]+\]", t.content)}
        self.hidden = special if target else special | tags
        texts = map(re.escape, sorted(self.hidden, reverse=True))
        self.pattern = re.compile("|".join(texts) or "(?!)")  # (?!) matches nothing
        unknown = tokenizer.unk_token_id  # stands for what cannot be spelled
        self.controls = set(tokenizer.convert_tokens_to_ids(sorted(special))) - {unknown, None}
        # most tokenizers never join the end of a line with the next one, so that text may be cut
        lines = ["def f(x):\n", "    return x\n\n", "Some words. 12\n", "more"]
        apart = [token for line in lines for token in self.plain(line)]
        self.chunked = self.plain("".join(lines)) == apart

    def plain(self, text: str, **options) -> list[int]:
        """Ids by the tokenizer itself, without anything around them."""
        names = ("add_special_tokens", "return_attention_mask", "return_token_type_ids", "verbose")
        return self.tokenizer(text, **dict.fromkeys(names, False), **options)["input_ids"]

    def encode(self, text: str) -> list[int]:
        if not self.pattern.search(text):
            return self.joined(self.plain, text)
        ids = self.joined(self.literal, text)
        if found := self.controls & set(ids):
            raise BadRow("control-token text that this tokenizer cannot spell", f"ids {found}")
        return ids

    def joined(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Encode a long text in pieces, where the tokenizer allows it."""
        pieces = chunks(text, CHUNK if self.chunked else len(text))
        return [token for piece in pieces for token in encode(piece)]

    def literal(self, text: str) -> list[int]:
        """Ids by a copy that knows none of the hidden tokens."""
        if self.copy is None:  # a tokenizer in Python
            return self.plain(text, split_special_tokens=True)
        return self.copy.encode(text, add_special_tokens=False).ids

    @cached_property
    def copy(self):
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend and _without(backend, self.hidden)


_encoder = lru_cache(maxsize=16)(_Encoder)


_encoder = lru_cache(maxsize=16)(_Encoder)  # one per tokenizer


def chunks(text: str, size: int):
    """Cut `text` into pieces of at most `size` characters, after line ends where it has any.

    A cut is made only before a character that is not white space, where tokenizers split anyway.
    """
    start = 0
    while len(text) - start > size:
        ends = [m.end() for m in re.finditer(r"\n(?=\S)", text[start : start + size + 1])]
        cut = ends[-1] if ends else size
        yield text[start : start + cut]
        start += cut
    yield text[start:]


def _without(backend, hidden: set[str]):
    """A copy of a fast tokenizer that reads the text of `hidden` tokens as text."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in hidden]
    state["truncation"] = state["padding"] = state["post_processor"] = None
    return Tokenizer.from_str(json.dumps(state))
