"""Teachers: a frozen model on the same ranks, the policy on another prompt, a server's top k.

All have the same two methods:

    teacher.attach(samples, max_tokens)      # once per batch, before packing
    inputs = micro.head_inputs("loss", teacher=teacher.head(micro), options=...)

A model's body runs once per batch without gradient. Its last hidden states (10 KB a token at width
5120) are kept, in host memory above a size, and its head is gathered within each pass of the
student's loss head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dgrpo.ops import TeacherHead, TopKTeacher
from dgrpo.trainer.batch import Micro, Sample, balanced_count, pack
from dgrpo.trainer.policy import PolicyModel


class _ModelTeacher:
    """A model's hidden states before the guided tokens of a batch, and its head."""

    def __init__(self, model: PolicyModel, offload_above: int):
        self.model = model
        self.offload_above = offload_above
        self.hidden = torch.empty(0, model.hidden_size)  # (M, Ht) of the batch

    def attach(self, samples: Sequence[Sample], max_tokens: int, **packing: Any) -> None:
        """Keep the hidden states of a batch, and set `sample.teacher_rows` to the rows of each.

        Collective: every rank calls it, with any number of samples.

        Args:
            samples: the batch; a sample's `teacher_prompt_ids` takes the place of its prompt.
            max_tokens: tokens of a forward pass.
            packing: `share_prompts`, as for `pack`.
        """
        self.hidden = torch.empty(0, self.model.hidden_size)  # frees the last batch's first
        self.hidden = read(self.model, samples, max_tokens, self.offload_above, **packing)

    def head(self, micro: Micro) -> TeacherHead:
        """The loss head's teacher for `micro`, also where none of its tokens is guided."""
        own, hidden = self.model.head, self.hidden
        return TeacherHead(
            hidden=hidden if len(hidden) else hidden.new_zeros(1, own.in_features),  # a dummy row
            weight=self._open,
            logit_scale=own.logit_scale,
            logit_softcap=own.logit_softcap,
            rows=micro.teacher_rows,
        )

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The head's weight and bias, entered within the student's head, also in backward."""
        head = self.model.head
        with torch.no_grad():
            weight = head.merged_weight().detach()
        yield weight, None if head.bias is None else head.bias.detach()


class Teacher(_ModelTeacher):
    """A frozen model on the student's ranks, with its own width and padded vocabulary.

    Args:
        model: sharded like the student, or not at all. Its parameters are frozen here.
        offload_above: bytes of a rank's hidden states above which they go to (pinned) host memory.
        offload_body: keep the decoder layers in host memory between calls of `attach`, so that the
            student has their memory.
    """

    def __init__(
        self, model: PolicyModel, *, offload_above: int = 2**30, offload_body: bool = False
    ):
        super().__init__(model.eval().requires_grad_(False), offload_above)
        self.offload_body = offload_body

    def attach(self, samples: Sequence[Sample], max_tokens: int, **packing: Any) -> None:
        """Keep the hidden states of a batch, with the decoder layers on the device meanwhile."""
        if self.offload_body:
            self._move_layers(self.model.device)
        super().attach(samples, max_tokens, **packing)
        if self.offload_body:
            self._move_layers("cpu")

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        # The group that holds the head: its own, or the root's for a tied one.
        owner = self.model.head if isinstance(self.model.head, FSDPModule) else self.model
        if isinstance(owner, FSDPModule):
            owner.unshard()
        try:
            with super()._open() as weights:
                yield weights
        finally:
            if isinstance(owner, FSDPModule):
                owner.reshard()

    def _move_layers(self, device: torch.device | str) -> None:
        for layer in self.model.layers:
            layer.to(device)


class SelfTeacher(_ModelTeacher):
    """The current policy, without gradient, on each sample's `teacher_prompt_ids`.

    That is a shorter, evidence-only prompt, or one with a privileged context. Hidden states are
    read once per batch. The head is the policy's own, which moves if a batch has several optimiser
    steps.

    Args:
        policy: the student.
        offload_above: as for `Teacher`.
    """

    def __init__(self, policy: PolicyModel, *, offload_above: int = 2**30):
        super().__init__(policy, offload_above)

    def attach(self, samples: Sequence[Sample], max_tokens: int, **packing: Any) -> None:
        """Keep the hidden states of a batch, read in evaluation mode."""
        training = self.model.training
        self.model.eval()
        try:
            super().attach(samples, max_tokens, **packing)
        finally:
            self.model.train(training)


class TopKSource(Protocol):
    """Where top-k log-probabilities come from, e.g. `dgrpo.trainer.teachers.served.HttpTopK`."""

    def topk(self, samples: Sequence[Sample], k: int) -> list[tuple[Tensor, Tensor] | None]:
        """Top-k log-probabilities of the completion tokens of `sample.seen_by_teacher()`.

        For each sample ids (C, K) int64, -1 = padding, and log-probabilities (C, K) fp32; K may
        exceed k. None where there is no answer for a sample.
        """
        ...


class ServedTeacher:
    """A teacher known by its k likeliest tokens at each position; the rest is one bucket.

    Args:
        source: where they come from.
        k: tokens asked for at each position.
    """

    def __init__(self, source: TopKSource, k: int):
        if k < 1:
            raise ValueError(f"k: got {k}, expected at least 1")
        self.source = source
        self.k = k
        self.missing = 0  # samples of the last batch that got no answer: they have no teacher

    def attach(self, samples: Sequence[Sample], *_: Any, **__: Any) -> None:
        """Ask for the batch and write `sample.topk`. Called as `Teacher.attach`; not collective."""
        answers = self.source.topk(samples, self.k)
        for sample, answer in zip(samples, answers, strict=True):
            if answer is not None:
                ids, logprobs = answer
                answer = ids.masked_fill(~sample.guided[:, None], -1), logprobs
            sample.topk = answer
        self.missing = sum(answer is None for answer in answers)

    def head(self, micro: Micro) -> TopKTeacher:
        """The loss head's teacher for `micro`, on its device."""
        pieces = [sample.topk for sample in micro.samples]
        width = max((ids.shape[1] for ids, _ in filter(None, pieces)), default=1)
        tokens, device = micro.targets.numel(), micro.targets.device
        ids = torch.full((tokens, width), -1, dtype=torch.int64)
        logprobs = torch.zeros(tokens, width)
        for (start, count), piece in zip(micro.spans, pieces, strict=True):
            if piece is not None:
                place = slice(start, start + count), slice(piece[0].shape[1])
                ids[place], logprobs[place] = piece
        return TopKTeacher(ids.to(device), logprobs.to(device))


