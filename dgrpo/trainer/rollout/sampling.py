"""Settings and results of sampling, and how a token is drawn.

Every random number is a function of (seed, step, prompt, index, position) and of nothing else: a
sample draws the same whatever is generated beside it, in which order and on which rank, and so does
a resumed run. `stream_keys` hashes the first four into one key per sample, `uniforms` turns key and
position into a number, and `draw` inverts the cumulative distribution at it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_BLOCK = 256  # columns of a block of the two-level cumulative sum
_CHUNK = 1 << 24  # logits turned into probabilities at once


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    No top-p or top-k: the policy ratio is taken to the whole distribution, and sampling from a part
    of it would bias it.
    """

    max_tokens: int = 256  # of the longest completion
    temperature: float = 1.0  # divisor of the logits; 0 takes the likeliest token
    # Tokens that end a completion and are part of it; None: the model's own, (): none.
    stop_token_ids: tuple[int, ...] | None = None
    # Texts that end a completion; the token that completes one is kept. Needs a tokenizer.
    stop_strings: tuple[str, ...] = ()
    seed: int = 0  # of the run
    step: int = 0  # of the run: the same prompt draws other tokens in each

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: got {self.max_tokens}, expected at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature: got {self.temperature}, expected 0 (greedy) or a positive number"
            )
        if "" in self.stop_strings:
            raise ValueError("stop_strings: got an empty string, expected texts; leave it out")


@dataclass(frozen=True)
class Rollout:
    """One completion, on the CPU; C tokens, the end-of-sequence token among them."""

    prompt_ids: Tensor  # (P,) int64, shared by the samples of a prompt
    completion_ids: Tensor  # (C,) int64
    logprobs: Tensor  # (C,) fp32, of the sampling distribution over the whole vocabulary
    finish_reason: Literal["stop", "length"]
    version: int  # of the weights that it was sampled from


def stream_keys(sampling: Sampling, keys: Iterable[int | str | bytes], n: int) -> Tensor:
    """A 64-bit key for each of n samples of each prompt: (prompts, n) int64."""
    rows = []
    for key in keys:
        kind = type(key).__name__.encode()
        data = key if isinstance(key, bytes) else str(key).encode()
        base = f"{sampling.seed} {sampling.step} ".encode() + kind + b" " + data
        digest = hashlib.blake2b(base, digest_size=32).digest()
        for index in range(n):
            small = hashlib.blake2b(index.to_bytes(8, "little"), key=digest, digest_size=8)
            rows.append(int.from_bytes(small.digest(), "little", signed=True))
    return torch.tensor(rows, dtype=torch.int64).view(-1, n)


def uniforms(keys: Tensor, position: int) -> Tensor:
    """Number `position` of each key's stream: fp64 in [0, 1), shaped like `keys`.

    SplitMix64 (Steele et al., OOPSLA 2014): the state is key + (position + 1) * gamma, the output
    its mixed bits, in wrapping int64 arithmetic and hence the same on every device.
    """
    x = keys + _signed((position + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    return _shift(x, 12).double() * 2.0**-52  # 52 bits: u * total stays below total


def draw(logits: Tensor, u: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row: tokens (R,) int64, and their log-probabilities (R,) fp32.

    Args:
        logits: (R, V) fp32.
        u: (R,) fp64 in [0, 1): the token is where the cumulative distribution passes it. Unused at
            temperature 0.
        temperature: divisor of the logits; 0 takes the likeliest token, whose log-probability is
            then that at temperature 1.
    """
    size = max(1, _CHUNK // logits.shape[1])
    if logits.shape[0] > size:
        rows = logits.split(size)
        numbers = [None] * len(rows) if u is None else u.split(size)
        parts = [draw(*part, temperature) for part in zip(rows, numbers, strict=True)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    lse = logits.logsumexp(1, keepdim=True)
    tokens = logits.argmax(1) if temperature == 0.0 else _invert(logits - lse, u)
    return tokens, (logits.gather(1, tokens[:, None]) - lse)[:, 0]


def _invert(logprobs: Tensor, u: Tensor) -> Tensor:
    """First token at which the cumulative probability exceeds u times its total.

    Block sums first, then the columns of one block, all in fp64: an fp32 cumulative sum over a
    vocabulary is off by 1e-5 and drops rare tokens.
    """
    rows, vocab = logprobs.shape
    blocks = -(-vocab // _BLOCK)
    p = logprobs.new_zeros(rows, blocks * _BLOCK)
    torch.exp(logprobs, out=p[:, :vocab])
    p = p.view(rows, blocks, _BLOCK)
    cumulative = p.sum(2, dtype=torch.float64).cumsum(1)
    goal = u[:, None] * cumulative[:, -1:]
    block = (cumulative <= goal).sum(1, keepdim=True).clamp_(max=blocks - 1)
    before = cumulative.gather(1, (block - 1).clamp(min=0)) * (block > 0)
    inner = p.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double()
    column = (inner.cumsum(1) <= goal - before).sum(1)
    # Rounding may leave the goal at the block's very end: then its last token of any probability.
    last = _BLOCK - 1 - (inner.flip(1) > 0).int().argmax(1)
    return block[:, 0] * _BLOCK + torch.minimum(column, last)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64 taken as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
