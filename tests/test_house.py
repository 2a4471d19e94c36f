"""Who may import whom, read off the syntax tree; what `import dgrpo` loads; how long a file is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only from lines below; names on one line ignore each other.
LAYERS = """
    cli
    trainer
    training
    evaluation
    rollout teacher served data rewards checkpoint metrics report
    fsdp
    policy batch
    config attention
    head packed
    ops
    objectives dgrpo_kernels
"""
LEVEL = {name: i for i, line in enumerate(LAYERS.split("\n")) for name in line.split()}
HEAVY = {"transformers", "pydantic", "datasets", "peft", "matplotlib", "rich", "yaml", "trl"}
FORBIDDEN = {  # part: (top-level packages, or dotted modules) that it never imports
    "dgrpo_kernels": {"torch.distributed", "torch.autograd", "torch.nn", *HEAVY},
    **{part: HEAVY for part in ("head", "ops", "objectives", "testing", "__init__")},
}


def part_of(module: str) -> str | None:
    """The part of the library that a dotted module belongs to, None for other people's."""
    top, _, rest = module.partition(".")
    return top if top == "dgrpo_kernels" else rest.split(".")[0] or None if top == "dgrpo" else None


def imports(tree: ast.AST) -> set[str]:
    """Every module and every `module.name` that a syntax tree imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(part: str, source: str, file: str = "module") -> list[str]:
    """What a module of `part` imports although it may not."""
    bad = []
    for module in sorted(imports(ast.parse(source, file))):
        other = part_of(module)
        above = LEVEL.get(other, -1) <= LEVEL.get(part, -1) and other != part and other in LEVEL
        if part in LEVEL and above:
            bad.append(f"{part} imports {module}")
        if part == "testing" and module.split(".")[0] in ("dgrpo", "dgrpo_kernels"):
            bad += [f"testing imports {module}"] if other != "testing" else []
        if any(module == name or module.startswith(name + ".") for name in FORBIDDEN.get(part, ())):
            bad.append(f"{part} imports {module}")
    return bad


def sources() -> list[tuple[str, Path]]:
    """Every module of the library with its part."""
    library, kernels = ROOT / "dgrpo", ROOT / "kernels" / "dgrpo_kernels"
    return [("dgrpo_kernels", path) for path in sorted(kernels.rglob("*.py"))] + [
        (path.relative_to(library).parts[0].removesuffix(".py"), path)
        for path in sorted(library.rglob("*.py"))
    ]


def test_imports_point_downwards():
    assert not [
        f"{p}: {v}" for part, p in sources() for v in violations(part, p.read_text(), str(p))
    ]


def test_every_part_has_its_place():
    placed = {*LEVEL, "testing", "__init__", "__main__"}
    assert not {part for part, _ in sources()} - placed, "add the new part to LAYERS"


@pytest.mark.parametrize(
    "part, source",
    [
        ("ops", "import dgrpo.head"),
        ("ops", "from dgrpo import head"),
        ("objectives", "def f():\n    from dgrpo.ops.sweep import sweep"),
        ("rollout", "import dgrpo.trainer.teachers.local"),
        ("dgrpo_kernels", "from torch import distributed"),
        ("head", "from transformers import PreTrainedModel"),
        ("testing", "from dgrpo.ops import sweep"),
    ],
)
def test_a_wrong_import_is_found(part, source):
    assert violations(part, source)


def test_right_imports_pass():
    assert not violations("head", "import torch\nfrom dgrpo.ops import sweep, head")
    assert not violations("testing", "from dgrpo.testing.oracle import oracle")


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


def test_files_are_short():
    folders = ("dgrpo", "kernels", "bench", "tests", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert not {name: length for name, length in lengths.items() if length > 350}
