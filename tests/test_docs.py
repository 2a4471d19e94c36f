"""What README, docs and examples name is there: files, modules, names, commands of make, links."""

import re

import pytest

from tests.house import ROOT, modules

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.yaml")),
]
FOLDERS = "dgrpo|kernels|tests|bench|examples|docs"


def missing(text: str, page=ROOT / "README.md") -> set[str]:
    """The files, modules, names and targets in `text` that do not exist."""
    paths = set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]*[\w*]", text))
    names = set(re.findall(r"(?<![\w./:@-])dgrpo(?:_kernels)?(?:\.\w+)+", text))
    tests = set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", text))
    links = {link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link}
    targets = set(re.findall(r"(?:^    |`)make ([a-z][a-z-]*)", text, re.MULTILINE))
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return {
        *(path for path in paths if not any(ROOT.glob(path))),
        *(name for name in names if not _exists(name)),
        *(test for path, test in tests if not _holds(path, f"def {test}(")),
        *(link for link in links if not (page.parent / link).exists()),
        *(f"make {target}" for target in targets - made),
    }


def _holds(path: str, text: str) -> bool:
    return (ROOT / path).exists() and text in (ROOT / path).read_text()


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module mentions."""
    module, _, rest = name.rpartition(".")
    known = modules()
    if name in known:
        return True
    return module in known and bool(re.search(rf"\b{rest}\b", known[module].read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    assert not missing(page.read_text(), page)


@pytest.mark.parametrize(
    "text",
    [
        "see `dgrpo/training/steps.py`",
        "`dgrpo.config.load` reads it",
        "call dgrpo.linear_dgrpo_los",
        "[data](docs/date.md)",
        "tests/ops/test_swep.py proves it",
        "`make tests`",
        "tests/test_docs.py::test_what_is_gone",
    ],
)
def test_what_is_gone_is_found(text):
    assert missing(text)


def test_what_exists_passes():
    text = "`dgrpo/ops`, `dgrpo.linear_dgrpo_loss`, [data](docs/data.md), `make test`, tests/*/*.py"
    assert not missing(text)
