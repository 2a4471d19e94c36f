"""A trainer's step: every method against plain torch, every option, and what must not change it."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from dgrpo.trainer import train
from dgrpo.trainer.build import build
from dgrpo.trainer.collect import collect
from dgrpo.trainer.config import Model
from dgrpo.trainer.models import load_policy
from dgrpo.trainer.update import attach_teacher, backward, micro_batches, update, weigh
from tests.trainer.home import HOOKS, make_home, metrics, settings  # noqa: F401


def first_step(wanted):
    """A run after the backward passes of its first step, and the step's batch."""
    run = build(wanted)
    batch = collect(run)
    attach_teacher(run, batch)
    weigh(run, batch)
    for micro in micro_batches(run, batch):
        backward(run, batch, micro)
    return run, batch


# -- every method against plain torch ----------------------------------------------------------


def plain_logits(model, prompt, completion):
    ids = torch.cat([prompt, completion])[None]
    return model(ids).logits[0, len(prompt) - 1 : -1].float()  # (C, V)


def plain_loss(home, wanted, batch):
    """The objective written out with full logits, one sequence at a time; and the gradients."""
    student = AutoModelForCausalLM.from_pretrained(home / "student", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(home / "teacher", dtype=torch.float32)
    method, samples = wanted.method, batch.samples
    groups = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.scored.reward if sample.scored else 0.0)
    tokens = sum(len(sample.completion_ids) for sample in samples)
    total = torch.zeros(())
    for sample in samples:
        z = plain_logits(student, sample.prompt_ids, sample.completion_ids)
        logp = z.log_softmax(-1)
        picked = logp.gather(1, sample.completion_ids[:, None])[:, 0]
        losses = torch.zeros(len(picked))
        if wanted.method.objective == "sft":
            losses = losses - picked
        if method.advantage == "group":
            rewards = torch.tensor(groups[sample.group])
            advantage = (sample.scored.reward - rewards.mean()) / (rewards.std() + 1e-4)
            losses = losses - (picked - picked.detach()).exp() * advantage
        if method.teacher == "model":
            with torch.no_grad():
                t = plain_logits(teacher, sample.prompt_ids, sample.completion_ids)
                logq = t[:, : z.shape[1]].log_softmax(-1)
            if method.divergence == "reverse_kl":
                kl = (logp.exp() * (logp - logq)).sum(-1)
            else:
                kl = (logq.exp() * (logq - logp)).sum(-1)
            losses = losses + method.teacher_coef * kl
        if method.normalizer == "token":
            total = total + losses.sum() / tokens
        else:
            total = total + losses.mean() / len(samples)
    total.backward()
    return total.item(), {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("preset", ["dgrpo", "grpo", "opd", "sft", "kd"])
def test_first_step_equals_plain_torch(home, tmp_path, preset):
    wanted = settings(home, tmp_path, preset)
    run, batch = first_step(wanted)
    loss, grads = plain_loss(home, wanted, batch)
    ours = {name.removeprefix("model."): p.grad for name, p in run.model.named_parameters()}
    update(run, batch)
    assert batch.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert any(grad.norm() > 1e-3 for grad in grads.values())
    for name, grad in grads.items():
        error = (ours[name] - grad).norm() / grad.norm().clamp(min=1e-8)
        assert error < 1e-4, f"{name}: {error}"
    run.close()


@pytest.mark.parametrize("objective", ["dgrpo", "gspo"])
def test_a_shared_prompt_changes_no_step(home, tmp_path, objective):
    found = []
    for share in (True, False):
        batch = {"prompts": 4, "tokens": 128, "share_prompts": share}
        method = {"objective": objective, "old_logprobs": "trainer"}
        run, step = first_step(settings(home, tmp_path / str(share), batch=batch, method=method))
        assert any(micro.prefixes is not None for micro, _ in step.outputs) == share
        grads = {name: p.grad.clone() for name, p in run.model.named_parameters()}
        update(run, step)
        found.append((step, grads))
        run.close()
    (shared, got), (apart, want) = found
    assert shared.loss == pytest.approx(apart.loss, rel=1e-4, abs=1e-6)
    assert shared.norm == pytest.approx(apart.norm, rel=1e-4)
    assert (
        shared.tokens
        < apart.tokens
        == sum(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in apart.samples)
    )
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("preset", ["opsdl", "ssopd", "kdrl", "self_distill"])
def test_presets_of_other_papers_run(home, tmp_path, preset):
    out = train(settings(home, tmp_path, preset))
    lines = metrics(tmp_path)
    assert out.status == "finished" and len(lines) == 2
    assert all(line["grad_norm"] > 0 for line in lines)
    assert all(line["divergence"] > 0 for line in lines)


@pytest.mark.parametrize(
    "groups",
    [
        {"method": {"objective": "gspo"}, "batch": {"updates": 2, "prompts": 4, "tokens": 64}},
        {"method": {"objective": "cispo", "preset": "grpo"}},
        {"method": {"objective": "vopd", "preset": "opd"}},
        {"method": {"preset": "dgrpo", "ref_coef": 0.1, "entropy_coef": 0.01}},
        {"method": {"preset": "dgrpo", "divergence": "jsd", "jsd_beta": 0.3}},
        {"method": {"preset": "dgrpo", "importance": "truncate"}},
        {"method": {"preset": "dgrpo", "importance": "mask", "importance_level": "sequence"}},
        {"method": {"preset": "dgrpo", "old_logprobs": "sampler"}},
        {"method": {"preset": "dgrpo", "normalizer": "local"}},
        {"method": {"preset": "dgrpo", "normalizer": "constant", "gate": "mixed"}},
        {"optimizer": {"kind": "muon", "lr": 1e-3, "warmup_steps": 0}},
        {"model": {"lora": {"rank": 2, "targets": ["q_proj", "down_proj"], "head": True}}},
        {"model": {"lora": {"rank": 2}, "checkpointing": True}},
    ],
    ids=lambda groups: "-".join(str(v) for v in list(groups.values())[0].values())[:40],
)
def test_options_run(home, tmp_path, groups):
    train(settings(home, tmp_path, **groups))
    assert all(0 < line["grad_norm"] < 1e3 for line in metrics(tmp_path))


# -- invariances -------------------------------------------------------------------------------


def test_micro_batch_size_does_not_change_a_step(home, tmp_path):
    norms, losses = [], []
    for tokens in (24, 1000):
        run, batch = first_step(
            settings(home, tmp_path / str(tokens), batch={"prompts": 4, "tokens": tokens})
        )
        assert (len(batch.outputs) == 1) == (tokens == 1000)
        update(run, batch)
        norms.append(batch.norm)
        losses.append(batch.loss)
        run.close()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-7)


