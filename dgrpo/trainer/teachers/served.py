"""A teacher that a server runs: its top-k log-probabilities, over HTTP.

Any server with vLLM's extension of the OpenAI completions interface will do: token ids as the
prompt, and `prompt_logprobs` in the answer. Prompt and completion are sent as one prompt. The
server must allow as many log-probabilities as are asked for (`--max-logprobs`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgrpo.endpoint import Endpoint, EndpointError
from dgrpo.ops import TopKTeacher
from dgrpo.trainer.batch import Micro, Sample

log = logging.getLogger(__name__)

PATH = "/v1/completions"
ROUNDING = 1e-3  # a server's log-probability may lie above 0 by so much


class ServedTeacher:
    """A teacher known by its k likeliest tokens at each position; the rest is one bucket.

    Args:
        endpoint: of the server, e.g. "http://localhost:8000" (its `/v1/completions` is called, at
            temperature 1), and the name under which it serves the teacher.
        k: log-probabilities per token to ask for.
    """

    def __init__(self, endpoint: Endpoint, k: int):
        if k < 1:
            raise ValueError(f"k: got {k}, expected at least 1")
        self.endpoint = replace(endpoint, url=endpoint.url.rstrip("/").removesuffix("/v1"))
        self.k = k
        self.missing = 0  # samples of the last batch that got no answer: they have no teacher

    def attach(self, samples: Sequence[Sample], *_: Any) -> None:
        """Ask for the batch and write `sample.topk`. Called as `Teacher.attach`; not collective.

        A sample whose request fails has no teacher, which is warned of.

        Raises:
            ConnectionError: not one request succeeded.
        """
        url, failed = f"{self.endpoint.url}{PATH}", []

        def ask(sample: Sample) -> tuple[Tensor, Tensor] | None:
            try:
                ids, logprobs = self.topk(sample)
                return ids.masked_fill(~sample.guided[:, None], -1), logprobs
            except (EndpointError, ValueError) as error:
                place = f"group {sample.group}, sample {sample.index}"
                log.warning("teacher at %s: no answer for %s: %s", url, place, error)
                failed.append(error)
                return None

        for i, answer in self.endpoint.each(ask, samples):
            samples[i].topk = answer
        self.missing = len(failed)
        if samples and len(failed) == len(samples):
            raise ConnectionError(
                f"teacher: no request to {url} succeeded, the last failed with: {failed[-1]}"
            )

    def topk(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """(C, k + 1) ids and log-probabilities: the sampled token, the k likeliest others."""
        seen = sample.seen_by_teacher()
        ids = torch.cat([seen.prompt_ids, seen.completion_ids]).tolist()
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self.k}
        answer = self.endpoint.post(PATH, body)
        return parse_prompt_logprobs(answer, ids, len(seen.completion_ids), self.k)

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


def parse_prompt_logprobs(
    answer: Any, ids: Sequence[int], tokens: int, k: int
) -> tuple[Tensor, Tensor]:
    """(C, k + 1) ids, -1 = padding, and log-probabilities of the last C = `tokens` of `ids`.

    `answer` is the server's, for these `ids` and this `k`.

    Raises:
        ValueError: an answer of another form, or without the log-probability of a token of `ids`.
    """
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
        if len(entries) != len(ids):
            raise ValueError
        entries = entries[-tokens:]
    except (KeyError, IndexError, TypeError, ValueError):
        expected = f"choices[0].prompt_logprobs of {len(ids)} entries"
        raise _unexpected(answer, expected) from None
    out_ids = torch.full((tokens, k + 1), -1, dtype=torch.int64)
    out_logprobs = torch.zeros(tokens, k + 1)
    for n, (entry, token) in enumerate(zip(entries, ids[-tokens:], strict=True)):
        try:
            known = {int(i): float(value["logprob"]) for i, value in entry.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise _unexpected(entry, "token ids with a logprob each") from None
        if token not in known or not all(value <= ROUNDING for value in known.values()):
            raise _unexpected(entry, f"log-probabilities, that of token {token} among them")
        best = sorted(known, key=lambda i: (i != token, -known[i]))[: k + 1]
        out_ids[n, : len(best)] = torch.tensor(best)
        out_logprobs[n, : len(best)] = torch.tensor([min(known[i], 0.0) for i in best])
    return out_ids, out_logprobs


def _unexpected(got: Any, expected: str) -> ValueError:
    return ValueError(f"answer: got {str(got)[:200]!r}, expected {expected}")
