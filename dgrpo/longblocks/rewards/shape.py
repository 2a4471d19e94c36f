"""The outer shape of a completion: its format and its length."""

import re


def format_regex(prompts, completions, *, pattern: str, **columns) -> list[float]:
    """1 where the whole completion matches `pattern` (dot matches newlines), and is not empty."""
    shape = re.compile(pattern, re.DOTALL)
    return [float(bool(c.strip()) and shape.fullmatch(c.strip()) is not None) for c in completions]


def format_tags(prompts, completions, *, tags=("think", "answer"), **columns) -> list[float]:
    """1 where the completion is `<tag>text</tag>` for each tag in order, each once, none empty.

    Nothing but white space stands outside of the tags, and no tag inside of another.
    """
    mark = re.compile(f"(</?(?:{'|'.join(map(re.escape, tags))})>)")
    wanted = [m for tag in tags for m in (f"<{tag}>", f"</{tag}>")]
    values = []
    for completion in completions:
        pieces = mark.split(completion)  # text, mark, text, mark, ..., text
        inside = [bool(text.strip()) for text in pieces[::2]]
        good = pieces[1::2] == wanted and inside == [False, True] * len(tags) + [False]
        values.append(float(good))
    return values


def length(
    prompts,
    completions,
    *,
    completion_tokens,
    max_tokens: int,
    cache: int = 0,
    min_tokens: int = 1,
    **columns,
) -> list[float]:
    """Soft overlong penalty of DAPO (arXiv 2503.14476, equation 13), raised by 1 to [0, 1].

    1 up to `max_tokens - cache` tokens, then falling in a line to 0 at `max_tokens`. Added to
    other rewards, the raise is the same for all and drops out of the advantages. A completion
    shorter than `min_tokens`, or of white space alone, has 0.

    Columns: `completion_tokens` (int).

    Raises:
        ValueError: `cache` not in [0, max_tokens].
    """
    if not 0 <= cache <= max_tokens:
        raise ValueError(f"cache: got {cache}, expected 0 ... max_tokens ({max_tokens})")
    values = []
    for completion, tokens in zip(completions, completion_tokens, strict=True):
        if tokens < min_tokens or not completion.strip():
            values.append(0.0)
        elif tokens <= max_tokens - cache:
            values.append(1.0)
        else:
            values.append(max(0.0, (max_tokens - tokens) / cache) if cache else 0.0)
    return values
