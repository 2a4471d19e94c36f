"""A small model, runs of it, and what a test compares of them."""

import contextlib
import random
import resource

import numpy
import torch
from torch import nn

from dgrpo.trainer.checkpoint import Checkpointer, RunState, files
from dgrpo.trainer.checkpoint.tensors import model_tensors, optimizer_tensors


class Tiny(nn.Module):
    """Tied ends, a buffer, a frozen layer, dropout, and 5 rows, which no number of ranks
    divides.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.body = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens):
        hidden = torch.tanh(self.body(self.frozen(self.embed(tokens))))
        self.seen += 1
        return self.head(nn.functional.dropout(hidden, 0.2))


def make(seed=0, kind=torch.optim.AdamW, shard=False):
    torch.manual_seed(seed)
    model = Tiny()
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, kind(trained, lr=1e-2)


def train(model, optimizer, steps):
    """Steps that draw from all three generators."""
    losses = []
    for _ in range(steps):
        tokens = torch.tensor([random.randrange(5), int(numpy.random.randint(5)), 3])
        loss = nn.functional.cross_entropy(model(tokens), tokens.flip(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(model, *optimizers):
    """Every tensor, whole."""
    tensors = model_tensors(model) | optimizer_tensors(model, optimizers)[0]
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
        for name, t in tensors.items()
    }


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def saved_at(folder, *steps, keep=9, **options):
    """A run of one process that saved at these steps; returns what it held at each."""
    model, optimizer = make()
    checkpointer, done, held = Checkpointer(folder, keep=keep, **options), 0, {}
    for step in steps:
        train(model, optimizer, step - done)
        checkpointer.save(model, optimizer, RunState(step=step))
        done, held[step] = step, everything(model, optimizer)
    checkpointer.close()
    return held


def step_folder(folder, step):
    return folder / files.folder_name(step)


@contextlib.contextmanager
def disk_of(size):
    """No file may grow beyond `size` bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
