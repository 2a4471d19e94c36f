"""A Hugging Face causal language model with the fused loss head, as the root of FSDP.

`model.py` runs body and head, `heads.py` knows what models do to their logits and LoRA on the
head, `load.py` makes the Hugging Face model.
"""

from dgrpo.trainer.policy.heads import LoraHead, fp32_logits, logit_transform
from dgrpo.trainer.policy.load import apply_liger, from_config, from_pretrained
from dgrpo.trainer.policy.model import PolicyModel

__all__ = [
    "LoraHead",
    "PolicyModel",
    "apply_liger",
    "fp32_logits",
    "from_config",
    "from_pretrained",
    "logit_transform",
]
