"""A Hugging Face causal language model with the fused loss head, as the root of FSDP.

`model.py` runs body and head, `heads.py` knows what models do to their logits and LoRA on the
head, `huggingface.py` makes the Hugging Face model, `fsdp.py` shards it.
"""

from dgrpo.trainer.policy.model import PolicyModel

__all__ = ["PolicyModel"]
