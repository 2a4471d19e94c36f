"""A model that completes texts: what `dgrpo generate` and `dgrpo eval` use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from dgrpo.data import Source
from dgrpo.data.render import PromptEncoder
from dgrpo.trainer.config import Model
from dgrpo.trainer.loading import load_tokenizer
from dgrpo.trainer.models import load_policy
from dgrpo.trainer.policy import fsdp
from dgrpo.trainer.rollout import HFSampler, Sampling


class Generator:
    """Completions of texts or chat messages by a model on one device.

    Args:
        model: hub name or folder.
        dtype: "float32", "bfloat16" or "float16"; None: bfloat16 on a GPU, float32 on a CPU.
        device: "auto", "cpu" or "cuda".
        chat: apply the chat template; None: if the tokenizer has one.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
        batch_tokens: tokens in the cache at once.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str | None = None,
        device: str = "auto",
        chat: bool | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_tokens: int = 65536,
        trust_remote_code: bool = False,
    ):
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        wanted = Model(
            name=model,
            dtype=dtype or ("bfloat16" if cuda else "float32"),
            trust_remote_code=trust_remote_code,
        )
        transformers.logging.disable_progress_bar()
        self.tokenizer: Any = load_tokenizer(wanted)
        policy = load_policy(wanted).requires_grad_(False).eval()
        fsdp.reset_rotary(policy)
        self.encoder = PromptEncoder(self.tokenizer, chat=chat)
        self.sampler = HFSampler(
            policy.to("cuda" if cuda else "cpu"), self.tokenizer, batch_tokens=batch_tokens
        )
        self.temperature, self.seed = temperature, seed

    def __call__(self, prompts: Sequence[str | list], max_tokens: int, n: int = 1) -> list[str]:
        """n completions of each prompt, those of a prompt in a row."""
        source = Source(prompt="prompt")
        ids = [self.encoder.encode({"prompt": prompt}, source).ids for prompt in prompts]
        drawn = self.sampler.generate(
            ids,
            n,
            Sampling(max_tokens=max_tokens, temperature=self.temperature, seed=self.seed),
            keys=list(range(len(ids))),
        )
        tokens = [rollout.completion_ids.tolist() for rollout in drawn]
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
