"""What the processes of a comparison do: train, let the teacher answer, score."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dgrpo.longblocks.evaluation import evaluate
from dgrpo.longblocks.rewards import final_number
from dgrpo.longblocks.tasks.chains import rows, write
from dgrpo.trainer import train_stages
from dgrpo.trainer.config import RunSettings
from dgrpo.trainer.generate import Generator

BATCH = 256  # prompts completed at once
SCORES = "scores.json"
ANSWER_SEED = 1  # of the training prompts and the teacher's sampling; validation and test have 0


def train(stages: dict[str, RunSettings]) -> bool:
    """Each stage in order; False where a signal stopped one."""
    return not any(outcome.interrupted for outcome in train_stages(stages).values())


def answer(teacher: RunSettings, task: dict[str, Any], prompts: int, path: Path) -> bool:
    """Writes the training rows: prompts, and what the teacher samples for each at temperature 1.

    `completion` is the teacher's, `right` whether its number is the right one, `gold` the perfect
    completion. There are four times as many rows as `prompts`; those after them are `extra`.
    """
    count = 4 * prompts
    options = {**task, "split": "train", "seed": ANSWER_SEED, "count": count}
    made = list(rows(**options))
    generator = sampler(teacher, temperature=1.0)
    texts: list[str] = []
    for start in range(0, count, BATCH):
        part = [row["prompt"] for row in made[start : start + BATCH]]
        texts += generator(part, teacher.rollout.max_tokens)
    scores = final_number(None, texts, aliases=[row["aliases"] for row in made])
    found = [
        {**row, "gold": row["completion"], "completion": text, "right": bool(score)}
        for row, text, score in zip(made, texts, scores, strict=True)
    ]
    for number, row in enumerate(found):
        row["extra"] = number >= prompts
    write(path, found)
    print(f"{sum(scores):.0f} of {count} answers of the teacher are right")
    return True


def score(stage: RunSettings, task: dict[str, Any], count: int) -> bool:
    """Writes a model's right (1) and wrong (0) answers to the test prompts.

    Greedy ones to all, and ones sampled at temperature 1 to the first half.
    """
    path = Path(stage.out) / SCORES
    found: dict[str, Any] = {}
    for name, temperature, number in (("sampled", 1.0, max(1, count // 2)), ("greedy", 0.0, count)):
        test = rows(**{**task, "split": "test", "count": number})
        generator = sampler(stage, temperature)
        limit = stage.rollout.max_tokens
        results = evaluate(generator, test, batch_size=BATCH, max_tokens=limit)
        if results.failures:
            raise RuntimeError(f"{len(results.failures)} prompts failed: {results.failures[0]}")
        found[name] = "".join(str(int(item.score)) for item in results.items)
        found["documents"] = [item.cluster for item in results.items]
        print(f"{name}: {100 * found[name].count('1') / number:.1f} % of {number} right")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, path)
    return True


def train_and_score(stage: RunSettings, task: dict[str, Any], count: int) -> bool:
    """A method's run and its scores on the test prompts."""
    if not train({Path(stage.out).name: stage}):
        return False
    return (Path(stage.out) / SCORES).exists() or score(stage, task, count)


def sampler(stage: RunSettings, temperature: float) -> Generator:
    """What completes prompts with a stage's exported model, in fp32."""
    return Generator(
        f"{stage.out}/export", device=stage.device, dtype="float32", temperature=temperature, seed=1
    )
