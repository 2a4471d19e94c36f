"""Saving while training goes on, and restoring on any number of ranks."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from dgrpo.distributed import ranks
from dgrpo.trainer.checkpoint import files, storage
from dgrpo.trainer.checkpoint.errors import CheckpointError, OtherFormat, together
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


class Checkpointer:
    """The checkpoints of one run: `folder/step-00000012`, each complete or not there at all.

    Make it, and call its methods, on every rank. A failure on one rank raises `CheckpointError` on
    all of them, with the rank and the file in its message.

    Args:
        folder: where the checkpoints lie, on a file system that all ranks share.
        keep: how many complete ones stay; older ones go once a new one is complete.
        asynchronous: `save` returns when parameters and optimiser state are copied to host memory,
            and a thread does the rest. False: `save` makes no copy and returns when all is on disk.
        frozen: save parameters that need no gradient too. False for LoRA: the base model comes from
            where it came from at the start.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 2, asynchronous: bool = True, frozen: bool = True
    ):
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1")
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self.frozen = frozen
        # A group of its own: the thread's collectives must not mix with the training's.
        self.ranks = ranks().apart(timedelta(hours=2))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._stager: DefaultStager | None = None

    def steps(self) -> list[int]:
        """The steps of the checkpoints in place, ascending."""
        return files.complete_steps(self.folder)

    def save(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], state: RunState
    ) -> None:
        """Save the run at `state.step`. Collective; first waits for the save before.

        Raises:
            CheckpointError: that one failed, or, if synchronous, this one.
        """
        self.wait()
        tensors, encoded, error = {}, ("", {}), None
        try:
            tensors = model_tensors(model, self.frozen)
            optimizer_part, rest = optimizer_tensors(model, _sequence(optimizer))
            tensors |= optimizer_part
            own = {"random": random_state(), "rollouts": state.rollouts}
            if self.ranks.first:
                own |= {"shared": state.shared(), "optimizers": rest}
            encoded = encode(own)
            if self.asynchronous:
                tensors = self._stage(tensors)
        except Exception as caught:
            error = caught
        if self.asynchronous:
            self._pending = self._thread.submit(self._write, state.step, tensors, encoded, error)
        else:
            self._write(state.step, tensors, encoded, error)

    def _stage(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A copy on the host, in buffers that every save uses again."""
        if self._stager is None:
            cuda = torch.cuda.is_available()
            self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        return self._stager.stage(tensors)

    def _write(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        state: tuple[str, dict[str, torch.Tensor]],
        error: Exception | None,  # what went wrong on this rank so far: all ranks hear of it
    ) -> None:
        temporary = self.folder / f"{files.folder_name(step)}.tmp"
        planner, what = DefaultSavePlanner(flatten_state_dict=False), f"saving step {step} failed"

        def plan() -> SavePlan:
            if error is not None:
                raise error
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            planner.set_up_planner(tensors, is_coordinator=self.ranks.first)
            return planner.create_local_plan()

        def write() -> tuple[list[SavePlan], dict[str, dict]]:
            own, _ = planner.create_global_plan(plans)  # without what another rank writes too
            items = own[self.ranks.rank].items
            pieces = {storage.piece_key(item): planner.resolve_data(item) for item in items}
            return own, storage.write_rank(temporary, self.ranks.rank, state, pieces)

        def publish() -> None:
            if self.ranks.first:
                storage.publish(temporary, step, plans, listed)
                files.prune(self.folder, self.keep)

        try:
            plans = self.ranks.gather(together(self.ranks, what, plan))
            plans, own = together(self.ranks, what, write)
            listed = dict(collections.ChainMap(*self.ranks.gather(own)))
            together(self.ranks, what, publish)
        except CheckpointError as failed:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            kept = self.steps()
            rest = f"the checkpoint of step {kept[-1]} is in place" if kept else "there is no other"
            raise CheckpointError(f"{failed}; {rest}") from failed.__cause__

    def wait(self) -> None:
        """Wait for the save under way; raises its error, on every rank."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], step: int | None = None
    ) -> RunState | None:
        """Load a checkpoint in place and return its state; None if there is none. Collective.

        The newest by default; where it is damaged that is printed and the one before is taken.
        Later ones are set aside, and removed by the next save. Random numbers are restored too, so
        call this last. With another number of ranks than at the save, rollouts in flight are
        distributed over them in order, and a new rank's random numbers are seeded from rank 0's.

        Raises:
            CheckpointError: all are damaged, or `step`'s is; or one is of another format.
        """
        self.wait()
        folder = self._choose(step)
        if folder is None:
            return None

        def load() -> RunState:
            metadata = storage.read_index(folder)
            first = decode(*storage.read_rank(folder, 0))
            rest = first["optimizers"]
            templates = optimizer_templates(model, rest, metadata.state_dict_metadata)
            tensors = model_tensors(model, self.frozen) | templates
            storage.read_tensors(folder, metadata, tensors)
            load_optimizers(model, _sequence(optimizer), rest, templates)
            return self._own_state(folder, first)

        def set_later_aside() -> None:
            later = [other for other in self.steps() if other > state.step]
            if later and self.ranks.first:
                files.set_aside(self.folder, later)
                print(f"checkpoint: set aside those of the later steps {later}", flush=True)

        state = together(self.ranks, f"{folder} cannot be loaded", load)
        together(self.ranks, str(self.folder), set_later_aside)
        return state

    def close(self) -> None:
        """Wait for the save under way and free the staging buffers."""
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
            if self.ranks.first:
                files.recover(self.folder)
            return self.steps()

        steps = self.ranks.gather(together(self.ranks, str(self.folder), scan))[0]
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
            if self.ranks.first:
                print(f"checkpoint: step {candidate} is damaged: {'; '.join(found)}", flush=True)
        if problems:
            raise CheckpointError(f"{self.folder}: nothing to resume from: {'; '.join(problems)}")
        return None

    def _damages(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint; every rank checks its share of the files."""
        found, other = [], None
        try:
            listed = files.read_manifest(folder)["files"]
            names = sorted(listed)[self.ranks.rank :: self.ranks.world]
            found = files.damages(folder, names, listed)
        except OtherFormat as error:
            other = str(error)
        except CheckpointError as error:
            found = [str(error)]
        answers = self.ranks.gather((found, other))
        if others := [text for _, text in answers if text]:
            raise OtherFormat(others[0])  # an older one in its place would cost its steps
        return sorted({text for part, _ in answers for text in part})

    def _own_state(self, folder: Path, first: dict) -> RunState:
        """This rank's state out of the rank files of a run with any number of ranks."""
        world, rank = files.read_manifest(folder)["world_size"], self.ranks.rank
        needed = [rank] if world == self.ranks.world else range(world)
        saved = {r: decode(*storage.read_rank(folder, r)) if r else first for r in needed}
        if rank in saved:
            set_random_state(saved[rank]["random"])
        else:
            fork_random_state(first["random"], rank)
        rollouts = [entry for part in saved.values() for entry in part["rollouts"]]
        if world != self.ranks.world:
            rollouts = share(rollouts, rank, self.ranks.world)
        return RunState(**first["shared"], rollouts=rollouts)


def _sequence(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
