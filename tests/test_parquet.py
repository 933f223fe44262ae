"""Batches of Parquet files that others have written, in row groups of any size."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovlm_hf import InputError
from nanovlm_hf.data import parquet
from nanovlm_hf.data.parquet import ROWS_PER_GROUP, read_batches
from nanovlm_hf.data.rows import load

ROWS = [{"image": {"bytes": b"x" * (number % 7), "path": None}, "texts": [f"a {number}", "b"]} for number in range(700)]


def write(path, rows_of_groups):
    table = pa.Table.from_pylist(ROWS)
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        for count in rows_of_groups:
            writer.write_table(table.slice(start, count))
            start += count
    return path


@pytest.mark.parametrize("groups", [(700,), (100,) * 7, (84, 84, 84, 448), (256, 256, 188), (1, 699)], ids=str)
@pytest.mark.parametrize("columns", [None, ["texts"]])
def test_row_groups_of_any_size_are_read(tmp_path, groups, columns):
    with write(tmp_path / "a.parquet", groups).open("rb") as file:
        batches = list(read_batches(file, "a.parquet", columns))
    assert max(batch.num_rows for batch in batches) <= ROWS_PER_GROUP
    read = [row for batch in batches for row in batch.to_pylist()]
    assert read == ([{"texts": row["texts"]} for row in ROWS] if columns else ROWS)


def test_the_values_of_a_column_are_counted_in_all_groups(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", (100,) * 7)
    monkeypatch.setattr(parquet, "MAX_VALUES", 1399)
    with path.open("rb") as file, pytest.raises(InputError, match=r"a\.parquet: holds more than 1,399 values"):
        list(read_batches(file, "a.parquet"))
    monkeypatch.setattr(parquet, "MAX_VALUES", 1400)
    with path.open("rb") as file:
        assert sum(batch.num_rows for batch in read_batches(file, "a.parquet")) == 700


@pytest.mark.parametrize("column", ["description", "captions"])
def test_a_small_file_that_expands_is_refused(tmp_path, monkeypatch, column):
    """Equal values are stored once."""
    monkeypatch.setattr(parquet, "MAX_BATCH_BYTES", 2**22)
    (tmp_path / "short").mkdir()
    for number, text in ((1, "A dog."), (2, "A dog. " * 10_000)):
        rows = {"image_id": range(1000), "description": ["A dog."] * 1000, "captions": [["A dog."]] * 1000}
        rows[column] = [text if column == "description" else [text]] * 1000
        pq.write_table(pa.table(rows), tmp_path / "short" / f"train-{number}.parquet")
        path = tmp_path / "short" / f"train-{number}.parquet"
        with path.open("rb") as file:
            if number == 1:
                parquet.check_expansion(file, path)
            else:
                with pytest.raises(InputError, match="expands to many times its size"):
                    parquet.check_expansion(file, path)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: short\n  data_files: short/train-2.parquet\n---\n"
    )
    with pytest.raises(InputError, match=r"train-2\.parquet: expands to many times its size"):
        load(str(tmp_path), "short")


def test_a_table_without_rows_has_no_batches(tmp_path):
    with write(tmp_path / "a.parquet", ()).open("rb") as file:
        assert list(read_batches(file, "a.parquet")) == []
