"""Every generated item is solved by its reference answer and by no wrong one."""

import re

import numpy as np
import pytest

from dgrpo.longblocks import rewards
from dgrpo.longblocks.tasks.catalog import TASKS, MakeSettings, make_row
from dgrpo.longblocks.tasks.facts import Draft
from dgrpo.text import count_tokens

LENGTHS = (1500, 6000)


@pytest.fixture(scope="module")
def rows(ground):
    """Eight rows of each task, half of them short."""
    settings = MakeSettings(out="", tokens=LENGTHS, seed=3)
    found = [make_row(ground, settings, i) for i in range(8 * len(TASKS))]
    return {task: [row for row in found if row["id"].startswith(f"{task}-")] for task in TASKS}


def score(row, completion):
    function = getattr(rewards, row["reward"].removeprefix("dgrpo.rewards:"))
    columns = {name: [value] for name, value in row.items() if name != "reward"}
    found = function([row["document"]], [completion], **columns)
    return (found["reward"] if isinstance(found, dict) else found)[0]


def changed(row, value):
    """The reference answer with another value in its place."""
    return re.sub(r"Answer: .*", f"Answer: {value}", row["response_reference"])


def without_a_line(text):
    return "\n".join(text.split("\n")[:-1])


@pytest.mark.parametrize("task", TASKS)
def test_its_own_reference_solves_every_item(rows, task):
    assert len(rows[task]) == 8
    for row in rows[task]:
        assert score(row, row["answer"]) == 1.0
        assert score(row, row["response_reference"]) == 1.0
        assert score(row, f"Let me see.\n{row['response_reference']}") == 1.0 or task == "report"


@pytest.mark.parametrize("task", TASKS)
def test_no_wrong_answer_solves_an_item(rows, task):
    every = [row for many in rows.values() for row in many]
    for row in rows[task]:
        wrong = ["", "Answer:", row["document"], row["question"], "Answer: not known"]
        wrong += [other["answer"] for other in every if other["answer"] != row["answer"]]
        wrong += [changed(row, value) for value in row["distractors"]] if task != "report" else []
        wrong += [f"Answer: {value}" for value in row["distractors"]]
        if row["reward"].endswith("exact_match"):
            listed = ", ".join([row["answer"], *row["distractors"][:3], "another"])
            wrong += [f"Answer: {listed}"]
        for completion in wrong:
            assert score(row, completion) < 1.0, completion[:200]


@pytest.mark.parametrize("task", ["quoting", "contradicting", "superseded", "retrieval"])
def test_evidence_must_be_there_and_be_exact(rows, task):
    for row in rows[task]:
        reference, label = row["answer"], row["passage_ids"][0]
        wrong = [re.sub(r"\[P\d+\]", "[P99999]", reference)]
        if task == "retrieval":
            wrong.append(re.sub(r"\. .*", ".", reference))
            wrong.append(reference.split("\n")[-1])
        else:
            wrong.append(reference.replace("lighthouse", "castle"))
            wrong.append(reference.replace(f"[{label}]", f"[{label}] [P2] [P3]"))
            wrong.append(reference.split("\n")[0])
        for completion in wrong:
            assert score(row, completion) < 1.0


@pytest.mark.parametrize("task", TASKS)
def test_the_document_tells_what_is_needed(rows, task):
    for row in rows[task]:
        document = row["document"]
        for part in row["evidence"].split("\n\n" if row["passages"] else "\n"):
            assert part in document
        for text, label in zip(row["passages"], row["passage_ids"], strict=True):
            assert f"[{label}] {text}" in document
        for point in row["points"]:
            assert sum(all(p in line for p in point) for line in document.split("\n")) == 1
        if row["answerable"] and row["aliases"] and task not in ("counting", "definition"):
            assert row["aliases"][0] in document


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_met(rows, task, tokenizer):
    for number, row in enumerate(rows[task]):
        wanted = LENGTHS[number % 2]
        real = count_tokens(tokenizer, f"{row['document']}\n\n{row['question']}")
        assert 0.85 * wanted < real <= wanted, (task, wanted)
        assert abs(real - row["tokens"]) < 0.05 * wanted or not row["tokens"]


def test_rows_depend_on_seed_number_and_split_alone(ground):
    settings = MakeSettings(out="a", tokens=(2000,), seed=1)
    assert make_row(ground, settings, 5) == make_row(ground, settings, 5)
    others = [{"seed": 2}, {"split": "test"}]
    texts = {make_row(ground, settings, 5)["document"]}
    for change in others:
        other = MakeSettings(**{"out": "a", "tokens": (2000,), "seed": 1} | change)
        texts.add(make_row(ground, other, 5)["document"])
    assert len(texts) == 3


def kolmogorov_smirnov(values):
    """sqrt(n) times the largest distance to the uniform distribution; 1.63 is the 1 % level."""
    values, n = np.sort(values), len(values)
    steps = np.arange(n + 1) / n
    return np.sqrt(n) * max(np.max(steps[1:] - values), np.max(values - steps[:-1]))


@pytest.mark.parametrize("task", [task for task in TASKS if task != "unanswerable"])
def test_needle_depths_are_uniform(ground, task):
    settings = MakeSettings(out="", tasks=(task,), tokens=(8000,), seed=7)
    count = 60 if task in ("relations", "variable_tracing", "counting", "comparison") else 120
    depths = [d for i in range(count) for d in make_row(ground, settings, i)["depths"]]
    assert len(depths) >= 100 and kolmogorov_smirnov(np.array(depths)) < 1.63


def test_the_uniformity_test_can_fail():
    rng = np.random.default_rng(0)
    assert kolmogorov_smirnov(rng.random(200)) < 1.63
    assert kolmogorov_smirnov(rng.random(200) ** 1.5) > 1.63
    assert kolmogorov_smirnov(rng.random(200) * 0.8) > 1.63


def test_weaving_keeps_all_text_and_facts(ground):
    facts = [f"Fact number {i}." for i in range(9)]
    woven = Draft(ground, np.random.default_rng(0), 3000).weave(facts, "?")
    lines = woven.text.split("\n")
    assert [sum(line == f for line in lines) for f in facts] == [1] * 9
    order = sorted(range(9), key=lambda i: lines.index(facts[i]))
    assert [woven.depths[i] for i in order] == sorted(woven.depths)
    rest = "\n".join(line for line in lines if not line.startswith("Fact number"))
    assert rest in ground.corpus.text(0, 2 * len(ground.corpus))


def test_passages_are_numbered_in_order_and_facts_have_theirs(ground):
    facts = [f"Fact number {i}." for i in range(5)]
    woven = Draft(ground, np.random.default_rng(0), 3000).weave_passages(facts, "?")
    labels = re.findall(r"(?m)^\[P(\d+)\]", woven.text)
    assert labels == [str(i + 1) for i in range(len(labels))] and len(labels) > 20
    for fact, label in zip(facts, woven.labels, strict=True):
        assert f"[{label}] {fact}\n\n" in woven.text + "\n\n"


def test_names_do_not_repeat(ground):
    names = Draft(ground, np.random.default_rng(0), 1000)
    assert len({names.place().lower() for _ in range(3000)}) == 3000
    assert len({names.number(10, 60) for _ in range(50)}) == 50
    with pytest.raises(ValueError, match="no unused number"):
        names.number(10, 60)


def test_too_short_a_document_says_so(ground):
    settings = MakeSettings(out="", tasks=("superseded",), tokens=(500,))
    with pytest.raises(ValueError, match="ask for longer documents"):
        for i in range(20):
            make_row(ground, settings, i)
