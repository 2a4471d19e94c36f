"""Which variants of each kernel would be compiled, for `test_variants.py` in a process of its own.

python -m tests.kernels.launches    # prints {call: {kernel: number of variants}} as JSON

Runs the whole ops on the CPU while a stand-in takes the place of Triton's driver and of its
compiler: what is recorded is the key under which Triton would look up a compiled kernel.
"""

import json
import os

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is first imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import dgrpo
from dgrpo_kernels import triton_rows  # noqa: F401  (before the interpreter's knob is turned)

TOKENS = (1, 15, 16, 4097)
VOCAB, WIDTH = 50, 4
BUDGET = 2**15  # bytes: blocks of a few rows, so that parts start at any row


class Driver:
    """Stands in for Triton's driver: a GPU to specialise for, nothing to launch on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record() -> dict[str, set[str]]:
    """From here on launches are looked up, recorded and dropped."""
    seen: dict[str, set[str]] = {}

    def compile_nothing(self: JITFunction, key: str, *args, **kwargs) -> None:
        seen.setdefault(self.__name__, set()).add(str(key))

    JITFunction._do_compile = compile_nothing
    triton.runtime.driver.set_active(Driver())
    triton.knobs.runtime.interpret = True  # the ops refuse Triton on the CPU without it
    return seen


def call(tokens: int, teacher_kind: str, numbers: dict, dtype: torch.dtype, masked: bool) -> None:
    """A loss and a recomputing backward on inputs that do not matter."""
    hidden = torch.zeros(tokens, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.zeros(VOCAB, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    if masked:
        targets[1::3] = -100
    some = torch.zeros(tokens)
    if teacher_kind == "topk":
        ids = torch.arange(3).expand(tokens, 3).contiguous()
        teacher = dgrpo.TopKTeacher(ids, torch.full((tokens, 3), -2.0))
    else:
        teacher = dgrpo.TeacherHead(hidden.detach(), weight.detach())
    shared = {"teacher": teacher, "backend": "triton", "memory_budget": BUDGET}
    head = {k: numbers[k] for k in ("temperature", "logit_softcap", "logit_scale") if k in numbers}
    clip = {k: v for k, v in numbers.items() if k not in head}
    divergence = {"divergence": "jsd", "jsd_beta": clip.pop("jsd_beta", 0.5)}
    dgrpo.linear_dgrpo_loss(
        hidden, weight, targets, some, old_logprobs=some, ref_logprobs=some, **shared, **head,
        **clip, **divergence,
    ).loss.backward()  # fmt: skip
    stats = dgrpo.linear_token_stats(hidden, weight, targets, **shared, **head, **divergence)
    (stats.logprobs.sum() + stats.divergence.sum()).backward()


def main() -> None:
    """Counts variants after one call, after all numbers of tokens, and after all coefficients."""
    seen, counts = record(), {}
    base = {"logit_softcap": 30.0}
    for kind in ("full", "topk"):
        for dtype in (torch.bfloat16, torch.float16):
            seen.clear()
            name = f"{kind} {str(dtype)[6:]}"
            found = counts[name] = {}
            call(64, kind, base, dtype, False)
            found["one call"] = {k: len(v) for k, v in sorted(seen.items())}
            for tokens in TOKENS:
                for masked in (False, True):
                    call(tokens, kind, base, dtype, masked)
            found["numbers of tokens"] = {k: len(v) for k, v in sorted(seen.items())}
            for number in (0.0, 1.0, 0.3):
                coefs = {
                    "clip_low": number, "clip_high": number, "ref_coef": number,
                    "entropy_coef": number, "teacher_coef": number, "jsd_beta": 0.1 + 0.5 * number,
                    "temperature": 1 + number, "logit_scale": 1 + number,
                    "logit_softcap": 16 + number, "clip_dual": None if number else 3.0,
                }  # fmt: skip
                call(64, kind, coefs, dtype, False)
            found["coefficients"] = {k: len(v) for k, v in sorted(seen.items())}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
