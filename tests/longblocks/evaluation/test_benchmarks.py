"""Files of public benchmarks, made here with exactly their columns."""

import json
import sys
import types

import pytest

from dgrpo.longblocks.evaluation import LOADERS, evaluate, lm_eval_scores
from dgrpo.text import Report

SAMPLES = {
    "longbench": (
        "hotpotqa.jsonl",
        {
            "input": "Who?",
            "context": "Ann did it.",
            "answers": ["Ann", "Anna"],
            "length": 3,
            "dataset": "hotpotqa",
            "language": "en",
            "all_classes": None,
            "_id": "x1",
        },
        "Answer: Anna",
        "Answer: Bob",
    ),
    "infinitebench": (
        "longbook_choice_eng.jsonl",
        {"id": 3, "context": "Text", "input": "Q?", "answer": ["two"], "options": ["one", "two"]},
        "The answer is B",
        "The answer is (A).",
    ),
    "longbench_v2": (
        "data.json",
        {
            "_id": "y",
            "domain": "d",
            "sub_domain": "s",
            "difficulty": "easy",
            "length": "short",
            "question": "Q?",
            "choice_A": "a",
            "choice_B": "b",
            "choice_C": "c",
            "choice_D": "d",
            "answer": "C",
            "context": "Text",
        },
        "I think so.\nAnswer: C",
        "A B C D",
    ),
    "gsm8k": (
        "test.jsonl",
        {"question": "1000+72?", "answer": "It is <<1000+72=1072>>1072\n#### 1,072"},
        "so it is 1,072",
        "Answer: 72",
    ),
    "mmlu_pro": (
        "test.jsonl",
        {
            "question_id": 7,
            "question": "Q?",
            "options": ["a", "b", "c", "N/A"],
            "answer": "B",
            "answer_index": 1,
            "cot_content": "",
            "category": "law",
            "src": "",
        },
        "A is wrong, so the answer is (B).",
        "Answer: D",
    ),
    "ifeval": (
        "input.jsonl",
        {
            "key": 1,
            "prompt": "Write without commas, at least 3 words.",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"relation": "at least", "num_words": 3, "language": None}],
        },
        "one two three",
        "one, two three",
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_becomes_rows_that_right_answers_solve(tmp_path, name):
    file, row, right, wrong = SAMPLES[name]
    content = json.dumps([row]) if file.endswith(".json") else json.dumps(row)
    (tmp_path / file).write_text(content)
    rows = list(LOADERS[name](tmp_path / file))
    assert len(rows) == 1 and rows[0]["prompt"] and rows[0]["max_tokens"]
    for text, score in ((right, 1.0), (wrong, 0.0)):
        results = evaluate(lambda prompts, n, text=text: [text], rows)
        assert [item.score for item in results.items] == [score], results.failures


@pytest.mark.parametrize("name", LOADERS)
def test_bad_rows_are_counted(tmp_path, name):
    file, row, _, _ = SAMPLES[name]
    file = file.replace(".json", ".jsonl").replace(".jsonll", ".jsonl")
    (tmp_path / file).write_text("\n".join([json.dumps(row), "{", '{"x": 1}', "3"]))
    report = Report(log=lambda line: None)
    assert len(list(LOADERS[name](tmp_path / file, report=report))) == 1
    assert report.dropped == 3 and report.kept == 1


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("longbench", {"dataset": "other"}, "unknown data set"),
        ("infinitebench", {"answer": ["three"]}, "the answer is no option"),
        ("longbench_v2", {"answer": "E"}, "the answer is no option"),
        ("longbench_v2", {"answer": "AB"}, "the answer is no option"),
        ("gsm8k", {"answer": "42"}, "no number after ####"),
        ("mmlu_pro", {"answer": "D"}, "the answer is no option"),
        ("ifeval", {"kwargs": [{}]}, "as many kwargs"),
    ],
)
def test_rows_that_make_no_sense_say_why(tmp_path, name, change, reason):
    file, row, _, _ = SAMPLES[name]
    file = "longbook_choice_eng.jsonl" if name == "infinitebench" else "a.jsonl"
    (tmp_path / file).write_text(json.dumps(row | change))
    report = Report(log=lambda line: None)
    assert not list(LOADERS[name](tmp_path / file, report=report))
    assert reason in report.summary()


def test_lm_eval_is_used_where_it_is_installed(monkeypatch):
    seen = {}

    def simple_evaluate(**options):
        seen.update(options)
        metrics = {"alias": "gsm8k", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1}
        return {"results": {"gsm8k": metrics}, "n-samples": {"gsm8k": {"effective": 40}}}

    monkeypatch.setitem(
        sys.modules, "lm_eval", types.SimpleNamespace(simple_evaluate=simple_evaluate)
    )
    found = lm_eval_scores("folder", ["gsm8k"], dtype="float32")
    assert seen["model_args"] == "pretrained=folder,dtype=float32"
    score = found["gsm8k/exact_match (strict)"]
    assert (score.mean, score.n) == (0.5, 40) and abs(score.low - 0.304) < 1e-9
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install lm-eval"):
        lm_eval_scores("folder", ["gsm8k"])
