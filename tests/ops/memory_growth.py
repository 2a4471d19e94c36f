"""Growth of the resident set over one loss, for `test_memory.py` in a process of its own.

python -m tests.ops.memory_growth '{"tokens": 2048, ...}'    # prints bytes beyond the inputs
"""

import ctypes
import gc
import json
import sys

import torch

import dgrpo


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field + ":"))


def make_inputs(tokens: int, vocab: int, width: int, dtype: torch.dtype, bias: bool) -> dict:
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype)
    return {
        "hidden": torch.randn(tokens, width).to(dtype).requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": torch.randint(vocab, (tokens,)),
        "teacher": dgrpo.TeacherHead(torch.randn(tokens, width).to(dtype), weight.detach().clone()),
        "bias": torch.zeros(vocab, dtype=dtype, requires_grad=True) if bias else None,
    }


def step(mode: str, inputs: dict, budget: int, divergence: str) -> None:
    """A forward pass and a backward pass of one mode."""
    options = {"memory_budget": budget, "divergence": divergence}
    if mode == "logprobs":
        given = {k: v for k, v in inputs.items() if k != "teacher"}
        dgrpo.linear_logprobs(**given, memory_budget=budget)
        return
    if mode == "stats":
        loss = sum(x.sum() for x in dgrpo.linear_token_stats(**inputs, **options)[:3])
    elif mode == "objective":
        loss = dgrpo.linear_loss(objective=lambda s, _: s.divergence, **inputs, **options).loss
    else:
        advantages = torch.randn(len(inputs["targets"]))
        loss = dgrpo.linear_dgrpo_loss(advantages=advantages, **inputs, **options).loss
    loss.backward()


def main() -> None:
    """Read the sizes from the command line, warm up on few tokens, measure."""
    sizes = {
        "vocab": 16384, "width": 64, "dtype": "float32", "bias": False, "mode": "loss",
        "divergence": "reverse_kl", **json.loads(sys.argv[1]),
    }  # fmt: skip
    torch.set_num_threads(1)
    head = (sizes["vocab"], sizes["width"], getattr(torch, sizes["dtype"]), sizes["bias"])
    small = make_inputs(8, *head)
    step(sizes["mode"], small, 2**20, sizes["divergence"])
    del small
    inputs = make_inputs(sizes["tokens"], *head)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    step(sizes["mode"], inputs, sizes["budget"], sizes["divergence"])
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()
