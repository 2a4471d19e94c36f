"""Whether the data have what the teacher's prompt is made from: looked at before a run starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from dgrpo.data import PromptStream, render_row
from dgrpo.trainer.attempts import Attempt, Messages, TeacherContext

# Of each tuple a row needs one column.
NEEDED = {
    "evidence": (("document",), ("evidence", "passages")),
    "privileged": (("privileged", "answer"),),
}


def check_columns(name: str, context: TeacherContext | None, stream: PromptStream) -> None:
    """Raises ValueError where no row of the data gives the context of that name its prompt.

    Reads up to the first row that does. Contexts that look at the group, and the user's own, are
    not checked.
    """
    if context is None or name not in NEEDED:
        return
    missing = list(NEEDED[name])
    with closing(rows(stream)) as found:
        for prompt, row in found:
            attempt = Attempt(
                prompt, "", row, tokens=0, reward=0.0, correct=False, failed=False, truncated=False
            )
            if context([attempt], 0)[1]:
                return
            missing = [columns for columns in missing if not any(row.get(c) for c in columns)]
    if missing:
        several = f"a column of {', '.join(missing[0])}"
        what = f"the column {missing[0][0]}" if len(missing[0]) == 1 else several
        reason = f"no row has {what}, so no completion would have a teacher"
    else:
        one_of = " and ".join(" or ".join(columns) for columns in NEEDED[name])
        reason = f"no row has {one_of}, with the document as a part of its prompt"
    raise ValueError(
        f"method.teacher_context: got {name!r}, but {reason}; add it to the rows, name it in "
        "data.sources[].columns, or take another method.preset"
    )


def rows(stream: PromptStream) -> Iterator[tuple[str | Messages, dict[str, Any]]]:
    """The prompt's text and the row of every usable row, once; the stream stays where it is."""
    before, log = stream.state_dict(), stream.report.log
    stream.report.log = lambda line: None  # they are told when it is their turn
    try:
        for cursor, source, books in zip(stream.cursors, stream.sources, stream.books, strict=True):
            while (found := cursor.next()) is not None:
                row = found[1]
                try:
                    if any(row.get(column) != value for column, value in source.where.items()):
                        continue
                    row = books.join(row) if books else row
                    prompt, _ = render_row(row, source)
                except Exception:  # a row that the run will drop too, and tell why
                    continue
                yield prompt, row
    finally:
        stream.load_state_dict(before)
        stream.report.log = log
