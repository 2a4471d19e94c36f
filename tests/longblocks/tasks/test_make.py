"""The files of `dgrpo data make`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from dgrpo.data import PromptStream, Source, load_rows
from dgrpo.longblocks.tasks.catalog import TASKS, MakeSettings
from dgrpo.longblocks.tasks.make import make
from dgrpo.trainer.config import Data


def quiet(settings):
    return make(settings, log=lambda line: None, show=False)


@pytest.fixture
def settings(tmp_path, haystack):
    def build(name="out", **changes):
        base = {"tasks": ("relations", "quoting", "report"), "count": 12, "tokens": (9000,)}
        base |= {"haystack": haystack, "out": str(tmp_path / name)}
        base |= {"file_tokens": 36_000}  # 4 rows a file
        return MakeSettings(**base | changes)

    return build


def test_files_hold_the_rows_with_the_columns_of_longblocks(settings):
    result = quiet(settings())
    assert result.rows == 12 and len(result.files) == 3 and not result.report.counts
    rows = load_rows(settings().out)
    columns = ["id", "document", "source", "language", "question", "answer", "response_reference"]
    assert list(rows[0])[:7] == columns
    assert [row["task"] for row in rows][:3] == ["relations", "quoting", "report"]
    assert len({row["id"] for row in rows}) == 12
    assert rows[2]["points"] and rows[1]["passages"] and rows[0]["aliases"]


def test_processes_make_the_same_files(settings):
    one = quiet(settings("one"))
    two = quiet(settings("two", processes=2))
    assert len(one.files) == len(two.files) == 3
    for a, b in zip(one.files, two.files, strict=True):
        assert pyarrow.parquet.read_table(a).equals(pyarrow.parquet.read_table(b))


def test_an_interrupted_run_goes_on(settings):
    whole = quiet(settings("whole"))
    quiet(settings())
    files = sorted(path for path in whole.files)
    before = [pyarrow.parquet.read_table(f) for f in files]
    files[1].unlink()
    (files[1].parent / "part-00001.parquet.tmp").write_bytes(b"half a file")
    kept = files[0].stat().st_mtime_ns
    again = quiet(settings("whole"))
    assert files[0].stat().st_mtime_ns == kept and again.rows == 12
    assert all(a.equals(pyarrow.parquet.read_table(f)) for a, f in zip(before, files, strict=True))


def test_a_folder_of_other_settings_raises(settings):
    quiet(settings(count=3))
    with pytest.raises(ValueError, match="holds data of other settings"):
        quiet(settings(count=3, seed=1))
    assert quiet(settings(count=3, processes=2)).rows == 3


def test_rows_that_cannot_be_made_are_reported_and_counted(settings):
    lines = []
    result = make(
        settings(tasks=("superseded", "relations"), tokens=(1300,)), log=lines.append, show=False
    )
    failed = result.report.counts["cannot be made"]
    assert 0 < failed < 12 and result.rows == 12 - failed
    problems = (result.files[0].parent / ".make/problems.jsonl").read_text().splitlines()
    assert len(problems) == failed and "row " in json.loads(problems[0])["where"]
    summary = json.loads((result.files[0].parent / ".make/summary.json").read_text())
    assert summary["rows"] == result.rows and summary["dropped"]["cannot be made"] == failed
    again = quiet(settings(tasks=("superseded", "relations"), tokens=(1300,)))
    assert again.report.counts == result.report.counts and again.rows == result.rows


def test_text_without_python_takes_code_from_the_standard_library(settings, tmp_path, monkeypatch):
    from dgrpo.longblocks.tasks import haystack as module

    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("A line of some words that fill the page.\n" * 400)
    files = module.text_files(settings().haystack)
    monkeypatch.setattr(
        module, "text_files", lambda f=None, s=(): files if f is None else [folder / "a.txt"]
    )
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": settings().haystack})
    lines = []
    wanted = settings(haystack=str(folder), tasks=("definition", "relations"), count=4)
    result = make(wanted, log=lines.append, show=False)
    assert result.rows == 4 and any("standard library" in line for line in lines)
    rows = load_rows(wanted.out)
    assert "def " in rows[0]["document"] and "fill the page" in rows[1]["document"]


def test_the_trainer_reads_them(settings, tokenizer):
    quiet(settings())
    data = Data(sources=[Source(path=settings().out)])
    prompts = PromptStream(data, tokenizer, require_completion=True)
    found = prompts.batch(12)
    assert len(found) == 12 and prompts.report.dropped == 0
    assert all(p.columns["reward"].startswith("dgrpo.rewards:") for p in found)


def test_all_means_every_task(tmp_path):
    assert MakeSettings(out="x").named == tuple(TASKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("riddles",)}, "tasks: got .'riddles'"),
        ({"split": "dev"}, "split: got 'dev'"),
        ({"count": 0}, "count: got 0"),
        ({"tokens": (100,)}, "tokens: got"),
    ],
)
def test_wrong_settings(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.slow
def test_a_thousand_tasks_of_32k_tokens_in_five_minutes(tmp_path, tokenizer):
    import time

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    start = time.time()
    result = quiet(
        MakeSettings(
            out=str(tmp_path / "out"),
            tokenizer=str(tmp_path / "tokenizer"),
            count=1000,
            processes=2,
        )
    )
    assert result.rows == 1000 and time.time() - start < 300


LONG = """
import resource, sys
import torch
from dgrpo.trainer.batch import Sample, pack
from dgrpo.trainer.config import Data
from dgrpo.data import PromptStream, Source
from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.longblocks.tasks.make import make
from dgrpo.longblocks.tasks.catalog import MakeSettings

tokenizer = train_tokenizer(1024, 0)
tokenizer.save_pretrained(sys.argv[1] + "/tokenizer")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
settings = MakeSettings(
    out=sys.argv[1] + "/out", tokenizer=sys.argv[1] + "/tokenizer",
    tasks=("relations", "quoting"), tokens=(2**20,), count=4,
)
make(settings, log=lambda line: None, show=False)
data = Data(sources=[Source(path=settings.out)], max_prompt_tokens=2**20)
prompts = PromptStream(data, tokenizer)
found = prompts.batch(4)
assert len(found) == 4 and all(len(p.ids) > 1_000_000 for p in found), prompts.report.lines()
samples = [
    Sample(
        prompt_ids=p.ids, completion_ids=p.completion_ids,
        advantages=torch.ones(len(p.completion_ids)),
        loss_mask=torch.ones(len(p.completion_ids), dtype=torch.bool),
        token_weights=torch.ones(len(p.completion_ids)),
    )
    for p in found
]
micros = pack(samples, 2**20 + 4096)
assert len(micros) == 4
for micro in micros:
    prompt = found[micro.indices[0]].ids
    assert torch.equal(micro.input_ids[0, : len(prompt)], prompt)
print(peak() - before)
"""


@pytest.mark.slow
def test_a_million_tokens_pass_in_bounded_memory(tmp_path):
    root = Path(__file__).parents[3]
    paths = {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    run = subprocess.run(
        [sys.executable, "-c", LONG, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | paths,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.split()[-1]) < 1000, run.stdout  # MiB
