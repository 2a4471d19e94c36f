"""Teachers whose model runs on the same ranks: a frozen one, or the policy on another prompt.

These, and the one in `served.py`, have the same two methods:

    teacher.attach(samples, max_tokens)      # once per batch, before packing
    inputs = micro.head_inputs("loss", teacher=teacher.head(micro), options=...)

A model's body runs once per batch without gradient. Its last hidden states (10 KB per token at
width 5120) are kept, in host memory above a size, and its head is gathered within each pass of the
student's loss head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dgrpo.ops import TeacherHead
from dgrpo.trainer.batch import Micro, Sample, balanced_count, pack
from dgrpo.trainer.policy import PolicyModel


class _ModelTeacher:
    """A model's hidden states before the guided tokens of a batch, and its head."""

    def __init__(self, model: PolicyModel, *, offload_above: int = 2**30):
        self.model = model
        self.offload_above = offload_above
        self.hidden = torch.empty(0, model.hidden_size)  # (M, Ht) of the batch

    @torch.no_grad()
    def attach(
        self, samples: Sequence[Sample], max_tokens: int, share_prompts: bool = True
    ) -> None:
        """Keep the hidden states of a batch, and set `sample.teacher_rows` to the rows of each.

        Collective: every rank calls it, with any number of samples. The states lie in (pinned) host
        memory beside a GPU if they take more than `offload_above` bytes, else on the model's
        device.

        Args:
            samples: the batch; a sample's `teacher_prompt_ids` takes the place of its prompt.
            max_tokens: tokens of a forward pass.
            share_prompts: as for `pack`.
        """
        model, total = self.model, 0
        for sample in samples:
            guided = sample.guided
            sample.teacher_rows = torch.where(guided, guided.cumsum(0) - 1 + total, -1)
            total += int(guided.sum())
        seen = [sample.seen_by_teacher() for sample in samples]
        micros = balanced_count(pack(seen, max_tokens, share_prompts=share_prompts))
        # Frees the last batch's states first. Without any pass, this is what there is.
        dtype = model.head.weight.dtype
        self.hidden = torch.empty(0, model.hidden_size, dtype=dtype, device=model.device)
        with self._reading():
            for number, micro in enumerate(micros):
                hidden = model.hidden_states(micro.to(model.device))
                if number == 0:
                    size = total * hidden.shape[1] * hidden.element_size()
                    pinned = hidden.is_cuda and size > self.offload_above
                    place = {"pin_memory": True} if pinned else {"device": hidden.device}
                    self.hidden = torch.empty(total, hidden.shape[1], dtype=hidden.dtype, **place)
                for (start, count), index in zip(micro.spans, micro.indices, strict=True):
                    rows = samples[index].teacher_rows
                    tokens = (rows >= 0).nonzero()[:, 0]
                    if len(tokens):  # the guided rows of a sample are consecutive
                        first = int(rows[tokens[0]])
                        picked = hidden[start : start + count]
                        if len(tokens) < count:  # by indices: a mask would wait for the device
                            chosen = tokens.pin_memory() if hidden.is_cuda else tokens
                            picked = picked[chosen.to(hidden.device, non_blocking=True)]
                        self.hidden[first : first + len(picked)].copy_(picked, non_blocking=True)
        if self.hidden.is_pinned():
            torch.cuda.synchronize()

    def _reading(self) -> AbstractContextManager:
        """What `attach` runs the model within."""
        return nullcontext()

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

    @contextmanager
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
        super().__init__(model.eval().requires_grad_(False), offload_above=offload_above)
        self.offload_body = offload_body
        self._host: list[Tensor] = []  # pinned; the layers are frozen: nothing is copied back

    @contextmanager
    def _reading(self) -> Iterator[None]:
        model, layers = self.model, self.model.layers if self.offload_body else []
        moved = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
        if any(isinstance(tensor, DTensor) for tensor in moved):  # FSDP knows where its parts are
            for layer in layers:
                layer.to(model.device)
            yield
            for layer in layers:
                layer.to("cpu")
            return
        if not self._host:
            on_gpu = torch.device(model.device).type == "cuda"
            self._host = [t.data.cpu().pin_memory() if on_gpu else t.data for t in moved]
        for tensor, host in zip(moved, self._host, strict=True):
            tensor.data = host.to(model.device, non_blocking=True)
        yield
        for tensor, host in zip(moved, self._host, strict=True):
            tensor.data = host

    @contextmanager
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


class SelfTeacher(_ModelTeacher):
    """The current policy, without gradient, on each sample's `teacher_prompt_ids`.

    That is a shorter, evidence-only prompt, or one with a privileged context. The head is the
    policy's own, which moves if a batch has several optimiser steps.
    """

    def _reading(self) -> AbstractContextManager:
        return self.model.evaluating()
