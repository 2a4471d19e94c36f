"""Wheel and editable install, each in a venv of its own.

The venvs borrow what they need from the environment that runs the tests: one torch, triton and what
these two require, the others all of it. Only Hugging Face's package `kernels` and the setuptools of
the build are downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from dgrpo.trainer.report.page import SCRIPTS
from tests.alone import ROOT, python_blocks, required

pytestmark = pytest.mark.slow

USE = """
import torch, transformers, dgrpo, dgrpo_kernels
from transformers import Qwen3Config, Qwen3ForCausalLM
model = Qwen3ForCausalLM(Qwen3Config(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8))
tokens = torch.arange(8)[None]
hidden = model.model(tokens).last_hidden_state
out = dgrpo.linear_dgrpo_loss(hidden, model.lm_head.weight, tokens, torch.ones(1, 8))
out.loss.backward()
assert model.lm_head.weight.grad.isfinite().all() and model.lm_head.weight.grad.abs().sum() > 0
print(dgrpo.__file__, dgrpo_kernels.__file__)
"""
BESIDE = "import kernels\nassert kernels.__file__ and hasattr(kernels, 'get_kernel'), kernels"


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command without this session's Python paths; its output, or a failure that shows it."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is packaged, so that no build artefacts land in the repository."""
    copy = tmp_path_factory.mktemp("tree") / "dgrpo"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("dgrpo", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, tree, cwd=out)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture
def environment(tmp_path):
    """The folder of commands of a new venv that borrows the packages of this one."""
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin"


def test_wheel_holds_every_module_and_nothing_else(wheel, tree):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {
        str(path.relative_to(root))
        for root in (tree, tree / "kernels")
        for package in ("dgrpo", "dgrpo_kernels")
        for path in (root / package).rglob("*.py")
    }
    page = {f"dgrpo/trainer/report/{name}" for name in ("page.html", "page.css", *SCRIPTS)}
    assert packed - modules == {"dgrpo/py.typed", "dgrpo_kernels/py.typed", *page}
    assert modules <= packed and "dgrpo/ops/__init__.py" in packed
    assert "dgrpo_kernels/row_stats.py" in packed


@pytest.fixture
def loss_only(tmp_path):
    """The folder of commands of a new venv with torch, triton and what they require, by link."""
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    for name in required("torch", "triton"):
        files = metadata.distribution(name).files
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(metadata.distribution(name).locate_file(top))
    return tmp_path / "venv" / "bin"


def test_wheel_without_extras_needs_torch_and_triton_alone(wheel, loss_only, tmp_path):
    # --no-index: a requirement that the venv lacks fails the installation.
    call(loss_only / "pip", "install", "--no-index", wheel, cwd=tmp_path)
    (tmp_path / "readme.py").write_text("\n".join(python_blocks(ROOT / "README.md")))
    call(loss_only / "python", "readme.py", cwd=tmp_path)
    place = call(loss_only / "python", "-c", "import dgrpo; print(dgrpo.__file__)", cwd=tmp_path)
    assert place.startswith(str(loss_only.parent))
    for package in ("numpy", "transformers"):
        with pytest.raises(AssertionError, match=f"No module named '{package}'"):
            call(loss_only / "python", "-c", f"import {package}", cwd=tmp_path)
    with pytest.raises(AssertionError, match=r"pip install 'dgrpo\[train\]'") as failed:
        call(loss_only / "dgrpo", "--help", cwd=tmp_path)
    assert "Traceback" not in str(failed.value)
    with pytest.raises(AssertionError, match="No matching distribution found for"):
        call(loss_only / "pip", "install", "--no-index", f"{wheel}[train]", cwd=tmp_path)


def test_wheel_works_beside_hugging_face_kernels(wheel, environment, tmp_path):
    call(environment / "pip", "install", "--no-deps", wheel, "kernels", cwd=tmp_path)
    places = call(environment / "python", "-c", BESIDE + USE, cwd=tmp_path)
    assert places.count(str(environment.parent)) == 2, "the library did not come from the wheel"
    assert "usage" in call(environment / "dgrpo", "--help", cwd=tmp_path).lower()


def test_editable_works_with_and_without_hugging_face_kernels(tree, environment, tmp_path):
    call(environment / "pip", "install", "--no-deps", "-e", tree, cwd=tmp_path)
    for folder in (tmp_path, tree):  # in the tree, the folder kernels/ is on the path too
        places = call(environment / "python", "-c", USE, cwd=folder)
        assert places.count(str(tree)) == 2, "the library did not come from the tree"
    call(environment / "pip", "install", "--no-deps", "kernels", cwd=tmp_path)
    for folder in (tmp_path, tree):
        call(environment / "python", "-c", BESIDE + USE, cwd=folder)
