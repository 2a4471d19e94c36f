"""Three products, each with its doors: who may import whom, and how large each may grow.

Each rule is a function of source text, so that it has a case that must fail.
"""

import re
import sys
import tomllib
from typing import NamedTuple

import pytest

from tests.house import ROOT, circle, imports, lines, mentions, modules


class Product(NamedTuple):
    most: int  # lines of Python
    places: tuple[str, ...]
    doors: tuple[str, ...]  # the modules that the other products import


PRODUCTS = {
    "the loss": Product(
        6400,
        (
            "kernels",
            "dgrpo/__init__.py",
            "dgrpo/ops",
            "dgrpo/objectives",
            "dgrpo/head.py",
            "dgrpo/distributed.py",
            "dgrpo/testing",
        ),
        ("dgrpo", "dgrpo.ops", "dgrpo.head", "dgrpo.objectives", "dgrpo.distributed"),
    ),
    "the trainer": Product(
        10300,
        (
            "dgrpo/trainer",
            "dgrpo/data",
            "dgrpo/text",
            "dgrpo/endpoint.py",
            "dgrpo/extras.py",
            "dgrpo/cli.py",
        ),
        ("dgrpo.trainer", "dgrpo.trainer.config", "dgrpo.data"),
    ),
    "LongBlocks": Product(
        4700,
        ("dgrpo/longblocks", "dgrpo/rewards.py"),
        (
            "dgrpo.longblocks.tasks",
            "dgrpo.longblocks.rewards",
            "dgrpo.longblocks.rewards.runner",
            "dgrpo.longblocks.evaluation",
            "dgrpo.longblocks.dataset",
        ),
    ),
}
# A module imports only from lines below; names on one line ignore each other. A name stands for all
# below it that has no line of its own: `trainer` for collect, update, build, record, ...
LAYERS = """
    cli integrations
    trainer.loop longblocks.evaluation longblocks.dataset
    trainer
    trainer.rollout trainer.teachers trainer.checkpoint trainer.metrics trainer.report
    trainer.policy
    trainer.batch data longblocks.tasks longblocks.rewards
    trainer.attention trainer.config endpoint text
    head
    ops
    objectives dgrpo_kernels distributed extras
"""
LEVEL = {name: i for i, line in enumerate(LAYERS.split("\n")) for name in line.split()}
PACKAGES = {"testing", "rewards", "longblocks", "dgrpo", "dgrpo.trainer"}  # of no layer
LOSS = {"head", "ops", "objectives", "testing", "distributed", "extras", "dgrpo", "dgrpo_kernels"}
FREE = {"torch", "triton", "dgrpo", "dgrpo_kernels", *sys.stdlib_module_names}  # for the loss
KERNELS_WITHOUT = ("torch.distributed", "torch.autograd", "torch.nn")
SHARED = {"cli", "text", "endpoint", "extras"}  # counted with the trainer, but open to all
# Names that other distributions install, and packages that only some settings need.
INSTALLS = {"yaml": "pyyaml", "pydantic_core": "pydantic", "tokenizers": "transformers"}
OPTIONAL = {"liger_kernel", "lm_eval", "langdetect", "wandb", "flash_attn", "vllm"}


def part_of(module: str) -> str | None:
    """The part of the library that a dotted module belongs to, None for other people's."""
    if module in ("dgrpo", "dgrpo.trainer"):
        return module
    top, _, rest = module.partition(".")
    if top != "dgrpo":
        return top if top == "dgrpo_kernels" else None
    names = rest.split(".")
    known = [".".join(names[:n]) for n in range(len(names), 0, -1)]
    return next((name for name in known if name in LEVEL), names[0])


def product_of(module: str) -> str | None:
    """The product whose places hold a module. None for what is shared, and for other people's."""
    path = modules().get(module)
    if path is None or part_of(module) in SHARED:
        return None
    return next(
        name
        for name, product in PRODUCTS.items()
        if any(path.is_relative_to(ROOT / place) for place in product.places)
    )


def violations(part: str, source: str) -> list[str]:
    """What a module of `part` imports although it may not."""
    bad = []
    for module in sorted(imports(source)):
        top, other = module.split(".")[0], part_of(module)
        above = LEVEL.get(other, -1) <= LEVEL.get(part, -1) and other != part and other in LEVEL
        wrong = [
            part in LEVEL and above,
            part == "testing" and top in ("dgrpo", "dgrpo_kernels") and other != part,
            part in LOSS and top not in FREE,
            part == "dgrpo_kernels" and module.startswith(KERNELS_WITHOUT),
        ]
        if any(wrong):
            bad.append(f"{part} imports {module}")
    return bad


