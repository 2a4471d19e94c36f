"""Each bad argument: the type of the error, and a text that names argument, got and expected."""

import re

import pytest
import torch

import dgrpo
from dgrpo import TeacherHead, TopKTeacher
from tests.ops.cases import case_of

N, H, V, HT = 6, 16, 101, 12
CASE = case_of(N, V, masked=0.0)
IDS = torch.arange(4).expand(N, 4).contiguous()
LOGQ = torch.full((N, 4), -2.0)
ROWS = torch.arange(N)
NAN = torch.full((N,), torch.nan)


def teacher(**fields):
    given = {"hidden": CASE.teacher_hidden, "weight": CASE.teacher_weight, **fields}
    return {"teacher": TeacherHead(**given)}


def topk(**fields):
    return {"teacher": TopKTeacher(**{"token_ids": IDS, "logprobs": LOGQ, **fields})}


# arguments, error, argument that the text names first, words that it has
SHARED = {
    "hidden is a list": ({"hidden": [1.0]}, TypeError, "hidden", "list"),
    "hidden has one dimension": ({"hidden": torch.ones(H)}, ValueError, "hidden", "(16,)"),
    "hidden is integer": ({"hidden": torch.ones(N, H).long()}, TypeError, "hidden", "int64"),
    "hidden of another width": ({"hidden": torch.ones(N, 9)}, ValueError, "hidden", "9 16"),
    "hidden of another dtype": (
        {"hidden": CASE.hidden.bfloat16()}, TypeError, "hidden", "bfloat16 float32 autocast"),
    "weight is missing": ({"weight": None}, TypeError, "weight", "NoneType"),
    "weight is flat": ({"weight": torch.ones(V)}, ValueError, "weight", "(101,)"),
    "weight has no rows": ({"weight": torch.ones(0, H)}, ValueError, "weight", "(0, 16)"),
    "weight is transposed": ({"weight": CASE.weight.T}, ValueError, "hidden", "16 101"),
    "targets are int32": ({"targets": CASE.targets.int()}, TypeError, "targets", "int32 int64"),
    "targets are short": ({"targets": CASE.targets[:-1]}, ValueError, "targets", "(5,) (6,)"),
    "targets have a dimension more": (
        {"targets": CASE.targets[None]}, ValueError, "targets", "(1, 6) (6,)"),
    "bias of another length": ({"bias": torch.zeros(V - 1)}, ValueError, "bias", "(100,) (101,)"),
    "bias is a number": ({"bias": 0.5}, TypeError, "bias", "float"),
    "temperature is zero": ({"temperature": 0.0}, ValueError, "temperature", "0.0 above"),
    "temperature is text": ({"temperature": "1"}, TypeError, "temperature", "str"),
    "temperature is NaN": ({"temperature": float("nan")}, ValueError, "temperature", "nan"),
    "scale is negative": ({"logit_scale": -1.0}, ValueError, "logit_scale", "-1.0 above"),
    "cap is zero": ({"logit_softcap": 0}, ValueError, "logit_softcap", "0 above"),
    "vocabulary is zero": ({"vocab_size": 0}, ValueError, "vocab_size", "0 1"),
    "vocabulary is too large": ({"vocab_size": 102}, ValueError, "vocab_size", "102 101"),
    "vocabulary is a float": ({"vocab_size": 50.0}, TypeError, "vocab_size", "float"),
    "rounding of another name": (
        {"policy_logits": "bf16"}, ValueError, "policy_logits", "'bf16' 'bfloat16'"),
    "rows are a mask": ({"rows": CASE.targets > 0}, ValueError, "rows", "bool int64"),
    "rows are many": ({"rows": torch.zeros(9).long()}, ValueError, "rows", "(9,) 6"),
    "rows are a list": ({"rows": [0]}, TypeError, "rows", "list"),
    "no budget": ({"memory_budget": 0}, ValueError, "memory_budget", "0 above"),
    "budget is a float": ({"memory_budget": 1e9}, TypeError, "memory_budget", "int"),
    "backend of another name": ({"backend": "cuda"}, ValueError, "backend", "'cuda' 'triton'"),
    "group is a number": ({"group": 3}, TypeError, "group", "int ProcessGroup"),
    "start without group": ({"vocab_start": 0}, ValueError, "vocab_start", "0 without group"),
}  # fmt: skip
TEACHER = {
    "teacher is a tensor": ({"teacher": CASE.weight}, TypeError, "teacher", "TeacherHead"),
    "teacher temperature": (
        {"teacher_temperature": -1}, ValueError, "teacher_temperature", "-1 above"),
    "divergence of another name": ({"divergence": "kl"}, ValueError, "divergence", "'kl' jsd"),
    "divergences": ({"divergence": ["jsd"]}, ValueError, "divergence", "['jsd'] reverse_kl"),
    "the kernels' own divergence": (
        {"divergence": "bucket"}, ValueError, "divergence", "'bucket' reverse_kl"),
    "clip is missing": (
        {"divergence": "clipped_forward_kl"}, ValueError, "divergence_clip", "None positive"),
    "clip is negative": (
        {"divergence": "clipped_forward_kl", "divergence_clip": -1.0}, ValueError,
        "divergence_clip", "-1.0"),
    "clip of another divergence": (
        {"divergence_clip": 1.0}, ValueError, "divergence_clip", "1.0 clipped_forward_kl"),
    "jsd at 0": (
        {"divergence": "jsd", "jsd_beta": 0.0}, ValueError, "jsd_beta", "0.0 forward_kl"),
    "jsd at 1": (
        {"divergence": "jsd", "jsd_beta": 1}, ValueError, "jsd_beta", "1 reverse_kl"),
    "teacher of another vocabulary": (
        teacher(weight=torch.ones(V + 27, HT)), ValueError, "vocab_size", "101 128 None"),
    "teacher of another length": (
        teacher(hidden=torch.ones(N - 1, HT)), ValueError, "teacher.hidden", "5 6 rows"),
    "teacher of another width": (
        teacher(hidden=torch.ones(N, HT + 1)), ValueError, "teacher.weight", "(101, 12) 13"),
    "teacher states are integer": (
        teacher(hidden=torch.ones(N, HT).long()), TypeError, "teacher.hidden", "int64"),
    "teacher states are flat": (
        teacher(hidden=torch.ones(N)), ValueError, "teacher.hidden", "(6,)"),
    "teacher weight is text": (teacher(weight="w"), TypeError, "teacher.weight", "str"),
    "teacher bias": (teacher(bias=torch.ones(3)), ValueError, "teacher.bias", "(3,) (101,)"),
    "teacher scale": (teacher(logit_scale=0.0), ValueError, "teacher.logit_scale", "0.0"),
    "teacher cap": (teacher(logit_softcap=-1.0), ValueError, "teacher.logit_softcap", "-1.0"),
    "teacher rows": (teacher(rows=ROWS[:3]), ValueError, "teacher.rows", "(3,) (6,)"),
    "teacher rows are int32": (teacher(rows=ROWS.int()), ValueError, "teacher.rows", "int32"),
    "top-k ids are int32": (
        topk(token_ids=IDS.int()), TypeError, "teacher.token_ids", "int32 int64"),
    "top-k of other tokens": (
        topk(token_ids=IDS[:2]), ValueError, "teacher.token_ids", "(2, 4) (6, K)"),
    "top-k is flat": (topk(token_ids=ROWS), ValueError, "teacher.token_ids", "(6,)"),
    "top-k of other shapes": (
        topk(logprobs=LOGQ[:, :2]), ValueError, "teacher.logprobs", "(6, 2) (6, 4)"),
    "top-k targets": (
        topk(target_logprobs=LOGQ), ValueError, "teacher.target_logprobs", "(6, 4) (6,)"),
}  # fmt: skip
VALUES = {  # check=True alone finds these
    "target outside": ({"targets": CASE.targets + 200}, ValueError, "targets", "0 to 100"),
    "rows of masked tokens": ({"rows": ROWS[:2]}, ValueError, "rows", "2 indices 6"),
    "hidden is NaN": ({"hidden": CASE.hidden * torch.nan}, ValueError, "hidden", "NaN 96"),
    "weight is infinite": ({"weight": CASE.weight * torch.inf}, ValueError, "weight", "infinite"),
    "bias is NaN": ({"bias": torch.full((V,), torch.nan)}, ValueError, "bias", "101 NaN"),
    "teacher states are NaN": (
        teacher(hidden=CASE.teacher_hidden * torch.nan), ValueError, "teacher.hidden", "NaN"),
    "teacher rows outside": (teacher(rows=ROWS + 3), ValueError, "teacher.rows", "-1 to 5"),
    "top-k id outside": (topk(token_ids=IDS + 99), ValueError, "teacher.token_ids", "100"),
    "top-k id twice": (topk(token_ids=IDS // 2), ValueError, "teacher.token_ids", "twice"),
    "top-k mass above 1": (topk(logprobs=LOGQ + 1), ValueError, "teacher.logprobs", "exceed 1"),
}  # fmt: skip
DGRPO = {
    "advantages are missing": ({"advantages": None}, TypeError, "advantages", "None"),
    "advantages are short": (
        {"advantages": CASE.advantages[:2]}, ValueError, "advantages", "(2,) (6,)"),
    "advantages are a mask": (
        {"advantages": CASE.advantages > 0}, TypeError, "advantages", "bool floating"),
    "old log-probabilities": (
        {"old_logprobs": CASE.old_logprobs[None]}, ValueError, "old_logprobs", "(1, 6) (6,)"),
    "old log-probabilities are a list": (
        {"old_logprobs": [0.0] * N}, TypeError, "old_logprobs", "list"),
    "token weights": ({"token_weights": 0.5}, TypeError, "token_weights", "float"),
    "teacher coefficients": (
        {"teacher_coef": torch.ones(2)}, ValueError, "teacher_coef", "(2,) (6,)"),
    "teacher coefficient is text": ({"teacher_coef": "0.5"}, TypeError, "teacher_coef", "str"),
    "lower clip": ({"clip_low": -0.1}, ValueError, "clip_low", "-0.1 at least 0"),
    "upper clip": ({"clip_high": None}, TypeError, "clip_high", "NoneType"),
    "dual clip": ({"clip_dual": 1.0}, ValueError, "clip_dual", "1.0 above 1"),
    "cap without sampler": ({"is_cap": 2.0}, ValueError, "is_cap", "sampler_logprobs"),
    "two importance weights": (
        {"sampler_logprobs": CASE.old_logprobs, "policy_weights": CASE.old_logprobs}, ValueError,
        "policy_weights", "sampler_logprobs"),
    "reference is missing": ({"ref_coef": 0.1}, ValueError, "ref_logprobs", "None 0.1"),
    "reference coefficient": ({"ref_coef": float("inf")}, ValueError, "ref_coef", "inf"),
    "entropy coefficient": ({"entropy_coef": True}, TypeError, "entropy_coef", "bool"),
    "NaN advantages": (
        {"advantages": NAN, "check": True}, ValueError, "advantages", "6 values NaN"),
}  # fmt: skip


def inputs(**changed):
    return {"hidden": CASE.hidden, "weight": CASE.weight, "targets": CASE.targets, **changed}


def loss(**changed):
    dgrpo.linear_dgrpo_loss(**{"advantages": CASE.advantages, **inputs(**changed)})


def objective_loss(**changed):
    dgrpo.linear_loss(objective=lambda stats, rows: stats.logprobs, **inputs(**changed))


def stats(**changed):
    dgrpo.linear_token_stats(**inputs(**changed))


def logprobs(**changed):
    dgrpo.linear_logprobs(**inputs(**changed))


def check(op, changed, error, argument, words):
    with pytest.raises(error) as raised:
        op(**changed)
    text = str(raised.value)
    assert re.match(rf"{re.escape(argument)}: got ", text), text
    assert "expected" in text, text
    assert all(word in text for word in words.split()), text


@pytest.mark.parametrize("op", [loss, objective_loss, stats, logprobs], ids=lambda op: op.__name__)
@pytest.mark.parametrize("name", SHARED)
def test_shared_arguments(name, op):
    check(op, *SHARED[name])


@pytest.mark.parametrize("op", [loss, objective_loss, stats], ids=lambda op: op.__name__)
@pytest.mark.parametrize("name", TEACHER)
def test_teachers_and_divergences(name, op):
    check(op, *TEACHER[name])


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    changed, *want = VALUES[name]
    check(stats, {**changed, "check": True}, *want)


@pytest.mark.parametrize("name", DGRPO)
def test_the_objectives_arguments(name):
    check(loss, *DGRPO[name])


def test_good_arguments_pass():
    for op in (loss, objective_loss, stats, logprobs):
        op(check=True)
    loss(**teacher(), check=True)
    loss(**topk(), check=True)


def test_values_of_masked_tokens_do_not_matter():
    targets, advantages = CASE.targets.clone(), CASE.advantages.clone()
    targets[2], advantages[2] = -100, torch.nan
    loss(targets=targets, advantages=advantages, check=True)


def test_an_objective_that_is_none():
    want = (TypeError, "objective", "function")
    check(lambda **_: dgrpo.linear_loss(**inputs(), objective=None), {}, *want)


def test_triton_on_the_cpu_without_its_interpreter(monkeypatch):
    triton = pytest.importorskip("triton")
    import dgrpo_kernels.triton_rows  # noqa: F401  # before: what is imported now stays uninterpreted

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    check(loss, {"backend": "triton"}, ValueError, "backend", "cpu 'torch' TRITON_INTERPRET")


def test_triton_in_fp64():
    wide = {"hidden": CASE.hidden.double(), "weight": CASE.weight.double(), "backend": "triton"}
    check(loss, wide, ValueError, "backend", "fp64 'torch'")


def test_a_gathered_head_that_does_not_fit():
    from contextlib import nullcontext

    def gathered(rows, width):
        return TeacherHead(
            CASE.teacher_hidden, lambda: nullcontext((torch.ones(rows, width), None))
        )

    check(stats, {"teacher": gathered(V, 5)}, ValueError, "teacher.weight", "(101, 5) 12")
    check(stats, {"teacher": gathered(V + 9, HT)}, ValueError, "vocab_size", "101 110")


@pytest.fixture
def dtensor(tmp_path):
    """A weight that FSDP has sharded, in a group of one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield distribute_tensor(CASE.weight.detach(), mesh, [Shard(0)])
    finally:
        dist.destroy_process_group()


def test_a_dtensor_weight(dtensor):
    check(loss, {"weight": dtensor}, TypeError, "weight", "DTensor FusedHead.forward group=")
    wide = TeacherHead(CASE.hidden.detach(), dtensor)
    check(loss, {"teacher": wide}, TypeError, "teacher.weight", "DTensor function")
    check(loss, {"hidden": dtensor}, TypeError, "hidden", "DTensor local")
