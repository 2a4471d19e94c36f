"""The HTTP client of OpenAI-compatible servers: keys, time-outs, retries, many requests at once.

It imports `httpx2`, the fork of httpx that huggingface_hub installs, at the first request: the
worker of the rewards stays light.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from typing import Any

RETRIED = {408, 409, 425, 429}  # statuses that may pass, as may those from 500 on
LONGEST_PAUSE = 30.0  # seconds of backoff; a server may ask for more, up to LONGEST_WAIT
LONGEST_WAIT = 300.0


class EndpointError(Exception):
    """A request that got no usable answer; `detail` is the status or exception and the answer.

    `wait`: seconds that the server asked to wait; None: another try would fail as well.
    """

    def __init__(self, reason: str, detail: str, wait: float | None = 0.0):
        self.reason, self.detail, self.wait = reason, detail, wait
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class Endpoint:
    """A model at a server.

    Failures that may pass are tried again: no connection, a time-out, a status of `RETRIED` or from
    500 on, an answer of another form than expected.
    """

    url: str  # base address, such as http://localhost:8000/v1
    model: str  # its name there
    key_variable: str = "OPENAI_API_KEY"  # environment variable with the key; may be unset
    timeout: float = 300.0  # seconds until a request counts as failed
    retries: int = 2
    pause: float = 0.5  # seconds before the first retry, doubled each time
    workers: int = 8  # requests in flight in `each`

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: got {self.url!r}, expected http://… or https://…")
        if not self.model:
            raise ValueError("model: got nothing, expected the name of a model at the endpoint")

    def chat(
        self,
        messages: list[dict],
        *,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> str:
        """Ask for the model's answer to a chat, without its thinking. Raises `EndpointError`."""
        body = {"messages": messages, "temperature": temperature}
        body |= {} if max_tokens is None else {"max_tokens": max_tokens}
        body |= {} if seed is None else {"seed": seed}
        return self.post("/chat/completions", body, _content)

    def post(self, path: str, body: dict, parse: Callable[[Any], Any] = lambda answer: answer):
        """Send `body` and the model's name to `path` below the url; `parse` the answer's JSON.

        An exception of `parse` is a failure that may pass. Raises `EndpointError` after all tries.
        """
        content = json.dumps({"model": self.model, **body})
        for attempt in range(self.retries + 1):
            try:
                return self._post(self.url.rstrip("/") + path, content, parse)
            except EndpointError as error:
                if error.wait is None or attempt == self.retries:
                    raise
                time.sleep(max(error.wait, min(LONGEST_PAUSE, self.pause * 2**attempt)))

    def each(self, function: Callable[[Any], Any], items: Sequence) -> Iterator[tuple[int, Any]]:
        """Yield `(i, function(items[i]))` as they are done, `workers` of them at a time."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            numbers = {pool.submit(function, item): i for i, item in enumerate(items)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    @cached_property
    def _client(self):
        import httpx2

        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_keepalive_connections=self.workers)
        return httpx2.Client(headers=headers, timeout=self.timeout, limits=limits)

    def _post(self, address: str, content: str, parse: Callable[[Any], Any]) -> Any:
        import httpx2

        headers = {"Content-Type": "application/json"}
        try:
            response = self._client.post(address, content=content, headers=headers)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:  # refused, timed out, cut off
            detail = f"{type(error).__name__}: {error}"
            raise EndpointError("endpoint unreachable", detail) from None
        status = response.status_code
        if not response.is_success:
            asked = response.headers.get("Retry-After", "")
            wait = min(LONGEST_WAIT, float(asked)) if asked.isdecimal() else 0.0
            passing = status in RETRIED or status >= 500
            detail = f"HTTP {status}: {response.text[:500]}"
            raise EndpointError("endpoint failed", detail, wait if passing else None)
        try:
            return parse(response.json())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            detail = f"{type(error).__name__}: {error}; got {response.content[:120]!r}"
            raise EndpointError("endpoint answered nonsense", detail) from None


def _content(answer: Any) -> str:
    content = answer["choices"][0]["message"]["content"]
    if not isinstance(content, str) or not content.strip():
        raise TypeError("no text")
    return content.rpartition("</think>")[2]
