"""Code: where something is defined and where a chain of calls leads, in real source files."""

import ast
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from dgrpo.longblocks.tasks.corpus import CodeFile
from dgrpo.longblocks.tasks.facts import ANSWER, Draft, Woven, row

ATTEMPTS = 400


@dataclass(frozen=True)
class _Function:
    name: str
    text: str
    parameters: tuple[str, ...]
    calls: frozenset  # functions of the same file, at its top level


@lru_cache(maxsize=4096)
def _functions(file: CodeFile) -> dict[str, _Function]:
    """The top-level functions that a file defines exactly once."""
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError, RecursionError):
        return {}
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in tree.body if isinstance(n, functions)]
    every = [n.name for n in ast.walk(tree) if isinstance(n, (*functions, ast.ClassDef))]
    names = {n.name for n in nodes if every.count(n.name) == 1}
    lines = file.text.split("\n")
    found = {}
    for node in nodes:
        if node.name in names:
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            calls = frozenset({n.id for n in inner} & names - {node.name})
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            text = "\n".join(lines[first - 1 : node.end_lineno])
            a = node.args
            listed = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
            parameters = tuple(p.arg for p in listed if p)
            found[node.name] = _Function(node.name, text, parameters, calls)
    return found


def definition(draft: Draft) -> dict:
    """Where a function is defined, or which parameters it has."""
    where = bool(draft.rng.integers(2))

    def ask(file: CodeFile):
        functions = _functions(file).values()
        found = [f for f in functions if where or len(f.parameters) > 1]
        if not found:
            return None
        chosen = draft.choose(found)
        if where:
            question = f"In which file of this document is the function `{chosen.name}` defined?"
            return [chosen], question, file.name, [], "the file's path"
        question = (
            f"Which parameters does the function `{chosen.name}` have, in the order of its "
            "definition?"
        )
        wrong = [", ".join(f.parameters) for f in functions]
        what = "their names, separated by commas,"
        return [chosen], question, ", ".join(chosen.parameters), wrong, what

    return _code_row(draft, "definition", ask)


def call_chain(draft: Draft) -> dict:
    """Follow 2 to 4 calls through functions that each use exactly one other of their file."""
    hops = draft.pick(2, 4)

    def ask(file: CodeFile):
        functions = _functions(file)
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
            f"such references {len(chain) - 1} times from `{first}`, which function is reached?"
        )
        wrong = [f.name for f in chain[:-1]] + [name for name in functions if name != last]
        return chain, question, last, wrong, "the function's name"

    return _code_row(draft, "call_chain", ask)


def _code_row(draft: Draft, task: str, ask) -> dict:
    """A row about a file of which `ask` gives functions, question, answer, wrong ones, its kind."""

    def plain(name: str) -> str:  # what is left of a name after a reward's normalisation
        return name.strip("_").casefold()

    tokens, files = draft.tokens, (draft.ground.code or draft.ground.corpus).code
    for _ in range(ATTEMPTS):
        file = draft.choose(files)
        if (asked := ask(file)) is None:
            continue
        chain, question, answer, wrong, what = asked
        if sum(plain(w) == plain(answer) for w in {answer, *wrong}) > 1:
            continue
        question = f"{question} {ANSWER.format(what)}"
        needed = "\n\n\n".join(f.text for f in _functions(file).values() if f in chain)
        text = f"# File: {file.name}\n{needed}\n\n\n"
        room = tokens - draft.count(text) - draft.count("\n\n" + question) - 8
        if room < tokens // 8:
            continue
        woven = _surrounded(draft, files, file, text, room)
        if _told_once(woven.text, text, chain):
            steps = [f"{a.name} refers to {b.name}" for a, b in pairwise(chain)]
            steps = steps or [f"{chain[0].name}({', '.join(chain[0].parameters)})"]
            return row(
                woven,
                gold=[text.rstrip()],
                question=question,
                answer=answer,
                reward="exact_match",
                reference="\n".join([f"In {file.name}:", *steps, f"Answer: {answer}"]),
                aliases=[answer],
                distractors=[w for w in wrong if w and w != answer][:8],
                hops=len(chain),
            )
    raise ValueError(
        f"haystack: no {task} task of {tokens} tokens found in {ATTEMPTS} tries over "
        f"{len(files)} Python files; give more code, or ask for longer documents"
    )


def _surrounded(draft, files: list[CodeFile], file: CodeFile, text: str, room: int) -> Woven:
    """The text at a uniformly random depth between beginnings of other files."""
    goal = float(draft.rng.random())
    pieces, lengths = [], []
    for share in (int(goal * room), room - int(goal * room)):
        side, used = [], 0
        while used < share:
            other = draft.choose(files)
            if other.name == file.name and len(files) > 1:
                continue
            header = f"# File: {other.name}\n"
            cost = draft.count(header) + 2
            body, length = other.head(share - used - cost)
            if not body:
                break
            side.append(f"{header}{body.rstrip()}\n\n\n")
            used += cost + length
        pieces.append("".join(side))
        lengths.append(used)
    total = sum(lengths) or 1
    document = (pieces[0] + text + pieces[1]).rstrip("\n")
    return Woven(document, draft.tokens - room + sum(lengths), [lengths[0] / total], [])


def _told_once(document: str, text: str, chain: list[_Function]) -> bool:
    """Whether the rest of the document defines none of the functions."""
    names = "|".join(re.escape(f.name) for f in chain)
    rest = document.replace(text.rstrip("\n"), "", 1)
    return not re.search(rf"\b(?:def|class) +(?:{names})\b", rest)
