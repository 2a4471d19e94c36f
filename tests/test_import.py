"""What importing the library loads, in a fresh process."""

import subprocess
import sys

from tests.house import ROOT

HEAVY = {"transformers", "pydantic", "datasets", "peft", "matplotlib", "rich", "yaml", "trl"}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that are loaded after `statement` in a fresh process."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    run = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_the_library_loads_torch_alone():
    assert "torch" not in loaded_by("import dgrpo"), "until a loss is asked for"
    ours = loaded_by("from dgrpo import linear_loss") - loaded_by("import torch")
    assert "dgrpo" in ours
    assert not ours & {*HEAVY, "triton", "accelerate", "safetensors", "tensorboard"}, ours


def test_the_command_line_loads_what_a_command_needs():
    """`dgrpo train` speaks before it imports torch."""
    code = "import dgrpo.cli; dgrpo.cli.parser('train')"
    assert not loaded_by(code) & {"torch", "numpy", *(HEAVY - {"pydantic", "yaml"})}


def test_the_package_gives_what_it_names_and_no_more():
    code = (
        "import dgrpo; assert all(hasattr(dgrpo, name) for name in dgrpo.__all__)\n"
        "assert dgrpo.ops.linear_loss is dgrpo.linear_loss and dgrpo.objectives\n"
        "assert not hasattr(dgrpo, 'linear_lost')"
    )
    assert "torch" in loaded_by(code)
