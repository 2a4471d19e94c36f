r"""Rollouts to read: `rollouts/step-00000012-00000.jsonl.gz`, one file per step and rank.

A line is a rollout, a JSON object. Always there:

    step, group, index     ints: optimiser step, prompt within the step, rollout of the prompt
    prompt                 the prompt as text; a long one has its middle left out
    prompt_tokens          its length in tokens
    tokens                 (C,) token ids of the completion
    text                   (C,) strings that join to the completion; a token that ends within a
                           character has "", the token that completes it the whole character
    reward                 a number, or null where the reward failed

and, where the run has them: `rewards` (by name), `finish_reason`, `tags`, and per token,
(C,) lists, null where not finite: `advantage`, `divergence` (KL to the teacher, nats), `clipped`
(0 or 1), `ratio`, `entropy`, `logprob`, `teacher_logprob`, `loss` (0 where the token has no loss).
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dgrpo.distributed import ranks
from dgrpo.extras import whole_file
from dgrpo.trainer.batch import Sample
from dgrpo.trainer.config.run import ROLLOUTS

_NAME = re.compile(r"step-(\d+)-\d+\.jsonl\.gz")
_PROMPT_CHARACTERS = 8000
PER_TOKEN = "advantage divergence clipped ratio entropy logprob teacher_logprob loss".split()


def token_pieces(tokenizer: Any, ids: Sequence[int], window: int = 8) -> list[str]:
    """The text that each token adds; the pieces join to the decoded sequence.

    A character belongs to the token that completes it. Each token is decoded with a window of those
    before it, as spaces depend on them; the cost is linear in the length.
    """

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ids = [int(i) for i in ids]
    pieces, start, before = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        # A replacement character at the end is an incomplete character, unless it stays so.
        unfinished = text.endswith("\ufffd") and end < len(ids) and end - start < window + 4
        if unfinished or not text.startswith(before):
            pieces.append("")
            if unfinished:
                continue
        else:
            pieces.append(text[len(before) :])
        before = text
        if end - start >= window:
            start, before = end - window // 2, decode(ids[end - window // 2 : end])
    return pieces


def rollout_record(
    tokenizer: Any, step: int, sample: Sample, values: Mapping[str, torch.Tensor | None]
) -> dict[str, Any]:
    """One rollout as a line of the file; `values` by their names in it."""
    prompt, tokens = sample.prompt_ids.tolist(), sample.completion_ids.tolist()
    scored, sampled = sample.scored, sample.sampled
    parts = scored.parts if scored else {}
    optional = {
        "rewards": {name: _number(value) for name, value in parts.items()} or None,
        "finish_reason": "length" if sampled and sampled.truncated else "stop",
        "tags": sample.origin and vars(sample.origin),
        **{name: _per_token(name, values.get(name), len(tokens)) for name in PER_TOKEN},
    }
    return {
        "step": step,
        "group": sample.group,
        "index": sample.index,
        "prompt": _shortened(tokenizer.decode(prompt, skip_special_tokens=False)),
        "prompt_tokens": len(prompt),
        "tokens": tokens,
        "text": token_pieces(tokenizer, tokens),
        "reward": _number(scored.reward) if scored else None,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _per_token(name: str, values: torch.Tensor | None, count: int) -> list | None:
    if values is None:
        return None
    if len(values) != count:
        raise ValueError(
            f"{name}: got {len(values)} values, expected one for each of {count} tokens"
        )
    return [_number(number) for number in values.tolist()]


def _number(value: float) -> float | int | None:
    """Five digits are enough to read; a whole number is written as one."""
    value = float(value)
    if not math.isfinite(value):
        return None
    value = float(f"{value:.5g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _shortened(text: str) -> str:
    left_out = len(text) - _PROMPT_CHARACTERS
    if left_out <= 0:
        return text
    half = _PROMPT_CHARACTERS // 2
    return f"{text[:half]}\n… {left_out:,} characters left out …\n{text[-half:]}"


def write_rollouts(
    folder: str | Path, step: int, records: Sequence[Mapping[str, Any]]
) -> Path | None:
    """Writes this rank's rollouts of a step, atomically; nothing for none. Not collective."""
    if not records:
        return None
    path = Path(folder) / ROLLOUTS / f"step-{step:08d}-{ranks().rank:05d}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(r, ensure_ascii=False, separators=(",", ":")) + "\n" for r in records)
    with whole_file(path) as temporary, temporary.open("wb") as raw:
        # No time stamp in the header: equal runs write equal files.
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            file.writelines(line.encode("utf-8", "replace") for line in lines)
    return path


def cut_rollouts(folder: Path, step: int) -> None:
    """Removes the rollouts of steps after `step`."""
    for path in (folder / ROLLOUTS).glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match.group(1)) > step:
            path.unlink(missing_ok=True)
