"""Every setting of a run, by group. A field's docstring is its line in `dgrpo train --help`."""

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

DtypeName = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """A group of settings; the docstring under a field is its one-line help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Lora(Settings):
    """Low-rank adapters by peft; without this group all weights are trained."""

    rank: PositiveInt = 32
    """Rank of the adapters."""
    alpha: PositiveFloat = 64.0
    """Scale: the update is alpha / rank times B A."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapters' input."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Modules that get an adapter, by the end of their names, or all-linear."""
    head: bool = False
    """An adapter on the LM head too (its weight is merged for the loss)."""

    @model_validator(mode="after")
    def _targets_can_name_the_head(self) -> Self:
        if self.head and self.targets == "all-linear":
            raise ValueError(
                "targets: got all-linear with head, expected a list; all-linear never means the "
                "head, e.g. [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
            )
        return self


class Model(Settings):
    """The policy."""

    name: str | None = None
    """Hub name or folder; "stage:NAME" is the result of an earlier stage."""
    config: dict[str, Any] | None = None
    """Random weights instead: fields of a transformers configuration, with model_type."""
    tokenizer: str | None = None
    """Hub name or folder of the tokenizer; null: the model's own."""
    revision: str | None = None
    """Revision on the hub."""
    dtype: DtypeName = "float32"
    """Type of the master weights; the forward pass runs in fsdp.param_dtype."""
    lora: Lora | None = None
    """Low-rank adapters; null: train all weights."""
    liger: bool = False
    """Liger-Kernel's RMSNorm, SwiGLU and RoPE (GPUs)."""
    checkpointing: bool = False
    """Recompute each layer's activations in the backward pass."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @model_validator(mode="after")
    def _config_is_complete(self) -> Self:
        if self.config is None:
            return self
        if self.name is not None:
            raise ValueError("name: got both it and model.config, expected one of them")
        if "model_type" not in self.config:
            raise ValueError("config: got no model_type, expected one such as qwen3")
        if self.tokenizer is None:
            raise ValueError("tokenizer: got null with config, expected a name or folder")
        return self


class Teacher(Settings):
    """The teacher model (method.teacher: model) or endpoint (method.teacher: served)."""

    name: str | None = None
    """Hub name or folder; "stage:NAME" is the result of an earlier stage."""
    tokenizer: str | None = None
    """Hub name or folder of its tokenizer; null: the teacher's own."""
    allow_other_tokenizer: bool = False
    """Do not compare its tokenizer with the student's; only where you know the ids are the same."""
    revision: str | None = None
    """Revision on the hub."""
    dtype: DtypeName | None = None
    """Type of its weights; null: bfloat16 on a GPU, float32 on a CPU."""
    temperature: PositiveFloat = 1.0
    """Its logits are divided by this."""
    vocab_size: PositiveInt | None = None
    """Compare this many columns of both heads; null: the tokenizer's, if the heads differ."""
    offload_body: bool = False
    """Its layers wait in host memory while the student trains."""
    host_above: NonNegativeInt = 2**30
    """Bytes of hidden states per rank above which they are kept in host memory."""
    url: str | None = None
    """OpenAI-compatible endpoint that returns prompt log-probabilities."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key, if it wants one."""
    top_k: PositiveInt = 64
    """Log-probabilities per token asked of the endpoint."""
    timeout: PositiveFloat = 600.0
    """Seconds until a request to the endpoint counts as failed."""
    trust_remote_code: bool = False
    """Run code that comes with the teacher."""


class DataSource(Settings):
    """One source of rows."""

    path: str
    """JSONL, parquet or CSV file, glob, folder, hub name, or "module:function" that gives rows."""
    name: str = ""
    """Name in metrics and samples; empty: the path."""
    weight: PositiveFloat = 1.0
    """Share of the mix, relative to the other sources."""
    split: str = "train"
    """Split of a hub data set."""
    streaming: bool = False
    """Read in order with a block shuffle, for data that does not fit in memory."""
    columns: dict[str, str] = {}
    """Renamed columns, {our name: name in the file}."""
    options: dict[str, Any] = {}
    """Arguments of a "module:function" path."""
    prompt: str = ""
    """Column of the prompt (text or chat messages); empty: found by name."""
    template: str = "{document}\n\n{question}"
    """Prompt from columns, where no prompt column exists."""
    completion: str = ""
    """Column of the given completion (SFT, KD); empty: found by name."""
    reward: str = ""
    """Reward of its rows ("module:function"), in place of their reward column."""
    where: dict[str, Any] = {}
    """Keep only rows whose columns have these values."""
    books: str = ""
    """Folder with the texts of rows whose document is null (public LongBlocks)."""


