"""The library's source as syntax trees: its modules, what each imports, and what each calls."""

import ast
import graphlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def modules(root: Path = ROOT) -> dict[str, Path]:
    """The file of each module of `dgrpo` and `dgrpo_kernels`, by dotted name."""
    found = {}
    for folder in (root, root / "kernels"):
        for path in sorted(folder.glob("dgrpo*/**/*.py")):
            dotted = ".".join(path.relative_to(folder).with_suffix("").parts)
            found[dotted.removesuffix(".__init__")] = path
    return found


def imports(source: str) -> set[str]:
    """Every module and every `module.name` that a source imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def needs(source: str, known: set[str]) -> set[str]:
    """The `known` modules that a source needs to run; imports for type checkers do not count.

    `from package import name` needs the module `package.name` where there is one, else `package`.
    """
    found = set()
    for node in _without_type_checking(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known
            found |= {node.module} if names - known else set()
    return found & known


def _without_type_checking(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _without_type_checking(child)


def circle(sources: dict[str, str]) -> list[str]:
    """The modules of one import circle, in order; empty if there is none."""
    graph = {name: needs(source, set(sources)) - {name} for name, source in sources.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def mentions(source: str, *names: str) -> bool:
    """Whether a source uses one of `names`, bare, as an attribute or imported."""
    for node in ast.walk(ast.parse(source)):
        used = (
            getattr(node, "id", None) if isinstance(node, ast.Name)
            else node.attr if isinstance(node, ast.Attribute)
            else node.name if isinstance(node, ast.alias)
            else None
        )  # fmt: skip
        if used in names:
            return True
    return False


def lines(*places: str, root: Path = ROOT) -> dict[str, int]:
    """The number of lines of each Python file in these files and folders, by relative path."""
    found = {}
    for place in places:
        path = root / place
        assert path.exists(), place
        for file in [path] if path.is_file() else path.rglob("*.py"):
            found[str(file.relative_to(root))] = len(file.read_text().splitlines())
    return found
