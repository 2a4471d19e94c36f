"""The method: which sequences, which loss, which teacher.

A method is a set of values, never code. `PRESETS` holds what each named method changes from
the defaults below, which are dGRPO as published (arXiv 2605.12227); every single value can be
overridden after it (`method.preset=grpo method.normalizer=token`).
"""

import math
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from dgrpo.trainer.config.settings import Settings


class Schedule(Settings):
    """A coefficient that moves from `start` to `end` over the first `steps` optimiser steps."""

    start: float
    """Value at the first step."""
    end: float
    """Value from step `steps` on."""
    shape: Literal["constant", "linear", "cosine"] = "linear"
    """Interpolation from start to end (constant stays at start)."""
    steps: PositiveInt | None = None
    """Steps from start to end; null: all steps of the run."""

    def at(self, step: int, total: int | None) -> float:
        """The coefficient at the 0-based `step` of `total`, a function of these alone."""
        steps = self.steps or total
        if self.shape == "constant" or steps is None:
            return self.start
        done = min(1.0, step / max(1, steps - 1))
        if self.shape == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return self.start + (self.end - self.start) * done


Coefficient = float | Schedule

PRESETS: dict[str, dict[str, Any]] = {
    "dgrpo": {},
    # Supervised fine-tuning on the completions of the data.
    "sft": {
        "sequences": "given",
        "objective": "sft",
        "advantage": "none",
        "teacher": "none",
        "teacher_coef": 0.0,
        "normalizer": "token",
    },
    # Off-policy distillation: forward KL to the teacher on the completions of the data.
    "kd": {
        "sequences": "given",
        "advantage": "none",
        "teacher_coef": 1.0,
        "divergence": "forward_kl",
        "normalizer": "token",
    },
    "grpo": {"teacher": "none", "teacher_coef": 0.0},
    # On-policy distillation: reverse KL on the student's own samples, no reward.
    "opd": {"advantage": "none", "teacher_coef": 1.0, "normalizer": "token"},
    # OPSDL, 2604.17535: the policy on the evidence alone teaches the policy on the whole document.
    "opsdl": {
        "advantage": "none",
        "teacher": "self",
        "teacher_context": "evidence",
        "teacher_coef": 1.0,
        "normalizer": "token",
    },
    # SSOPD, 2605.17497: GRPO, and on the longest wrong completion of a mixed group a clipped
    # forward KL to the policy that has seen the group's shortest correct one. The weight
    # 4 p (1 - p) of the group's success rate p comes with the context; `teacher_coef` and
    # `divergence_clip` are ours.
    "ssopd": {
        "teacher": "self",
        "teacher_context": "correct_rollout",
        "teacher_coef": 1.0,
        "divergence": "clipped_forward_kl",
        "divergence_clip": 5.0,
    },
    # KDRL, 2506.02208: GRPO and the k2 estimate of the reverse KL, its coefficient annealed.
    "kdrl": {
        "objective": "kdrl",
        "normalizer": "token",
        "teacher_coef": {"start": 5e-3, "end": 1e-3, "shape": "linear"},
    },
    # Self-distillation: the policy that has read the row's `privileged` text teaches itself.
    "self_distill": {
        "advantage": "none",
        "teacher": "self",
        "teacher_context": "privileged",
        "teacher_coef": 1.0,
        "normalizer": "token",
    },
}

PresetName = Literal["sft", "kd", "grpo", "opd", "dgrpo", "opsdl", "ssopd", "kdrl", "self_distill"]


