"""The built-in sampler: the policy itself, packed, with one copy of each prompt in the cache.

Samples run in waves that fit the cache. A wave prefills its prompts without padding, each once,
then draws a token for all of its samples in one forward pass, and drops those that have ended.
Under FSDP the parameters are gathered once per call, so that ranks may finish at different lengths.

Left out: refilling a running wave with waiting prompts, a cache shared between prompts with a
common beginning, paged memory. A serving engine behind the same two methods has them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from dgrpo.trainer.attention.dispatch import packed_attention
from dgrpo.trainer.policy import PolicyModel
from dgrpo.trainer.rollout.kvcache import KVCache
from dgrpo.trainer.rollout.sampling import Rollout, Sampling, draw, stream_keys, uniforms
from dgrpo.trainer.rollout.stops import Record, Stops

_PREFILL = 1 << 15  # prompt tokens of a forward pass
_T = TypeVar("_T")


class _Unit(NamedTuple):
    """Some samples of one prompt, which share its keys and values."""

    prompt: int
    first: int
    width: int


class HFSampler:
    """Samples from a `PolicyModel`, sharing its parameters.

    Args:
        policy: the model; in evaluation mode during a call.
        tokenizer: for stop strings and the end-of-sequence token.
        vocab_size: sample among this many first columns of the head, as the loss with the same
            option does; None: all.
        batch_tokens: tokens (prompts once, completions at their longest) in the cache at once. A
            single sample that is longer runs alone.
    """

    def __init__(
        self,
        policy: PolicyModel,
        tokenizer=None,
        *,
        vocab_size: int | None = None,
        batch_tokens: int = 65536,
    ):
        self.policy = policy
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.batch_tokens = batch_tokens
        self.version = 0
        self._stops: dict[tuple, Stops] = {}

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample from these weights from now on; the rollouts carry `version`. On all ranks.

        Advancing `weights`, the policy's names and full tensors, may be collective, so a sampler
        consumes it on all ranks or on none: here on none, as the parameters are the policy's own.
        """
        self.version = version

    def generate(
        self,
        prompts: Sequence[Tensor | Sequence[int]],
        n: int,
        sampling: Sampling,
        *,
        keys: Sequence[int | str] | None = None,
    ) -> list[Rollout]:
        """Complete every prompt `n` times; sample j of prompt i is at `i * n + j`.

        Called on all ranks alike, each with its own prompts of token ids, or none. `keys` are the
        seeds of the prompts' random numbers; None: their token ids, but prompts that occur twice
        in a step need different keys, or they draw the same completions.

        Raises:
            ValueError: an empty prompt, one that leaves no room in the model's context, a wrong
                number of keys, stop strings without a tokenizer.
        """
        prompts = [torch.as_tensor(p, dtype=torch.int64, device="cpu") for p in prompts]
        self._check(prompts, n, sampling, keys)
        names = [p.numpy().tobytes() for p in prompts] if keys is None else keys
        streams = stream_keys(sampling, names, n)
        rollouts: list[Rollout | None] = [None] * (len(prompts) * n)
        with torch.no_grad(), self.policy.gathered():
            for wave in _waves([len(p) for p in prompts], n, sampling, self.batch_tokens):
                own = [streams[u.prompt, u.first : u.first + u.width] for u in wave]
                record = self._run([prompts[u.prompt] for u in wave], own, sampling)
                places = [u.prompt * n + u.first + j for u in wave for j in range(u.width)]
                for row, place in enumerate(places):
                    size = int(record.lengths[row])
                    rollouts[place] = Rollout(
                        prompt_ids=prompts[place // n],
                        completion_ids=record.tokens[row, :size].clone(),
                        logprobs=record.logprobs[row, :size].clone(),
                        finish_reason="stop" if record.stopped[row] else "length",
                        version=self.version,
                    )
        return rollouts

    def stops(self, sampling: Sampling) -> Stops:
        """What ends a completion: by default the end tokens of model and tokenizer."""
        ids, strings = key = sampling.stop_token_ids, sampling.stop_strings
        if key not in self._stops:
            ids = _end_of_sequence(self.policy.config, self.tokenizer) if ids is None else ids
            self._stops[key] = Stops(ids, strings, self.tokenizer)
        return self._stops[key]

    def _run(self, prompts: list[Tensor], keys: list[Tensor], sampling: Sampling) -> Record:
        """Sample one wave: prompts in the cache's order, and each one's keys (width,)."""
        device = self.policy.device
        widths = [len(k) for k in keys]
        samples = torch.arange(sum(widths))
        record = Record(len(samples), sampling.max_tokens, self.stops(sampling))
        sizes = [len(p) for p in prompts]
        cache = KVCache(list(zip(sizes, widths, strict=True)), packed_attention)
        width = torch.tensor(widths, device=device)
        keys = torch.cat(keys).to(device)
        ends = torch.tensor(sizes, device=device).repeat_interleave(width)
        with record_function("rollout/prefill"):
            logits = self._prefill(cache, prompts).repeat_interleave(width, 0)
        stride = _stride(device)
        tokens, logprobs = [], []
        for step in range(sampling.max_tokens):
            u = uniforms(keys, step) if sampling.temperature else None
            token, logprob = draw(logits[:, : self.vocab_size], u, sampling.temperature)
            tokens.append(token)
            logprobs.append(logprob)
            if (step + 1) % stride == 0 or step + 1 == sampling.max_tokens:
                alive = record.add(samples, tokens, logprobs)
                tokens, logprobs = [], []
                left = int(alive.sum())
                if left == 0:
                    break
                if left <= 0.75 * len(alive):
                    rows = cache.keep(alive)
                    samples = torch.where(alive, samples, -1)[rows]
                    rows = rows.to(device)
                    token, keys, ends = token[rows], keys[rows], ends[rows]
            with record_function("rollout/decode"):
                cache.decode()
                logits = self._logits(token, ends + step, None, range(len(token)), cache)
        return record

    def _prefill(self, cache: KVCache, prompts: list[Tensor]) -> Tensor:
        """Fill the cache; the logits after each prompt, (G, V) fp32."""
        parts = []
        for some in _parts(prompts, len, _PREFILL):
            lengths = [len(p) for p in some]
            cache.prefill(lengths)
            positions = torch.cat([torch.arange(n) for n in lengths])
            last = torch.tensor(lengths).cumsum(0) - 1
            parts.append(self._logits(torch.cat(some), positions, lengths, last, cache))
        return torch.cat(parts)

    def _logits(self, tokens, positions, lengths, rows, cache) -> Tensor:
        """A packed forward pass: tokens, positions (T,), rows (R,) -> (R, V) fp32."""
        device = self.policy.device
        tokens, positions = tokens[None].to(device), positions[None].to(device)
        rows = torch.as_tensor(rows, device=device)
        return self.policy.next_logits(tokens, positions, lengths, rows=rows, cache=cache)

    def _check(self, prompts, n: int, sampling: Sampling, keys) -> None:
        if n < 1:
            raise ValueError(f"n: got {n}, expected at least 1 completion per prompt")
        if keys is not None and len(keys) != len(prompts):
            raise ValueError(
                f"keys: got {len(keys)} for {len(prompts)} prompts, expected one each, or None"
            )
        context = self.policy.context
        for i, prompt in enumerate(prompts):
            if prompt.dim() != 1 or len(prompt) == 0:
                raise ValueError(
                    f"prompts[{i}]: got shape {tuple(prompt.shape)}, expected (P,) with P >= 1"
                )
            if context and len(prompt) + sampling.max_tokens > context:
                raise ValueError(
                    f"prompts[{i}]: got {len(prompt)} tokens + max_tokens {sampling.max_tokens}, "
                    f"expected at most {context} (the model's max_position_embeddings) together; "
                    "drop longer prompts, or extend the model's context"
                )


def _stride(device: torch.device) -> int:
    """Tokens drawn between two checks of what has ended; a check waits for the GPU."""
    return 1 if device.type == "cpu" else 16


def _waves(lengths: list[int], n: int, sampling: Sampling, budget: int) -> Iterable[list[_Unit]]:
    """Units that run together, longest prompts first, neighbours of similar length."""
    units = []
    for i, length in enumerate(lengths):
        width = min(n, max(1, (budget - length) // sampling.max_tokens))
        for first in range(0, n, width):
            units.append(_Unit(i, first, min(width, n - first)))
    units.sort(key=lambda u: (-lengths[u.prompt], -u.width, u.prompt, u.first))
    return _parts(units, lambda u: lengths[u.prompt] + u.width * sampling.max_tokens, budget)


def _parts(items: Iterable[_T], cost: Callable[[_T], int], budget: int) -> Iterator[list[_T]]:
    """Neighbours that cost at most `budget` together; one that costs more alone."""
    part: list[_T] = []
    used = 0
    for item in items:
        if part and used + cost(item) > budget:
            yield part
            part, used = [], 0
        part.append(item)
        used += cost(item)
    if part:
        yield part


def _end_of_sequence(config, tokenizer) -> set[int]:
    found = [getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    return {
        i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])
    }
