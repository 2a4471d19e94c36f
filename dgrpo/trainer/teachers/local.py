"""Teachers: a frozen model on the same ranks, the policy on another prompt, a server's top k.

All have the same two methods, so that a trainer has one road:

    teacher.attach(samples, max_tokens)      # once per batch, before packing
    inputs = micro.head_inputs("loss", teacher=teacher.head(micro), options=...)

A model's body runs once per batch without gradient. Its last hidden states (10 KB a token at width
5120) are kept, in host memory above a size, and its head is gathered within each pass of the
student's loss head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dgrpo.ops import TeacherHead, TopKTeacher
from dgrpo.trainer.batch import Micro, Sample, balanced_count, pack
from dgrpo.trainer.policy import PolicyModel


class Teacher:
    """A frozen model on the student's ranks, with its own width and padded vocabulary.

    Args:
        model: sharded like the student, or not at all. Its parameters are frozen here.
        offload_above: bytes of a rank's hidden states above which they go to (pinned) host memory.
        offload_body: keep the decoder layers in host memory between calls of `attach`, so that the
            student has their room.
    """

    def __init__(
        self, model: PolicyModel, *, offload_above: int = 2**30, offload_body: bool = False
    ):
        self.model = model.eval().requires_grad_(False)
        self.offload_above = offload_above
        self.offload_body = offload_body
        self.hidden = torch.empty(0, model.hidden_size)  # (M, Ht) of the batch

    def attach(
        self, samples: Sequence[Sample], max_tokens: int, group: Any = None, **packing: Any
    ) -> None:
        """Read a batch: keep its hidden states, and note in `sample.teacher_rows` which is whose.

        Collective: every rank calls it, with any number of samples.

        Args:
            samples: the batch; a sample's `teacher_prompt_ids` takes the place of its prompt.
            max_tokens: tokens of a forward pass.
            group: process group of the ranks, None = all.
            packing: `share_prompts` as for `pack`.
        """
        self.hidden = torch.empty(0, self.model.hidden_size)  # frees the last batch's first
        if self.offload_body:
            self._move_layers(self.model.device)
        self.hidden = read(self.model, samples, max_tokens, self.offload_above, group, **packing)
        if self.offload_body:
            self._move_layers("cpu")

    def head(self, micro: Micro) -> TeacherHead:
        """What the loss head needs for `micro`, also where the teacher has no token of it."""
        return _teacher_head(self.model, self.hidden, micro, self._open)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        # The group that holds the head: its own, or the root's for a tied one.
        owner = self.model.head if isinstance(self.model.head, FSDPModule) else self.model
        if isinstance(owner, FSDPModule):
            owner.unshard()
        try:
            yield _weights(self.model)
        finally:
            if isinstance(owner, FSDPModule):
                owner.reshard()

    def _move_layers(self, device: torch.device | str) -> None:
        for layer in self.model.layers:
            layer.to(device)


class SelfTeacher:
    """The current policy, without gradient, on each sample's `teacher_prompt_ids`.

    That is a shorter, evidence-only prompt, or one with a privileged context. Hidden states are
    read once per batch. The head is the policy's own, which moves if a batch has several optimiser
    steps; `frozen_head` keeps it as it was at `attach`, for a sharded copy.

    Args:
        policy: the student.
        offload_above: as for `Teacher`.
        frozen_head: keep a copy of the head.

    Raises:
        ValueError: `frozen_head` for a head with LoRA.
    """

    def __init__(
        self, policy: PolicyModel, *, offload_above: int = 2**30, frozen_head: bool = False
    ):
        if frozen_head and policy.adapted_head:
            raise ValueError("frozen_head: got True for a head with LoRA, expected False")
        self.model = policy
        self.offload_above = offload_above
        self.frozen_head = frozen_head
        self.hidden = torch.empty(0, policy.hidden_size)
        self._kept: tuple[Tensor, Tensor | None] | None = None

    def attach(
        self, samples: Sequence[Sample], max_tokens: int, group: Any = None, **packing: Any
    ) -> None:
        """As `Teacher.attach`. Collective."""
        self.hidden = torch.empty(0, self.model.hidden_size)
        training = self.model.training
        self.model.eval()
        try:
            self.hidden = read(
                self.model, samples, max_tokens, self.offload_above, group, **packing
            )
        finally:
            self.model.train(training)
        if self.frozen_head:
            for module, _ in self.model.sharded:
                module.reshard()
            weight, bias = self.model.head.weight.detach(), self.model.head.bias
            dtype = self.hidden.dtype
            kept = None if bias is None else bias.detach().to(dtype, copy=True)
            self._kept = weight.to(dtype, copy=True), kept

    def head(self, micro: Micro) -> TeacherHead:
        """As `Teacher.head`."""
        return _teacher_head(self.model, self.hidden, micro, self._open)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        # Entered within the policy's own head, whose parameters are gathered there, also in
        # backward. Gathering a frozen copy has no gradient that could go astray.
        if self._kept is None:
            yield _weights(self.model)
        else:
            weight, bias = self._kept
            yield _gathered(weight), None if bias is None else _gathered(bias)


class TopKSource(Protocol):
    """Where top-k log-probabilities come from, e.g. `dgrpo.trainer.teachers.served.HttpTopK`."""

    def topk(self, samples: Sequence[Sample], k: int) -> list[tuple[Tensor, Tensor] | None]:
        """What the teacher says of the completion tokens of `sample.seen_by_teacher()`.

        For each sample ids (C, K) int64, -1 = padding, and log-probabilities (C, K) fp32; K may
        exceed k. None: there is no answer for this sample.
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
        """What the loss head needs for `micro`, on its device."""
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
    group: dist.ProcessGroup | None = None,
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
    for number, micro in enumerate(balanced_count(micros, group)):
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


def _teacher_head(
    model: PolicyModel, hidden: Tensor, micro: Micro, opening: Callable[[], Any]
) -> TeacherHead:
    return TeacherHead(
        hidden=hidden if len(hidden) else hidden.new_zeros(1, model.hidden_size),  # a row to index
        weight=opening,
        logit_scale=model.head.logit_scale,
        logit_softcap=model.head.logit_softcap,
        rows=micro.teacher_rows,
    )


@torch.no_grad()
def _weights(model: PolicyModel) -> tuple[Tensor, Tensor | None]:
    bias = model.head.bias
    return model.head.merged_weight().detach(), None if bias is None else bias.detach()


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
