"""A teacher behind a server on this machine: what is asked, what comes back, and failures."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from dgrpo.endpoint import Endpoint
from dgrpo.trainer.batch import filler, pack
from dgrpo.trainer.teachers.served import ServedTeacher, parse_prompt_logprobs
from tests.tiny import (
    VOCAB,
    assert_same_gradients,
    loss_with,
    make_samples,
    plain_logits,
    plain_loss,
    teacher_samples,
    tiny_model,
    tiny_pair,
)


class Server:
    """A completions endpoint in front of a model, that can be told to fail."""

    def __init__(self, model):
        self.model, self.failures, self.requests, self.spoil = model, [], [], lambda answer: answer
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                if outer.failures:
                    self.send_response(outer.failures.pop())
                    self.end_headers()
                    self.wfile.write(b"not today")
                    return
                answer = json.dumps(outer.spoil(outer.answer(body))).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, body):
        ids, k = body["prompt"], body["prompt_logprobs"]
        with torch.no_grad():
            logp = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], -1)
        entries = [None]
        for row, token in zip(logp, ids[1:], strict=False):
            chosen = {*row.topk(k).indices.tolist(), token}
            entries.append({str(i): {"logprob": float(row[i]), "rank": 1} for i in chosen})
        return {"choices": [{"text": "x", "prompt_logprobs": entries}]}


@pytest.fixture
def server():
    server = Server(tiny_model("qwen3", seed=3))
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_all_tokens_served_are_the_whole_teacher(server):
    samples = teacher_samples()
    policy, plain = tiny_pair("qwen3")
    want = plain_loss(plain, samples, teacher=server.model)
    want.backward()
    teacher = ServedTeacher(Endpoint(server.url, "t"), VOCAB)
    got = loss_with(policy, samples, teacher)
    assert teacher.missing == 0 and abs(got - float(want.detach())) < 1e-4
    assert_same_gradients(policy, plain, 1e-3)


def test_few_tokens_served_bound_the_divergence_from_below(server):
    samples = teacher_samples()
    policy, _ = tiny_pair("qwen3")
    found = []
    for k in (1, 4, 20, VOCAB):
        teacher = ServedTeacher(Endpoint(server.url + "/v1/", "t"), k)
        teacher.attach(samples, 100)
        (micro,) = pack(samples, 100)
        inputs = micro.head_inputs(teacher=teacher.head(micro))
        divergence = policy(micro, inputs=inputs).divergence
        found.append(float(divergence.sum()))
        guided = torch.cat([s.guided for s in samples])
        picked = torch.cat([v for _, v in micro.per_sample(divergence)])
        assert not picked[~guided].any()
    assert 0 < found[0] < found[1] < found[2] < found[3]


def test_what_is_asked_of_the_server(server, monkeypatch):
    monkeypatch.setenv("A_KEY", "key")
    samples = teacher_samples()
    teacher = ServedTeacher(Endpoint(server.url, "name", "A_KEY"), 5)
    teacher.attach(samples)
    path, headers, body = server.requests[0]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer key"
    assert body["model"] == "name" and body["prompt_logprobs"] == 5 and body["max_tokens"] == 1
    sent = sorted(request["prompt"] for _, _, request in server.requests)
    seen = [s.seen_by_teacher() for s in samples]
    assert sent == sorted(torch.cat([s.prompt_ids, s.completion_ids]).tolist() for s in seen)
    ids, logprobs = teacher.topk(samples[0])
    logp = torch.log_softmax(plain_logits(server.model, samples[0], seen[0].prompt_ids), -1)
    assert torch.equal(ids[:, 0], samples[0].completion_ids)  # the sampled token first
    assert ids.shape == logprobs.shape == (5, 6)
    known = ids >= 0
    torch.testing.assert_close(logprobs[known], logp.gather(1, ids.clamp_min(0))[known].detach())


def test_passing_failures_are_asked_again(server):
    server.failures = [503, 429]
    samples = make_samples([(3, 4)])
    ServedTeacher(Endpoint(server.url, "t", pause=0.01), 2).attach(samples)
    assert samples[0].topk is not None and len(server.requests) == 3


def test_a_sample_without_an_answer_has_no_teacher(server, caplog):
    server.failures = [400]
    samples = make_samples([(3, 4), (2, 6)])
    teacher = ServedTeacher(Endpoint(server.url, "t", workers=1), 3)
    teacher.attach(samples)
    assert teacher.missing == 1 and samples[0].topk is None
    assert "HTTP 400: not today" in caplog.text
    (micro,) = pack(samples, 25)
    head = teacher.head(micro)
    assert head.token_ids.shape == (micro.targets.numel(), 4)
    (start, tokens), _ = micro.spans
    assert (head.token_ids[start : start + tokens] == -1).all()
    assert (head.token_ids >= 0).any()


def test_a_filler_has_no_served_teacher():
    teacher = ServedTeacher(Endpoint("http://localhost:1", "t"), 3)
    assert (teacher.head(filler()).token_ids == -1).all()


def test_a_server_that_is_not_there_raises():
    teacher = ServedTeacher(Endpoint("http://127.0.0.1:9", "t", retries=0, timeout=2), 3)
    with pytest.raises(ConnectionError, match="no request to http://127.0.0.1:9/v1/completions"):
        teacher.attach(make_samples([(3, 4)]))
    teacher.attach([])
    assert teacher.missing == 0


@pytest.mark.parametrize(
    "answer, message",
    [
        ("nonsense", "expected choices"),
        ({"choices": []}, "expected choices"),
        ({"choices": [{"prompt_logprobs": [None, {}]}]}, "of 3 entries"),
        ({"choices": [{"prompt_logprobs": [None, None, None]}]}, "token ids with a logprob each"),
        ({"choices": [{"prompt_logprobs": [None, {}, {"8": {"logprob": -1}}]}]}, "of token 9"),
        ({"choices": [{"prompt_logprobs": [None, {}, {"9": {"logprob": 1}}]}]}, "of token 9"),
        (
            {"choices": [{"prompt_logprobs": [None, {}, {"9": {"logprob": float("nan")}}]}]},
            "of token 9",
        ),
    ],
)
def test_nonsense_is_named(answer, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt_logprobs(answer, [7, 8, 9], 1, 2)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="k: got 0"):
        ServedTeacher(Endpoint("http://localhost", "t"), 0)
