"""Contact sheets of Parquet datasets: which columns, which rows, and what is said of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from denoise_batch.errors import ColumnError, FlagError, MissingFileError, OutputError, RequestError
from denoise_batch.evaluation.preview import preview
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("footers_read_here")

COUNT = 40


def _binary(images: np.ndarray) -> pa.Array:
    return pa.array([row.tobytes() for row in images], pa.binary(784))


@pytest.fixture(scope="module")
def columns() -> dict[str, pa.Array]:
    """Row i's denoised image is off by more the greater i is; row i's noise is smaller the greater i is."""
    clean = np.zeros((COUNT, 784), np.uint8)
    clean[:, 300:400] = 255
    wrong = clean.copy()
    noise = np.zeros((COUNT, 784), np.float32)
    for i in range(COUNT):
        wrong[i, :i] = 100
        noise[i] = (COUNT - i) / 10
    noisy = clean.astype(np.float32) / 255 + noise
    lists = pa.array(list(noisy), pa.list_(pa.float32(), 784))
    return {"image": lists, "denoised": _binary(wrong), "clean": _binary(clean)}


def _write(path: Path, columns: dict[str, pa.Array]) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=16)
    return str(path)


def test_worst_rows_are_those_of_the_lowest_psnr(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    shown = preview(_write(tmp_path / "a.parquet", columns), tmp_path / "a.png", count=3)
    assert shown.columns == ("image", "denoised", "clean")
    assert [row.row for row in shown.worst] == [39, 38, 37]
    assert shown.worst_by == "psnr"
    expected = -10 * np.log10((100 / 255) ** 2 * 39 / 784)
    assert shown.worst[0].psnr == pytest.approx(expected, abs=1e-4)
    assert shown.summary().endswith("a.png: 3 random and the 3 worst of all 40 rows")
    with Image.open(tmp_path / "a.png") as image:
        image.load()


def test_ink_is_compared_with_ink(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    """Dark scans, or some of them, beside light clean images; their clean images are shown as they are."""
    light = preview(_write(tmp_path / "a.parquet", columns), tmp_path / "a.png", count=3)
    clean, wrong = (np.array([list(value) for value in columns[name].to_pylist()]) for name in ("clean", "denoised"))
    for turned in (np.arange(COUNT) >= 0, np.arange(COUNT) % 3 == 0):
        shown = {
            name: np.where(turned[:, None], 255 - part, part) for name, part in (("image", clean), ("denoised", wrong))
        }
        dark = columns | {name: _binary(part.astype(np.uint8)) for name, part in shown.items()}
        made = preview(_write(tmp_path / "b.parquet", dark), tmp_path / "b.png", count=3)
        assert [row.row for row in made.worst] == [row.row for row in light.worst]
        assert [row.psnr for row in made.worst] == pytest.approx([row.psnr for row in light.worst], abs=1e-4)
    # What was taken the wrong way round has another side than its scan, and is as bad as it looks.
    lost = columns | {"image": columns["clean"], "denoised": _binary((255 - wrong).astype(np.uint8))}
    assert preview(_write(tmp_path / "b.parquet", lost), tmp_path / "b.png", count=1).worst[0].psnr < 1


def test_without_clean_images_worst_means_changed_the_most(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    few = {name: columns[name] for name in ("image", "denoised")}
    shown = preview(_write(tmp_path / "a.parquet", few), tmp_path / "a.png", count=2)
    assert shown.worst_by == "change"
    assert [row.row for row in shown.worst] == [0, 1]
    assert shown.worst[0].psnr is None
    assert shown.worst[0].change == pytest.approx(4.0)


@pytest.mark.parametrize("name", ["image", "clean", "denoised", "scan"])
def test_images_alone_are_shown_alone(tmp_path: Path, columns: dict[str, pa.Array], name: str) -> None:
    path = _write(tmp_path / "a.parquet", {name: columns["clean"]})
    shown = preview(path, tmp_path / "a.png", count=5)
    assert (shown.columns, shown.worst_by, shown.worst) == ((name,), None, ())
    assert len(shown.random) == 5


def test_columns_can_be_named(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    path = _write(tmp_path / "a.parquet", {"x": columns["image"], "y": columns["denoised"], "z": columns["clean"]})
    shown = preview(path, tmp_path / "a.png", column="x", denoised="y", clean="z", count=2)
    assert shown.columns == ("x", "y", "z")
    with pytest.raises(ColumnError, match="'nothing'"):
        preview(path, tmp_path / "a.png", column="x", denoised="nothing")


@pytest.mark.parametrize("made", ["denoised", "better"])
@pytest.mark.parametrize("shape", ["file", "folder"])
def test_an_outputs_own_manifest_names_its_columns(
    tmp_path: Path, columns: dict[str, pa.Array], made: str, shape: str
) -> None:
    path = tmp_path / "out.parquet"
    described = publishing.file_sidecar(path) if shape == "file" else path / "_denoise_batch"
    described.mkdir(parents=True)
    both = {"scan": columns["image"], "truth": columns["clean"]}
    _write(path if shape == "file" else path / "part-00000.parquet", {**both, made: columns["denoised"]})
    manifest = {"files": [], "sidecar": [], "image_column": "scan", "output_column": made}
    (described / "manifest.json").write_text(json.dumps(manifest))
    assert preview(str(path), tmp_path / "a.png").columns == ("scan", made)
    assert preview(str(path), tmp_path / "a.png", clean="truth").columns == ("scan", made, "truth")
    assert preview(str(path), tmp_path / "a.png", column="truth").columns == ("truth", made)
    assert preview(str(path), tmp_path / "a.png", denoised="scan", column="truth").columns == ("truth", "scan")
    for other in ("[1]", json.dumps(manifest | {"image_column": "gone"})):  # another's, or no longer true
        (described / "manifest.json").write_text(other)
        with pytest.raises(ColumnError, match="more than one column fits"):
            preview(str(path), tmp_path / "a.png")


def test_what_is_denoised_is_not_offered_as_noisy(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    table = {"scan": columns["image"], "truth": columns["clean"], "denoised": columns["denoised"]}
    with pytest.raises(ColumnError, match=r"more than one column fits: 'scan' and 'truth'$"):
        preview(_write(tmp_path / "a.parquet", table), tmp_path / "a.png")


def test_a_column_is_shown_once(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    """Where it is named for, whatever its name says; two flags cannot name the same."""
    path, sheet = _write(tmp_path / "a.parquet", columns), tmp_path / "a.png"
    assert preview(path, sheet, denoised="clean", count=2).columns == ("image", "clean")
    assert preview(path, sheet, clean="denoised", count=2).columns == ("image", "denoised")
    assert preview(path, sheet, column="clean", count=2).columns == ("clean", "denoised")
    assert preview(path, sheet, denoised="clean", clean="denoised", count=2).columns == ("image", "clean", "denoised")
    for first, second in (("column", "denoised"), ("column", "clean"), ("denoised", "clean")):
        with pytest.raises(FlagError, match=f"--{first} clean and --{second} clean are the same column"):
            preview(path, sheet, **{first: "clean", second: "clean"})


def test_noisy_images_that_are_not_there_are_named_as_such(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    path = _write(tmp_path / "a.parquet", {"clean": columns["clean"]})
    with pytest.raises(ColumnError, match="no column of noisy images stands beside 'clean'"):
        preview(path, tmp_path / "a.png", denoised="clean")
    with pytest.raises(ColumnError, match="there is no column ''"):
        preview(path, tmp_path / "a.png", denoised="")


def test_a_denoised_column_that_holds_no_images_is_left_out_and_named(
    tmp_path: Path, columns: dict[str, pa.Array]
) -> None:
    path = _write(tmp_path / "a.parquet", {"image": columns["image"], "denoised": pa.array(range(COUNT))})
    shown = preview(path, tmp_path / "a.png")
    assert shown.columns == ("image",)
    assert shown.notes == ("not shown: column 'denoised' is of type int64",)


def test_rows_without_an_image_are_left_out_and_counted(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    holed = pa.array([None if i in (3, 39) else value for i, value in enumerate(columns["denoised"].to_pylist())],
                     pa.binary(784))  # fmt: skip
    shown = preview(_write(tmp_path / "a.parquet", {**columns, "denoised": holed}), tmp_path / "a.png", count=38)
    assert shown.without_image == 2
    assert {3, 39}.isdisjoint(row.row for row in (*shown.random, *shown.worst))
    assert "2 of them have no image" in shown.summary()


def _holed(column: pa.Array, rows: set[int]) -> pa.Array:
    return pa.array([None if i in rows else value for i, value in enumerate(column.to_pylist())], pa.binary(784))


def test_a_clean_column_that_nobody_named_hides_no_row(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    """Clean images are known of some rows alone: the others are shown without, and may be the worst."""
    told = {"denoised_psnr": pa.array([20.0 + i for i in range(COUNT)])}
    for lacking in ({0, 1, 5}, {0, 1, 2}, set(range(COUNT))):
        holed = columns | {"clean": _holed(columns["clean"], lacking)} | told
        path = _write(tmp_path / "a.parquet", holed)
        shown = preview(path, tmp_path / "a.png", count=COUNT, worst=3)
        assert (shown.worst_by, [row.row for row in shown.worst]) == ("expected_psnr", [0, 1, 2])
        assert {row.row for row in shown.worst if row.psnr is None} == lacking & {0, 1, 2}
        assert {row.row for row in shown.random if row.psnr is None} == lacking
        assert (len(shown.random), shown.without_image, shown.notes) == (COUNT, 0, ())
        json.dumps(shown.to_json(), allow_nan=False)
    named = preview(_write(tmp_path / "a.parquet", columns | told | {"clean": _holed(columns["clean"], {39})}),
                    tmp_path / "a.png", clean="clean", count=3)  # fmt: skip
    assert (named.without_image, named.worst_by, [row.row for row in named.worst]) == (1, "psnr", [38, 37, 36])


def test_rows_without_a_clean_image_are_not_ranked_by_it(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    few = columns | {"clean": _holed(columns["clean"], {39, *range(20)})}
    shown = preview(_write(tmp_path / "a.parquet", few), tmp_path / "a.png", count=2, worst=30)
    assert (shown.worst_by, [row.row for row in shown.worst]) == ("psnr", list(range(38, 19, -1)))
    assert shown.notes == ("note: 21 of the rows read have no clean image, and are not among the worst",)
    none = columns | {"clean": pa.nulls(COUNT, pa.binary(784))}
    shown = preview(_write(tmp_path / "b.parquet", none), tmp_path / "b.png", count=2)
    assert (shown.worst_by, [row.row for row in shown.worst], shown.notes) == ("change", [0, 1], ())


def test_worst_rows_that_cannot_be_shown_are_counted(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    table = {
        "image": columns["image"],
        "denoised": _holed(columns["denoised"], {1, 2}),
        "denoised_psnr": pa.array(map(float, range(COUNT))),
    }
    shown = preview(_write(tmp_path / "a.parquet", table), tmp_path / "a.png", count=3)
    assert (shown.worst_by, [row.row for row in shown.worst]) == ("expected_psnr", [0])
    assert shown.notes == ("note: 2 of the 3 rows that the model expects least of have no image to show",)


def test_a_dataset_of_files_names_each_rows_file(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    table = pa.table(columns)
    (tmp_path / "set").mkdir()
    for part in range(2):
        pq.write_table(table.slice(20 * part, 20), tmp_path / "set" / f"part-{part}.parquet")
    shown = preview(str(tmp_path / "set"), tmp_path / "a.png", count=1)
    assert (shown.worst[0].file.rpartition("/")[2], shown.worst[0].row) == ("part-1.parquet", 19)


def test_a_seed_chooses_the_rows_and_a_picture_repeats(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    path = _write(tmp_path / "a.parquet", columns)
    first = preview(path, tmp_path / "a.png", count=4, worst=0)
    assert preview(path, tmp_path / "b.png", count=4, worst=0).random == first.random
    assert preview(path, tmp_path / "c.png", count=4, worst=0, seed=1).random != first.random
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert first.worst == ()


def test_a_large_dataset_is_searched_in_part_and_says_so(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    shown = preview(_write(tmp_path / "a.parquet", columns), tmp_path / "a.png", count=2, searched=10)
    assert shown.searched < COUNT
    assert f"of {shown.searched} of 40 rows, sampled" in shown.summary()


def test_exact_copies_have_no_psnr_in_json(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    path = _write(tmp_path / "a.parquet", {**columns, "denoised": columns["clean"]})
    content = json.loads(json.dumps(preview(path, tmp_path / "a.png", count=1).to_json(), allow_nan=False))
    assert content["worst"][0]["psnr"] is None


def test_requests_that_cannot_be_met(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    path = _write(tmp_path / "a.parquet", columns)
    for count in (0, 101):
        with pytest.raises(FlagError, match=f"--rows {count}"):
            preview(path, tmp_path / "a.png", count=count)
    with pytest.raises(MissingFileError):
        preview(str(tmp_path / "none"), tmp_path / "a.png")
    with pytest.raises(RequestError, match="none of 0 rows"):
        preview(_write(tmp_path / "b.parquet", {"image": columns["image"][:0]}), tmp_path / "a.png")
    with pytest.raises(OutputError, match="is a folder"):
        preview(path, tmp_path)
    with pytest.raises(FlagError, match=r"a\.jpg: the picture is a PNG"):
        preview(path, tmp_path / "a.jpg")
    assert not any((tmp_path / name).exists() for name in ("a.png", "a.jpg"))


def test_worst_rows_are_those_the_model_expects_least_of(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    """Of all rows, not of the sampled ones; nulls are no images."""
    expected = [30.0 - i % 7 for i in range(COUNT)]
    expected[17], expected[3], expected[31] = 2.5, 1.5, None
    table = {"image": columns["image"], "denoised": columns["denoised"], "denoised_psnr": pa.array(expected)}
    (tmp_path / "set").mkdir()
    for part in range(2):
        half = {name: column[part * 20 : part * 20 + 20] for name, column in table.items()}
        _write(tmp_path / "set" / f"part-{part}.parquet", half)
    shown = preview(str(tmp_path / "set"), tmp_path / "a.png", count=2, worst=4, searched=2)
    assert shown.worst_by == "expected_psnr"
    assert [(row.row, row.expected_psnr) for row in shown.worst] == [(3, 1.5), (17, 2.5), (6, 24.0), (13, 24.0)]
    assert shown.worst[0].change == pytest.approx(3.7, abs=0.05)
    assert len(shown.random) == 2
    for row in shown.random:
        number = row.row + 20 * row.file.endswith("part-1.parquet")
        assert row.expected_psnr == expected[number] or (number == 31 and row.expected_psnr is None)
    assert shown.summary().endswith("2 of 40 rows, sampled, and the 4 of all that the model expects least of")
    with pytest.raises(FlagError, match="--worst 101"):
        preview(str(tmp_path / "set"), tmp_path / "a.png", worst=101)


def test_worst_rows_of_views(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    table = {name: pa.array(columns["clean"].to_pylist(), pa.binary_view()) for name in ("image", "denoised")}
    table["denoised_psnr"] = pa.array(map(float, range(COUNT)))
    shown = preview(_write(tmp_path / "a.parquet", table), tmp_path / "a.png", count=2)
    assert (shown.worst_by, [row.row for row in shown.worst]) == ("expected_psnr", [0, 1])


def test_what_the_model_did_not_say_is_null_in_json(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    told = pa.array([None, *[20.0] * (COUNT - 1)], pa.float32())
    shown = preview(_write(tmp_path / "a.parquet", columns | {"denoised_psnr": told}), tmp_path / "a.png", count=COUNT)
    # Beside clean images, too: it is known of all rows, and it is what a user without clean images goes by.
    assert shown.worst_by == "expected_psnr"
    assert all(row.psnr is not None for row in shown.worst)
    path = str(tmp_path / "a.parquet")
    named = preview(path, tmp_path / "b.png", clean="clean", count=3)
    assert (named.worst_by, [row.row for row in named.worst]) == ("psnr", [39, 38, 37])
    nothing = pa.nulls(COUNT, pa.float32())
    said_nothing = preview(_write(tmp_path / "c.parquet", columns | {"denoised_psnr": nothing}), tmp_path / "c.png")
    assert said_nothing.worst_by == "psnr"
    assert len(said_nothing.worst) == 8
    content = json.loads(json.dumps(shown.to_json(), allow_nan=False))
    assert [row["expected_psnr"] for row in content["random"]] == [None, *[20.0] * (COUNT - 1)]


def test_other_numbers_are_not_what_the_model_expects(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    table = {"image": columns["image"], "": pa.array(range(COUNT)), "denoised_psnr": pa.array(range(COUNT))}
    shown = preview(_write(tmp_path / "a.parquet", table), tmp_path / "a.png")
    assert all(row.expected_psnr is None for row in shown.random)


def test_an_empty_file_need_not_say_what_the_model_expects(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    table = {"image": columns["image"], "denoised": columns["denoised"]}
    (tmp_path / "set").mkdir()
    _write(tmp_path / "set" / "a.parquet", {name: column[:0] for name, column in table.items()})
    _write(tmp_path / "set" / "b.parquet", table | {"denoised_psnr": pa.array(map(float, range(COUNT)))})
    shown = preview(str(tmp_path / "set"), tmp_path / "a.png", count=2)
    assert [row.row for row in shown.worst] == [0, 1]


@pytest.mark.slow
def test_a_sheet_of_many_rows_is_no_strip(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    for kept, count in ((["image"], COUNT), (["image", "denoised"], COUNT), (list(columns), 8)):
        table = {name: columns[name] for name in kept}
        preview(_write(tmp_path / "a.parquet", table), tmp_path / "a.png", count=count)
        with Image.open(tmp_path / "a.png") as image:
            assert 0.5 <= image.width / image.height <= 2.0


def test_a_picture_does_not_replace_the_data(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    """Hive's files have no suffix, as a picture may."""
    folder = tmp_path / "hive"
    folder.mkdir()
    data = _write(folder / "000000_0", columns)
    before = (folder / "000000_0").read_bytes()
    (tmp_path / "link.png").symlink_to(data)
    for path, picture in (
        (data, folder / "000000_0"),
        (str(folder), folder / "000000_0"),
        (data, tmp_path / "link.png"),
    ):
        with pytest.raises(OutputError, match="is a file of the data"):
            preview(path, picture)
    assert (folder / "000000_0").read_bytes() == before
    preview(str(folder), folder / "sheet.png")


def test_a_picture_is_not_put_into_a_finished_output(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    out = tmp_path / "out"
    (out / "_denoise_batch").mkdir(parents=True)
    (out / "_denoise_batch" / "manifest.json").touch()
    pq.write_table(pa.table(columns), out / "part-00000.parquet")
    with pytest.raises(OutputError, match="an output of infer"):
        preview(str(out), out / "sheet.png")
    assert not (out / "sheet.png").exists()
