"""Files that differ in a column: which are named. How footers are read, test_bad_files.py says."""

from __future__ import annotations

import pyarrow as pa
import pytest

from denoise_batch.errors import ColumnError
from denoise_batch.inference.footers import Footer, check_type


def _footer(**types: pa.DataType) -> Footer:
    return Footer(pa.schema(types.items()).serialize().to_pybytes(), (1,), 784)


EMPTY = _footer(image=pa.null())
BINARY = _footer(image=pa.binary(784))
OTHER = _footer(picture=pa.binary(784))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([BINARY, EMPTY], "in a.parquet, but b.parquet has it of type null"),
        ([EMPTY, BINARY], "in b.parquet, but a.parquet has it of type null"),
        ([OTHER, BINARY, BINARY], "in b.parquet, but a.parquet has no such column"),
        ([BINARY, BINARY, OTHER, EMPTY], "in a.parquet, but c.parquet has no such column"),
    ],
)
def test_the_file_that_differs_is_named_after_one_that_fits(found: list[Footer], said: str) -> None:
    paths = [f"{name}.parquet" for name in "abcd"[: len(found)]]
    with pytest.raises(ColumnError) as caught:
        check_type(paths, found, "image", pa.binary(784))
    assert caught.value.message == f"column 'image' is fixed_size_binary[784] {said}"


def test_files_of_one_type_pass() -> None:
    check_type(["a", "b"], [BINARY, BINARY], "image", pa.binary(784))
