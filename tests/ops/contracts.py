"""The calls that the tests of arguments share: every op by a short name, and what it raises."""

import re

import pytest
import torch

import dgrpo
from tests.ops.cases import case_of

N, V = 6, 101
CASE = case_of(N, V, masked=0.0)
OPS = ("dgrpo", "loss", "stats", "logprobs")


def given(**changed):
    return {"hidden": CASE.hidden, "weight": CASE.weight, "targets": CASE.targets, **changed}


def run(op, **changed):
    """One call of an op, by a short name; a scalar to differentiate."""
    if op == "dgrpo":
        arguments = {"advantages": CASE.advantages, **given(**changed)}
        return dgrpo.linear_dgrpo_loss(**arguments).loss
    if op == "loss":
        objective = changed.pop("objective", lambda s, rows: s.divergence - s.logprobs)
        return dgrpo.linear_loss(objective=objective, **given(**changed)).loss
    if op == "stats":
        return sum(dgrpo.linear_token_stats(**given(**changed))[:3]).sum()
    return dgrpo.linear_logprobs(**given(**changed)).logprobs.sum()


def raises(error, argument, words, call, *args, **options):
    with pytest.raises(error) as raised:
        call(*args, **options)
    text = str(raised.value)
    assert re.match(rf"{re.escape(argument)}: got ", text), text
    assert all(word in text for word in words.split()), text


def topk(**changed):
    own = {
        "token_ids": torch.arange(4).expand(N, 4).contiguous(),
        "logprobs": torch.full((N, 4), -2.0),
    }
    return dgrpo.TopKTeacher(**{**own, **changed})


def head_teacher(**changed):
    return dgrpo.TeacherHead(
        **{"hidden": CASE.teacher_hidden, "weight": CASE.teacher_weight, **changed}
    )
