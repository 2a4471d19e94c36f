"""Without extras: the loss works, and everything else names the extra that it lacks."""

import sys

import pytest

from dgrpo.extras import MissingExtra, require
from tests.alone import ROOT, python_blocks, run_alone

LOSS = ("dgrpo", "dgrpo.head", "dgrpo.objectives", "dgrpo.testing", "dgrpo.distributed")
# What imports packages of the extra, and what the message says is missing.
NEEDY = {
    "dgrpo.trainer": "dgrpo.trainer: got no transformers, datasets, peft, ",
    "dgrpo.trainer.config": "dgrpo.trainer: got no transformers, datasets, peft, ",
    "dgrpo.data": "dgrpo.data: got no numpy, datasets, ",
    "dgrpo.longblocks.tasks": "dgrpo.longblocks.tasks: got no numpy, transformers, datasets, ",
    "dgrpo.longblocks.evaluation": "dgrpo.longblocks.evaluation: got no numpy, ",
    "dgrpo.longblocks.dataset": "dgrpo.data: got no numpy, datasets, ",
}
COMMANDS = (
    ["--help"],
    ["train", "run.yaml"],
    ["eval", "model", "--tasks", "all"],
    ["generate", "model"],
    ["report", "run"],
    ["data", "make", "out"],
)


@pytest.mark.parametrize("document", ["README.md", "docs/objectives.md"])
def test_documented_losses_run_with_torch_and_triton_alone(document):
    blocks = python_blocks(ROOT / document)
    assert blocks and "dgrpo" in "".join(blocks)
    done = run_alone("\n".join(blocks))
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_loss_imports_with_torch_and_triton_alone():
    done = run_alone("\n".join(f"import {module}" for module in (*LOSS, "dgrpo.rewards")))
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_rest_is_really_hidden():
    for package in ("numpy", "transformers", "pydantic", "yaml"):
        done = run_alone(f"import {package}")
        assert f"No module named '{package}'" in done.stderr, package


def test_what_needs_the_extra_says_so():
    done = run_alone(f"""
import importlib
for module in {tuple(NEEDY)}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(module, error, sep="|")
""")
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert [module for module, _ in lines] == list(NEEDY), done.stderr
    for module, message in lines:
        assert message.startswith(NEEDY[module])
        assert message.endswith("expected the extra `train`; pip install 'dgrpo[train]'")


def test_the_command_says_so_in_one_line():
    done = run_alone(f"""
from dgrpo.cli import main
print([main(arguments) for arguments in {COMMANDS}])
""")
    assert done.stdout.split("\n")[0] == str([2] * len(COMMANDS)), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(COMMANDS)
    for line in lines:
        assert line.startswith("error: dgrpo.") and line.endswith("pip install 'dgrpo[train]'")


def test_what_is_there_is_not_reported():
    require("dgrpo.trainer", "torch")
    with pytest.raises(MissingExtra, match="dgrpo.trainer: got no no_such_package, expected"):
        require("dgrpo.trainer", "torch", "no_such_package")


def test_a_blocked_package_is_missing(monkeypatch):
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name == "colorsys":
                raise ModuleNotFoundError("No module named 'colorsys'")

    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(MissingExtra, match="here: got no colorsys, expected the extra `train`"):
        require("here", "colorsys")