def test_lora_goes_on_from_a_checkpoint_without_its_base(home, tmp_path):
    model = {"name": str(home / "student"), "lora": {"rank": 2}}
    optimizer = {"kind": "adamw", "lr": 0.01}
    wanted = settings(home, tmp_path / "whole", model=model, optimizer=optimizer)
    train(wanted)
    train(settings(home, tmp_path / "two", model=model, optimizer=optimizer, steps=1))
    train(settings(home, tmp_path / "two", model=model, optimizer=optimizer))
    assert metrics(tmp_path / "two") == metrics(tmp_path / "whole")
    saved = (tmp_path / "two/checkpoints/step-00000002/index.json").read_text()
    assert "lora_A" in saved and "embed_tokens" not in saved


def test_dropout_is_off_where_old_logprobs_are_scored(home, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(home / "student", student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    batch, out = {"prompts": 4, "updates": 2}, tmp_path / "run"
    train(settings(home, out, model={"name": str(student)}, batch=batch, steps=4))
    assert all(line["sampler_mismatch"] < 1e-4 for line in metrics(out))


def test_adapters_start_from_the_seed(home, tmp_path):
    model = {"name": str(home / "student"), "lora": {"rank": 4}}

    def norms(name, seed):
        torch.manual_seed(len(name))  # whatever happened before in this process
        train(
            settings(home, tmp_path / name, "sft", model=model, seed=seed, data={"shuffle": False})
        )
        return [line["grad_norm"] for line in metrics(tmp_path / name)]

    assert norms("a", 1) == norms("bb", 1) != norms("ccc", 2)


def test_second_update_of_a_batch_has_a_ratio(home, tmp_path):
    wanted = settings(home, tmp_path, batch={"prompts": 4, "updates": 2, "tokens": 128}, steps=4)
    train(wanted)
    ratios = [line["ratio"] for line in metrics(tmp_path)]
    assert [ratio == pytest.approx(1.0, abs=1e-6) for ratio in ratios] == [True, False, True, False]
    assert all(line["sampler_mismatch"] < 1e-4 for line in metrics(tmp_path))


def test_the_end_of_sequence_token_carries_loss(home, tmp_path):
    run = build(settings(home, tmp_path, "sft"))
    for sample in collect(run).samples:
        assert sample.completion_ids[-1] == run.tokenizer.eos_token_id and sample.mask.all()
    run.close()


def test_rollouts_repeat_for_the_same_seed_alone(home, tmp_path):
    def drawn(seed):
        run = build(settings(home, tmp_path / str(seed), "grpo", seed=seed))
        ids = [sample.completion_ids.tolist() for sample in collect(run).samples]
        run.close()
        return ids

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


# -- rewards and truncation --------------------------------------------------------------------


def test_truncated_completions(home, tmp_path):
    def batch_of(mode):
        run = build(
            settings(home, tmp_path / mode, "grpo", method={"preset": "grpo", "truncated": mode})
        )
        batch = collect(run)
        run.close()
        return batch.samples

    kept, masked, penalised = map(batch_of, ("keep", "mask", "penalise"))
    cut = [sample.sampled.truncated for sample in kept]
    assert any(cut)
    assert [not sample.mask.any() for sample in masked] == cut
    fine = [p.scored.reward - k.scored.reward for k, p in zip(kept, penalised, strict=True)]
    assert fine == pytest.approx([-1.0 if c else 0.0 for c in cut])


def test_a_failing_reward_costs_its_samples_alone(home, tmp_path):
    rewards = {"functions": [{"path": f"{HOOKS}:failing"}], "timeout": None}
    run = build(settings(home, tmp_path, "grpo", rewards=rewards))
    samples = collect(run).samples
    failed = [sample for sample in samples if sample.scored.failed]
    assert 0 < len(failed) < len(samples)
    assert all(not sample.advantages.any() for sample in failed)
    run.close()
    train(settings(home, tmp_path, "grpo", rewards=rewards))
    assert 0 < metrics(tmp_path)[0]["reward_failed"] < 1


def test_rows_without_a_reward_are_for_methods_that_read_none(home, tmp_path):
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    groups = {"data": {"sources": [{"path": str(plain)}]}, "rewards": {"functions": []}}
    train(settings(home, tmp_path / "opd", "opd", **groups))
    assert metrics(tmp_path / "opd")[0]["divergence"] > 0
    with pytest.raises(ValueError, match=r"rewards\.functions: got none, and the rows have no rew"):
        train(settings(home, tmp_path / "dgrpo", **groups))


# -- models that cannot be made ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": {"model_type": "qwen3", "hidden_sise": 8}}, "did you mean hidden_size?"),
        ({"config": {"model_type": "qwenn"}}, "model.config.model_type: got 'qwenn', did you mean"),
        ({"name": "/nowhere/at/all"}, "model.name: got '/nowhere/at/all', expected an existing"),
    ],
)
def test_a_model_that_cannot_be_made_names_its_setting(model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_policy(Model(tokenizer="t", **model))


def test_a_folder_without_weights_names_its_setting(home, tmp_path):
    shutil.copy(home / "student/config.json", tmp_path)
    with pytest.raises(ValueError, match=r"model\.name: got .* which cannot be loaded: "):
        load_policy(Model(name=str(tmp_path)))
