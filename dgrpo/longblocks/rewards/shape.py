"""The outer shape of a completion: its format and its length."""

import re

from dgrpo.longblocks.rewards.matching import per_sample


@per_sample()
def format_regex(completion, *, pattern: str) -> float:
    """1 where the whole completion matches `pattern` (dot matches newlines), and is not empty."""
    text = completion.strip()
    return float(bool(text) and re.fullmatch(pattern, text, re.DOTALL) is not None)


@per_sample()
def format_tags(completion, *, tags=("think", "answer")) -> float:
    """1 where the completion is `<tag>text</tag>` for each tag in order, each once, none empty.

    Nothing but white space stands outside of the tags, and no tag inside of another.
    """
    mark = f"(</?(?:{'|'.join(map(re.escape, tags))})>)"
    pieces = re.split(mark, completion)  # text, mark, text, mark, ..., text
    wanted = [m for tag in tags for m in (f"<{tag}>", f"</{tag}>")]
    inside = [bool(text.strip()) for text in pieces[::2]]
    return float(pieces[1::2] == wanted and inside == [False, True] * len(tags) + [False])


@per_sample()
def length(
    completion, completion_tokens, *, max_tokens: int, cache: int = 0, min_tokens: int = 1
) -> float:
    """Soft overlong penalty of DAPO (arXiv 2503.14476, equation 13), raised by 1 to [0, 1].

    1 up to `max_tokens - cache` tokens, then falling in a line to 0 at `max_tokens`. A completion
    shorter than `min_tokens`, or of white space alone, has 0.

    Columns: `completion_tokens` (int).
    """
    if not 0 <= cache <= max_tokens:
        raise ValueError(f"cache: got {cache}, expected 0 ... max_tokens ({max_tokens})")
    if completion_tokens < min_tokens or not completion.strip():
        return 0.0
    if completion_tokens <= max_tokens - cache:
        return 1.0
    return max(0.0, (max_tokens - completion_tokens) / cache) if cache else 0.0
