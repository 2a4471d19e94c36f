"""Questions by a model behind an endpoint, against a small server that also misbehaves."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dgrpo.data import load_rows
from dgrpo.endpoint import Endpoint
from dgrpo.longblocks import rewards
from dgrpo.longblocks.tasks.command import main
from dgrpo.longblocks.tasks.questions import checked, parse_object
from dgrpo.longblocks.tasks.synthesis import SynthesisSettings, synthesize
from dgrpo.text import BadRow

FACT = "The bridge of Velmar was opened in 1873."
OTHER = "It was designed by the engineer Tavik Romel."
SHORT = {"question": "When?", "answer": "1873", "aliases": ["in 1873"], "evidence": [FACT]}
LONG = {
    "question": "Tell all.",
    "answer": "- The bridge of Velmar opened in 1873.\n- Its engineer: Tavik Romel\n- A bridge.",
    "evidence": [FACT, OTHER],
    "points": [["bridge of Velmar", "1873"], ["Tavik Romel"], ["bridge"]],
}


class Server(ThreadingHTTPServer):
    """Answers by `script(kind of request, seed) -> (status, content or raw bytes)`."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen = script, Counter()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        system = body["messages"][0]["content"]
        kind = "judge" if "check exam" in system else "long" if "points" in system else "short"
        self.server.seen[kind] += 1
        self.server.seen["key", self.headers.get("Authorization")] += 1
        status, content = self.server.script(kind, body["seed"])
        if isinstance(content, str):
            content = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def good(kind, seed):
    reply = {"judge": {"verdict": "supported"}, "long": LONG, "short": SHORT}[kind]
    return 200, f"<think>hm {{</think>```json\n{json.dumps(reply)}\n```"


@pytest.fixture
def served():
    servers = []

    def start(script=good):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def settings(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(2):
        filler = f"Line {i} of a long and dull text.\n" * 40
        (folder / f"{i}.txt").write_text(f"{filler}{FACT}\n{filler}{OTHER}\n{filler}")
    (folder / "bad.bin").write_bytes(b"\xff\xfe")

    def build(url, **changes):
        server = {
            name: changes.pop(name) for name in ("retries", "key_variable") if name in changes
        }
        endpoint = Endpoint(url, "m", **{"retries": 1, "pause": 0.01, "workers": 2} | server)
        base = {"count": 6, "tokens": 9000, "documents": str(folder), "out": str(tmp_path / "out")}
        return SynthesisSettings(endpoint=endpoint, **base | changes)

    return build


def ask(settings):
    return synthesize(settings, log=lambda line: None)


def test_questions_that_pass_become_rows_that_their_answers_solve(settings, served):
    server = served()
    result = ask(settings(server.url))
    assert result.rows == 6 and server.seen["judge"] == 6
    assert result.report.counts == {"unreadable file": 1}
    rows = load_rows(result.files[0])
    assert {row["family"] for row in rows} == {"multi_hop", "grounding", "long_form"}
    for row in rows:
        assert all(text in row["document"] for text in row["passages"])
        function = getattr(rewards, row["reward"].removeprefix("dgrpo.rewards:"))
        columns = {name: [value] for name, value in row.items() if name != "reward"}
        for completion in (row["answer"], row["response_reference"]):
            assert function([""], [completion], **columns)["reward"] == [1.0]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("I cannot help.", "no JSON in the answer"),
        ("[1, 2]", "no JSON in the answer"),
        (json.dumps(SHORT | {"question": ""}), "no question"),
        (json.dumps(SHORT | {"answer": None}), "no answer"),
        (json.dumps(SHORT | {"evidence": "none"}), "no evidence"),
        (json.dumps(SHORT | {"evidence": [FACT[:-1] + "!"]}), "evidence not in the document"),
        (json.dumps(SHORT | {"answer": "word " * 13}), "answer too long"),
        (json.dumps(SHORT | {"question": [1], "aliases": 3}), "no question"),
    ],
)
def test_nonsense_is_dropped_and_counted(settings, served, reply, reason):
    server = served(lambda kind, seed: (200, reply) if seed == 0 else good(kind, seed))
    result = ask(settings(server.url))
    assert result.rows == 5 and result.report.counts[reason] == 1
    assert any("question 0" in line for line in result.report.lines())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"points": [["1873"]]}, "too few points"),
        ({"points": [["1873"], ["Rome"], ["bridge"]]}, "point not in the document"),
        ({"points": [["1873", "dull"], ["Tavik"], ["bridge"]]}, "point not in its line"),
        ({"points": [["1873"], ["Tavik"], ["bridge"], ["dull"]]}, "not one line per point"),
    ],
)
def test_points_must_stand_in_document_and_answer(change, reason):
    document = f"{FACT} {OTHER} dull"
    assert checked("long_form", json.dumps(LONG), document)["points"] == LONG["points"]
    with pytest.raises(BadRow, match=reason):
        checked("long_form", json.dumps(LONG | change), document)


