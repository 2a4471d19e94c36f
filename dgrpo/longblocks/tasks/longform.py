"""Long-form generation: a report that covers a list of points, in a given form and length."""

from dgrpo.longblocks.tasks.facts import Draft, row
from dgrpo.longblocks.tasks.grounding import ATTRIBUTES, value

FORMS = {
    "bullets": 'a list with one fact a line, each line beginning with "- "',
    "numbered": 'a list with one fact a line, numbered "1. ", "2. " and so on',
    "table": "a Markdown table with a header, the columns Property and Value, one fact a row",
    "sections": "sections under the headings {headings}, in this order, each heading on a line "
    'that begins with "## " and each fact in a sentence of its own on a line of its own',
}


def report(draft: Draft) -> dict:
    """Everything that a document tells about one lighthouse, gathered from 6 to 12 places."""
    many = draft.pick(6, 12 if draft.tokens >= 2000 else 8)
    place, chosen = draft.place(), sorted(draft.rng.permutation(len(ATTRIBUTES))[:many].tolist())
    told = [(ATTRIBUTES[i], value(ATTRIBUTES[i], draft)) for i in chosen]
    texts = [a.sentence.format(x=place, v=v) for a, v in told]
    others, wrong = [], []
    for _ in range(draft.distractors(draft.count(texts[0]))):
        if len(others) % 6 == 0:
            other = draft.place()
        attribute = draft.choose(ATTRIBUTES)
        wrong.append(value(attribute, draft))
        others.append(attribute.sentence.format(x=other, v=wrong[-1]))
    form = draft.choose(list(FORMS))
    headings = list(dict.fromkeys(a.section for a, _ in told)) if form == "sections" else []
    low, high = 4 * many, 30 * many
    question = (
        f"Write a report of everything that this document says about the {place} lighthouse, as "
        f"{FORMS[form].format(headings=', '.join(headings))}. There are {many} facts, scattered "
        f"over the document. Write between {low} and {high} words, nothing before or after the "
        "report, and nothing about other lighthouses."
    )
    return row(
        draft.weave(texts + others, question),
        gold=texts,
        question=question,
        answer=_written(form, told, texts, headings),
        reward="coverage",
        points=[[a.key, v] for a, v in told],
        distractors=wrong,
        form=form,
        headings=headings,
        min_words=low,
        max_words=high,
    )


def _written(form: str, told: list, texts: list[str], headings: list[str]) -> str:
    """The report, in its form."""
    if form == "bullets":
        return "\n".join(f"- {text}" for text in texts)
    if form == "numbered":
        return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))
    if form == "table":
        rows = [f"| {a.key} | {v} |" for a, v in told]
        return "\n".join(["| Property | Value |", "|---|---|", *rows])
    lines = []
    for heading in headings:
        lines.append(f"## {heading}")
        pairs = zip(told, texts, strict=True)
        lines += [text for (a, _), text in pairs if a.section == heading]
    return "\n".join(lines)
