"""The public dataset, on small files of exactly its schema."""

import pyarrow
import pyarrow.parquet
import pytest

from dgrpo.data import PromptStream, Source
from dgrpo.longblocks.dataset import Books, load_longblocks
from dgrpo.longblocks.tasks import train_tokenizer
from dgrpo.text import Report
from dgrpo.trainer.config import Data

MODELS = ("Qwen3-Next-80B-A3B", "Qwen3.5-27B", "Nemotron-3-Nano-30B-A3B")


def row(i, document="A text. <|end|>", **changes):
    base = {
        "id": f"book-{i}",
        "document": document,
        "source": "institutional-books" if document is None else "wikipedia",
        "language": "en",
        "question": f"Question {i}?",
        "answer": f"Answer {i}.",
    }
    return base | {f"response_{m}": f"{m} says {i}" for m in MODELS} | changes


SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in row(0)])


@pytest.fixture
def folder(tmp_path):
    """Two files, 4 of 7 rows without a document, as Institutional Books is shipped."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [row(i, None if i % 2 == 0 else f"Text {i}. <|end|>") for i in range(7)]
    for n, part in enumerate((rows[:4], rows[4:])):
        table = pyarrow.Table.from_pylist(part, schema=SCHEMA)
        pyarrow.parquet.write_table(table, data / f"train-0000{n}-of-00002.parquet")
    return data


def quiet():
    return Report(log=lambda line: None)


def test_rows_without_a_document_are_dropped_counted_and_explained(folder):
    lines = []
    report = Report(log=lines.append)
    found = list(load_longblocks(folder, report=report))
    assert sorted(r["id"] for r in found) == ["book-1", "book-3", "book-5"]
    assert report.counts == {"document is null": 4} and report.kept == 3
    assert any("Institutional Books" in line and "books=FOLDER" in line for line in lines)
    assert lines[-1] == "3 rows kept, 4 dropped: 4 document is null"


def test_books_are_joined_from_text_files(folder, tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    (books / "book-0.txt").write_text("The text of book 0")
    (books / "book-2.txt").write_bytes(b"\xff\xfe")
    report = quiet()
    found = {r["id"]: r["document"] for r in load_longblocks(folder, books=books, report=report)}
    assert found["book-0"] == "The text of book 0" and len(found) == 4
    assert report.counts == {"document is null": 2, "unreadable book": 1}


def test_books_are_joined_from_parquet_files_by_page(folder, tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    rows = [
        {"barcode_src": f"book-{i}", "text_by_page_gen": [f"p{i}", None, "end"]} for i in (4, 6)
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), books / "a.parquet", row_group_size=1
    )
    (books / "b.parquet").write_bytes(b"nonsense")
    report = quiet()
    found = {r["id"]: r["document"] for r in load_longblocks(folder, books=books, report=report)}
    assert found["book-6"] == "p6\n\nend" and found["book-4"] == "p4\n\nend"
    assert report.counts == {"document is null": 2, "unreadable file": 1}


@pytest.mark.parametrize("identifier", ["HX1", "HX1_q3", "institutional-books/HX1", "ib:HX1#2"])
def test_identifiers_are_found_inside_ids(tmp_path, identifier):
    (tmp_path / "HX1.txt").write_text("text")
    joined = Books(tmp_path).join({"id": identifier, "document": None})
    assert joined["document"] == "text"


def test_a_folder_without_books_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no book"):
        Books(tmp_path)


def test_a_generators_response_becomes_the_completion(folder):
    found = list(load_longblocks(folder, response="Qwen3.5-27B", report=quiet()))
    assert found[0]["completion"].startswith("Qwen3.5-27B says")
    with pytest.raises(ValueError, match=r"got 'GPT', the data has response_Nemotron"):
        list(load_longblocks(folder, response="GPT", report=quiet()))


def test_lengths_are_those_of_the_models_tokenizer(tmp_path):
    tokenizer = train_tokenizer(300, 0)
    rows = [row(0, "12345"), row(1, "1" * 50), row(2, "1" * 500)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "a.parquet"
    )
    report = quiet()
    limits = {"tokenizer": tokenizer, "min_tokens": 10, "max_tokens": 100, "report": report}
    assert [r["tokens"] for r in load_longblocks(tmp_path, **limits)] == [50]
    assert report.counts == {"too short": 1, "too long": 1}
    with pytest.raises(ValueError, match="tokenizer: got None"):
        list(load_longblocks(tmp_path, min_tokens=1))


@pytest.mark.parametrize("column", ["question", "answer"])
def test_rows_without_question_or_answer_are_counted(tmp_path, column):
    rows = [row(0), row(1, **{column: None}), row(2, **{column: ""})]
    table = pyarrow.Table.from_pylist(rows, schema=SCHEMA)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    report = quiet()
    assert len(list(load_longblocks(tmp_path, report=report))) == 1
    assert report.counts == {f"{column} is empty or not text": 2}


def test_other_data_is_told_by_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": "1"}]), tmp_path / "a.parquet")
    report = quiet()
    assert list(load_longblocks(tmp_path, report=report)) == []
    assert report.counts == {"missing column": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_trainer_reads_it_as_a_source(folder, tmp_path, streaming):
    tokenizer = train_tokenizer(300, 0)
    books = tmp_path / "books"
    books.mkdir()
    (books / "book-0.txt").write_text("The text of book 0")
    source = Source(
        path=str(folder),
        streaming=streaming,
        books=str(books),
        completion="response_Qwen3.5-27B",
    )
    prompts = PromptStream(Data(sources=[source]), tokenizer, log=lambda line: None)
    found = prompts.batch(10)
    assert len(found) == 4 and prompts.report.counts == {"document is null": 3}
    assert all(p.completion.startswith("Qwen3.5-27B") for p in found)
    assert all(tokenizer.eos_token_id not in p.ids for p in found)  # "<|end|>" in the text
