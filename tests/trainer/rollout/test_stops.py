"""Where completions end."""

import dataclasses

import pytest

from dgrpo.trainer.rollout import HFSampler, Sampling, hf
from tests.trainer.rollout.models import VOCAB, make_policy, make_prompts, tokens


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture(scope="module")
def prompts():
    return make_prompts()


@pytest.mark.parametrize("n", (8, 2), ids=("dropping samples", "dropping whole groups"))
def test_stopping_drops_rows_without_changing_the_others(policy, prompts, n):
    """An unstopped run never drops a row; up to each end it draws the same."""
    sampling = Sampling(max_tokens=40, seed=1, temperature=1.5)
    prompts = [*prompts, *(prompts[3][i : i + 9 + i % 4] for i in range(20))]  # similar lengths
    stopped = tokens(HFSampler(policy).generate(prompts, n, sampling))
    free = dataclasses.replace(sampling, stop_token_ids=())
    whole = tokens(HFSampler(policy).generate(prompts, n, free))
    lengths = [len(t) for t in stopped]
    assert sum(size < 40 for size in lengths) > 20
    assert {len(t) for t in whole} == {40}
    assert stopped == [t[:size] for t, size in zip(whole, lengths, strict=True)]


@pytest.mark.parametrize("stride", (1, 7), ids=("look at every token", "look at every seventh"))
def test_end_of_sequence_is_part_of_the_completion(policy, prompts, stride, monkeypatch):
    monkeypatch.setattr(hf, "_stride", lambda device: stride)
    sampling = Sampling(max_tokens=40, seed=1, temperature=1.5)
    for rollout in HFSampler(policy).generate(prompts, 8, sampling):
        ids = rollout.completion_ids.tolist()
        assert len(ids) == len(rollout.logprobs) and 2 not in ids[:-1]
        assert rollout.finish_reason == ("stop" if ids[-1] == 2 else "length")
        assert rollout.finish_reason == "stop" or len(ids) == 40


class Letters:
    """A tokenizer of letters: token i is the i-th character, 60 two letters at once."""

    eos_token_id = 2

    def __len__(self):
        return VOCAB

    def decode(self, ids, **options):
        return "".join("ab" if i == 60 else chr(48 + i) for i in ids)


@pytest.mark.parametrize("stride", (1, 5))
def test_stop_strings_end_where_they_are_complete(policy, prompts, stride, monkeypatch):
    monkeypatch.setattr(hf, "_stride", lambda device: stride)
    sampler = HFSampler(policy, Letters())
    free = Sampling(max_tokens=30, seed=2, temperature=2.0, stop_token_ids=())
    texts = [Letters().decode(t) for t in tokens(sampler.generate(prompts, 4, free))]
    stop = texts[0][3:5]  # two tokens of the first sample, that surely occur
    drawn = sampler.generate(prompts, 4, dataclasses.replace(free, stop_strings=(stop, "ab")))
    assert drawn[0].finish_reason == "stop"
    for rollout, text in zip(drawn, texts, strict=True):
        got = Letters().decode(rollout.completion_ids.tolist())
        ends = [text.find(s) + 2 for s in (stop, "ab") if s in text]
        assert got == text[: min(ends, default=len(text))]
        assert rollout.finish_reason == ("stop" if ends else "length")
