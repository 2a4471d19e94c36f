"""What a change of structure must not change, to the bit: `python -m tests.numbers > before.txt`.

Prints the ops' outputs and gradients on fixed inputs, and tiny runs (every preset, LoRA, two ranks)
with their losses, gradient norms and final weights, as hashes and exact numbers. Run it before and
after a change that is to keep behaviour, on one machine, and compare the two files.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from safetensors.torch import load_file

import dgrpo
from dgrpo.trainer import train
from dgrpo.trainer.config import PRESETS
from tests.interpreter import mend_interpreter
from tests.ops.cases import DIVERGENCES, TEACHERS, case_of, teacher_of
from tests.trainer import test_ranks
from tests.trainer.home import make_home, metrics, settings

LORA = {"model": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj"], "head": True}}}


def digest(*tensors: torch.Tensor | None) -> str:
    """A short hash of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def print_ops(backend: str) -> None:
    """Every op on every divergence and kind of teacher."""
    for divergence, options in DIVERGENCES.items():
        for kind in TEACHERS:
            case = case_of(24, 101)
            shared = {"teacher": teacher_of(kind, case), "backend": backend, **options}
            given = (case.hidden, case.weight, case.targets)
            fused = dgrpo.linear_dgrpo_loss(
                *given, case.advantages, old_logprobs=case.old_logprobs, clip_high=0.3, **shared
            )
            free = dgrpo.linear_loss(
                *given, lambda s, rows: 0.1 * s.divergence - 0.2 * s.logprobs, **shared
            )
            stats = dgrpo.linear_token_stats(*given, **shared)
            replayed = (stats.logprobs * 0.3 + stats.divergence - 0.1 * stats.entropy).sum()
            for name, loss, outputs in (
                ("dgrpo", fused.loss, fused[1:]),
                ("loss", free.loss, free[1:5]),
                ("stats", replayed, stats),
            ):
                grads = torch.autograd.grad(loss, [case.hidden, case.weight])
                print(backend, divergence, kind, name, digest(loss, *outputs, *grads))
    scored = dgrpo.linear_logprobs(case.hidden, case.weight, case.targets, backend=backend)
    print(backend, "logprobs", digest(*scored))


@contextlib.contextmanager
def to_stderr():
    """What this process and its children print goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)


def run(wanted) -> None:
    """Train, with what the run prints out of the way, and print what it left."""
    with to_stderr(), contextlib.redirect_stdout(sys.stderr):
        train(wanted)
    print_run(Path(wanted.out))


def print_run(folder: Path) -> None:
    """A finished run: its metrics and the tensors of its last checkpoint."""
    for line in metrics(folder):
        print(folder.name, json.dumps(line, sort_keys=True))
    for step in sorted((folder / "checkpoints").glob("step-*")):
        print(folder.name, step.name, weights(step))


def weights(step: Path) -> str:
    """A hash over a checkpoint's matrices, weights and moments, in whichever files they are."""
    found = [
        hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for file in step.glob("[!r]*.safetensors")  # no random states
        for tensor in load_file(file).values()
        if tensor.dim() > 1
    ]
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:16]


def main() -> None:
    """Print everything."""
    torch.set_num_threads(1)
    mend_interpreter()
    for backend in ("torch", "triton"):
        print_ops(backend)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)

        class Folders:
            mktemp = staticmethod(lambda part: (out / part).mkdir() or out / part)

        home = make_home.__wrapped__(Folders)
        for preset in PRESETS:
            run(settings(home, out / preset, preset))
        run(settings(home, out / "lora", "dgrpo", **LORA))
        with to_stderr():
            ranks = test_ranks.on_ranks.__wrapped__(home, Folders)
        for case in test_ranks.CASES:
            print_run(ranks / case)


if __name__ == "__main__":
    main()
