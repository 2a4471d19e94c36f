"""Rows from the files of public benchmarks that a user has.

Long context: LongBench (arXiv 2308.14508), ∞Bench (2402.13718), LongBench v2 (2412.15204). Short
context, to see what training has cost elsewhere: GSM8K, MMLU-Pro, IFEval. The prompts are worded
here. Each reader takes a file or a folder of them; `report` counts the rows that are left out.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_uppercase as LETTERS

from dgrpo.data import load_rows
from dgrpo.text import BadRow, Report

SCORES = "dgrpo.longblocks.evaluation.scores"
SHORT = 'Answer as briefly as you can. End with a line that says "Answer: " and the answer.'
PARAGRAPH = "Which paragraph is this of? Give its number."
LINE = "Write the next line of the code and nothing else."
LETTER = 'End with a line that says "Answer: " and the letter alone.'
WORDS = "narrativeqa multifieldqa_en hotpotqa 2wikimqa musique triviaqa".split()
LONGBENCH = {
    **dict.fromkeys(WORDS, ("word_f1", SHORT)),
    "qasper": ("word_f1", SHORT + ' If the text does not say it, the answer is "unanswerable".'),
    "multifieldqa_zh": ("character_f1", SHORT),
    "dureader": ("rouge_l", "Answer in Chinese."),
    "gov_report": ("rouge_l", "Write a one-page summary of this report."),
    "qmsum": ("rouge_l", "Answer the question about this meeting in a few sentences."),
    "multi_news": ("rouge_l", "Write a one-page summary of these news."),
    "vcsum": ("rouge_l", "Write a summary of this meeting in Chinese."),
    "trec": ("class_name", "Give the type of the last question and nothing else."),
    "samsum": ("rouge_l", "Summarise the last dialogue in one or two sentences, as before."),
    "lsht": ("class_name", "Give the category of the last news and nothing else."),
    "passage_count": ("same_number", "How many different paragraphs are there? Give the number."),
    **dict.fromkeys(["passage_retrieval_en", "passage_retrieval_zh"], ("same_number", PARAGRAPH)),
    **dict.fromkeys(["lcc", "repobench-p"], ("code_similarity", LINE)),
}
SUMMARIES = {"gov_report": 512, "multi_news": 512, "vcsum": 512, "qmsum": 256, "dureader": 256}
CONTAINED = "passkey number_string kv_retrieval longdialogue_qa_eng code_run math_find".split()
INFINITEBENCH = {
    **dict.fromkeys(CONTAINED, ("contained", SHORT)),
    "longbook_qa_eng": ("word_f1", SHORT),
    "longbook_qa_chn": ("character_f1", SHORT),
    "longbook_sum_eng": ("rouge_l", "Write a summary of the book of about 1000 words."),
    "longbook_choice_eng": ("choice", LETTER),
    "code_debug": ("choice", LETTER),
    "math_calc": ("number_list", "Give the values after each step as a list of numbers."),
}


def _loader(make: Callable[[dict, str], dict]) -> Callable[..., Iterator[dict]]:
    """Turn a function of one row into a reader of all rows at a path."""

    def load(path: str | Path, *, report: Report | None = None) -> Iterator[dict]:
        report = report or Report()
        found = load_rows(path, split="test", report=report)
        for index in range(len(found)):
            where = found.where(index)
            try:
                row = make(found[index], where)
            except BadRow as problem:
                report.drop(problem, where)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                report.drop(BadRow("malformed row", f"{type(error).__name__}: {error}"), where)
            else:
                report.kept += 1
                yield row

    load.__name__, load.__doc__ = make.__name__, make.__doc__
    return load


@_loader
def load_longbench(row: dict, where: str) -> dict:
    """Rows of LongBench: `input, context, answers, length, dataset, language, all_classes, _id`."""
    name = re.sub(r"_e$", "", str(row.get("dataset") or Path(where.rpartition(":")[0]).stem))
    if name not in LONGBENCH:
        raise BadRow("unknown data set", name)
    score, instruction = LONGBENCH[name]
    return {
        "answers": [str(a) for a in _needed(row, "answers")],
        "id": str(row.get("_id") or where),
        "task": name,
        "prompt": _joined(_needed(row, "context"), row.get("input"), instruction),
        "classes": row.get("all_classes") or [],
        "language": row.get("language") or "en",
        "reward": f"{SCORES}:{score}",
        "max_tokens": SUMMARIES.get(name, 128),
    }


@_loader
def load_infinitebench(row: dict, where: str) -> dict:
    """Rows of ∞Bench: `id, context, input, answer, options`, the task being the file's name."""
    name = Path(where.rpartition(":")[0]).stem
    name = next((task for task in INFINITEBENCH if name.startswith(task)), name)
    if name not in INFINITEBENCH:
        raise BadRow("unknown task", f"{name}; the file's name says which task it is")
    score, instruction = INFINITEBENCH[name]
    answers = _needed(row, "answer")
    answers = [str(a) for a in (answers if isinstance(answers, list) else [answers])]
    question = row.get("input") or ""
    made = {"answers": answers}
    if score == "choice":
        options = _needed(row, "options")
        if answers[0] not in options:
            raise BadRow("the answer is no option", answers[0][:80])
        made |= {"answer": LETTERS[options.index(answers[0])], "chance": 1 / len(options)}
        question = _joined(question, _listed(options))
    return made | {
        "id": f"{name}-{row.get('id', where)}",
        "task": name,
        "prompt": _joined(_needed(row, "context"), question, instruction),
        "language": "zh" if name.endswith("_chn") else "en",
        "reward": f"{SCORES}:{score}",
        "max_tokens": {"longbook_sum_eng": 1200, "math_calc": 30_000}.get(name, 128),
    }


