"""What ends completions (tokens and texts), and the record of what was drawn."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Stops:
    """The tokens and the texts, wherever token borders lie, that end a completion.

    Raises:
        ValueError: texts without a tokenizer.
    """

    def __init__(self, token_ids: Iterable[int], strings: Sequence[str] = (), tokenizer=None):
        if strings and tokenizer is None:
            raise ValueError(
                f"stop_strings: got {list(strings)} without a tokenizer, expected "
                "HFSampler(policy, tokenizer); or stop on token ids"
            )
        self.token_ids = torch.tensor(sorted(set(token_ids)), dtype=torch.int64)
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # A text of n characters is spread over 4 n tokens at most (a byte each).
        self.tail = 4 * max(map(len, strings), default=0) + 8
        self.may_end = _may_end(tokenizer, strings) if strings else None

    def first(self, drawn: Tensor, known: Tensor) -> Tensor:
        """Tokens up to and with the first stop: (R,) int64 in 1..c, or 0 where nothing stops.

        `drawn` (R, c) int64 are the latest tokens, `known` (R, t + c) those and all before them.
        """
        hits = torch.isin(drawn, self.token_ids)
        if self.may_end is not None:
            before = known.shape[1] - drawn.shape[1]
            for row, column in (self.may_end[drawn] & ~hits).nonzero().tolist():
                if not hits[row, :column].any():
                    end = before + column + 1
                    last = known[row, max(0, end - self.tail) : end]
                    text = _text(self.tokenizer, last.tolist())
                    hits[row, column] = any(stop in text for stop in self.strings)
        return torch.where(hits.any(1), hits.byte().argmax(1) + 1, 0)


class Record:
    """Tokens and log-probabilities of S samples, up to each one's end."""

    def __init__(self, samples: int, max_tokens: int, stops: Stops):
        self.stops = stops
        self.tokens = torch.zeros(samples, max_tokens, dtype=torch.int64)
        self.logprobs = torch.zeros(samples, max_tokens)
        self.lengths = torch.zeros(samples, dtype=torch.int64)  # 0 while it runs
        self.stopped = torch.zeros(samples, dtype=torch.bool)
        self.drawn = 0

    def add(self, samples: Tensor, tokens: list[Tensor], logprobs: list[Tensor]) -> Tensor:
        """Take the latest c tokens of each row; (R,) bool says which rows' samples go on.

        `samples` (R,) int64 is the sample of each row, -1 where it has none; `tokens` and
        `logprobs` are c tensors (R,), on any device.
        """
        new, logp = torch.stack(tokens, 1).cpu(), torch.stack(logprobs, 1).cpu()
        start, self.drawn = self.drawn, self.drawn + new.shape[1]
        alive = (samples >= 0) & (self.lengths[samples] == 0)
        rows = alive.nonzero()[:, 0]
        where = samples[rows]
        self.tokens[where, start : self.drawn] = new[rows]
        self.logprobs[where, start : self.drawn] = logp[rows]
        ends = self.stops.first(new[rows], self.tokens[where, : self.drawn])
        self.stopped[where] = ends > 0
        full = self.drawn if self.drawn == self.tokens.shape[1] else 0
        self.lengths[where] = torch.where(ends > 0, start + ends, full)
        alive[rows] = self.lengths[where] == 0
        return alive


def _may_end(tokenizer, strings: Sequence[str]) -> Tensor:
    """(V,) bool: tokens that could hold the last character of one of the strings."""
    size = len(tokenizer)
    lasts = {stop[-1] for stop in strings}
    if any(last.isspace() for last in lasts):  # spaces are written in too many ways
        return torch.ones(size + 1, dtype=torch.bool)
    texts = (_text(tokenizer, [i]) for i in range(size))
    # U+FFFD: a part of a character, which a later token completes.
    return torch.tensor([not lasts.isdisjoint(text) or "\ufffd" in text for text in texts])


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