def behind_doors(product: str | None, source: str) -> set[str]:
    """The modules of other products that a module of `product` imports past their doors."""
    if product is None:
        return set()
    doors = {door for other in PRODUCTS.values() for door in other.doors}
    others = {m for m in imports(source) & set(modules()) if product_of(m) not in (product, None)}
    return others - doors


def sources() -> dict[str, str]:
    return {module: path.read_text() for module, path in modules().items()}


def test_imports_point_downwards():
    found = [v for module, text in sources().items() for v in violations(part_of(module), text)]
    assert not found


def test_every_part_has_its_place():
    assert {part_of(m) for m in modules()} <= {*LEVEL, *PACKAGES}, "add the new part to LAYERS"


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
        ("endpoint", "from dgrpo.text import BadRow"),
        ("dgrpo_kernels", "from torch import distributed"),
        ("head", "from transformers import PreTrainedModel"),
        ("objectives", "import numpy"),
        ("testing", "from dgrpo.ops import sweep"),
    ],
)
def test_a_wrong_import_is_found(part, source):
    assert violations(part, source)


def test_right_imports_pass():
    assert not violations("head", "import torch\nfrom dgrpo.ops import sweep, head")
    assert not violations("testing", "from dgrpo.testing.oracle import oracle")


def test_a_product_is_entered_by_its_doors():
    found = [behind_doors(product_of(module), text) for module, text in sources().items()]
    assert not set().union(*found)


def test_an_import_past_a_door_is_found():
    source = "from dgrpo.ops.sweep import sweep\nfrom dgrpo.head import FusedHead"
    assert behind_doors("the trainer", source) == {"dgrpo.ops.sweep"}
    assert not behind_doors("the loss", source)


def test_imports_form_no_circle():
    assert not circle(sources())


def test_a_circle_is_found():
    apart = {"a": "import b", "b": "def f():\n    from c import g", "c": "", "d": "import a"}
    assert not circle(apart)
    assert set(circle(apart | {"c": "from a import h"})) == {"a", "b", "c"}
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"
    assert not circle(apart | {"c": typed})


def distributions(sources: list[str]) -> set[str]:
    """What has to be installed for these sources, without what is optional."""
    tops = {name.split(".")[0] for source in sources for name in imports(source)}
    tops -= {*OPTIONAL, *sys.stdlib_module_names, "dgrpo", "dgrpo_kernels"}
    return {INSTALLS.get(top, top.replace("_", "-")) for top in tops}


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = (project["dependencies"], project["optional-dependencies"]["train"])
    loss, train = ({re.match(r"[\w-]+", line)[0] for line in group} for group in wanted)
    assert loss == {"torch", "triton"}
    assert distributions(list(sources().values())) == loss | train


def test_an_undeclared_package_is_found():
    source = "import os, yaml\ndef f():\n    from math_verify.grader import verify"
    assert distributions([source, "import vllm"]) == {"pyyaml", "math-verify"}


def too_large(product: Product, root=ROOT) -> bool:
    return sum(lines(*product.places, root=root).values()) > product.most


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_keeps_its_size(product):
    assert not too_large(product)
    assert too_large(product._replace(most=int(product.most * 0.8))), "lower the limit"


def test_a_product_that_grows_is_found(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops/a.py").write_text("x = 1\n" * 10)
    (tmp_path / "head.py").write_text("x = 1\n" * 5)
    product = Product(15, ("ops", "head.py"), ())
    assert not too_large(product, tmp_path)
    (tmp_path / "ops/b.py").write_text("x = 1\n")
    assert too_large(product, tmp_path)


def long_files(*places: str, root=ROOT) -> dict[str, int]:
    return {name: length for name, length in lines(*places, root=root).items() if length > 300}


def test_files_are_short():
    assert not long_files("dgrpo", "kernels", "bench", "tests", "examples")


def test_a_long_file_is_found(tmp_path):
    for length in (300, 301):
        (tmp_path / f"of_{length}.py").write_text("x = 1\n" * length)
    assert long_files(".", root=tmp_path) == {"of_301.py": 301}


RANKS = ("get_rank", "get_world_size", "get_global_rank", "get_group_rank", "get_node_local_rank")


def test_ranks_are_known_in_one_place():
    asking = {module for module, text in sources().items() if mentions(text, *RANKS)}
    assert asking == {"dgrpo.distributed"}


def test_records_of_the_loss_stay_whole():
    loss = {m: text for m, text in sources().items() if product_of(m) == "the loss"}
    assert not {m for m, text in loss.items() if mentions(text, "vars", "asdict")}


def test_a_mention_is_found():
    for source in ("dist.get_rank()", "from torch.distributed import get_rank", "f = get_rank"):
        assert mentions(source, *RANKS)
    assert mentions("f(**vars(options))", "vars")
    assert not mentions("'get_rank'; variables = ranks.rank()", *RANKS, "vars")
