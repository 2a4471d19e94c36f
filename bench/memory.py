"""Peak bytes of a step, beyond what it was given and the gradients it leaves.

On a GPU: the allocator's own peak. On a CPU: growth of the resident set, in a process of its own
per provider, whose high-water mark Linux lets us reset between steps.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
from collections.abc import Callable, Sequence

import torch

from bench.cases import Case, make_case
from bench.provider import Provider
from bench.rivals import RIVAL_MODULES
from bench.sizes import Shape

GIB = 2**30
SECONDS = 180.0  # that a provider may take on a CPU
TOOK_LONGER = "took more than"  # how the reason of one begins that was stopped for it
_M_MMAP_THRESHOLD = -3  # glibc malloc.h


def gpu_peak(provider: Provider, case: Case) -> int:
    """Peak bytes allocated during one step beyond inputs and gradients, on the case's GPU."""
    case.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.step(case)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - case.gradient_bytes()
    case.zero_grad()
    return peak


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS now, VmHWM the highest since the last reset."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def cpu_peak(provider: Provider, case: Case, *, warm: bool = False) -> int:
    """Growth of this process's resident set over one step, less the gradients. Linux only.

    warm: run one step before, which loads libraries and compiles; that is not to count.
    """
    if warm:
        provider.step(case)
    case.zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = resident("VmRSS")
    provider.step(case)
    return max(0, resident("VmHWM") - before - case.gradient_bytes())


def _child(build: Callable, number: int, shapes: Sequence[Shape], options: dict, limit: int, pipe):
    # Large blocks straight from the kernel: what is freed leaves the resident set at once.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)
    torch.set_num_threads(1)  # others may be measured beside this one
    provider = build()[number]
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (resident("VmData") + limit, hard))
    for index, shape in enumerate(shapes):
        try:
            warm = index == 0 or provider.compiles
            pipe.send(cpu_peak(provider, make_case(shape, **options), warm=warm))
        except Exception as error:
            out = "memory" in str(error).lower() or isinstance(error, MemoryError)
            pipe.send(f"needs more than {limit / GIB:.0f} GiB" if out else f"failed: {error}"[:200])
            break
    pipe.close()


def cpu_peaks(
    build: Callable[[], list[Provider]],
    number: int,
    shapes: Sequence[Shape],
    *,
    limit: int = 4 * GIB,
    seconds: float = SECONDS,
    **options,
) -> list[int | str]:
    """Peaks of one provider over `shapes`, in a fresh process that may grow by `limit` bytes.

    build: a module-level function that lists the providers (one by itself may not pickle).
    number: which of them. options: those of `make_case`.
    Where there is no number there is a reason, which stands for the shapes after it too: let them
    grow.
    """
    # A fork of a process that has imported everything and run nothing: fresh, and started at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([build.__module__, *RIVAL_MODULES])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(build, number, shapes, options, limit, theirs))
    child.start()
    theirs.close()
    found: list[int | str] = []
    for _ in shapes:
        try:
            found.append(ours.recv() if ours.poll(seconds) else f"{TOOK_LONGER} {seconds:.0f} s")
        except EOFError:  # killed, or died in a library
            child.join()
            found.append(f"ended with exit code {child.exitcode}")
        if isinstance(found[-1], str):
            break
    child.join(timeout=10)
    child.terminate()
    child.join()
    return found + found[-1:] * (len(shapes) - len(found))
