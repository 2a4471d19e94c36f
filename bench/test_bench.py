"""Small sizes under pytest-benchmark, and checks that the benches compare like with like.

pytest bench --benchmark-only                  times of every provider that runs here
pytest bench --benchmark-skip                  the checks
"""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
import torch

from bench import ceilings, harness, loss_memory, loss_precision, loss_speed, parts, readme, summary
from bench.cases import make_case
from bench.gpus import GPUS
from bench.harness import floor_ms, gemms, interleaved, measure, new_row
from bench.memory import TOOK_LONGER, cpu_peaks
from bench.options import all_providers, chosen, device
from bench.ours import MIB, teacher
from bench.plots import draw
from bench.provider import Provider
from bench.reference import BOTH, CROSS_ENTROPY, FORWARD_KL, KL, POLICY, errors, reference
from bench.resume import UNFINISHED, Report
from bench.roofline import roofline
from bench.sizes import Shape, heads, pair
from dgrpo.ops.plan import padded
from dgrpo.testing import oracle, relative_error

TINY = Shape("tiny", 64, 48, 64, 1000, "float32")
RUNNABLE = [p for p in all_providers() if not p.absent and not p.compiles]


@pytest.fixture(scope="module")
def case():
    return make_case(TINY, device())


@pytest.mark.parametrize("provider", RUNNABLE, ids=lambda p: p.name)
def test_time_of_a_step(benchmark, case, provider):
    benchmark.group = provider.terms
    benchmark.pedantic(provider.step, args=(case,), rounds=5, warmup_rounds=1)


def test_the_reference_is_the_oracle(case):
    want = oracle(
        case.hidden,
        case.weight,
        case.targets,
        case.advantages,
        old_logprobs=case.old_logprobs,
        teacher=teacher(case),
    )
    got = reference(case, [BOTH])[BOTH]
    assert relative_error(got.loss, want.loss) < 1e-12
    assert relative_error(got.d_hidden, want.d_hidden[got.rows]) < 1e-12
    assert relative_error(got.d_weight, want.d_weight[got.columns]) < 1e-12


@pytest.mark.parametrize("provider", RUNNABLE, ids=lambda p: p.name)
def test_every_provider_computes_its_terms(case, provider):
    loss = provider.step(case)
    found = errors(case, reference(case, [provider.terms])[provider.terms], loss)
    assert set(found) == {"error_hidden", "error_weight", "error_loss"}
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize("claimed", [POLICY, KL, CROSS_ENTROPY, FORWARD_KL])
def test_a_provider_of_other_terms_would_show(case, claimed):
    both = next(p for p in RUNNABLE if p.terms == BOTH)
    loss = both.step(case)
    assert errors(case, reference(case, [claimed])[claimed], loss)["error_hidden"] > 0.05


def test_a_provider_that_fails_stays_in_the_table(case):
    def broken(case):
        raise RuntimeError("no such kernel\nand more")

    providers = [Provider("broken", BOTH, broken), Provider("gone", KL, broken, "not installed")]
    rows = measure(providers, case)
    assert [row.absent for row in rows] == ["RuntimeError: no such kernel", "not installed"]
    assert rows[0].ms is None and rows[0].floor_share is None


def test_providers_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved(runs, repeats=3)
    assert calls == list("ababab") and all(len(found) == 3 for found in times.values())
    assert len(interleaved(runs, repeats=3, seconds=-1)["a"]) == 1


def test_the_floor_counts_the_products_that_are_needed(case):
    assert set(gemms(case)) == {"z", "t", "dHidden", "dW"}
    times = {"z": [1.0], "t": [10.0], "dHidden": [100.0], "dW": [1000.0]}
    shape = pair("qwen2.5", 8192)
    assert floor_ms(times, shape, BOTH) == 2 * 1111
    assert floor_ms(times, shape, POLICY) == 2 * 1101


def _holds_64_mib(case):
    held = torch.ones(2**24)
    return (case.hidden.sum() + case.weight.sum()) * held[0]


