"""An environment with torch and triton alone, as `pip install dgrpo` makes it without extras."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# Finders that know the standard library, the packages in `names`, and nothing else.
HIDE = """
import sys, warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's, where numpy is missing
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in names or top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if known else None
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def required(*names: str) -> set[str]:
    """The installed distributions that `names` require, themselves included, without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        wanted = map(Requirement, metadata.requires(name) or ())
        waiting += [r.name for r in wanted if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def packages(distributions: set[str]) -> set[str]:
    """The top-level names that these distributions install."""
    places = metadata.packages_distributions().items()
    normal = {top: {re.sub(r"[-_.]+", "-", name).lower() for name in of} for top, of in places}
    return {top for top, of in normal.items() if of & distributions}


def run_alone(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh process that finds torch, triton and their requirements alone."""
    names = packages(required("torch", "triton")) | {"dgrpo", "dgrpo_kernels"}
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    script = f"names = {names!r}\n{HIDE}\n{code}"
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)


def python_blocks(document: Path) -> list[str]:
    """The Python blocks of a Markdown file, in their order."""
    return re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
