"""What is exported is what `from_pretrained` loads."""

import pytest
import torch
from safetensors.torch import load_file

from dgrpo.trainer.checkpoint import CheckpointError, export, files
from tests.trainer.checkpoint.runs import assert_same, disk_of


def tiny_llama(tied=False, lora=False, seed=0):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=33,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=3,
    )
    model = AutoModelForCausalLM.from_config(config)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "down_proj", "lm_head"]
    return get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


def policy_of(model):
    from dgrpo.trainer.policy import PolicyModel

    return PolicyModel(model)


def test_export_is_what_from_pretrained_loads(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<eos>": 3}, unk_token="a")),
        eos_token="<eos>",
    )
    model = tiny_llama()
    model.generation_config.update(temperature=0.7, do_sample=True)
    expected, policy = logits(model), policy_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(files, "PART", 4096)
        assert export(policy, tmp_path / "out", tokenizer=words) == tmp_path / "out"
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), expected)
    assert loaded.generation_config.temperature == 0.7
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    export(policy, tmp_path / "out", dtype=torch.bfloat16)  # replaces it
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, policy.head.weight.bfloat16())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_of_lora_merged_and_as_an_adapter(tmp_path, tied):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tied, lora=True)
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected, atol=1e-3)
    policy = policy_of(model)
    merged = AutoModelForCausalLM.from_pretrained(export(policy, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected)

    export(policy_of(tiny_llama(tied)), tmp_path / "base")
    export(policy, tmp_path / "adapter", merge=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), expected)


def test_tied_weights_are_exported_once(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tied=True)
    expected = logits(model)
    export(policy_of(model), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), expected)


def test_export_to_a_full_disk_keeps_the_old_folder(tmp_path):
    export(policy_of(tiny_llama()), tmp_path / "out")
    before = load_file(tmp_path / "out/model.safetensors")
    with disk_of(1000), pytest.raises(CheckpointError, match="export to .*out.tmp/part-0"):
        export(policy_of(tiny_llama(seed=1)), tmp_path / "out")
    assert_same(load_file(tmp_path / "out/model.safetensors"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
