"""`PolicyModel`: body, then loss head.

Training does not use Hugging Face's own `forward`, which calls the head on every token. The body
runs on packed sequences, and its last hidden states go to `FusedHead` together with all inputs of
the loss in one dataclass, which FSDP neither casts nor moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dgrpo.head import FusedHead, HeadInputs, HeadOutput
from dgrpo.trainer.attention.dispatch import packed_arguments, use_packed_attention
from dgrpo.trainer.batch import Micro
from dgrpo.trainer.policy.heads import LoraHead, head_of, install_head


class PolicyModel(nn.Module):
    """A causal language model of transformers, or a peft LoRA model around one, with a loss head.

    Student and teacher are both policy models. Parameter names are those of `model` after `model.`.

    Args:
        model: what `AutoModelForCausalLM` or `peft.get_peft_model` returned; changed in place: its
            attention becomes packed attention, its `lm_head` a `FusedHead` with its parameters.

    Raises:
        ValueError: a model whose logits or attention are not understood.
        TypeError: not a causal language model with a linear head.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        causal = self.causal
        if not isinstance(causal, PreTrainedModel) or causal.base_model is causal:
            raise TypeError(f"model: got {type(causal).__name__}, expected an AutoModelForCausalLM")
        install_head(causal)
        use_packed_attention(causal)
        # Set by `fsdp.shard`: FSDP modules with their reshard_after_forward, the mesh's device.
        self.sharded: list[tuple[nn.Module, bool]] = []
        self.mesh_device: torch.device | None = None

    @property
    def causal(self) -> PreTrainedModel:
        """The Hugging Face causal model, also below peft."""
        peft = hasattr(self.model, "peft_config") and hasattr(self.model, "get_base_model")
        return self.model.get_base_model() if peft else self.model

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        return self.causal.base_model

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        count = self.config.num_hidden_layers
        for module in self.body.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
        raise ValueError(
            f"model: got {type(self.body).__name__}, expected a list of {count} decoder layers"
        )

    @property
    def head(self) -> FusedHead:
        """The loss head."""
        return head_of(self.causal)

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the text model."""
        return self.causal.config.get_text_config()

    @property
    def tied(self) -> bool:
        """Whether the head shares its weight with the input embedding."""
        embedding = self.causal.get_input_embeddings()
        return getattr(embedding, "base_layer", embedding).weight is self.head.weight

    @property
    def adapted_head(self) -> bool:
        """Whether the head has LoRA."""
        return isinstance(self.head, LoraHead)

    @property
    def vocab_size(self) -> int:
        """Rows of the head, padding of the vocabulary included."""
        return self.head.out_features

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.head.in_features

    @property
    def context(self) -> int | None:
        """Most tokens of a sequence by the configuration; None where it sets no limit."""
        limit = getattr(self.config, "max_position_embeddings", None) or 0
        rope = getattr(self.config, "rope_parameters", None) or {}
        if limit > 0 and rope.get("rope_type") == "yarn":
            # Where YaRN is switched on by hand, max_position_embeddings often stays the original.
            original = rope.get("original_max_position_embeddings") or limit
            limit = max(limit, int(original * rope.get("factor", 1.0)))
        return limit if limit > 0 else None

    @property
    def device(self) -> torch.device:
        """Where inputs belong (parameters may be offloaded)."""
        return self.mesh_device or next(self.parameters()).device

    def forward(self, micro: Micro, inputs: HeadInputs) -> HeadOutput:
        """One pass of training or scoring. FSDP neither casts nor moves what is in either."""
        # Not self.hidden_states: registered with FSDP, it would end the root's forward pass.
        return self.head(self._states(micro), inputs)

    def hidden_states(self, micro: Micro) -> Tensor:
        """(T, H) last hidden states. Registered with FSDP."""
        return self._states(micro)

    @torch.no_grad()
    def next_logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Sequence[int] | None,
        *,
        rows: Tensor,
        cache: Any,
    ) -> Tensor:
        """(R, V) fp32 logits at the tokens `rows` (R,) int64, for sampling. Registered with FSDP.

        The tokens, (1, T) int64, are prompts of these lengths end to end, or, with `lengths` None,
        one new token of each running sample. `cache.attend` is the attention of every layer.
        """
        ends = None
        if lengths is not None:
            ends = torch.tensor([0, *lengths], device=input_ids.device).cumsum(0).to(torch.int32)
        hidden = self._run(input_ids, position_ids, ends, lengths, cache=cache)
        return self.head.fp32_logits(hidden[rows])

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Evaluation mode with all parameters gathered: forward passes need no communication.

        For sampling, which would otherwise gather them for every token. Under FSDP all ranks must
        enter together; inside they may run different numbers of passes.
        """
        with self.evaluating():
            try:
                for module, _ in self.sharded:
                    module.set_reshard_after_forward(False, recurse=False)
                    module.unshard()
                yield
            finally:
                for module, reshards in self.sharded:
                    module.set_reshard_after_forward(reshards, recurse=False)
                    module.reshard()

    def _states(self, micro: Micro) -> Tensor:
        packed = micro.cu_seqlens, micro.lengths, micro.prefixes
        return self._run(micro.input_ids, micro.position_ids, *packed)

    def _run(self, tokens, positions, cu_seqlens, lengths, prefixes=None, cache=None) -> Tensor:
        lengths = None if lengths is None else tuple(lengths)
        packing = packed_arguments(cu_seqlens, lengths, cache, prefixes)
        out = self.body(input_ids=tokens, position_ids=positions, use_cache=False, **packing)
        return out.last_hidden_state[0]
