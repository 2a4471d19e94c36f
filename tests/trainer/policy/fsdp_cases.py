"""What every rank runs for test_fsdp.py: each case gives numbers that the test judges.

Every rank computes the single-process reference itself, on the samples of all ranks.
"""

import traceback

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dgrpo.distributed import make_mesh
from dgrpo.head import FusedHead
from dgrpo.objectives import gspo
from dgrpo.trainer.batch import pack
from dgrpo.trainer.policy import PolicyModel, fsdp
from dgrpo.trainer.rollout import HFSampler, Sampling
from dgrpo.trainer.teachers.local import SelfTeacher, Teacher
from tests.tiny import VOCAB, make_sample, relative, tiny_model, tiny_pair
from tests.trainer.policy.fsdp_steps import (
    MAX_TOKENS,
    everyone,
    full_gradients,
    samples_of,
    step,
    worst,
)


def compare(
    kind,
    mesh,
    *,
    steps=1,
    lora=None,
    teacher=None,
    objective=None,
    every_micro=True,
    rank_0_has_all=False,
    **options,
):
    """Loss, gradients, clipped norm, and parameters after SGD steps, sharded and not."""
    policy, _ = tiny_pair(kind, lora=lora)
    single, _ = tiny_pair(kind, lora=lora)
    policy.train(), single.train()
    fsdp.shard(policy, mesh, **options)
    teachers = [None, None]
    if teacher is not None:
        frozen = [PolicyModel(tiny_model(**teacher)).requires_grad_(False) for _ in range(2)]
        teachers = [Teacher(fsdp.shard(frozen[0], mesh)), Teacher(frozen[1])]
    result, rank, world = {}, dist.get_rank(), mesh.size()
    own = samples_of(rank)
    if rank_0_has_all:
        own = [] if rank else everyone()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (policy, single)]
    for number in range(steps):
        loss = step(
            policy, own, world, objective=objective, teacher=teachers[0], every_micro=every_micro
        )
        dist.all_reduce(loss)
        want = step(single, everyone(), 1, objective=objective, teacher=teachers[1])
        if number == 0:
            result["loss"] = abs(float(loss) / world - float(want))
            result["gradients"] = worst(full_gradients(policy), full_gradients(single))
        limit = 0.8 * float(fsdp.grad_norm(single))
        norms = fsdp.clip_gradients(policy, limit), fsdp.clip_gradients(single, limit)
        result["norm"] = relative(*norms)
        result["clipped"] = abs(float(fsdp.grad_norm(policy)) / limit - 1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    got = dict(fsdp.full_tensors(policy, merge=False))
    result["parameters"] = worst(got, dict(fsdp.full_tensors(single, merge=False)))
    merged = dict(fsdp.full_tensors(policy))
    result["merged"] = worst(merged, dict(fsdp.full_tensors(single)))
    return result


def inputs_arrive(mesh, cast):
    """How many of the float inputs of the loss are changed on their way into the head."""
    policy, _ = tiny_pair("llama")
    if cast:  # the control: what FSDP does by default
        fully_shard(policy, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    else:
        fsdp.shard(policy, mesh, compute_dtype=torch.bfloat16)
    (micro,) = pack([make_sample(4, 9, dist.get_rank())], 100)
    seen, forward = {}, FusedHead.forward

    def spying(self, hidden, inputs):
        seen.update(inputs=inputs, hidden=hidden, weight=self.weight)
        return forward(self, hidden, inputs)

    FusedHead.forward = spying
    try:
        loss = policy(micro, inputs=micro.head_inputs()).loss
    finally:
        FusedHead.forward = forward
    if not cast:
        loss.backward()
    got, want = seen["inputs"].context, micro.context
    names = ("old_logprobs", "token_weights", "advantages")
    return {
        "changed": sum(not torch.equal(getattr(got, n), getattr(want, n)) for n in names),
        "bf16": seen["hidden"].dtype == seen["weight"].dtype == torch.bfloat16,
        "masters": all(p.dtype == torch.float32 for p in policy.parameters()),
        "fp32_gradients": all(
            p.grad.dtype == torch.float32 for p in policy.parameters() if p.grad is not None
        ),
    }


def bf16_step(mesh):
    """Mixed precision against a single process whose parameters are rounded to bf16."""
    policy, _ = tiny_pair("qwen3")
    single, _ = tiny_pair("qwen3")
    single.to(torch.bfloat16)
    fsdp.reset_rotary(single)
    fsdp.shard(policy, mesh, compute_dtype=torch.bfloat16)
    rank, world = dist.get_rank(), mesh.size()
    loss = step(policy, samples_of(rank), world)
    dist.all_reduce(loss)
    want = step(single, everyone(), 1)
    exact, _ = tiny_pair("qwen3")
    step(exact, everyone(), 1)
    names = full_gradients(exact)
    got, plain = full_gradients(policy), full_gradients(single)
    join = lambda grads: torch.cat([grads[n].float().flatten() for n in names])  # noqa: E731
    return {
        "loss": abs(float(loss) / world - float(want)),
        "gradients": relative(join(got), join(names)),
        "plain": relative(join(plain), join(names)),
    }


def sampling(kind, mesh, fewest):
    """Prompts and completions of different lengths on each rank, against one process."""
    policy, _ = tiny_pair(kind)
    single, _ = tiny_pair(kind)
    fsdp.shard(policy.train(), mesh)
    rank = dist.get_rank()
    prompts = [make_sample(2 + 3 * rank + i, 1, rank).prompt_ids for i in range(fewest + rank)]
    options = Sampling(max_tokens=3 + 4 * rank, stop_token_ids=(), seed=rank)
    got = HFSampler(policy).generate(prompts, 2, options)
    want = HFSampler(single).generate(prompts, 2, options)
    pairs = list(zip(got, want, strict=True))
    loss = step(policy, samples_of(rank), mesh.size())  # training goes on
    step(single, everyone(), 1)
    return {
        "tokens": all(torch.equal(a.completion_ids, b.completion_ids) for a, b in pairs),
        "logprobs": max([relative(a.logprobs, b.logprobs) for a, b in pairs], default=0.0),
        "count": len(got),
        "sharded": all(isinstance(p, DTensor) for p in policy.parameters()),
        "training": policy.model.training,
        "gradients": worst(full_gradients(policy), full_gradients(single)),
        "finite": bool(torch.isfinite(loss)),
    }


def self_teaching(kind, mesh):
    """The policy on another prompt as its own teacher, in both modes of the loss."""
    policy, _ = tiny_pair(kind)
    single, _ = tiny_pair(kind)
    fsdp.shard(policy, mesh)
    teachers = [SelfTeacher(model) for model in (policy, single)]
    rank, world, result = dist.get_rank(), mesh.size(), {}
    for objective in (None, gspo):
        loss = step(policy, samples_of(rank), world, objective=objective, teacher=teachers[0])
        dist.all_reduce(loss)
        want = step(single, everyone(), 1, objective=objective, teacher=teachers[1])
        result["loss" if objective is None else "loss_gspo"] = abs(
            float(loss) / world - float(want)
        )
    result["gradients"] = worst(full_gradients(policy), full_gradients(single))
    return result


def teacher_states(mesh):
    """A sharded teacher reads what an unsharded one reads; its layers can be moved away."""
    models = [PolicyModel(tiny_model("gemma2", 3)).requires_grad_(False) for _ in range(2)]
    fsdp.shard(models[0], mesh)
    teachers = [Teacher(models[0], offload_body=True), Teacher(models[1])]
    result = {}
    for turn in range(2):
        samples = samples_of(dist.get_rank())
        for teacher in teachers:
            teacher.attach(samples, MAX_TOKENS)
        got, want = (teacher.hidden for teacher in teachers)
        result[f"turn {turn}"] = relative(got, want) if len(want) else float(len(got))
        (micro, *_) = pack(samples, MAX_TOKENS)
        with teachers[0].head(micro).open() as (weight, _):
            result[f"head {turn}"] = relative(weight, models[1].head.weight)
    result["resharded"] = all(isinstance(p, DTensor) for p in models[0].parameters())
    return result


def non_finite(mesh):
    """One rank's gradient is not finite: all ranks see it, and none scales its gradients."""
    policy, _ = tiny_pair("llama")
    fsdp.shard(policy, mesh)
    step(policy, samples_of(dist.get_rank()), 2)
    grad = next(policy.parameters()).grad
    if dist.get_rank() == 0:
        grad.to_local()[0] = float("inf")
    other = policy.head.weight.grad.to_local().clone()
    norm = fsdp.clip_gradients(policy, 1e-3)
    return {
        "finite": bool(torch.isfinite(norm)),
        "untouched": torch.equal(other, policy.head.weight.grad.to_local()),
    }


def lora_mixed(mesh):
    """A bf16 model with fp32 adapters: only they are trained, with fp32 gradients."""
    policy, _ = tiny_pair("llama", lora=["q_proj", "lm_head"], dtype=torch.bfloat16)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fsdp.shard(policy, mesh, compute_dtype=torch.bfloat16)
    loss = step(policy, samples_of(dist.get_rank()), mesh.size())
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    return {
        "finite": bool(torch.isfinite(loss)),
        "adapters": all("lora_" in name for name in trained) and len(trained) > 0,
        "fp32": all(p.grad.dtype == p.dtype == torch.float32 for p in trained.values()),
    }


def cases(world):
    """Name -> function of no arguments."""
    mesh, hsdp = make_mesh("cpu"), make_mesh("cpu", replicas=2)
    untied, tied = "llama", "qwen3"
    tight = {"kind": "gemma2", "seed": 5}  # tied, soft cap
    wide = {"kind": "phi_biased_head", "seed": 6, "hidden_size": 48, "vocab_size": VOCAB + 16}
    both = {
        "untied": lambda: compare(untied, mesh, steps=3),
        "tied": lambda: compare(tied, mesh, steps=3),
        "gspo_sharded_teacher": lambda: compare(
            untied, mesh, steps=3, teacher=wide, objective=gspo
        ),
        "hsdp": lambda: compare(untied, hsdp, steps=3),
        "sampling": lambda: sampling(tied, mesh, fewest=0),
    }
    if world > 2:
        return both
    return {
        **both,
        "lora": lambda: compare(tied, mesh, steps=3, lora=["q_proj", "down_proj"]),
        "biased_head": lambda: compare("phi_biased_head", mesh),
        "window_softcap": lambda: compare("gemma2", mesh),
        "teacher_untied": lambda: compare(tied, mesh, teacher=wide),
        "teacher_tied": lambda: compare(untied, mesh, teacher=tight),
        "gspo_tied_teacher": lambda: compare(tied, mesh, teacher=tight, objective=gspo),
        "rank_without_samples": lambda: compare(
            untied, mesh, teacher=wide, objective=gspo, rank_0_has_all=True
        ),
        "no_sync": lambda: compare(untied, mesh, every_micro=False),
        "hsdp_no_sync": lambda: compare(tied, hsdp, every_micro=False),
        "checkpointed": lambda: compare(untied, mesh, checkpoint_activations=True),
        "checkpointed_gspo": lambda: compare(
            tied, mesh, teacher=wide, objective=gspo, checkpoint_activations=True
        ),
        "lora_head": lambda: compare(untied, mesh, lora=["q_proj", "lm_head"]),
        "lora_tied_head": lambda: compare(tied, mesh, lora=["v_proj", "lm_head"]),
        "inputs": lambda: inputs_arrive(mesh, cast=False),
        "inputs_control": lambda: inputs_arrive(mesh, cast=True),
        "bf16": lambda: bf16_step(mesh),
        "sampling_untied": lambda: sampling(untied, mesh, fewest=2),
        "self_teacher": lambda: self_teaching(untied, mesh),
        "self_teacher_tied": lambda: self_teaching(tied, mesh),
        "teacher_states": lambda: teacher_states(mesh),
        "lora_mixed": lambda: lora_mixed(mesh),
        "non_finite": lambda: non_finite(mesh),
    }


def worker(rank, world, store, folder):
    """Runs all cases on one rank; saves {case: numbers, or the traceback}."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = {}
    try:
        for name, case in cases(world).items():
            torch.manual_seed(0)
            try:
                results[name] = case()
            except Exception:
                results[name] = traceback.format_exc()
                break  # the other ranks may be out of step now
    finally:
        torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