class Method(Settings):
    """Which sequences are trained on, with which loss and which teacher."""

    preset: PresetName = "dgrpo"
    """Named set of the values below; each can still be set by itself."""
    sequences: Literal["rollout", "given"] = "rollout"
    """Train on the policy's own samples, or on the completions given in the data."""
    objective: str = "dgrpo"
    """Loss: dgrpo (fused), another function of dgrpo.objectives, or "module:function"."""
    advantage: Literal["group", "none"] = "group"
    """Reward relative to the group of one prompt, or 0 everywhere (distillation alone)."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divide the group's advantages by their standard deviation, or not."""
    leave_one_out: bool = False
    """Take each sample out of its own baseline (RLOO)."""
    normalizer: Literal["sequence", "token", "constant", "local"] = "sequence"
    """Token weights: GRPO, DAPO, Dr.GRPO (over rollout.max_tokens) or BNPO (per micro-batch)."""
    clip_low: NonNegativeFloat = 0.2
    """Ratio clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """Ratio clipped above at 1 + clip_high."""
    clip_dual: float | None = Field(None, gt=1.0)
    """Dual clip: bound of the loss at negative advantages (above 1); null: none."""
    teacher: Literal["none", "model", "self", "served"] = "model"
    """No teacher, a frozen model, the current policy, or an endpoint's top-k."""
    teacher_context: str = "same"
    """Prompt of the teacher: same, evidence, correct_rollout, privileged or "module:function"."""
    teacher_template: str = "{prompt}\n\nA correct answer, for reference:\n{context}\n"
    """How correct_rollout and privileged write the teacher's prompt."""
    teacher_coef: Coefficient = 0.5
    """Weight of the divergence to the teacher: a number or a schedule."""
    divergence: Literal["reverse_kl", "forward_kl", "clipped_forward_kl", "jsd", "jeffreys"] = (
        "reverse_kl"
    )
    """Divergence to the teacher over the whole vocabulary."""
    divergence_clip: PositiveFloat | None = None
    """Bound of each vocabulary term of clipped_forward_kl."""
    jsd_beta: float = Field(0.5, gt=0.0, lt=1.0)
    """Mixture of jsd; towards 0 forward KL, towards 1 reverse KL."""
    jeffreys_weight: float = Field(0.5, ge=0.0, le=1.0)
    """Share of the forward KL in jeffreys; the rest is the reverse KL."""
    gate: str = "none"
    """Factor on each sample's teacher_coef: none, wrong, mixed or "module:function"."""
    ref_coef: Coefficient = 0.0
    """Weight of the k3 penalty to the starting policy (dGRPO has none)."""
    entropy_coef: Coefficient = 0.0
    """Weight of the entropy bonus."""
    old_logprobs: Literal["auto", "none", "trainer", "sampler"] = "auto"
    """Denominator of the ratio; auto: trainer if batch.updates > 1, else none (ratio 1)."""
    importance: Literal["none", "truncate", "mask"] = "none"
    """Correction of the sampler's mismatch: truncate its importance weight, or mask above it."""
    importance_level: Literal["token", "sequence"] = "token"
    """Importance weight of each token, or of the whole completion."""
    importance_cap: PositiveFloat = 2.0
    """Largest importance weight."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """Completions cut at rollout.max_tokens: keep, leave out of loss, or lower their reward."""
    truncation_penalty: NonNegativeFloat = 1.0
    """Taken from the reward of a truncated completion under truncated: penalise."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "dgrpo")
        return {**PRESETS.get(preset, {}), **values} if isinstance(preset, str) else values

    @model_validator(mode="after")
    def _terms_agree(self) -> Self:
        if self.teacher == "none" and self.teacher_coef != 0.0:
            raise ValueError(f"teacher_coef: got {self.teacher_coef} without a teacher, expected 0")
        if self.teacher == "self" and self.teacher_context == "same":
            raise ValueError(
                'teacher_context: got "same" for a self-teacher, which then equals the policy; '
                "expected another prompt, e.g. evidence, privileged or correct_rollout"
            )
        if self.advantage == "none" and self.teacher_coef == 0.0 and self.objective == "dgrpo":
            raise ValueError("advantage: got none with teacher_coef 0; there would be no loss")
        clipped, bound = self.divergence == "clipped_forward_kl", self.divergence_clip
        if clipped and bound is None:
            raise ValueError("divergence_clip: got null, expected a bound for clipped_forward_kl")
        if not clipped and bound is not None:
            raise ValueError(f"divergence_clip: got {bound} with {self.divergence}, expected null")
        if self.importance != "none" and self.old_logprobs == "sampler":
            raise ValueError(
                f"importance: got {self.importance} while the ratio is already taken to the "
                "sampler; expected none, or old_logprobs: trainer"
            )
        return self

    @model_validator(mode="after")
    def _given_sequences_need_no_rollouts(self) -> Self:
        reads_rollouts = {
            "advantage": self.advantage == "group",
            "teacher_context": self.teacher_context == "correct_rollout",
            "gate": self.gate in ("wrong", "mixed"),
            "importance": self.importance != "none",
            "old_logprobs": self.old_logprobs == "sampler",
        }
        for name, reads in reads_rollouts.items():
            if reads and self.sequences == "given":
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, which reads rollouts; expected another "
                    "value with sequences: given"
                )
        return self

    def teaches(self) -> bool:
        """Whether any step of this method compares the policy with a teacher."""
        coef = self.teacher_coef
        return self.teacher != "none" and (isinstance(coef, Schedule) or coef != 0.0)
