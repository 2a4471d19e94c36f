"""Timing, the floor, and what a row of a table holds.

Times are medians of repeats in which the providers take turns, so that a machine that slows down
slows all alike. Every share is of a floor measured in the same turns: the GEMMs that no exact dense
loss can do without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from bench.cases import Case
from bench.memory import gpu_peak
from bench.provider import Provider
from bench.reference import WITH_TEACHER, errors, reference
from bench.sizes import Shape

FLOOR_ROWS = 4096  # at which a GEMM of a head is as fast as it gets
CONTRACT_REPEATS = 10  # rounds of what the library promises, whatever time is left
PROBE_ROWS = 2048  # tells how long a step will take, where it has several times as many rows
STEPS = 4  # of a provider, at least: errors, peak, two rounds
NOT_REACHED = "not reached"  # how the reason of a row begins that a later run may fill in


@dataclass
class Row:
    """One provider on one shape. What was not measured is None, and `absent` may say why."""

    shape: str
    tokens: int
    provider: str
    terms: str
    ours: bool
    absent: str = ""
    ms: float | None = None
    floor_ms: float | None = None
    peak_bytes: int | None = None
    error_hidden: float | None = None
    error_weight: float | None = None
    error_loss: float | None = None
    ms_all: list[float] = field(default_factory=list)

    @property
    def floor_share(self) -> float | None:
        """Floor over time: 1 is as fast as the GEMMs alone."""
        return self.floor_ms / self.ms if self.ms and self.floor_ms else None

    def as_json(self) -> dict:
        """All of it, the share included."""
        return {**asdict(self), "floor_share": self.floor_share}


def new_row(provider: Provider, shape: Shape) -> Row:
    """The row of a provider before anything is measured."""
    absent = provider.absent
    if not absent and shape.tokens > (provider.most_tokens or shape.tokens):
        absent = f"left out above N = {provider.most_tokens}: {provider.too_many}"
    return Row(shape.name, shape.tokens, provider.name, provider.terms, provider.ours, absent)


def not_reached(providers: Sequence[Provider], shape: Shape, seconds: float) -> list[Row]:
    """Rows for a shape whose turn came after the `seconds` were over."""
    rows = [new_row(provider, shape) for provider in providers]
    for row in rows:
        row.absent = row.absent or f"{NOT_REACHED} within {seconds:.0f} s"
    return rows


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_once(run: Callable[[], object]) -> float:
    """Milliseconds of one run: CUDA events on a GPU, else the clock."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def interleaved(
    runs: dict[str, Callable[[], object]], *, repeats: int, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Milliseconds of every run, taken in turns, after the caller has warmed them up.

    Up to `repeats` rounds, no further one once `seconds` have passed, always one.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + seconds
    for done in range(repeats):
        if done and time.monotonic() > end:
            break
        for name, run in runs.items():
            times[name].append(time_once(run))
    return times


