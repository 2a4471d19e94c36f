"""Code: where something is defined and where a chain of calls leads, in real source files."""

import ast
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dgrpo.longblocks.tasks.corpus import Corpus
from dgrpo.longblocks.tasks.facts import Ground, Woven, pick, row

FAMILY = "code"
ANSWER = 'End with a line that says "Answer: " and then {what} alone.'
ATTEMPTS = 400


@dataclass(frozen=True)
class CodeFile:
    """A Python file.

    Attributes:
        name: its path in the haystack.
        text: its source.
        cuts: positions at which it may be cut off.
        totals: tokens before each of them.
    """

    name: str
    text: str
    cuts: tuple[int, ...]
    totals: tuple[int, ...]

    def head(self, room: int) -> tuple[str, int]:
        """The longest beginning of at most `room` tokens, and its tokens."""
        n = int(np.searchsorted(self.totals, room, side="right")) - 1
        return (self.text[: self.cuts[n]], self.totals[n]) if n > 0 else ("", 0)


def code_files(corpus: Corpus) -> list[CodeFile]:
    """The Python files of a corpus, with the token counts that it has of them."""
    files = []
    for name, first, last in corpus.files:
        if name.endswith(".py"):
            units = [corpus.text(unit, unit + 1) for unit in range(first, last)]
            cuts = np.cumsum([0, *map(len, units)]).tolist()
            totals = (corpus.totals[first : last + 1] - corpus.totals[first]).tolist()
            files.append(CodeFile(name, "".join(units), tuple(cuts), tuple(totals)))
    return files


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
    nodes = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    every = [
        n.name
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
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
            listed = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs]
            listed += [a.kwarg] if a.kwarg else []
            parameters = tuple(p.arg for p in listed)
            found[node.name] = _Function(node.name, text, parameters, calls)
    return found


def definition(ground: Ground, rng: np.random.Generator, tokens: int) -> dict:
    """Where a function is defined, or which parameters it has."""
    where = bool(rng.integers(2))

    def choose(file: CodeFile):
        found = [f for f in _functions(file).values() if where or len(f.parameters) > 1]
        return [found[pick(rng, 0, len(found) - 1)]] if found else None

    def ask(file: CodeFile, chain: list[_Function]):
        name = chain[0].name
        if where:
            question = f"In which file of this document is the function `{name}` defined?"
            return question, file.name, [], "the file's path"
        question = (
            f"Which parameters does the function `{name}` have, in the order of its definition?"
        )
        wrong = [p for f in _functions(file).values() for p in [", ".join(f.parameters)]]
        answer = ", ".join(chain[0].parameters)
        return question, answer, wrong, "their names, separated by commas,"

    return _code_row(ground, rng, tokens, "definition", choose, ask)


def call_chain(ground: Ground, rng: np.random.Generator, tokens: int) -> dict:
    """Follow 2 to 4 calls through functions that each use exactly one other of their file."""
    hops = pick(rng, 2, 4)

    def choose(file: CodeFile):
        functions = _functions(file)
        for name in rng.permutation(sorted(functions)):
            chain = [functions[str(name)]]
            while len(chain) <= hops and len(chain[-1].calls) == 1:
                following = functions[next(iter(chain[-1].calls))]
                if following in chain:
                    break
                chain.append(following)
            if len(chain) > 2:
                return chain[: hops + 1]
        return None

    def ask(file: CodeFile, chain: list[_Function]):
        times = len(chain) - 1
        question = (
            f"The function `{chain[0].name}` refers to exactly one other function that its file "
            f"defines at the top level; that function refers to exactly one in turn. Following "
            f"such references {times} times from `{chain[0].name}`, which function is reached?"
        )
        wrong = [f.name for f in chain[:-1]] + [n for n in _functions(file) if n != chain[-1].name]
        return question, chain[-1].name, wrong, "the function's name"

    return _code_row(ground, rng, tokens, "call_chain", choose, ask)


def _code_row(ground: Ground, rng, tokens: int, task: str, choose, ask) -> dict:
    for _ in range(ATTEMPTS):
        file = ground.files[pick(rng, 0, len(ground.files) - 1)]
        chain = choose(file)
        if not chain:
            continue
        question, answer, wrong, what = ask(file, chain)
        if sum(_plain(w) == _plain(answer) for w in {answer, *wrong}) > 1:
            continue  # names that differ by underscores or case, which rewards do not see
        question = f"{question} {ANSWER.format(what=what)}"
        needed = "\n\n\n".join(f.text for f in _in_file_order(file, chain))
        text = f"# File: {file.name}\n{needed}\n\n\n"
        room = tokens - ground.count(text) - ground.count("\n\n" + question) - 8
        if room < tokens // 8:
            continue
        woven = _surrounded(ground, rng, file, text, room, tokens)
        if _told_once(woven.text, text, chain):
            return row(
                woven,
                gold=1,
                family=FAMILY,
                task=task,
                question=question,
                answer=answer,
                reward="exact_match",
                reference="\n".join([f"In {file.name}:", *_steps(chain), f"Answer: {answer}"]),
                evidence=text.rstrip(),
                aliases=[answer],
                distractors=[w for w in wrong if w and w != answer][:8],
                hops=len(chain),
            )
    raise ValueError(
        f"haystack: no {task} task of {tokens} tokens found in {ATTEMPTS} tries over "
        f"{len(ground.files)} Python files; give more code, or ask for longer documents"
    )


def _plain(name: str) -> str:
    return name.strip("_").casefold()


def _surrounded(ground, rng, file: CodeFile, text: str, room: int, tokens: int) -> Woven:
    """The text at a uniformly random depth between beginnings of other files."""
    goal = float(rng.random())
    pieces, lengths = [], []
    for share in (int(goal * room), room - int(goal * room)):
        side, used = [], 0
        while used < share:
            other = ground.files[pick(rng, 0, len(ground.files) - 1)]
            if other.name == file.name and len(ground.files) > 1:
                continue
            header = f"# File: {other.name}\n"
            cost = ground.count(header) + 2
            body, length = other.head(share - used - cost)
            if not body:
                break
            side.append(f"{header}{body.rstrip()}\n\n\n")
            used += cost + length
        pieces.append("".join(side))
        lengths.append(used)
    total = sum(lengths) or 1
    document = (pieces[0] + text + pieces[1]).rstrip("\n")
    return Woven(document, tokens - room + sum(lengths), [lengths[0] / total], [])


def _told_once(document: str, text: str, chain: list[_Function]) -> bool:
    """Whether the rest of the document defines none of the functions."""
    names = "|".join(re.escape(f.name) for f in chain)
    rest = document.replace(text.rstrip("\n"), "", 1)
    return not re.search(rf"\b(?:def|class) +(?:{names})\b", rest)


def _in_file_order(file: CodeFile, chain: list[_Function]) -> list[_Function]:
    order = list(_functions(file))
    return sorted(chain, key=lambda f: order.index(f.name))


def _steps(chain: list[_Function]) -> list[str]:
    if len(chain) == 1:
        return [f"{chain[0].name}({', '.join(chain[0].parameters)})"]
    pairs = zip(chain[:-1], chain[1:], strict=True)
    return [f"{a.name} refers to {b.name}" for a, b in pairs]
