"""Rows from every kind of place, the unreadable ones reported."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dgrpo.data import load_rows
from dgrpo.data.row_stream import RowStream
from dgrpo.text import BadRow, Report


def make_rows(n=5, start=0):
    return [{"id": f"r{i}", "x": i} for i in range(start, start + n)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows, group=2):
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def provided(n):
    return make_rows(n)


def test_jsonl_and_parquet_give_the_same_rows(tmp_path):
    a = load_rows(write_jsonl(tmp_path / "a.jsonl", make_rows()))
    b = load_rows(write_parquet(tmp_path / "a.parquet", make_rows()))
    assert list(a) == list(b) == make_rows()
    assert a[-1] == make_rows()[-1] and a[1:3] == make_rows()[1:3]


def test_a_last_line_without_its_end_counts(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"x": 1}\n{"x": 2}')
    assert [row["x"] for row in load_rows(file)] == [1, 2]


def test_a_folder_is_all_its_files_in_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", make_rows(2, 3))
    write_parquet(tmp_path / "a.parquet", make_rows(3))
    assert [row["x"] for row in load_rows(tmp_path)] == [0, 1, 2, 3, 4]
    assert load_rows(str(tmp_path / "*.jsonl")).where(1).endswith("b.jsonl:2")


def test_json_a_saved_dataset_and_a_function(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": make_rows()}))
    assert list(load_rows(tmp_path / "a.json")) == make_rows()
    datasets.Dataset.from_list(make_rows()).save_to_disk(tmp_path / "saved")
    assert list(load_rows(tmp_path / "saved")) == make_rows()
    assert list(load_rows("json:loads", options={"s": '[{"x": 1}]'})) == [{"x": 1}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{", "bad JSON"), ("[1]", "not an object"), ("", "bad JSON"), ("\xff", "bad JSON")],
)
def test_a_bad_line_is_one_bad_row_with_its_place(tmp_path, line, reason):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"x": 0}\n' + line.encode("latin1") + b'\n{"x": 2}\n')
    rows = load_rows(file)
    assert len(rows) == 3 and rows[2] == {"x": 2}
    with pytest.raises(BadRow, match=f"a.jsonl:2: {reason}"):
        rows[1]


def test_an_unreadable_file_is_counted_and_the_others_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", make_rows())
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    report = Report(log=lambda line: None)
    assert len(load_rows(tmp_path, report=report)) == 5
    assert report.counts == {"unreadable file": 1}
    assert "b.parquet" in report.examples["unreadable file"][0]


def test_nothing_readable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_rows(tmp_path / "none.jsonl")
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 files"):
        load_rows(tmp_path / "b.parquet", report=Report(log=lambda line: None))


def test_columns_are_renamed_and_missing_ones_are_bad_rows(tmp_path):
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", [{"q": 1}, {"r": 2}]), columns={"x": "q"})
    assert rows[0] == {"x": 1}
    with pytest.raises(BadRow, match="missing column"):
        rows[1]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 9])
def test_a_stream_goes_on_where_it_stood(tmp_path, kind, stop):
    write = write_jsonl if kind == "jsonl" else write_parquet
    for i in range(3):
        write(tmp_path / f"{i}.{kind}", make_rows(3, 3 * i))
    whole = [row["x"] for _, row in RowStream(tmp_path, seed=1)]
    assert sorted(whole) == list(range(9))
    first = RowStream(tmp_path, seed=1)
    taken = [row["x"] for _, (_, row) in zip(range(stop), first, strict=False)]
    state = json.loads(json.dumps(first.state()))
    assert taken + [row["x"] for _, row in RowStream(tmp_path, seed=1, state=state)] == whole


def test_a_stream_orders_files_by_seed_and_epoch(tmp_path):
    for i in range(6):
        write_jsonl(tmp_path / f"{i}.jsonl", make_rows(1, i))
    orders = {
        tuple(row["x"] for _, row in RowStream(tmp_path, seed=s, epoch=e))
        for s in (0, 1)
        for e in (0, 1)
    }
    assert len(orders) > 1


def test_a_stream_reports_bad_rows_and_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 0}\n{\n')
    (tmp_path / "b.parquet").write_bytes(b"nonsense")
    report = Report(log=lambda line: None)
    found = [row for _, row in RowStream(tmp_path, report=report)]
    assert found[0] == {"x": 0} and isinstance(found[1], BadRow)
    assert report.counts == {"unreadable file": 1}


def test_report_tells_the_first_of_each_kind_and_keeps_all_in_a_file(tmp_path):
    lines = []
    report = Report(log=lines.append, path=tmp_path / "dropped.jsonl")
    for i in range(120):
        report.drop(BadRow("too long", f"{i} tokens"), f"file:{i}")
    assert [int(line.split("number ")[1].split()[0]) for line in lines] == [1, 2, 3, 10, 100]
    assert report.dropped == 120 and "120 too long" in report.summary()
    assert len((tmp_path / "dropped.jsonl").read_text().splitlines()) == 120


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset "org/name" that is three local files."""
    for i in range(3):
        write_parquet(tmp_path / f"{i}.parquet", make_rows(3, 3 * i))
    real = datasets.load_dataset

    def load_dataset(name, split, streaming=False):
        assert (name, split) == ("org/name", "train")
        files = sorted(str(file) for file in tmp_path.glob("*.parquet"))
        return real("parquet", data_files=files, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    return "org/name"


def test_the_hub_as_a_whole(hub):
    assert list(load_rows(hub)) == make_rows(9)


@pytest.mark.parametrize("stop", [0, 2, 3, 7])
def test_the_hub_as_a_stream_goes_on_where_it_stood(hub, stop):
    whole = [row["x"] for _, row in RowStream(hub, seed=3)]
    assert sorted(whole) == list(range(9))
    first = RowStream(hub, seed=3)
    iterator = iter(first)
    taken = [next(iterator)[1]["x"] for _ in range(stop)]
    state = json.loads(json.dumps(first.state()))
    assert taken + [row["x"] for _, row in RowStream(hub, seed=3, state=state)] == whole


# Tables of text


def test_csv_and_tsv_cells_are_text_and_empty_ones_null(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbf"id",prompt,answer\r\n'
        b'1,"two\nlines, ""quoted""",007\r\n'
        b"\r\n"
        b"2,NA,\r\n"
        b"3,short\r\n" + '4,naïve 5" pipe,1e3'.encode()
    )
    expected = [
        {"id": "1", "prompt": 'two\nlines, "quoted"', "answer": "007"},
        {"id": "2", "prompt": "NA", "answer": None},
        {"id": "3", "prompt": "short", "answer": None},
        {"id": "4", "prompt": 'naïve 5" pipe', "answer": "1e3"},
    ]
    rows = load_rows(tmp_path / "a.csv")
    assert list(rows) == expected
    assert [rows.where(i).rpartition(":")[2] for i in range(4)] == ["2", "5", "6", "7"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.tsv").write_text("prompt\tanswer\na, b\t1\n")
    assert list(load_rows(tmp_path / "b")) == [{"prompt": "a, b", "answer": "1"}]


def test_a_long_cell_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(f'document,answer\n"{"words, " * 100_000}",x\n')
    (row,) = load_rows(tmp_path / "a.csv")
    assert len(row["document"]) == 700_000


def test_a_bad_line_of_csv_is_one_bad_row_with_its_place(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'x,y\n1,2\n1,2,3\n\xff,2\n5,6\x0c\n7,"8\n9,')
    rows = load_rows(tmp_path / "a.csv")
    assert len(rows) == 5 and rows[0]["x"] == "1" and rows[3]["y"] == "6\x0c"
    with pytest.raises(BadRow, match="a.csv:6: bad CSV .*unexpected end of data"):
        rows[4]
    with pytest.raises(BadRow, match=r"a.csv:3: bad CSV \(3 cells, the header has 2\)"):
        rows[1]
    with pytest.raises(BadRow, match="a.csv:4: bad CSV .*utf-8"):
        rows[2]


@pytest.mark.parametrize("text", ["", "\n\n", "x,y\r1,2\r"])
def test_a_csv_without_a_header_is_unreadable(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(ValueError, match="none of the 1 files"):
        load_rows(tmp_path / "a.csv", report=Report(log=lambda line: None))


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_csv_is_streamed_from_where_it_stood(tmp_path, stop):
    for i in range(2):
        text = "".join(f'"{3 * i + j}"\n' for j in range(3))
        (tmp_path / f"{i}.csv").write_text("x\n" + text)
    whole = [row["x"] for _, row in RowStream(tmp_path, seed=1)]
    assert sorted(whole) == list("012345")
    first = RowStream(tmp_path, seed=1)
    taken = [row["x"] for _, (_, row) in zip(range(stop), first, strict=False)]
    state = json.loads(json.dumps(first.state()))
    assert taken + [row["x"] for _, row in RowStream(tmp_path, seed=1, state=state)] == whole
