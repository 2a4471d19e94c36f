"""A small client of OpenAI-compatible chat endpoints; what fails is a BadRow."""

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from dgrpo.text.problems import BadRow

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Attributes:
        url: base address, such as ``http://localhost:8000/v1``.
        model: name of the model there.
        key_variable: environment variable that holds the key; it may be unset.
        temperature: of the answers.
        max_tokens: longest answer.
        timeout: seconds until a request counts as failed.
        retries: further tries after a failure that may pass.
        pause: seconds before the first of them, doubled each time.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.7
    max_tokens: int = 2048
    timeout: float = 300.0
    retries: int = 2
    pause: float = 1.0

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint: got {self.url!r}, expected http://… or https://…")
        if not self.model:
            raise ValueError("model: got nothing, expected the name of a model at the endpoint")

    def ask(self, messages: list[dict], *, seed: int | None = None) -> str:
        """The model's answer to a chat.

        Raises:
            BadRow: "endpoint unreachable", "endpoint failed" (with its status) or "endpoint
                answered nonsense".
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        body |= {} if seed is None else {"seed": seed}
        for attempt in range(self.retries + 1):
            try:
                return _content(self._post(json.dumps(body).encode()))
            except _Passing as problem:
                if attempt == self.retries:
                    raise BadRow(problem.reason, problem.detail) from None
                time.sleep(self.pause * 2**attempt)
        raise AssertionError("unreachable")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            detail = f"status {error.code}: {error.read(200).decode('utf-8', 'replace')}"
            kind = _Passing if error.code in RETRIED else BadRow
            raise kind("endpoint failed", detail) from None
        except (OSError, ValueError) as error:  # refused, timed out, cut off, not HTTP
            raise _Passing("endpoint unreachable", f"{type(error).__name__}: {error}") from None


class _Passing(BadRow):
    """A failure that another try may not have."""


def _content(answer: bytes) -> str:
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
        if not isinstance(content, str) or not content.strip():
            raise TypeError("no text")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        detail = f"{type(error).__name__}: {error}; got {answer[:120]!r}"
        raise _Passing("endpoint answered nonsense", detail) from None
    return content.rpartition("</think>")[2]


def parse_object(text: str) -> dict:
    """The JSON object in a model's answer, also inside a code fence. Raises BadRow without one."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1])
    except ValueError as error:
        raise BadRow("no JSON in the answer", f"{error}; got {text[:120]!r}") from None
    if not isinstance(found, dict):
        raise BadRow("no JSON in the answer", f"got {text[:120]!r}")
    return found
