"""No failure costs the checkpoint before, and each says what is wrong with which file."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dgrpo.trainer.checkpoint import Checkpointer, CheckpointError, RunState
from tests.trainer.checkpoint.runs import (
    Tiny,
    assert_same,
    disk_of,
    everything,
    make,
    saved_at,
    step_folder,
    train,
)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("tensors-00000.safetensors", truncate, "bytes, expected"),
        ("tensors-00000.safetensors", flip, "do not match their checksum"),
        ("rank-00000.safetensors", os.unlink, "missing"),
        ("index.json", truncate, "bytes, expected"),
        ("manifest.json", truncate, "unreadable"),
        ("manifest.json", os.unlink, "unreadable"),
    ],
    ids=["truncated", "altered", "rank missing", "index", "manifest", "no manifest"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_loads(
    tmp_path, capsys, name, damage, says
):
    held = saved_at(tmp_path, 1, 2)
    path = step_folder(tmp_path, 2) / name
    damage(path)
    model, optimizer = make(seed=8)
    assert Checkpointer(tmp_path).restore(model, optimizer).step == 1
    out = capsys.readouterr().out
    assert str(path) in out and says in out and "step 2 is damaged" in out
    assert_same(everything(model, optimizer), held[1])

    damage(step_folder(tmp_path, 1) / name)
    with pytest.raises(CheckpointError, match="nothing to resume from") as error:
        Checkpointer(tmp_path).restore(model, optimizer)
    assert str(step_folder(tmp_path, 1) / name) in str(error.value)


def test_a_damaged_one_that_was_asked_for_is_an_error(tmp_path):
    saved_at(tmp_path, 1, 2)
    truncate(step_folder(tmp_path, 2) / "tensors-00000.safetensors")
    with pytest.raises(CheckpointError, match="tensors-00000.safetensors: .* bytes, expected"):
        Checkpointer(tmp_path).restore(*make(), step=2)
    with pytest.raises(CheckpointError, match=r"no step 7, expected one of \[1, 2\]"):
        Checkpointer(tmp_path).restore(*make(), step=7)


def other_format(folder, step, **changes):
    path = step_folder(folder, step) / "manifest.json"
    manifest = {**json.loads(path.read_text()), "format": 99, **changes}
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value}))


@pytest.mark.parametrize("changes", [{}, {"files": None, "world_size": None}])
def test_another_format_says_so_and_loses_no_step(tmp_path, capsys, changes):
    """Going on from the one before would set the newer one aside, and remove it."""
    saved_at(tmp_path, 1, 2)
    other_format(tmp_path, 2, **changes)
    checkpointer = Checkpointer(tmp_path)
    for step in (None, 2):
        with pytest.raises(CheckpointError, match="format 99, this version of dgrpo reads") as e:
            checkpointer.restore(*make(), step=step)
        assert f"{step_folder(tmp_path, 2)}: " in str(e.value) and "damaged" not in str(e.value)
    assert "damaged" not in capsys.readouterr().out
    assert checkpointer.steps() == [1, 2]
    assert checkpointer.restore(*make(), step=1).step == 1


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_a_full_disk_is_an_error_and_the_one_before_loads(tmp_path, asynchronous):
    held = saved_at(tmp_path, 1)
    model, optimizer = make()
    train(model, optimizer, 2)
    checkpointer = Checkpointer(tmp_path, keep=1, asynchronous=asynchronous)
    with disk_of(700), pytest.raises(CheckpointError) as error:
        checkpointer.save(model, optimizer, RunState(step=2))
        checkpointer.wait()
    text = str(error.value)
    assert "step-00000002.tmp/rank-00000.safetensors" in text and "cannot write" in text
    assert "the checkpoint of step 1 is in place" in text
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    checkpointer.wait()  # said once
    other, its_optimizer = make(seed=3)
    assert checkpointer.restore(other, its_optimizer).step == 1
    assert_same(everything(other, its_optimizer), held[1])
    checkpointer.save(other, its_optimizer, RunState(step=2))  # there is room again
    checkpointer.close()
    assert checkpointer.steps() == [2]


def test_state_of_another_type_is_refused_by_its_path(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=r"state.shared.data.order: got set, expected dict"):
        checkpointer.save(*make(), RunState(data={"order": {1, 2}}))
        checkpointer.wait()


def test_another_model_is_refused_by_name(tmp_path):
    saved_at(tmp_path, 1)
    model, optimizer = make()
    wider = Tiny()
    wider.body = nn.Linear(6, 7)
    with pytest.raises(
        CheckpointError, match=r"mismatch .*\[6, 6\].* and current: .*\[7, 6\].* model.body.weight"
    ):
        Checkpointer(tmp_path).restore(wider, torch.optim.SGD(wider.parameters()))
    wider.body, wider.extra = nn.Linear(6, 6), nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointError, match="Missing key in .*: model.extra.weight"):
        Checkpointer(tmp_path).restore(wider, torch.optim.SGD(wider.parameters()))
    with pytest.raises(CheckpointError, match="parameter group 0 lacks body.bias"):
        Checkpointer(tmp_path).restore(
            model, torch.optim.AdamW([model.embed.weight, model.body.weight])
        )


KILLED_SAVE = """
import os, sys, zlib
from pathlib import Path
import shutil
from safetensors.torch import save_file
from dgrpo.trainer.checkpoint import RunState
from tests.trainer.checkpoint.runs import Checkpointer, everything, make, train

class Countdown:
    left = 0
def watch(module, name):
    call = getattr(module, name)
    def counted(*args, **kwargs):
        Countdown.left -= 1
        if Countdown.left == 0:
            os._exit(9)
        return call(*args, **kwargs)
    setattr(module, name, counted)
for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"),
                     (zlib, "crc32"), (Path, "open")):
    watch(module, name)

source, work = Path(sys.argv[1]), Path(sys.argv[2])
model, optimizer = make(seed=1)
train(model, optimizer, 3)
save_file(everything(model, optimizer), work.with_suffix(".safetensors"))
for kill_at in range(1, 200):
    shutil.copytree(source, work / str(kill_at))
    child = os.fork()
    if child == 0:
        Countdown.left = kill_at
        checkpointer = Checkpointer(work / str(kill_at), keep=1, asynchronous=False)
        checkpointer.save(model, optimizer, RunState(step=3, skipped=1))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
else:
    raise SystemExit("never finished")
"""


def test_killed_at_any_point_of_a_save_the_old_or_the_new_one_is_whole(tmp_path):
    """The process dies before each of its file-system calls in turn, also over an older step 3."""
    source, work = tmp_path / "source", tmp_path / "work"
    held = saved_at(source, 2, 3)
    run_python(KILLED_SAVE, str(source), str(work))
    new = load_file(work.with_suffix(".safetensors"))
    folders = sorted(work.iterdir(), key=lambda path: int(path.name))
    assert len(folders) > 15
    found = []
    for folder in folders:
        model, optimizer = make(seed=7)
        state = Checkpointer(folder).restore(model, optimizer)
        is_new = state.skipped == 1
        found.append((state.step, is_new))
        assert_same(everything(model, optimizer), new if is_new else held[state.step])
    assert found == sorted(found, key=lambda at: at[1])  # once the new one is there, it stays
    assert found[0] == (3, False) and found[-1] == (3, True)
    assert (2, False) not in found


def run_python(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
