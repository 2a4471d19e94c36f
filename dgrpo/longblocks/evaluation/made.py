"""The tasks of `dgrpo data make` as an evaluation, from the text that it keeps for tests."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dgrpo.longblocks.tasks.catalog import MakeSettings, make_row
from dgrpo.longblocks.tasks.corpus import build_corpus
from dgrpo.longblocks.tasks.facts import Ground
from dgrpo.text import BadRow


def made(
    tokenizer,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (4096,),
    count: int = 100,
    seed: int = 0,
    haystack: str | None = None,
) -> Iterator[dict | BadRow]:
    """Rows of tasks at lengths, deterministic by seed: those of the split "test".

    `tasks` are names in `dgrpo.longblocks.tasks.catalog.TASKS`, empty or "all" for all; the other
    arguments are those of `ruler`. Raises ValueError for an unknown task, or a length under 500
    tokens.
    """
    settings = MakeSettings("", tuple(tasks) or ("all",), count, tuple(lengths), split="test")
    settings = replace(settings, count=count * len(settings.named) * len(lengths), seed=seed)
    return _rows(tokenizer, settings, haystack)


def _rows(tokenizer, settings: MakeSettings, haystack: str | None) -> Iterator[dict | BadRow]:
    ground = Ground(build_corpus(tokenizer, haystack).part(settings.split), tokenizer)
    for number in range(settings.count):
        try:
            row = make_row(ground, settings, number)
        except Exception as error:  # whatever goes wrong costs this row alone
            yield BadRow("cannot be made", str(error))
            continue
        length = settings.tokens[number // len(settings.named) % len(settings.tokens)]
        yield row | {"length": length}