def gemms(case: Case, rows: int = FLOOR_ROWS) -> dict[str, Callable[[], object]]:
    """The four products of the floor at M = min(`rows`, N).

    Their output is in the inputs' dtype, goes into buffers, and is added to nothing.
    """
    rows = min(rows, case.shape.tokens)
    weight, teacher_weight = case.weight.detach(), case.teacher_weight
    hidden, teacher_hidden = case.hidden.detach()[:rows], case.teacher_hidden[:rows]
    logits = hidden.new_empty(rows, weight.shape[0])
    # Products of zeros run faster: the gradient block holds ordinary numbers.
    grad = torch.randn(rows, 256, device=hidden.device).to(hidden.dtype)
    grad = grad.repeat(1, -(-weight.shape[0] // 256))[:, : weight.shape[0]].contiguous()
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    return {
        "z": lambda: torch.mm(hidden, weight.T, out=logits),
        "t": lambda: torch.mm(teacher_hidden, teacher_weight.T, out=logits),
        "dHidden": lambda: torch.mm(grad, weight, out=d_hidden),
        "dW": lambda: torch.mm(grad.T, hidden, out=d_weight),
    }


def floor_ms(times: dict[str, list[float]], shape: Shape, terms: str) -> float:
    """The floor of `terms` in ms, scaled to N; without the teacher's product where it is unused.

    times: those of `gemms`, in ms.
    """
    needed = ["z", "dHidden", "dW"] + (["t"] if terms in WITH_TEACHER else [])
    measured = min(FLOOR_ROWS, shape.tokens)
    return sum(statistics.median(times[name]) for name in needed) * shape.tokens / measured


def why(error: BaseException) -> str:
    """One line for a provider that failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def too_slow(provider: Provider, case: Case, seconds: float, left: float) -> str:
    """Why the provider does not run on this case: its steps would take too long.

    Timed on the first rows only, twice, as the first step may compile; empty where it is fast
    enough, or where only the whole would tell. seconds: for all providers; one that would take
    half of them is skipped for good. left: of them; one that would take more is not reached.
    """
    if seconds == float("inf") or provider.compiles or case.shape.tokens < 4 * PROBE_ROWS:
        return ""
    probe = case.first(PROBE_ROWS)
    provider.step(probe)
    step = time_once(lambda: provider.step(probe)) / 1e3 * case.shape.tokens / PROBE_ROWS
    case.zero_grad()
    if STEPS * step > seconds / 2:
        return f"skipped: about {step:.1f} s per step, too long for {seconds:.0f} s in all"
    return f"{NOT_REACHED} within {seconds:.0f} s" if STEPS * step > left else ""


def measure(
    providers: Sequence[Provider],
    case: Case,
    *,
    repeats: int = 5,
    seconds: float = float("inf"),
    exact_whole: bool = True,
    exact_tokens: int = 64,
    timed: bool = True,
) -> list[Row]:
    """Time, floor, peak bytes (GPU only) and errors of every provider on one case.

    seconds: about how long; providers that are not reached say so, and one that alone would need
    half of it is skipped. Providers of the contract get `CONTRACT_REPEATS` rounds
    whatever it takes. A provider that raises is out, and says why. exact_whole: also the error of
    dW and of the loss, for which the reference reads every token.
    """
    start = time.monotonic()
    rows, runs = [new_row(provider, case.shape) for provider in providers], {}
    terms = {row.terms for row in rows if not row.absent}
    exact = reference(case, terms, tokens=exact_tokens, whole=exact_whole)
    for provider, row in zip(providers, rows, strict=True):
        if row.absent:
            continue
        left = seconds * (0.6 if timed else 1.0) - (time.monotonic() - start)
        if left < 0 and not provider.contract:
            row.absent = f"{NOT_REACHED} within {seconds:.0f} s"
            continue
        try:
            if not provider.contract:
                row.absent = too_slow(provider, case, seconds, left)
            if not row.absent:
                _try(provider, row, case, exact)
                runs[provider.name] = lambda provider=provider: provider.step(case)
        except Exception as error:  # a rival that fails must not end the comparison
            row.absent = why(error)
        case.zero_grad()
        if case.hidden.is_cuda:
            torch.cuda.empty_cache()
    if timed and runs:
        left = seconds - (time.monotonic() - start)
        if all(provider.contract for provider in providers):
            repeats, left = max(repeats, CONTRACT_REPEATS), float("inf")
        _time(rows, runs, case, repeats, left)
    return rows


def _try(provider: Provider, row: Row, case: Case, exact: dict) -> None:
    """One step for the errors, which also compiles; on a GPU another for the peak."""
    loss = provider.step(case)
    for name, value in errors(case, exact[provider.terms], loss).items():
        setattr(row, name, value)
    if case.hidden.is_cuda:
        row.peak_bytes = gpu_peak(provider, case)


def _time(rows: list[Row], runs: dict, case: Case, repeats: int, seconds: float) -> None:
    """Fill in the times of the providers that ran, and their floors."""
    products = {f"gemm {name}": run for name, run in gemms(case).items()}
    for run in products.values():
        run()
    times = interleaved(runs | products, repeats=repeats, seconds=seconds)
    case.zero_grad()
    floor = {name.removeprefix("gemm "): times[name] for name in products}
    for row in rows:
        if row.provider in runs:
            row.ms_all = times[row.provider]
            row.ms = statistics.median(row.ms_all)
            row.floor_ms = floor_ms(floor, case.shape, row.terms)