def test_aliases_that_are_no_list_are_left_out():
    reply = json.dumps(SHORT | {"aliases": 3})
    assert checked("grounding", reply, FACT)["aliases"] == ["1873"]


@pytest.mark.parametrize("verdict", ["unsupported", "ambiguous", "perhaps"])
def test_what_the_judge_does_not_support_is_dropped(settings, served, verdict):
    def script(kind, seed):
        if kind == "judge" and seed % 2:
            return 200, json.dumps({"verdict": verdict, "reason": "why not"})
        return good(kind, seed)

    result = ask(settings(served(script).url))
    reason = "no verdict" if verdict == "perhaps" else f"judged {verdict}"
    assert result.rows == 3 and result.report.counts[reason] == 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((500, b"down"), "endpoint failed"),
        ((404, b"no such model"), "endpoint failed"),
        ((200, b"<html>"), "endpoint answered nonsense"),
        ((200, b'{"choices": []}'), "endpoint answered nonsense"),
    ],
)
def test_a_failing_endpoint_is_counted_and_asked_again_by_the_next_run(
    settings, served, answer, reason
):
    bad = served(lambda kind, seed: answer if seed < 2 else good(kind, seed))
    result = ask(settings(bad.url))
    assert result.rows == 4 and result.report.counts[reason] == 2
    again = served()
    result = ask(settings(again.url))
    assert result.rows == 6 and again.seen["judge"] == 2  # the other four are kept


def test_a_passing_failure_is_tried_again(settings, served):
    failed = Counter()

    def script(kind, seed):
        failed[kind, seed] += 1
        return (503, b"busy") if failed[kind, seed] == 1 else good(kind, seed)

    assert ask(settings(served(script).url)).rows == 6


def test_an_endpoint_that_is_not_there_is_not_fatal_and_soon_given_up(settings):
    result = ask(settings("http://127.0.0.1:9", count=60, retries=0))
    assert result.rows == 0 and result.report.counts["endpoint unreachable"] == 60


def test_a_run_goes_on_without_asking_again(settings, served):
    server = served()
    assert ask(settings(server.url)).rows == 6
    assert ask(settings(server.url)).rows == 6 and server.seen["judge"] == 6
    with pytest.raises(ValueError, match="other settings"):
        ask(settings(server.url, seed=1))


def test_the_key_comes_from_the_environment(settings, served, monkeypatch):
    monkeypatch.setenv("MY_KEY", "abc")
    server = served()
    ask(settings(server.url, key_variable="MY_KEY"))
    assert server.seen["key", "Bearer abc"] == 12


def test_long_documents_are_asked_about_in_stretches(settings, served):
    result = ask(settings(served().url, tokens=1500, count=12))
    assert result.report.counts["evidence not in the document"] > 0
    assert all(len(row["document"]) <= 1500 for row in load_rows(settings("http://x").out))


def test_the_command_line(settings, served, tmp_path):
    wanted = settings(served().url)
    argv = [wanted.out, "--endpoint", wanted.endpoint.url, "--model", "m"]
    assert main([*argv, "--documents", wanted.documents, "--count", "3", "--tokens", "8k"]) == 0


def test_wrong_settings():
    with pytest.raises(ValueError, match="url: got"):
        Endpoint("localhost", "m")
    with pytest.raises(ValueError, match="model: got nothing"):
        Endpoint("http://x", "")
    with pytest.raises(ValueError, match="documents: got nothing"):
        SynthesisSettings(out="x", endpoint=Endpoint("http://x", "m"), documents="")
    with pytest.raises(BadRow, match="no JSON"):
        parse_object("}{")