@torch.no_grad()
def read(
    model: PolicyModel,
    samples: Sequence[Sample],
    max_tokens: int,
    offload_above: int,
    **packing: Any,
) -> Tensor:
    """(M, Ht) hidden states of `model` before the M guided tokens; writes `teacher_rows`.

    Collective. They lie in (pinned) host memory beside a GPU if they take more than
    `offload_above` bytes, else on the model's device.
    """
    end = 0
    for sample in samples:
        guided = sample.guided
        sample.teacher_rows = torch.where(guided, guided.cumsum(0) - 1 + end, -1)
        end += int(guided.sum())
    micros = pack([sample.seen_by_teacher() for sample in samples], max_tokens, **packing)
    kept = torch.empty(0, model.hidden_size, dtype=model.head.weight.dtype, device=model.device)
    for number, micro in enumerate(balanced_count(micros)):
        hidden = model.hidden_states(**micro.to(model.device).model_args())
        if number == 0:
            kept = _buffer(end, hidden, offload_above)
        for (start, count), index in zip(micro.spans, micro.indices, strict=True):
            rows = samples[index].teacher_rows
            guided = rows >= 0
            if guided.any():  # the guided rows of a sample are consecutive
                first, own = int(rows[guided][0]), guided.to(hidden.device)
                picked = hidden[start : start + count][own]
                kept[first : first + len(picked)].copy_(picked, non_blocking=True)
    if kept.is_pinned():
        torch.cuda.synchronize()
    return kept


def _buffer(rows: int, like: Tensor, offload_above: int) -> Tensor:
    shape, dtype = (rows, like.shape[1]), like.dtype
    if like.is_cuda and rows * like.shape[1] * like.element_size() > offload_above:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.empty(shape, dtype=dtype, device=like.device)
