"""One trainer's steps in a process of its own: what `bench.step` starts.

python -m bench.step_run PROVIDER SIZE STEPS FOLDER    prints one line of JSON

Both trainers get the same random weights, prompts, group size, completion length, AdamW and reward,
compute in fp32 on a CPU and in bf16 from fp32 masters on a GPU, and take one optimiser step from
micro-batches of the same number of tokens. A first step that is not counted warms them up.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.memory import resident

GPU = torch.cuda.is_available()
VERBS = ("rollout", "score", "teacher", "train")


@dataclass(frozen=True)
class Size:
    """A model's shape, and what one step works on."""

    hidden: int
    layers: int
    vocab: int
    prompts: int
    group: int
    prompt: int  # tokens, about
    completion: int  # tokens, exactly
    teacher: int  # width of the teacher, in widths of the student

    def as_text(self) -> str:
        """For the title of a table."""
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


SIZES = {
    "tiny": Size(64, 2, 1024, prompts=2, group=4, prompt=48, completion=8, teacher=2),
    "cpu": Size(256, 4, 32768, prompts=4, group=8, prompt=192, completion=48, teacher=2),
    "gpu": Size(1024, 28, 151936, prompts=4, group=8, prompt=4096, completion=128, teacher=1),
}


def make_model(size: Size, folder: Path, width: int = 1, seed: int = 0) -> None:
    """A Qwen3 with random weights, and a tokenizer whose end-of-sequence token is never sampled."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from dgrpo.longblocks.tasks import train_tokenizer

    tokenizer = train_tokenizer(vocab_size=400, names=32)
    hidden = size.hidden * width
    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=max(2, hidden // 128),
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        max_position_embeddings=2 * (size.prompt + size.completion),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # an embedding that no hidden state can point to
        model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0
        model.get_input_embeddings().weight *= 3.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(size: Size, folder: Path, count: int) -> list[dict]:
    """Prompts of the wanted length, written as rows.jsonl too."""
    from transformers import AutoTokenizer

    from dgrpo.longblocks.tasks import chains

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    task = chains.ChainTask(tokenizer, tokens=size.prompt, chains=2, hops=2, names=32, queries=1)
    rows = [{"id": str(i), "prompt": task.row(i)["prompt"], "answer": "1"} for i in range(count)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)
    return rows


def reward(prompts, completions, **columns) -> list[float]:
    """Cheap, and different within a group."""
    return [sum(map(ord, text)) % 7 / 6 for text in completions]


def measured(step: Callable[[], dict[str, float]], steps: int) -> dict:
    """Medians of `steps` steps after one, and the peak memory of these."""
    step()
    gc.collect()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    taken = [step() for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() if GPU else resident("VmHWM")
    medians = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
    return {**medians, "peak_bytes": peak, "step_bytes": peak - before}


def ours(size: Size, steps: int, folder: Path, preset: str) -> dict:
    """dgrpo's verbs of a step, as its own trainer calls them."""
    from dgrpo.trainer.build import build
    from dgrpo.trainer.collect import collect
    from dgrpo.trainer.config import validate
    from dgrpo.trainer.record import record
    from dgrpo.trainer.update import attach_teacher, backward, micro_batches, update, weigh

    micro = size.group * (size.prompt + size.completion)
    run = build(
        validate(
            {
                "out": str(folder / preset),
                "steps": steps + 1,
                "epochs": None,
                "model": {"name": str(folder / "model")},
                "teacher": {"name": str(folder / "teacher")},
                "data": {"sources": [{"path": str(folder / "rows.jsonl")}]},
                "method": {"preset": preset},
                "rollout": {"group_size": size.group, "max_tokens": size.completion},
                "rewards": {"functions": [{"path": f"{__file__}:reward"}], "timeout": None},
                "batch": {"prompts": size.prompts, "tokens": micro + 64 * size.group},
                "optimizer": {"lr": 1e-6},
                "head": {"memory_budget": 2**30 if GPU else 2**26},
                "log": {"progress": False, "samples": 0},
            }
        )
    )

    def step() -> dict[str, float]:
        start = time.perf_counter()
        batch = collect(run)
        attach_teacher(run, batch)
        weigh(run, batch)
        for one in micro_batches(run, batch):
            backward(run, batch, one)
        update(run, batch)
        record(run, batch)
        # Of all sequences, whatever is read once for several of them.
        tokens = sum(len(s.prompt_ids) + len(s.completion_ids) for s in batch.samples)
        found = {"seconds": time.perf_counter() - start, "tokens": tokens}
        found |= {verb: batch.seconds.get(verb, 0.0) for verb in VERBS}
        found["train"] += batch.seconds["update"]
        return found

    found = measured(step, steps)
    run.close()
    return found


def trl(size: Size, steps: int, folder: Path) -> dict:
    """TRL's GRPOTrainer without a reference model."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clocks = dict.fromkeys(("rollout", "scored"), 0.0)

    class Timed(GRPOTrainer):
        """The same trainer, its two halves timed."""

        def _generate(self, *args, **kwargs):
            return clock("rollout", super()._generate, *args, **kwargs)

        def _generate_and_score_completions(self, *args, **kwargs):
            inner = super()._generate_and_score_completions
            return clock("scored", inner, *args, **kwargs)

    def clock(name: str, call: Callable, *args, **kwargs):
        start = time.perf_counter()
        found = call(*args, **kwargs)
        clocks[name] += time.perf_counter() - start
        return found

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=size.group,
        gradient_accumulation_steps=size.prompts,
        num_generations=size.group,
        max_completion_length=size.completion,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-6,
        max_steps=steps + 1,
        bf16=GPU,
        use_cpu=not GPU,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    trainer = Timed(
        str(folder / "model"), reward, args=config, train_dataset=Dataset.from_list(rows)
    )
    bounds: list[dict[str, float]] = []

    class Steps(TrainerCallback):
        """Notes the time and the clocks after every optimiser step."""

        def on_step_end(self, args, state, control, **kwargs):
            bounds.append({"at": time.perf_counter(), **clocks})
            if len(bounds) == 1:
                begin()

    memory: dict[str, int] = {}

    def begin() -> None:
        gc.collect()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            memory["before"] = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            memory["before"] = resident("VmRSS")
        bounds[-1]["at"] = time.perf_counter()

    trainer.add_callback(Steps())
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if GPU else resident("VmHWM")
    taken = []
    for last, now in zip(bounds, bounds[1:], strict=False):
        seconds, rollout, scored = (now[k] - last[k] for k in ("at", "rollout", "scored"))
        parts = {"rollout": rollout, "score": scored - rollout, "teacher": 0.0}
        taken.append({"seconds": seconds, **parts, "train": seconds - scored})
    medians = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
    lengths = [
        len(ids) for ids in trainer.processing_class([row["prompt"] for row in rows]).input_ids
    ]
    tokens = size.prompts * size.group * (statistics.mean(lengths) + size.completion)
    return {
        **medians,
        "tokens": tokens,
        "peak_bytes": peak,
        "step_bytes": peak - memory["before"],
    }


def main() -> None:
    """One provider, one line."""
    provider, size, steps, folder = sys.argv[1:]
    run = trl if provider == "trl" else lambda *args: ours(*args, preset=provider)
    print(json.dumps(run(SIZES[size], int(steps), Path(folder))))


if __name__ == "__main__":
    main()