def _holder():
    return [Provider("holder", BOTH, _holds_64_mib)]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_peak_of_a_process_is_what_a_step_holds():
    (peak,) = cpu_peaks(_holder, 0, [TINY])
    assert 60 * MIB < peak < 72 * MIB
    (refused,) = cpu_peaks(_holder, 0, [TINY], limit=32 * MIB)
    assert refused.startswith("needs more than")


def test_roofline_agrees_with_the_estimates_of_the_design():
    found = roofline(pair("qwen2.5", 32768), GPUS["h200"], 1024 * MIB)
    stats, grad, sums = found.rows
    assert found.ms(found.products) == pytest.approx(200, rel=0.01)
    assert stats.ms + grad.ms == pytest.approx(21, rel=0.02)
    assert sums.ms / -(-32768 // found.plan.grad_rows) == pytest.approx(1.0, rel=0.03)


def test_heads_of_two_families_are_refused():
    with pytest.raises(ValueError, match="152064.*151936|151936.*152064"):
        heads("qwen2.5-7b", "qwen3-32b", 128)
    with pytest.raises(ValueError, match="expected one of"):
        heads("qwen9", "qwen3-32b", 128)


def test_cases_are_peaked_and_repeat(case):
    z = case.hidden.detach() @ case.weight.detach().T
    top = z.softmax(1).amax(1)
    assert top.median() > 0.5 and top.max() < 0.9999
    again = make_case(TINY, device())
    assert torch.equal(case.hidden, again.hidden) and torch.equal(
        case.old_logprobs, again.old_logprobs
    )
    near = make_case(Shape("near", 16, 32, 32, 200, "float32"), teacher="near", kl=0.01)
    exact = reference(near, [KL], columns=8)[KL]
    assert float(exact.loss / near.teacher_coef) == pytest.approx(0.01, rel=0.3)


def test_only_picks_by_name():
    names = [p.name for p in chosen(all_providers(), "TRL, jsd")]
    assert names and all("trl" in n.lower() or "jsd" in n.lower() for n in names)


@pytest.mark.parametrize(
    "bench", [loss_speed, loss_precision, loss_memory], ids=lambda m: m.__name__
)
def test_benches_write_what_the_summary_reads(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    bench.main(["--size", "tiny", "--only", "eager", "--repeats", "2"])
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert not any(where in path.read_text() for where in (str(tmp_path), sys.prefix))
    assert path.with_suffix(".png").stat().st_size > 1000
    assert draw(report, tmp_path / "again.png").exists()
    lines = summary.SECTIONS[report["bench"]](summary.load(tmp_path)[report["bench"]])
    assert lines and "full logits, eager" in capsys.readouterr().out


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_parts_write_the_gradient_of_the_sweep(case, triton):
    if triton and not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
        pytest.skip("needs a GPU, or Triton's interpreter")
    vocab, rows = TINY.vocab, 16
    wide = padded(vocab)
    z, t, grad = (torch.zeros(rows, wide, device=device())[:, :vocab] for _ in range(3))
    z.copy_(case.hidden.detach()[:rows] @ case.weight.detach().T)
    t.copy_(case.teacher_hidden[:rows] @ case.teacher_weight.T)
    run = parts.row_kernels(case, z, t, grad, triton=triton)
    assert list(run) == ["row_stats", "row_grad", "row_fused"][: 3 if triton else 2]
    run["row_stats"]()
    run["row_grad"]()
    assert grad.abs().sum(1).min() > 0 and grad.isfinite().all()
    if triton:
        exact = reference(case, [BOTH], tokens=64)[BOTH]
        assert relative_error(grad @ case.weight.detach(), exact.d_hidden[:rows]) < 1e-4


def test_parts_and_ceilings_write_what_the_summary_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    parts.main(["--size", "tiny", "--repeats", "2"])
    ceilings.main(["--size", "tiny", "--repeats", "2"])
    for name, report in summary.load(tmp_path).items():
        assert all(value for _, value in summary.SECTIONS[name](report))
    assert "row_grad" in capsys.readouterr().out


def test_what_ran_out_of_time_is_measured_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    path = tmp_path / "loss_speed-tiny.json"
    names = ["--size", "tiny", "--repeats", "1", "--no-plot", "--only", "fused, 64,eager,trl"]

    def rows(*more):
        status = loss_speed.main([*names, *more])
        return status, {row["provider"]: row for row in json.loads(path.read_text())["rows"]}

    status, first = rows("--seconds", "0")
    contract = first["ours, fused, 64 MiB"]
    assert status == UNFINISHED and len(contract["ms_all"]) == 10  # promised, so always measured
    assert first["full logits, eager"]["absent"].startswith("not reached")
    status, second = rows("--resume")
    assert status == 0 and second["ours, fused, 64 MiB"] == contract
    assert second["full logits, eager"]["ms"]
    monkeypatch.setattr(loss_speed, "measure", None)  # nothing is left to measure
    assert rows("--resume") == (status, second)


def test_a_report_of_another_machine_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    report = Report("loss_speed", "tiny", resume=False)
    report.add([new_row(Provider("gone", BOTH, None, "not installed"), TINY)])
    gone = Provider("gone", BOTH, None)
    assert not Report("loss_speed", "tiny", resume=True).missing([gone], TINY)
    path = tmp_path / "loss_speed-tiny.json"
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    assert Report("loss_speed", "tiny", resume=True).missing([gone], TINY)


def test_a_report_is_saved_after_every_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    shapes = [TINY, TINY.at(128)]
    monkeypatch.setitem(loss_speed.SHAPES, "tiny", shapes)
    made = []

    def fails_on_the_second(shape, *args, **options):
        made.append(shape)
        if len(made) == 2:
            raise KeyboardInterrupt
        return make_case(shape, *args, **options)

    monkeypatch.setattr(loss_speed, "make_case", fails_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        loss_speed.main(["--size", "tiny", "--repeats", "1", "--only", "eager", "--no-plot"])
    report = Report("loss_speed", "tiny", resume=True)
    assert report.at(TINY)[0]["ms"] and not report.at(shapes[1])


def test_a_provider_that_would_take_too_long_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(harness, "PROBE_ROWS", 8)

    def slow(case):
        time.sleep(0.01)
        return (case.hidden.sum() + case.weight.sum()) * 0

    long, case = Provider("slow", BOTH, slow), make_case(TINY, device())
    found = harness.too_slow(long, case, seconds=0.4, left=0.4)  # 0.08 s a step, four steps
    assert found.startswith("skipped: about 0.1 s per step")
    assert harness.too_slow(long, case, seconds=4, left=0.1).startswith("not reached")
    assert not harness.too_slow(long, case, seconds=4, left=4)
    (row,) = measure([long], case, seconds=0.4)
    assert row.absent.startswith("skipped") and row.ms is None


def test_a_reference_implementation_is_left_out_of_large_shapes():
    torch_rows = Provider("rows", BOTH, None, most_tokens=4096, too_many="tile by tile")
    assert new_row(torch_rows, TINY).absent == ""
    assert new_row(torch_rows, TINY.at(8192)).absent == "left out above N = 4096: tile by tile"


def test_the_table_of_the_readme_is_made_of_the_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    only = ["--size", "tiny", "--repeats", "1", "--no-plot", "--only", "fused,eager,jsd"]
    for bench in (loss_speed, loss_precision):
        bench.main(only)
    capsys.readouterr()
    readme.main(["--size", "tiny"])
    both, single, machine = capsys.readouterr().out.strip().split("\n\n")
    assert both.splitlines()[2].startswith("| four matrix products alone |")
    for name in ("ours, fused, 64 MiB", "ours, fused, 256 MiB", "full logits, eager"):
        (line,) = [line for line in both.splitlines() if line.startswith(f"| {name} |")]
        ms, share, error = line.strip("| ").split(" | ")[1:]
        assert ms.isdigit() and share.endswith(" %") and error.endswith(" %")
    assert "| Liger JSD |" in single and f"torch {torch.__version__}" in machine


def test_a_provider_stopped_for_want_of_time_is_measured_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stopped = [f"{TOOK_LONGER} 1 s"] * 2
    monkeypatch.setattr(loss_memory, "cpu_peaks", lambda *given, **options: stopped)
    once = ["--size", "tiny", "--only", "eager", "--no-plot"]
    assert loss_memory.main([*once, "--seconds", "5"]) == UNFINISHED
    assert loss_memory.main(once) == 0  # with all of its time it is too slow for good