class Data(Settings):
    """The prompts, and the completions of SFT and KD."""

    sources: list[DataSource] = []
    """Files or hub data sets, mixed by weight."""
    chat: bool | None = None
    """Apply the chat template; null: if the tokenizer has one."""
    chat_options: dict[str, Any] = {}
    """Arguments of the chat template, such as enable_thinking: false."""
    system: str | None = None
    """System message put before each prompt."""
    min_prompt_tokens: NonNegativeInt = 0
    """Drop rows with shorter prompts."""
    max_prompt_tokens: PositiveInt | None = None
    """Drop rows with longer prompts; null: no limit."""
    max_completion_tokens: PositiveInt | None = None
    """Drop rows with longer given completions; null: no limit."""
    shuffle: bool = True
    """Another order in each epoch, fixed by the seed."""


class Rollout(Settings):
    """Sampling from the policy."""

    group_size: PositiveInt = 8
    """Completions per prompt."""
    max_tokens: PositiveInt = 1024
    """Longest completion."""
    temperature: PositiveFloat = 1.0
    """Temperature of sampling and of the training logits alike."""
    stop: list[str] = []
    """Texts that end a completion, beside the end-of-sequence token."""
    batch_tokens: PositiveInt = 65536
    """Tokens (prompt and completion) that the built-in sampler holds in its cache at once."""


class Reward(Settings):
    """One reward; several are added with their weights."""

    path: str
    """Function of dgrpo.longblocks.rewards, "module:function" or "file.py:function"."""
    name: str = ""
    """Name in metrics; empty: the function's."""
    weight: float = 1.0
    """Factor in the sum."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the function."""

    @property
    def title(self) -> str:
        """The name in metrics."""
        return self.name or self.path.rpartition(":")[2]


class Rewards(Settings):
    """How completions are scored."""

    functions: list[Reward] = []
    """The rewards; none: each row's own reward column."""
    timeout: PositiveFloat | None = 30.0
    """Seconds a batch may take in the worker, and again one by one if it fails; null: no worker."""
    max_failed: PositiveInt = 3
    """Batches in a row without any reward, every one having failed, before the run stops."""
    correct_above: float = 0.5
    """A completion counts as correct above this reward (gates, teacher contexts)."""


class Batch(Settings):
    """How much is in one step. Counts are over all ranks."""

    prompts: PositiveInt = 16
    """Prompts per batch of rollouts (or given sequences per batch)."""
    updates: PositiveInt = 1
    """Optimiser steps per batch; above 1 the ratio clips."""
    tokens: PositiveInt = 16384
    """Tokens of a packed micro-batch; a longer sequence goes alone."""
    share_prompts: bool = True
    """Read a prompt once for all of its completions in a micro-batch."""

    @model_validator(mode="after")
    def _each_update_has_a_prompt(self) -> Self:
        if self.updates > self.prompts:
            raise ValueError(
                f"updates: got {self.updates}, expected at most batch.prompts ({self.prompts})"
            )
        return self


class Head(Settings):
    """The loss head."""

    memory_budget: PositiveInt = 2**30
    """Bytes of transient workspace."""
    policy_logits: Literal["float32", "bfloat16"] = "float32"
    """Rounding of the policy's logits, to match a sampler that rounds."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Row kernels."""


class Optimizer(Settings):
    """The optimiser and its learning rate over the steps."""

    kind: Literal["adamw", "sgd", "muon"] = "adamw"
    """Muon: hidden matrices by Muon, the rest by AdamW."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of the hidden matrices under muon."""
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2)
    """AdamW's decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Momentum of Muon and SGD."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices; vectors have none."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay."""
    decay_fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Last part of the steps over which the rate decays."""
    final_fraction: float = Field(0.0, ge=0.0, le=1.0)
    """Rate at the end, as a fraction of the peak."""
    max_skipped: PositiveInt = 5
    """Steps with a non-finite loss or gradient, in a row, before the run stops."""


class Fsdp(Settings):
    """Sharding over ranks (torchrun); without torchrun all but the types is unused."""

    param_dtype: DtypeName | None = None
    """Type of weights and activations in forward and backward; null: bfloat16 on a GPU."""
    reduce_dtype: DtypeName = "float32"
    """Type in which gradients are summed over ranks."""
    replicas: PositiveInt = 1
    """HSDP: copies of the sharded model (ranks / replicas share one)."""
    offload: bool = False
    """Parameters, gradients and optimiser state in host memory (GPU only)."""
    reduce_every_micro: bool = True
    """False: keep unsharded gradients and reduce once per step."""
