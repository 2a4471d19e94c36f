"""Hugging Face models from folders and configurations, and Liger's layers."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgrpo.trainer.policy import PolicyModel
from dgrpo.trainer.policy.huggingface import (
    apply_liger,
    from_config,
    from_pretrained,
)
from tests.tiny import (
    VOCAB,
    tiny_model,
)


def test_loads_safetensors_and_no_pickles(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "safe")
    policy = PolicyModel(from_pretrained(str(tmp_path / "safe")))
    for (_, got), want in zip(policy.model.named_parameters(), model.parameters(), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        PolicyModel(from_pretrained(str(pickled)))


def test_code_in_a_folder_is_not_run(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('this ran')")
    config = (tmp_path / "config.json").read_text()
    entry = (
        '{"auto_map": {"AutoConfig": "modeling_own.A", "AutoModelForCausalLM": "modeling_own.B"},'
    )
    config = config.replace('"model_type": "llama"', '"model_type": "own"')
    (tmp_path / "config.json").write_text(entry + config.lstrip()[1:])
    with pytest.raises(ValueError, match="trust_remote_code"):
        PolicyModel(from_pretrained(str(tmp_path)))


def test_random_models_from_a_configuration():
    config = tiny_model("qwen2").config
    policy = PolicyModel(from_config(config, dtype=torch.bfloat16))
    assert policy.head.weight.dtype == torch.bfloat16 and policy.vocab_size == VOCAB


@pytest.mark.skipif(torch.cuda.is_available(), reason="raises without a GPU only")
def test_liger_needs_a_gpu():
    with pytest.raises(ValueError, match="liger: got True without a GPU"):
        apply_liger(tiny_model("llama"))


LIGER = """
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model
torch.cuda.is_available = lambda: True
from dgrpo.trainer.policy.huggingface import apply_liger
from liger_kernel.transformers.rms_norm import LigerRMSNorm
model = tiny_model({kind!r})
before = type(model).forward, model.forward
apply_liger(model)
assert (type(model).forward, model.forward) == before, "the loss patch is on"
norm = model.model.norm
assert norm.forward.__func__ is LigerRMSNorm.forward, norm.forward
"""


@pytest.mark.slow  # a process of its own: Liger changes transformers' modules
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_liger_applies_to_the_models_at_hand(kind):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", LIGER.format(kind=kind)], check=True, env=environment)


def test_weights_of_another_model_are_told_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, "more": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    from_pretrained(str(tmp_path))
    assert "1 weights that the model lacks: more" in caplog.text
    other = {**weights, name: torch.zeros(3, 3)}
    save_file(other, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} has shape \[3, 3\]"):
        from_pretrained(str(tmp_path))
    assert "LOAD REPORT" not in caplog.text
