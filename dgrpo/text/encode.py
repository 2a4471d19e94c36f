"""Text and chats to token ids, with the special-token text inside documents kept as text.

A document that quotes `<|endoftext|>` must not end there: a tokenizer left alone would turn the
quotation into the control token. Text is encoded as usual, unless it contains the text of a control
token; then by a copy of the tokenizer that does not know those tokens.
"""

import re
from functools import lru_cache

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
    return _encoder(tokenizer).text(text, target)


def encode_chat(
    tokenizer, messages: list[dict], *, add_generation_prompt: bool = True, **options
) -> list[int]:
    """Token ids of a chat through the tokenizer's template; what the messages say is text.

    Args:
        messages: `[{"role": ..., "content": str}, ...]`.
        add_generation_prompt: end with the opening of the assistant's turn.
        options: passed to the template (`enable_thinking=False`, `tools=...`).

    Raises:
        ValueError: the tokenizer has no template.
        BadRow: a message has no text content, or control-token text in a template that does not
            render contents verbatim.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "tokenizer: got one without a chat template, expected one with it; "
            "set tokenizer.chat_template or use encode_text"
        )
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow("a chat message without text content", repr(message)[:80])
    return _encoder(tokenizer).chat(messages, add_generation_prompt, options)


def count_tokens(tokenizer, text: str) -> int:
    """Number of tokens of `text` taken literally; of bytes, with `"bytes"` as the tokenizer."""
    if tokenizer == "bytes":
        return len(text.encode("utf-8", errors="replace"))
    return len(encode_text(tokenizer, text))


@lru_cache(maxsize=16)
def _encoder(tokenizer) -> "_Encoder":
    return _Encoder(tokenizer)


class _Encoder:
    """The tokenizer, and lazily its copies without control tokens (documents, targets)."""

    def __init__(self, tokenizer):
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        tags = {t.content for t in added if re.fullmatch(r"<.+>|\[[A-Z_/]+\]", t.content)}
        special |= {str(token) for token in tokenizer.all_special_tokens}
        self.hidden = {True: special, False: special | tags}
        self.patterns = {target: _any_of(texts) for target, texts in self.hidden.items()}
        unknown = tokenizer.unk_token_id  # stands for what cannot be spelled
        self.controls = set(tokenizer.convert_tokens_to_ids(sorted(special))) - {unknown, None}
        self.copies: dict[bool, object] = {}
        self.tokenizer = tokenizer
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        self.chunked = self._cuts_at_lines()

    def plain(self, text: str, **options) -> list[int]:
        """Ids by the tokenizer itself, without anything around them."""
        names = ("add_special_tokens", "return_attention_mask", "return_token_type_ids", "verbose")
        return self.tokenizer(text, **dict.fromkeys(names, False), **options)["input_ids"]

    def text(self, text: str, target: bool) -> list[int]:
        pattern = self.patterns[target]
        if not pattern or not pattern.search(text):
            return self._encode(self.plain, text)
        ids = self._encode(self._literal(target), text)
        if found := self.controls & set(ids):
            raise BadRow("control-token text that this tokenizer cannot spell", f"ids {found}")
        return ids

    def chat(self, messages: list[dict], add_generation_prompt: bool, options: dict) -> list[int]:
        pattern, render = self.patterns[False], self.tokenizer.apply_chat_template
        keywords = dict(options, tokenize=False, add_generation_prompt=add_generation_prompt)
        if not pattern or not any(pattern.search(m["content"]) for m in messages):
            return self._encode(self.plain, render(messages, **keywords))
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        marked = [dict(m, content=mark) for m, mark in zip(messages, marks, strict=True)]
        rendered = render(marked, **keywords)
        if any(rendered.count(mark) != 1 for mark in marks):
            raise BadRow("control-token text in a chat whose template changes the contents")
        ids: list[int] = []
        for i, piece in enumerate(re.split("\ue000|\ue001", rendered)):
            if i % 2:
                message = messages[int(piece)]
                ids += self.text(message["content"], message["role"] == "assistant")
            elif piece:
                ids += self.plain(piece)
        return ids

    def _encode(self, encode, text: str) -> list[int]:
        if len(text) <= CHUNK or not self.chunked:
            return encode(text)
        return [token for piece in chunks(text, CHUNK) for token in encode(piece)]

    def _literal(self, target: bool):
        """The encode function of a copy that knows none of the hidden tokens."""
        if self.backend is None:  # a tokenizer in Python
            return lambda text: self.plain(text, split_special_tokens=True)
        if target not in self.copies:
            self.copies[target] = _without(self.backend, self.hidden[target])
        copy = self.copies[target]
        return lambda text: copy.encode(text, add_special_tokens=False).ids

    def _cuts_at_lines(self) -> bool:
        """Whether this tokenizer, as most do, never joins the end of a line with the next one."""
        lines = ["def f(x):\n", "    return x\n\n", "Some words. 12\n", "more"]
        return self.plain("".join(lines)) == [i for line in lines for i in self.plain(line)]


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


def _any_of(texts: set[str]) -> re.Pattern | None:
    return re.compile("|".join(map(re.escape, sorted(texts, reverse=True)))) if texts else None


def _without(backend, hidden: set[str]):
    """A copy of a fast tokenizer that reads the text of `hidden` tokens as text."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in hidden]
    state["truncation"] = state["padding"] = state["post_processor"] = None
    return Tokenizer.from_str(json.dumps(state))
