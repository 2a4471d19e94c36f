"""What a model is asked when it makes questions, and how its answers are checked."""

import json
import re

from dgrpo.endpoint import Endpoint
from dgrpo.longblocks.tasks.facts import ANSWER
from dgrpo.longblocks.tasks.rows import row
from dgrpo.text import BadRow

FORMAT = (
    "Answer with one JSON object and nothing else, with the keys: "
    '"question"; "answer"; "aliases", a list of other right ways to write the answer; "evidence", '
    "a list of 1 to 8 sentences copied word for word from the document that together prove the "
    "answer"
)
KINDS = {
    "multi_hop": (
        "Ask one question whose answer needs at least two facts from places of the document that "
        "lie far apart. The answer is a name, a number or a short phrase of at most 12 words, and "
        "cannot be known without the document. " + FORMAT + "."
    ),
    "grounding": (
        "Ask one question about one detail that only a reader of this document can know. The "
        "answer is a name, a number or a short phrase of at most 12 words. " + FORMAT + "."
    ),
    "long_form": (
        "Ask for a list of what the document says about one topic in several places, 4 to 12 "
        "facts. Give the list as the answer, one fact a line, each line beginning with '- '. "
        + FORMAT
        + '; "points", as many lists of 1 to 3 short key phrases as the answer has lines, in its '
        "order: all phrases of a list stand in the line, and each of them word for word in the "
        "document."
    ),
}
JUDGE = (
    "You check exam questions. By the document alone: can the question be answered, is the "
    "proposed answer right and complete, and is no other answer right as well? Answer with one "
    'JSON object and nothing else: {"verdict": "supported", "unsupported" or "ambiguous", '
    '"reason": "..."}.'
)
REWARDS = {"multi_hop": "token_f1", "grounding": "token_f1", "long_form": "coverage"}
MAX_TOKENS = 2048  # of a reply


def ask(endpoint: Endpoint, kind: str, document: str, seed: int) -> dict:
    """Have a model ask; see `checked`. Raises BadRow, EndpointError."""
    chat = _chat(KINDS[kind], document)
    reply = endpoint.chat(chat, temperature=0.7, max_tokens=MAX_TOKENS, seed=seed)
    return checked(kind, reply, document)


def _chat(rules: str, document: str, task: str = "") -> list[dict]:
    content = f"<document>\n{document}\n</document>{task}"
    return [{"role": "system", "content": rules}, {"role": "user", "content": content}]


def checked(kind: str, reply: str, document: str) -> dict:
    """Question, answer, aliases, evidence and points of a model's reply.

    Raises BadRow where something is missing, or the document lacks what should stand in it.
    """
    found = parse_object(reply)
    question, answer = (_text(found.get(name), name) for name in ("question", "answer"))
    evidence = _texts(found.get("evidence"), "evidence")
    squeezed = _squeeze(document)
    for sentence in evidence:
        if len(sentence.split()) < 3 or _squeeze(sentence) not in squeezed:
            raise BadRow("evidence not in the document", repr(sentence[:80]))
    asked = {"question": question, "answer": answer, "evidence": evidence, "points": []}
    if kind != "long_form":
        if len(answer.split()) > 12:
            raise BadRow("answer too long", f"{len(answer.split())} words")
        extra = found.get("aliases")
        extra = [a for a in extra if isinstance(a, str) and a] if isinstance(extra, list) else []
        return asked | {"aliases": list(dict.fromkeys([answer, *extra]))}
    return asked | {"aliases": [answer], "points": _points(found, answer, document)}


def _points(found: dict, answer: str, document: str) -> list[list[str]]:
    """The points of a list, one per line, so that the answer covers them all."""
    points, lines = found.get("points"), answer.split("\n")
    if not isinstance(points, list) or len(points) < 3:
        raise BadRow("too few points", repr(points)[:80])
    if len(points) != len(lines) or not all(line.startswith("- ") for line in lines):
        raise BadRow("not one line per point", f"{len(points)} points, {len(lines)} lines")
    for point, line in zip(points, lines, strict=True):
        phrases = _texts(point, "point")
        if not all(_contains(document, phrase) for phrase in phrases):
            raise BadRow("point not in the document", repr(phrases)[:80])
        if not all(_contains(line, phrase) for phrase in phrases):
            raise BadRow("point not in its line", repr(phrases)[:80])
    return points


def judge(endpoint: Endpoint, asked: dict, document: str, seed: int) -> None:
    """Have a question judged. Raises BadRow unless the verdict is "supported"."""
    task = f"\n\nQuestion: {asked['question']}\nProposed answer: {asked['answer']}"
    reply = endpoint.chat(_chat(JUDGE, document, task), max_tokens=MAX_TOKENS, seed=seed)
    found = parse_object(reply)
    verdict = found.get("verdict")
    if verdict not in ("supported", "unsupported", "ambiguous"):
        raise BadRow("no verdict", repr(verdict)[:80])
    if verdict != "supported":
        raise BadRow(f"judged {verdict}", str(found.get("reason", ""))[:200])


def row_of(entry: dict, document: str) -> dict:
    """A row like those that are made without a model."""
    kind, answer, evidence = entry["kind"], entry["answer"], entry["evidence"]
    if kind == "long_form":
        words = len(answer.split())
        low, high = words // 3, 3 * words
        rule = (
            'Write a list, one fact a line, each line beginning with "- ", of between '
            f"{low} and {high} words, and nothing else."
        )
        reference = shown = answer
        wanted = {"form": "bullets", "min_words": low, "max_words": high}
    else:
        rule, shown, wanted = ANSWER.format("the answer"), f"Answer: {answer}", {}
        reference = "\n".join([*evidence, shown])
    made = row(
        document=document,
        source=entry["name"],
        language="",
        question=f"{entry['question']} {rule}",
        answer=answer,
        family=kind,
        task="asked",
        reward=REWARDS[kind],
        evidence="\n".join(evidence),
        reference=reference,
        aliases=entry["aliases"],
        passages=evidence,
        points=entry["points"],
        hops=len(evidence),
        **wanted,
    )
    return made | {"id": f"asked-{kind}-{entry['number']}", "seed": 0, "privileged": shown}


def parse_object(text: str) -> dict:
    """Read the JSON object in a model's answer, also inside a code fence; BadRow without one."""
    start, end = text.find("{"), text.rfind("}")
    try:
        return json.loads(text[start : end + 1])
    except ValueError as error:
        raise BadRow("no JSON in the answer", f"{error}; got {text[:120]!r}") from None


def _text(value, name: str) -> str:
    value = str(value) if isinstance(value, int | float) else value
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"no {name}", repr(value)[:80])
    return value.strip()


def _texts(values, name: str) -> list[str]:
    if not isinstance(values, list) or not values:
        raise BadRow(f"no {name}", repr(values)[:80])
    return [_text(value, name) for value in values]


def _contains(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as whole words, white space and case aside."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


def _squeeze(text: str) -> str:
    return " ".join(text.split())
