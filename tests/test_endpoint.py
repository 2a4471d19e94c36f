"""The HTTP client against a small server: what it sends, what it asks for again, and when."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dgrpo import endpoint
from dgrpo.endpoint import Endpoint, EndpointError


class Server(ThreadingHTTPServer):
    """Gives its replies (status, headers, body) one by one, the last one for ever."""

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.seen = list(replies), []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        replies = self.server.replies
        status, headers, content = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def said(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def serve():
    servers = []

    def start(*replies):
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(endpoint.time, "sleep", seconds.append)
    return seconds


def test_a_chat_sends_what_was_given_and_returns_what_follows_the_thinking(serve, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    server = serve(said("<think>hm</think>yes"))
    chat = [{"role": "user", "content": "lone \ud800"}]
    assert Endpoint(server.url + "/", "m", "A_KEY").chat(chat, seed=3) == "yes"
    assert server.seen == [
        (
            "/v1/chat/completions",
            "Bearer secret",
            {"model": "m", "messages": chat, "temperature": 0.0, "seed": 3},
        )
    ]


def test_pauses_double_and_a_server_may_ask_for_longer_ones(serve, slept):
    busy = [(503, {}, b""), (429, {"Retry-After": "7"}, b""), (500, {"Retry-After": "soon"}, b"")]
    server = serve(*busy, said("yes"))
    assert Endpoint(server.url, "m", retries=3).chat([]) == "yes"
    assert slept == [0.5, 7.0, 2.0]


@pytest.mark.parametrize(
    "reply, reason, detail, tries",
    [
        ((400, {}, b"no such model"), "endpoint failed", "HTTP 400: no such model", 1),
        ((408, {}, b""), "endpoint failed", "HTTP 408", 2),
        ((307, {"Location": "/"}, b""), "endpoint failed", "HTTP 307", 1),
        ((200, {}, b"<html>"), "endpoint answered nonsense", "JSONDecodeError", 2),
        ((200, {}, b'{"choices": []}'), "endpoint answered nonsense", "IndexError", 2),
        (said(" "), "endpoint answered nonsense", "no text", 2),
        ((200, {"Content-Length": "9"}, b"{"), "endpoint unreachable", "RemoteProtocolError", 2),
    ],
)
def test_failures_have_a_reason(serve, slept, reply, reason, detail, tries):
    server = serve(reply)
    with pytest.raises(EndpointError, match=detail) as caught:
        Endpoint(server.url, "m", retries=1).chat([])
    assert caught.value.reason == reason and len(server.seen) == tries


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://x:port", "http://"])
def test_an_address_without_a_server_is_unreachable(slept, url):
    with pytest.raises(EndpointError, match="endpoint unreachable"):
        Endpoint(url, "m").post("/x", {})


def test_results_come_with_their_numbers():
    found = dict(Endpoint("http://x", "m", workers=2).each(lambda x: x * x, [3, 4, 5]))
    assert found == {0: 9, 1: 16, 2: 25}


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="url: got 'localhost'"):
        Endpoint("localhost", "m")
    with pytest.raises(ValueError, match="model: got nothing"):
        Endpoint("http://x", "")