@_loader
def load_longbench_v2(row: dict, where: str) -> dict:
    """Rows of LongBench v2: `_id, domain, difficulty, length, question, choice_A …, answer, …`."""
    options = [_needed(row, f"choice_{letter}") for letter in "ABCD"]
    chosen = _choice(row, options)
    question = _joined(_needed(row, "question"), _listed(options))
    return chosen | {
        "id": str(row.get("_id") or where),
        "task": f"longbench_v2 {row.get('length') or ''}".strip(),
        "prompt": _joined(_needed(row, "context"), question, LETTER),
        "max_tokens": 512,
    }


@_loader
def load_gsm8k(row: dict, where: str) -> dict:
    """Rows of GSM8K: `question, answer`, the answer ending in `#### 42`."""
    number = re.search(r"####\s*(-?[\d,.]+)", _needed(row, "answer"))
    if number is None:
        raise BadRow("no number after ####")
    return {
        "id": where,
        "task": "gsm8k",
        "prompt": f"{_needed(row, 'question')}\n\nThink step by step. End with a line that "
        'says "Answer: " and the number alone.',
        "aliases": [number[1].replace(",", "").rstrip(".")],
        "reward": "dgrpo.rewards:final_number",
        "max_tokens": 1024,
    }


@_loader
def load_mmlu_pro(row: dict, where: str) -> dict:
    """Rows of MMLU-Pro: `question_id, question, options, answer, category`."""
    options = [option for option in _needed(row, "options") if option != "N/A"]
    rules = f"Think step by step. {LETTER}"
    return _choice(row, options) | {
        "id": f"mmlu_pro-{row.get('question_id', where)}",
        "task": "mmlu_pro",
        "prompt": _joined(_needed(row, "question"), _listed(options), rules),
        "max_tokens": 1024,
    }


@_loader
def load_ifeval(row: dict, where: str) -> dict:
    """Rows of IFEval: `key, prompt, instruction_id_list, kwargs`."""
    names = _needed(row, "instruction_id_list")
    arguments = row.get("kwargs") or []
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if len(arguments) != len(names):
        raise BadRow("as many kwargs as instructions expected", f"{len(arguments)}")
    return {
        "id": f"ifeval-{row.get('key', where)}",
        "task": "ifeval",
        "prompt": _needed(row, "prompt"),
        "instruction_ids": names,
        "arguments": arguments,
        "reward": f"{SCORES}:instructions",
        "max_tokens": 1280,
    }


LOADERS: dict[str, Callable[..., Iterator[dict]]] = {
    "longbench": load_longbench,
    "infinitebench": load_infinitebench,
    "longbench_v2": load_longbench_v2,
    "gsm8k": load_gsm8k,
    "mmlu_pro": load_mmlu_pro,
    "ifeval": load_ifeval,
}


def _needed(row: dict, name: str):
    if row.get(name) in (None, "", []):
        raise BadRow("missing column", name)
    return row[name]


def _choice(row: dict, options: list[str]) -> dict:
    """The columns of a multiple choice whose right letter is `answer`."""
    answer = str(_needed(row, "answer")).strip().upper()
    if answer not in [*LETTERS[: len(options)]]:
        raise BadRow("the answer is no option", answer[:80])
    return {"answer": answer, "chance": 1 / len(options), "reward": f"{SCORES}:choice"}


def _joined(*parts: str | None) -> str:
    return "\n\n".join(part for part in parts if part)


def _listed(options: list[str]) -> str:
    return "\n".join(f"{a}. {option}" for a, option in zip(LETTERS, options, strict=False))
