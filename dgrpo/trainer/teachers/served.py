"""A teacher that a server runs: its top-k log-probabilities, over HTTP.

Any server with vLLM's extension of the OpenAI completions interface will do: token ids as the
prompt, and `prompt_logprobs` in the answer. Prompt and completion are sent as one prompt. The
server must allow as many log-probabilities as are asked for (`--max-logprobs`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgrpo.endpoint import Endpoint, EndpointError
from dgrpo.ops import TopKTeacher
from dgrpo.trainer.batch import Micro, Sample

log = logging.getLogger(__name__)

PATH = "/v1/completions"
ROUNDING = 1e-3  # a server's log-probability may lie above 0 by so much


class HttpTopK:
    """Asks an OpenAI-compatible server (vLLM) for top-k log-probabilities, at temperature 1.

    Args:
        url: of the server, e.g. "http://localhost:8000" (its `/v1/completions` is called).
        model: name under which it serves the teacher.
        key_variable, timeout, retries, workers: see `Endpoint`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 600.0,
        retries: int = 3,
        workers: int = 16,
    ):
        url = url.rstrip("/").removesuffix("/v1")
        options = {"timeout": timeout, "retries": retries, "workers": workers}
        self.endpoint = Endpoint(url, model, key_variable, **options)

    def topk(self, samples: Sequence[Sample], k: int) -> list[tuple[Tensor, Tensor] | None]:
        """For each sample (C, k + 1) ids and log-probabilities: the sampled token, the k likeliest.

        A sample whose request fails gets None and a warning.

        Raises:
            ConnectionError: not one request succeeded.
        """
        url = f"{self.endpoint.url}{PATH}"

        def ask(sample: Sample) -> tuple[Tensor, Tensor] | Exception:
            try:
                return self._ask(sample, k)
            except (EndpointError, ValueError) as error:
                place = f"group {sample.group}, sample {sample.index}"
                log.warning("teacher at %s: no answer for %s: %s", url, place, error)
                return error

        answers = dict(self.endpoint.each(ask, samples))
        failed = [answer for answer in answers.values() if isinstance(answer, Exception)]
        if samples and len(failed) == len(samples):
            raise ConnectionError(
                f"teacher: no request to {url} succeeded, the last failed with: {failed[-1]}"
            )
        ordered = [answers[i] for i in range(len(samples))]
        return [None if isinstance(answer, Exception) else answer for answer in ordered]

    def _ask(self, sample: Sample, k: int) -> tuple[Tensor, Tensor]:
        seen = sample.seen_by_teacher()
        ids = torch.cat([seen.prompt_ids, seen.completion_ids]).tolist()
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        answer = self.endpoint.post(PATH, body)
        return parse_prompt_logprobs(answer, ids, len(seen.completion_ids), k)


class ServedTeacher:
    """A teacher known by its k likeliest tokens at each position; the rest is one bucket."""

    def __init__(self, source: HttpTopK, k: int):
        if k < 1:
            raise ValueError(f"k: got {k}, expected at least 1")
        self.source = source
        self.k = k
        self.missing = 0  # samples of the last batch that got no answer: they have no teacher

    def attach(self, samples: Sequence[Sample], *_: Any, **__: Any) -> None:
        """Ask for the batch and write `sample.topk`. Called as `Teacher.attach`; not collective."""
        answers = self.source.topk(samples, self.k)
        for sample, answer in zip(samples, answers, strict=True):
            sample.topk = None
            if answer is not None:
                ids, logprobs = answer
                sample.topk = ids.masked_fill(~sample.guided[:, None], -1), logprobs
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
