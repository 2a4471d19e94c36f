"""Who may import whom, read off the syntax tree; what `import dgrpo` loads; how long a file is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only from lines below; names on one line ignore each other. A name stands for all
# below it that has no line of its own: `trainer` for collect, update, build, record, ...
LAYERS = """
    cli integrations
    trainer.loop longblocks.evaluation longblocks.dataset
    trainer
    trainer.rollout trainer.teachers trainer.checkpoint trainer.metrics trainer.report
    trainer.policy trainer.batch data longblocks.tasks longblocks.rewards
    trainer.attention trainer.config endpoint text
    head
    ops
    objectives dgrpo_kernels distributed
"""
LEVEL = {name: i for i, line in enumerate(LAYERS.split("\n")) for name in line.split()}
DOORS = {"testing", "rewards", "longblocks", "__init__"}  # the others that stand in dgrpo/
# What each product may grow to, in lines of Python.
SIZES = {
    "the loss": (
        5700,
        ("kernels", "dgrpo/ops", "dgrpo/objectives", "dgrpo/testing", "dgrpo/head.py"),
    ),
    "the trainer": (11400, ("dgrpo/trainer", "dgrpo/data", "dgrpo/text", "dgrpo/cli.py")),
    "LongBlocks": (5900, ("dgrpo/longblocks",)),
}
HEAVY = {"transformers", "pydantic", "datasets", "peft", "matplotlib", "rich", "yaml", "trl"}
LOSS = ("head", "ops", "objectives", "testing", "distributed", "__init__")
FORBIDDEN = {  # part: (top-level packages, or dotted modules) that it never imports
    "dgrpo_kernels": {"torch.distributed", "torch.autograd", "torch.nn", *HEAVY},
    **{part: HEAVY for part in LOSS},
}


def part_of(module: str) -> str | None:
    """The part of the library that a dotted module belongs to, None for other people's."""
    top, _, rest = module.partition(".")
    if top != "dgrpo":
        return top if top == "dgrpo_kernels" else None
    names = rest.split(".")
    known = [".".join(names[:n]) for n in range(len(names), 0, -1)]
    return next((name for name in known if name in LEVEL), names[0] or None)


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
    found = []
    for folder in (ROOT, ROOT / "kernels"):
        for path in sorted(folder.glob("dgrpo*/**/*.py")):
            dotted = ".".join(path.relative_to(folder).with_suffix("").parts)
            door = dotted in ("dgrpo.__init__", "dgrpo.trainer.__init__")
            part = "__init__" if door else part_of(dotted.removesuffix(".__init__"))
            found.append((part, path))
    return found


def test_imports_point_downwards():
    assert not [
        f"{p}: {v}" for part, p in sources() for v in violations(part, p.read_text(), str(p))
    ]


def test_every_part_has_its_place():
    assert not {part for part, _ in sources()} - {*LEVEL, *DOORS}, "add the new part to LAYERS"


@pytest.mark.parametrize("product", SIZES)
def test_a_product_keeps_its_size(product):
    most, places = SIZES[product]
    paths = [
        p
        for place in places
        for p in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    ]
    lines = sum(len(path.read_text().splitlines()) for path in paths)
    assert 0.5 * most < lines <= most


@pytest.mark.parametrize(
    "part, source",
    [
        ("ops", "import dgrpo.head"),
        ("ops", "from dgrpo import head"),
        ("objectives", "def f():\n    from dgrpo.ops.sweep import sweep"),
        ("trainer.rollout", "import dgrpo.trainer.teachers"),
        ("trainer.config", "from dgrpo.trainer import run"),
        ("trainer", "from dgrpo.trainer.loop import train"),
        ("longblocks.tasks", "from dgrpo.data import Source"),
        ("data", "import dgrpo.longblocks.rewards"),
        ("text", "import dgrpo.endpoint"),
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
