"""Top-k log-probabilities of a teacher that a server runs, over HTTP.

Any server with vLLM's extension of the OpenAI completions interface will do: token ids as the
prompt, and `prompt_logprobs` in the answer. Prompt and completion are sent as one prompt, after
which one token is generated. The server must allow as many log-probabilities as are asked for
(`--max-logprobs`).
"""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dgrpo.trainer.batch import Sample

log = logging.getLogger(__name__)

ROUNDING = 1e-3  # a server's log-probability may lie above 0 by so much


class HttpTopK:
    """Asks an OpenAI-compatible server (vLLM) for top-k log-probabilities, at temperature 1.

    Args:
        url: of the server, e.g. "http://localhost:8000" (its `/v1/completions` is called).
        model: name under which it serves the teacher.
        api_key: sent as a bearer token where given.
        timeout: seconds for one request.
        retries: further attempts where the failure may pass (connection, time-out, status 429 or
            5xx).
        workers: requests under way at once.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 3,
        workers: int = 16,
    ):
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ValueError(f"url: got {url!r}, expected one that begins with http:// or https://")
        self.url = f"{base}/v1/completions"
        self.model = model
        self.timeout = timeout
        self.retries = retries
        self.workers = workers
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def topk(self, samples: Sequence[Sample], k: int) -> list[tuple[Tensor, Tensor] | None]:
        """For each sample (C, k + 1) ids and log-probabilities: the sampled token, the k likeliest.

        A sample whose request fails gets None and a warning.

        Raises:
            ConnectionError: not one request succeeded.
        """
        errors: list[Exception] = []

        def ask(sample: Sample) -> tuple[Tensor, Tensor] | None:
            try:
                return self._ask(sample, k)
            except (OSError, ValueError, http.client.HTTPException) as error:
                errors.append(error)
                log.warning(
                    "teacher at %s: no answer for group %d, sample %d: %s",
                    self.url,
                    sample.group,
                    sample.index,
                    error,
                )
                return None

        with ThreadPoolExecutor(self.workers) as pool:
            answers = list(pool.map(ask, samples))
        if samples and len(errors) == len(samples):
            raise ConnectionError(
                f"teacher: no request to {self.url} succeeded, the last failed with: {errors[-1]}"
            )
        return answers

    def _ask(self, sample: Sample, k: int) -> tuple[Tensor, Tensor]:
        seen = sample.seen_by_teacher()
        ids = torch.cat([seen.prompt_ids, seen.completion_ids]).tolist()
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
        }
        answer = self._post(json.dumps(body).encode())
        return parse_prompt_logprobs(answer, ids, seen.completion_ids.numel(), k)

    def _post(self, body: bytes) -> Any:
        for attempt in range(self.retries + 1):
            try:
                request = urllib.request.Request(self.url, body, self.headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")[:500]
                if error.code != 429 and error.code < 500:
                    raise ValueError(f"status {error.code}: {text}") from error
                failure: Exception = OSError(f"status {error.code}: {text}")
            except (OSError, http.client.HTTPException) as error:  # no connection, time-out
                failure = error
            if attempt < self.retries:
                time.sleep(min(30.0, 0.5 * 2**attempt))
        raise failure


def parse_prompt_logprobs(
    answer: Any, ids: Sequence[int], tokens: int, k: int
) -> tuple[Tensor, Tensor]:
    """(C, k + 1) ids, -1 = padding, and log-probabilities of the last C = `tokens` of `ids`.

    Args:
        answer: the server's, parsed.
        ids: the tokens that were sent.
        tokens: how many of them are the completion's.
        k: log-probabilities that were asked for.

    Raises:
        ValueError: an answer of another form, or without the log-probability of a token of `ids`.
    """
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
        entries = entries[-tokens:] if len(entries) == len(ids) else None
    except (KeyError, IndexError, TypeError):
        entries = None
    if entries is None:
        raise _unexpected(answer, f"choices[0].prompt_logprobs of {len(ids)} entries")
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
