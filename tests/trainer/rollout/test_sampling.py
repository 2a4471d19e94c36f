"""Drawing a token, and the random numbers for it."""

import pytest
import torch

from dgrpo.trainer.rollout import Sampling, sampling
from dgrpo.trainer.rollout.sampling import draw, stream_keys, uniforms


def test_draw_hits_every_token_as_often_as_it_should():
    """Over three blocks of columns, with zeros among them; u on an even grid."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, generator=generator) * 2
    logits[torch.randperm(600, generator=generator)[:100]] = float("-inf")
    n = 20000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn, logprobs = draw(logits.expand(n, -1), u, 1.0)
    exact = logits.double().softmax(0)
    counts = drawn.bincount(minlength=600)
    assert not counts[exact == 0].any()
    assert (counts - n * exact).abs().max() <= 1.01, "an even grid is off by one at most"
    assert torch.allclose(logprobs.double(), exact.log()[drawn], atol=1e-5)


@pytest.mark.parametrize("u", (0.0, 1 - 2**-52), ids=("lowest", "highest"))
def test_draw_at_the_ends_never_takes_an_impossible_token(u):
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, [3, 400, 700]] = 0.0
    drawn, _ = draw(logits, torch.tensor([u], dtype=torch.float64), 0.7)
    assert drawn.item() == (3 if u == 0 else 700)


def test_draw_survives_rounding_at_the_end_of_a_block():
    """A block's sum may exceed its running sum: small terms are lost when added one by one."""
    logits = torch.full((1, 256), -36.8)  # about 2^-53 of the first token's probability
    logits[0, 0] = 0.0
    drawn, _ = draw(logits, torch.tensor([1 - 2**-52], dtype=torch.float64), 1.0)
    assert drawn.item() == 255


def test_draw_in_parts_and_at_temperature_zero(monkeypatch):
    logits, u = torch.randn(50, 300), torch.rand(50, dtype=torch.float64)
    whole = draw(logits, u, 0.5)
    monkeypatch.setattr(sampling, "_CHUNK", 1000)
    assert all(torch.equal(a, b) for a, b in zip(draw(logits, u, 0.5), whole, strict=True))
    likeliest, logprobs = draw(logits, None, 0.0)
    assert torch.equal(likeliest, logits.argmax(1))
    assert torch.allclose(logprobs, logits.log_softmax(1).amax(1))


def test_uniforms_are_splitmix64():
    key = torch.tensor([1234567])
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [uniforms(key, i).item() for i in range(3)] == [(w >> 12) * 2.0**-52 for w in want]


def test_streams_are_uniform_and_unrelated():
    keys = stream_keys(Sampling(seed=1), range(500), 8)
    assert len(set(keys.flatten().tolist())) == 4000
    u = torch.stack([uniforms(keys.flatten(), i) for i in range(5)], 1)  # (4000, 5)
    ordered = u.flatten().sort().values
    gap = (ordered - (torch.arange(20000) + 0.5) / 20000).abs().max()
    assert gap < 1.95 / 20000**0.5, "Kolmogorov-Smirnov at 0.1 %"
    correlation = torch.corrcoef(u.T) - torch.eye(5)
    assert correlation.abs().max() < 0.06
    by_sample = u.view(500, 8, 5)[:, :, 0]
    assert (torch.corrcoef(by_sample.T) - torch.eye(8)).abs().max() < 0.2
