"""Code: where something is defined and where a chain of calls leads, in real source files."""

import ast
import re
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from dgrpo.longblocks.tasks.corpus import Corpus
from dgrpo.longblocks.tasks.facts import ANSWER, Draft, Woven, row

ATTEMPTS = 400


class _Function(NamedTuple):
    name: str
    text: str
    parameters: tuple[str, ...]
    calls: frozenset  # functions of the same file, at its top level


@lru_cache(maxsize=4096)
def _functions(corpus: Corpus, first: int, last: int) -> dict[str, _Function]:
    """The top-level functions that a file, given by its units, defines exactly once."""
    text = corpus.text(first, last)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return {}
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in tree.body if isinstance(n, functions)]
    every = [n.name for n in ast.walk(tree) if isinstance(n, (*functions, ast.ClassDef))]
    names = {n.name for n in nodes if every.count(n.name) == 1}
    lines, found = text.split("\n"), {}
    for node in nodes:
        if node.name in names:
            inner = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            a = node.args
            listed = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
            found[node.name] = _Function(
                node.name,
                text="\n".join(lines[start - 1 : node.end_lineno]),
                parameters=tuple(p.arg for p in listed if p),
                calls=frozenset(inner & names - {node.name}),
            )
    return found


def definition(draft: Draft) -> dict:
    """Where a function is defined, or which parameters it has."""
    where = bool(draft.rng.integers(2))

    def ask(file: str, functions: dict[str, _Function]):
        found = [f for f in functions.values() if where or len(f.parameters) > 1]
        if not found:
            return None
        chosen = draft.choose(found)
        if where:
            question = f"In which file of this document is the function `{chosen.name}` defined? "
            return [chosen], question + ANSWER.format("the file's path"), file, []
        question = (
            f"Which parameters does the function `{chosen.name}` have, in the order of its "
            f"definition? {ANSWER.format('their names, separated by commas,')}"
        )
        wrong = [", ".join(f.parameters) for f in functions.values()]
        return [chosen], question, ", ".join(chosen.parameters), wrong

    return _code_row(draft, "definition", ask)


def call_chain(draft: Draft) -> dict:
    """Follow 2 to 4 calls through functions that each use exactly one other of their file."""
    hops = draft.pick(2, 4)

    def ask(file: str, functions: dict[str, _Function]):
        for name in draft.rng.permutation(sorted(functions)):
            chain = [functions[str(name)]]
            while len(chain) <= hops and len(chain[-1].calls) == 1:
                following = functions[next(iter(chain[-1].calls))]
                if following in chain:
                    break
                chain.append(following)
            if len(chain) > 2:
                break
        else:
            return None
        first, last = chain[0].name, chain[-1].name
        question = (
            f"The function `{first}` refers to exactly one other function that its file "
            f"defines at the top level; that function refers to exactly one in turn. Following "
            f"such references {len(chain) - 1} times from `{first}`, which function is reached? "
            + ANSWER.format("the function's name")
        )
        wrong = [f.name for f in chain[:-1]] + [name for name in functions if name != last]
        return chain, question, last, wrong

    return _code_row(draft, "call_chain", ask)


def _code_row(draft: Draft, task: str, ask) -> dict:
    """A row about a file of which `ask` gives functions, question, answer and wrong answers."""

    def plain(name: str) -> str:  # what is left of a name after a reward's normalisation
        return name.strip("_").casefold()

    tokens, corpus = draft.tokens, draft.ground.code or draft.ground.corpus
    files = corpus.code
    for _ in range(ATTEMPTS):
        name, *units = draft.choose(files)
        functions = _functions(corpus, *units)
        if (asked := ask(name, functions)) is None:
            continue
        chain, question, answer, wrong = asked
        if sum(plain(w) == plain(answer) for w in {answer, *wrong}) > 1:
            continue
        needed = "\n\n\n".join(f.text for f in functions.values() if f in chain)
        text = f"# File: {name}\n{needed}\n\n\n"
        room = tokens - draft.count(text) - draft.count("\n\n" + question) - 8
        if room < tokens // 8:
            continue
        woven = _surrounded(draft, corpus, name, text, room)
        names = "|".join(re.escape(f.name) for f in chain)
        rest = woven.text.replace(text.rstrip("\n"), "", 1)
        if not re.search(rf"\b(?:def|class) +(?:{names})\b", rest):  # none is defined elsewhere
            steps = [f"{a.name} refers to {b.name}" for a, b in pairwise(chain)]
            steps = steps or [f"{chain[0].name}({', '.join(chain[0].parameters)})"]
            return row(
                woven,
                gold=[text.rstrip()],
                question=question,
                answer=answer,
                reward="exact_match",
                reference="\n".join([f"In {name}:", *steps, f"Answer: {answer}"]),
                aliases=[answer],
                distractors=[w for w in wrong if w and w != answer][:8],
                hops=len(chain),
            )
    tried = f"{ATTEMPTS} tries over {len(files)} Python files"
    way_out = "give more code, or ask for longer documents"
    raise ValueError(f"haystack: no {task} task of {tokens} tokens found in {tried}; {way_out}")


def _surrounded(draft, corpus: Corpus, own: str, text: str, room: int) -> Woven:
    """The text at a uniformly random depth between beginnings of other files."""
    goal = float(draft.rng.random())
    files, pieces, lengths = corpus.code, [], []
    for share in (int(goal * room), room - int(goal * room)):
        side, used = [], 0
        while used < share:
            name, first, last = draft.choose(files)
            if name == own and len(files) > 1:
                continue
            header = f"# File: {name}\n"
            cost = draft.count(header) + 2
            end = min(corpus.reach(first, share - used - cost), last)
            if end <= first:
                break
            side.append(f"{header}{corpus.text(first, end).rstrip()}\n\n\n")
            used += cost + corpus.before(end) - corpus.before(first)
        pieces.append("".join(side))
        lengths.append(used)
    total = sum(lengths) or 1
    document = (pieces[0] + text + pieces[1]).rstrip("\n")
    return Woven(document, draft.tokens - room + sum(lengths), [lengths[0] / total], [])
