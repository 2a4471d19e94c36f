"""A step's numbers are the same however its tokens are split."""

import json
import math

import pytest
import torch
import torch.distributed as dist

from dgrpo.trainer.metrics import RunLog, StepMetrics, write_rollouts


def test_means_are_over_all_tokens_of_all_calls():
    metrics = StepMetrics()
    metrics.mean("kl", torch.tensor([1.0, 2.0, math.nan]), torch.tensor([True, True, False]))
    metrics.mean("kl", torch.tensor([[6.0]]), torch.tensor([[2.0]]))
    metrics.mean("kl", 3.0, 4)
    metrics.mean("plain", torch.tensor([1, 2], dtype=torch.int64))
    metrics.mean("empty", torch.tensor([math.nan]), torch.tensor([False]))
    metrics.sum("tokens", torch.tensor([2.0, 3.0]))
    metrics.sum("tokens", 1)
    for value in (torch.tensor([1.0, 5.0]), 2.0):
        metrics.max("high", value)
        metrics.min("low", value)
    got = metrics.reduce()
    assert got == {"kl": 27 / 8, "plain": 1.5, "tokens": 6.0, "high": 5.0, "low": 1.0}
    assert metrics.reduce() == {}


def test_sums_are_in_fp64():
    metrics = StepMetrics()
    for _ in range(2):
        metrics.mean("kl", torch.tensor([1e8, 1.0, -1e8], dtype=torch.float32))
    assert metrics.reduce()["kl"] == pytest.approx(1 / 3, rel=1e-12)


def test_what_is_not_finite_is_carried_through():
    metrics = StepMetrics()
    metrics.mean("loss", torch.tensor([1.0, math.nan]))
    assert math.isnan(metrics.reduce()["loss"])


def test_metrics_refuse_what_would_be_wrong():
    metrics = StepMetrics()
    with pytest.raises(
        ValueError, match=r"weights: got \(2,\), expected the shape of values \(3,\)"
    ):
        metrics.mean("kl", torch.ones(3), torch.ones(2))
    metrics.sum("kl", 1)
    with pytest.raises(ValueError, match="kl: got mean, expected sum as before"):
        metrics.mean("kl", 1.0)


def _rank(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metrics = StepMetrics()
    metrics.mean("kl", torch.arange(3.0) + rank, torch.tensor([1.0, 1.0, float(rank)]))
    metrics.sum("tokens", 2 + rank)
    metrics.max("high", rank)
    if rank == 1:
        metrics.mean("only_here", 0.1)
    got = metrics.reduce()
    log = RunLog(f"{store}-run", live=False)
    log.log(1, got)
    log.close()
    write_rollouts(f"{store}-run", 1, [{"rank": rank}])
    with open(f"{results}-{rank}", "w") as file:
        json.dump(got, file)
    dist.destroy_process_group()


def test_ranks_agree_and_only_the_first_one_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    store, results = tmp_path / "store", tmp_path / "result"
    torch.multiprocessing.spawn(_rank, (str(store), str(results)), nprocs=2)
    got = [json.loads((tmp_path / f"result-{rank}").read_text()) for rank in range(2)]
    expected = {"kl": (0 + 1 + 1 + 2 + 3) / 5, "tokens": 5.0, "high": 1.0, "only_here": 0.1}
    assert got == [expected, expected]
    run = tmp_path / "store-run"
    assert [json.loads(line) for line in (run / "metrics.jsonl").open()] == [{"step": 1} | expected]
    assert [p.name for p in sorted((run / "rollouts").iterdir())] == [
        "step-00000001-00000.jsonl.gz",
        "step-00000001-00001.jsonl.gz",
    ]
