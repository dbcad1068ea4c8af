"""Bad files that planning finds and names, all at once, before Ray starts; and odd ones that simply work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_files import LAYOUTS, ROWS, encrypted, images, parquet, planned, run_units, table
from pyarrow import feather, orc

from denoise_batch.errors import ParquetError
from denoise_batch.images import Polarity, decode
from denoise_batch.images.layouts import output_column
from denoise_batch.inference.ledger import Receipt
from denoise_batch.parquet import footers

if TYPE_CHECKING:
    from collections.abc import Callable


def _orc(path: Path) -> None:
    orc.write_table(table().select(["id"]), path)


def _damaged_footer(path: Path) -> None:
    whole = parquet(table())
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    path.write_bytes(whole[:start] + bytes(60) + whole[start + 60 :])


def _longer_than_the_file(path: Path) -> None:
    whole = parquet(table())
    path.write_bytes(whole[:-8] + (1 << 31 - 1).to_bytes(4, "little") + whole[-4:])


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty (0 bytes)"),
    "truncated at 3": (lambda path: path.write_bytes(parquet(table())[:3]), "it is cut off after 3 bytes"),
    "truncated at 12": (lambda path: path.write_bytes(parquet(table())[:12]), "it is cut off after 12 bytes"),
    "truncated half-way": (
        lambda path: path.write_bytes(parquet(table())[: 1 << 12]),
        "it is cut off after 4,096 bytes",
    ),
    "truncated by a byte": (lambda path: path.write_bytes(parquet(table())[:-1]), "the footer at its end is missing"),
    "head lost": (lambda path: path.write_bytes(parquet(table())[-200:]), "its beginning is missing"),
    "damaged footer": (_damaged_footer, "thrift"),
    "footer longer than file": (_longer_than_the_file, "smaller than the size reported by footer"),
    "encrypted": (lambda path: encrypted(path, plaintext_footer=False), "it is encrypted"),
    "encrypted columns": (lambda path: encrypted(path, plaintext_footer=True), "it is encrypted"),
    "text": (lambda path: path.write_text("not Parquet at all\n" * 20), "it is no Parquet file"),
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500)), "it is no Parquet file"),
    "orc": (_orc, "it is no Parquet file"),
    "feather": (lambda path: feather.write_feather(table().select(["id"]), path), "it is no Parquet file"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_file_is_named_with_its_fault(tmp_path: Path, kind: str) -> None:
    make, reason = UNREADABLE[kind]
    for name in ("a", "c"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(table()))
    make(tmp_path / "b.parquet")
    with pytest.raises(ParquetError) as error:
        planned(tmp_path)
    assert error.value.message.startswith(f"1 file is not readable as Parquet: {tmp_path / 'b.parquet'}: ")
    assert reason in error.value.message
    assert error.value.hint == "repair them, or take them out of the input"
    assert "\n" not in error.value.message


def test_a_path_that_is_not_utf8_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"in\xff.parquet")
    path.write_bytes(parquet(table()))
    said = f"{path}: its path is not UTF-8, and PyArrow opens no other"
    with pytest.raises(ParquetError) as error:
        planned(path)
    assert error.value.message == f"1 file is not readable as Parquet: {said}"
    assert error.value.hint == footers.RENAME
    (tmp_path / "b.parquet").write_bytes(b"x")
    with pytest.raises(ParquetError, match="2 of 2 files") as error:
        planned(tmp_path)
    assert said in error.value.message
    assert error.value.hint == f"repair them, or take them out of the input; {footers.RENAME}"


def test_all_are_named_at_once_and_the_command_ends_with_2_before_ray(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        (folder / f"good{number}.parquet").write_bytes(parquet(table()))
    for kind, (make, _) in UNREADABLE.items():
        make(folder / f"{kind}.parquet")
    (folder / "also.parquet").write_bytes(parquet(table().drop_columns("word")))
    script = (
        "import sys; from denoise_batch import cli; code = cli.run(sys.argv[1:])\nprint('ray' in sys.modules, code)"
    )
    command = [sys.executable, "-c", script, "infer", str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "2"]
    error, hint = done.stderr.splitlines()
    assert f"{len(UNREADABLE)} of {len(UNREADABLE) + 5} files are not readable" in error
    assert all(f"{kind}.parquet: " in error for kind in UNREADABLE)
    assert "also.parquet (column 'word' is missing)" in error
    assert "good1" not in error
    assert hint.startswith("hint: repair them")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("odd", [0, 57])
def test_a_column_that_one_of_a_hundred_lacks(tmp_path: Path, odd: int) -> None:
    whole, lacking = parquet(table()), parquet(table().drop_columns("tags"))
    for number in range(100):
        (tmp_path / f"{number:03d}.parquet").write_bytes(lacking if number == odd else whole)
    with pytest.raises(ParquetError) as error:
        planned(tmp_path)
    assert error.value.message.startswith("1 of 100 files differs in the columns from ")
    assert error.value.message.endswith(f"{odd:03d}.parquet (column 'tags' is missing)")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.set_column(0, "id", t["id"].cast(pa.int32())), "column 'id' is int32, not int64"),
        (lambda t: t.select(["word", "id", "tags", "yes", "image"]), "its columns stand in another order"),
        (
            lambda t: t.set_column(1, pa.field("word", pa.large_string()), t["word"].cast("large_string")).set_column(
                3, "yes", t["yes"].cast(pa.int8())
            ),
            "column 'yes' is int8, not bool",  # the words' type makes no difference
        ),
        (lambda t: t.rename_columns(["id", "Word", "tags", "yes", "image"]), "column 'word' is missing"),
    ],
)
def test_schemas_that_differ(tmp_path: Path, change: Any, said: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(table()))
    (tmp_path / "c.parquet").write_bytes(parquet(change(table())))
    with pytest.raises(ParquetError) as error:
        planned(tmp_path)
    assert error.value.message.endswith(f"c.parquet ({said})")


@pytest.mark.parametrize("folder", ["k=..", "k=.", "=v", "k=a\\..\\b"])
def test_partition_folders_that_lead_elsewhere(tmp_path: Path, folder: str) -> None:
    (tmp_path / "in" / "x" / folder).mkdir(parents=True)
    (tmp_path / "in" / "x" / folder / "a.parquet").write_bytes(parquet(table()))
    with pytest.raises(ParquetError, match="is not safe") as error:
        planned(tmp_path / "in")
    assert error.value.hint == "rename the folder"


@pytest.mark.slow
def test_a_thousand_damaged_footers_are_each_answered(tmp_path: Path) -> None:
    """Some crash pyarrow (it aborts on footers whose parts disagree): in a child, not here."""
    rng = np.random.default_rng(0)
    bases = [parquet(table(20, *layout), row_group_size=10) for layout in LAYOUTS]
    paths = []
    for number in range(1000):
        content = bytearray(bases[number % len(bases)])
        end = len(content) - 8
        start = end - int.from_bytes(content[end : end + 4], "little")
        at = int(rng.integers(start, end))
        if number % 3 == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif number % 3 == 1:  # a huge number
            content[at : min(at + 5, end)] = b"\xff\xff\xff\xff\x7f"[: end - at]
        else:  # some bytes lost
            del content[at : min(at + 9, end)]
            content[-8:-4] = (len(content) - 8 - start).to_bytes(4, "little")
        paths.append(str(tmp_path / f"{number}.parquet"))
        Path(paths[-1]).write_bytes(content)
    found = footers.read_footers(paths, 1)
    refused = [answer.reason for answer in found if isinstance(answer, footers.Unreadable)]
    assert len(found) == 1000
    assert len(refused) > 500
    assert not any("\n" in reason or "did not answer" in reason for reason in refused)


def test_a_file_that_asks_for_all_memory_is_refused_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import denoise_batch.parquet.footers as f\nimport pyarrow as pa\n"
        "f._read_footer = lambda path: pa.allocate_buffer(64 << 30)\nf._main()\n"
    )
    start = subprocess.Popen
    monkeypatch.setattr(
        footers.subprocess, "Popen", lambda command, **options: start([command[0], str(script)], **options)
    )
    (found,) = footers.read_footers([str(tmp_path / "a.parquet")], 1)
    assert isinstance(found, footers.Unreadable)
    assert "malloc of size 68719476736 failed" in found.reason


def test_a_first_page_that_cannot_be_read_is_said_rather_than_guessed_around(tmp_path: Path) -> None:
    content = table().select(["image"])
    whole = bytearray(parquet(content, compression="none", use_dictionary=False, data_page_size=1 << 20))
    whole[9000] ^= 1
    (tmp_path / "a.parquet").write_bytes(whole)
    with pytest.raises(ParquetError, match=r"a\.parquet, row group 0: .*checksum") as error:
        planned(tmp_path / "a.parquet", polarity=Polarity.AUTO)
    assert "none of the 1 row groups looked at can be read" in error.value.message


# --- must simply work -------------------------------------------------------------------------------------------------


def test_no_rows_and_no_row_groups(tmp_path: Path) -> None:
    pq.ParquetWriter(tmp_path / "none.parquet", table().schema).close()
    pq.write_table(table().slice(0, 0), tmp_path / "empty.parquet")
    assert pq.read_metadata(tmp_path / "none.parquet").num_row_groups == 0
    for path in tmp_path.glob("*.parquet"):
        made = planned(path, polarity=Polarity.AUTO)
        assert (made.rows, len(made)) == (0, 0)
    (tmp_path / "some.parquet").write_bytes(parquet(table()))
    made = planned(tmp_path)
    assert (made.rows, len(made)) == (ROWS, 1)


@pytest.mark.slow
def test_twenty_thousand_row_groups_of_one_row(tmp_path: Path) -> None:
    path, content = tmp_path / "a.parquet", pa.table({"image": images(20_000)})
    pq.write_table(content, path, row_group_size=1)
    made = planned(path)
    assert made.units["rows"].tolist() == [16_384, 20_000 - 16_384]
    answers, targets = zip(*run_units(path, made), strict=True)
    assert all(isinstance(answer, Receipt) for answer in answers)
    out = pa.concat_tables(pq.read_table(target) for target in targets)
    assert out.drop_columns("denoised").equals(content)
    assert out["denoised"].equals(content["image"])
    assert [pq.read_metadata(target).num_row_groups for target in targets] == [1, 1]


_MIDDLE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import bad_files as t
from denoise_batch.forward import in_float32
path = Path(sys.argv[1])
made = t.planned(path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
staging = path.parent / "staging"
staging.mkdir()
output = t.output_column(made.column, "denoised")
options = t.UnitOptions(str(staging), made.column, output, made.polarity, t.OnBadRow.NULL, "zstd")
unit = made.unit(len(made) // 2)
assignment = t.Assignment(unit, made.files[0], 1, "unit.parquet")
answer = t.denoise_unit(assignment, options, in_float32(lambda pixels: pixels))
print(len(made), unit.start, unit.rows, answer.rows_out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_a_unit_from_the_middle_of_a_large_row_group_takes_little_memory(tmp_path: Path) -> None:
    rows = 500_000  # 392 MB in one row group, 3 MB in the file
    pixels = np.zeros((20_000, 28, 28), np.uint8)
    pixels[:, 8:20, 10:18] = 200
    part = pa.FixedSizeBinaryArray.from_buffers(pa.binary(784), 20_000, [None, pa.py_buffer(pixels.tobytes())])
    content = pa.table({"id": pa.array(range(rows)), "image": pa.chunked_array([part] * 25)})
    path = tmp_path / "a.parquet"
    pq.write_table(content, path, compression="zstd", row_group_size=rows, use_dictionary=False)
    assert pq.read_metadata(path).row_group(0).total_byte_size > 390_000_000
    command = [sys.executable, "-c", _MIDDLE, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    units, start, made, written, grown = map(int, done.stdout.split())
    assert (units, start, made, written) == (4, 250_000, 125_000, 125_000)
    assert grown < 250  # MB; a row group of the output is 200 MB
    ids = pq.read_table(tmp_path / "staging" / "unit.parquet", columns=["id"])["id"]
    assert ids.equals(content["id"].slice(start, made))


def test_hidden_files_are_skipped_and_partitions_kept(tmp_path: Path) -> None:
    whole = parquet(table())
    kept = ["a.parquet", "year=2024/b.parquet", "year=2024/plain/month=5/c.parquet"]
    skipped = [
        "_d.parquet",
        ".e.parquet",
        "_temporary/0/f.parquet",
        "year=2024/.hidden/g.parquet",
        "year=2024/_h.parquet",
    ]
    for name in kept + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(whole if name in kept else b"not to be looked at")
    made = planned(tmp_path)
    assert [(file.path.removeprefix(f"{tmp_path}/"), file.folder) for file in made.files] == [
        ("a.parquet", ""),
        ("year=2024/b.parquet", "year=2024"),
        ("year=2024/plain/month=5/c.parquet", "year=2024/month=5"),
    ]


def test_what_is_decoded_is_what_was_written() -> None:
    """The images above are images, so that what the tests compare is pixels."""
    for layout, dtype in LAYOUTS:
        decoded = decode(images(10, layout, dtype), output_column(None, "image", layout, dtype))
        assert decoded.bad.nonzero()[0].tolist() == [5]
