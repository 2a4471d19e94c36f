"""The adapter of a LoRA run, as peft itself loads it."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from dgrpo.trainer import train
from tests.trainer.home import make_home, settings  # noqa: F401

BODY = {"rank": 2, "targets": ["q_proj", "down_proj"]}


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


@pytest.mark.parametrize("base", ["student", "teacher"], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "lora", [BODY, {**BODY, "head": True}, {"rank": 2}], ids=["body", "head", "all-linear"]
)
def test_the_adapter_loads_with_peft_and_equals_the_merged_model(home, tmp_path, base, lora):
    train(
        settings(
            home,
            tmp_path,
            "sft",
            model={"name": str(home / base), "lora": lora},
            optimizer={"kind": "adamw", "lr": 0.05},
            checkpoint={"export": True},
        )
    )
    start = AutoModelForCausalLM.from_pretrained(home / base)
    before = logits(start)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export"))
    assert not torch.allclose(merged, before, atol=1e-2)
    adapted = PeftModel.from_pretrained(start, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), merged, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / base)
    assert config["inference_mode"] and config["r"] == 2
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(found), merged, atol=1e-4, rtol=1e-4)


def test_there_is_no_adapter_without_lora_or_export(home, tmp_path):
    train(settings(home, tmp_path / "a", "sft", checkpoint={"export": True}))
    model = {"name": str(home / "student"), "lora": BODY}
    train(settings(home, tmp_path / "b", "sft", model=model))
    assert not (tmp_path / "a/adapter").exists() and not (tmp_path / "b/adapter").exists()
