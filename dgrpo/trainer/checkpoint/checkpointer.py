"""Saving while training goes on, and restoring on any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from dgrpo.trainer.checkpoint import files, storage
from dgrpo.trainer.checkpoint.errors import CheckpointError, OtherFormat, by_rank, failures
from dgrpo.trainer.checkpoint.state import (
    RunState,
    decode,
    encode,
    fork_random_state,
    random_state,
    set_random_state,
    share,
)
from dgrpo.trainer.checkpoint.tensors import (
    load_optimizers,
    model_tensors,
    optimizer_templates,
    optimizer_tensors,
)

_T = TypeVar("_T")


class Checkpointer:
    """The checkpoints of one run: `folder/step-00000012`, each complete or not there at all.

    Make it, and call its methods, on every rank alike. A failure on one rank raises
    `CheckpointError` on all of them, with the rank and the file in its message.

    Args:
        folder: where the checkpoints lie, on a file system that all ranks share.
        keep: how many complete ones stay; older ones go once a new one is complete.
        asynchronous: `save` returns when parameters and optimiser state are copied to host memory,
            and the rest happens in a thread. False: no copy is made, `save` returns when all is on
            the disk.
        checksums: verify every file's CRC-32 before loading, besides its size.
        frozen: save parameters that need no gradient too. False for LoRA: the base model comes from
            where it came from at the start.

    Without `torch.distributed`, or with one rank, everything happens in this process.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        asynchronous: bool = True,
        checksums: bool = True,
        frozen: bool = True,
    ):
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1")
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self.checksums, self.frozen = checksums, frozen
        self.rank, self.world_size, self.group = 0, 1, None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            # A group of its own: the thread's collectives must not mix with the training's.
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._stager: DefaultStager | None = None
        # DCP warns on every call that it works in one process, which is what is wanted.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    @property
    def _ranks(self) -> dict:
        """What DCP is told of the ranks."""
        return {"process_group": self.group, "no_dist": self.group is None}

    def steps(self) -> list[int]:
        """The steps of the checkpoints in place, ascending."""
        return files.complete_steps(self.folder)

    def save(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], state: RunState
    ) -> None:
        """Saves the run at `state.step`. Collective; first waits for the save before.

        Raises CheckpointError for that one if it failed, and for this one if it is synchronous.
        """
        self.wait()
        tensors, encoded, error = {}, ("", {}), None
        try:
            tensors = model_tensors(model, self.frozen)
            optimizer_part, rest = optimizer_tensors(model, _sequence(optimizer))
            tensors |= optimizer_part
            own = {"random": random_state(), "rollouts": state.rollouts}
            if self.rank == 0:
                own |= {"shared": state.shared(), "optimizers": rest}
            encoded = encode(own)
            if self.asynchronous:
                tensors = self._stage(tensors)
        except Exception as caught:
            error = caught
        writer = storage.Writer(
            self.folder / files.folder_name(state.step),
            step=state.step,
            rank=self.rank,
            world_size=self.world_size,
            state=encoded,
            error=error,
            committed=lambda: files.prune(self.folder, self.keep),
        )
        if self.asynchronous:
            self._pending = self._thread.submit(self._write, tensors, writer)
        else:
            self._write(tensors, writer)

    def _stage(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A copy on the host, in buffers that every save uses again."""
        if self._stager is None:
            cuda = torch.cuda.is_available()
            self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        return self._stager.stage(tensors)

    def _write(self, tensors: dict[str, torch.Tensor], writer: storage.Writer) -> None:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        try:
            dcp.save(tensors, storage_writer=writer, planner=planner, **self._ranks)
        except CheckpointException as error:
            if self.rank == 0:
                files.discard(writer.temporary)
            kept = self.steps()
            rest = f"the checkpoint of step {kept[-1]} is in place" if kept else "there is no other"
            text = f"saving step {writer.step} failed; {failures(error)}; {rest}"
            raise CheckpointError(text) from error

    def wait(self) -> None:
        """Returns once the save under way is complete; raises its error, on every rank alike."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        step: int | None = None,
    ) -> RunState | None:
        """Loads a checkpoint in place and returns its state; None if there is none. Collective.

        The newest by default. One that is damaged is reported and the one before is taken; if all
        are, the one asked for is, or one is of another format, CheckpointError says so. Later ones
        than that restored are set aside, and removed by the next save. Random numbers are restored
        too, so call this last, after the model is built, sharded and its optimiser made.

        With another number of ranks than at the save, rollouts in flight are dealt anew in their
        order, and a rank that is new gets random numbers seeded from rank 0's.
        """
        self.wait()
        folder = self._choose(step)
        if folder is None:
            return None
        optimizers, what = _sequence(optimizer), f"{folder} cannot be loaded"
        reader, first, tensors, templates = self._together(what, lambda: self._plan(folder, model))
        try:
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            dcp.load(tensors | templates, storage_reader=reader, planner=planner, **self._ranks)
        except CheckpointException as error:
            raise CheckpointError(f"{what}: {failures(error)}") from error

        def finish() -> RunState:
            load_optimizers(model, optimizers, first["optimizers"], templates)
            state = self._own_state(folder, first)
            later = files.set_aside(self.folder, state.step) if self.rank == 0 else []
            if later:
                print(f"checkpoint: set aside those of the later steps {later}", flush=True)
            return state

        return self._together(what, finish)

    def close(self) -> None:
        """Waits for the save under way and frees the staging buffers."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._stager is not None:
                self._stager.close()
                self._stager = None

    def _choose(self, step: int | None) -> Path | None:
        """The folder to load: the newest whose files are whole, or `step`'s. All ranks agree."""

        def scan() -> list[int]:
            if self.rank == 0:
                files.recover(self.folder)
            return self.steps()

        steps = self._gather(self._together(str(self.folder), scan))[0]
        if step is not None:
            if step not in steps:
                raise CheckpointError(f"{self.folder}: no step {step}, expected one of {steps}")
            steps = [step]
        problems: list[str] = []
        for candidate in reversed(steps):
            folder = self.folder / files.folder_name(candidate)
            found = self._damages(folder)
            if not found:
                return folder
            problems += found
            if self.rank == 0:
                print(f"checkpoint: step {candidate} is damaged: {'; '.join(found)}", flush=True)
        if problems:
            raise CheckpointError(f"{self.folder}: nothing to resume from: {'; '.join(problems)}")
        return None

    def _damages(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint; every rank verifies its share of the files."""
        found, other = [], None
        try:
            listed = files.read_manifest(folder)["files"]
            names = sorted(listed)[self.rank :: self.world_size]
            found = files.damages(folder, names, listed, self.checksums)
        except OtherFormat as error:
            other = str(error)
        except CheckpointError as error:
            found = [str(error)]
        answers = self._gather((found, other))
        if others := [text for _, text in answers if text]:
            raise OtherFormat(others[0])  # an older one in its place would cost its steps
        return sorted({text for part, _ in answers for text in part})

    def _plan(self, folder: Path, model: nn.Module) -> tuple:
        """Reader, rank 0's state, and what is loaded in place: the model, the optimisers' state."""
        reader = storage.Reader(folder)
        saved = reader.saved()
        tensors = model_tensors(model, self.frozen)
        problems = [f"it has no {name}" for name in tensors if name not in saved] + [
            f"{name} has shape {list(saved[name][1])}, here {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in saved and saved[name][1] != tensor.shape
        ]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(f"the model is another: {problems[0]}{more}")
        first = decode(*storage.read_rank(folder, 0))
        return reader, first, tensors, optimizer_templates(model, first["optimizers"], saved)

    def _own_state(self, folder: Path, first: dict) -> RunState:
        """This rank's state out of the rank files of a run with any number of ranks."""
        world_size = files.read_manifest(folder)["world_size"]
        if world_size == self.world_size:
            own = first if self.rank == 0 else decode(*storage.read_rank(folder, self.rank))
            rollouts = own["rollouts"]
        else:
            every = [first, *(decode(*storage.read_rank(folder, r)) for r in range(1, world_size))]
            own = every[self.rank] if self.rank < world_size else None
            rollouts = [entry for rank in every for entry in rank["rollouts"]]
            rollouts = share(rollouts, self.rank, self.world_size)
        if own is not None:
            set_random_state(own["random"])
        else:
            fork_random_state(first["random"], self.rank)
        return RunState(**first["shared"], rollouts=rollouts)

    def _gather(self, value: object) -> list:
        values = [value]
        if self.group is not None:
            values = [None] * self.world_size
            dist.all_gather_object(values, value, group=self.group)
        return values

    def _together(self, what: str, call: Callable[[], _T]) -> _T:
        """`call()`, or CheckpointError on every rank if it fails on any."""
        value, error = None, None
        try:
            value = call()
        except Exception as caught:
            error = caught
        texts = self._gather(error and f"{type(error).__name__}: {error}")
        failed = {rank: text for rank, text in enumerate(texts) if text}
        if failed:
            raise CheckpointError(f"{what}: {by_rank(failed)}") from error
        return value


def _sequence(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
