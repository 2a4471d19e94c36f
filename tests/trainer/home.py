"""What the trainer's tests share: tiny models and data, settings of a small run, its metrics."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from dgrpo.longblocks.tasks import chains, train_tokenizer
from dgrpo.trainer.config import validate

HOOKS = __file__  # where rewards are found
COUNT = 24  # rows of data


@pytest.fixture(scope="module", name="home")
def make_home(tmp_path_factory):
    """A folder with rows.jsonl, a tokenizer, a student and a wider teacher with more padding."""
    folder = tmp_path_factory.mktemp("trainer")
    tokenizer = train_tokenizer(vocab_size=300, names=16)
    task = chains.ChainTask(tokenizer, tokens=None, chains=2, hops=2, names=16)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(COUNT):
            file.write(json.dumps(task.row(i)) + "\n")
    for name, width, padding in (("student", 32, 0), ("teacher", 48, 24)):
        torch.manual_seed(width)
        config = Qwen3Config(
            vocab_size=len(tokenizer) + padding,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=name == "student",
            initializer_range=0.2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def parity(prompts, completions, completion_tokens, **columns):
    """A reward that differs within every group: where a completion's characters lie."""
    return [sum(map(ord, text)) % 7 / 6 for text in completions]


def failing(prompts, completions, **columns):
    """Fails on some completions, whatever they are called with."""
    if any(sum(map(ord, text)) % 3 == 0 for text in completions):
        raise RuntimeError("a bad completion")
    return parity(prompts, completions, None)


def settings(home, out, preset="dgrpo", **groups):
    """Settings of a small run in `out`; `groups` change single values."""
    tree = {
        "out": str(out),
        "steps": 2,
        "epochs": None,
        "model": {"name": str(home / "student")},
        "data": {"sources": [{"path": str(home / "rows.jsonl")}]},
        "method": {"preset": preset},
        "teacher": {"name": str(home / "teacher")},
        "rollout": {"group_size": 4, "max_tokens": 6},
        "rewards": {
            "functions": [{"path": f"{HOOKS}:parity"}],
            "timeout": None,
            "correct_above": 0.5,
        },
        "batch": {"prompts": 4, "tokens": 128},
        "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.0, "warmup_steps": 0}
        | {"clip_norm": None},
        "head": {"memory_budget": 2**20},
        "log": {"progress": False, "samples": 2},
        "checkpoint": {"every": 100, "asynchronous": False, "export": False},
    }
    for group, values in groups.items():
        tree[group] = {**tree[group], **values} if isinstance(tree.get(group), dict) else values
    return validate(tree)


def metrics(folder):
    """The lines of metrics.jsonl, without what may differ between equal runs."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: v for key, v in line.items() if not key.startswith(("time/", "memory/"))}
        for line in lines
    ]
