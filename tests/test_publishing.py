"""One rename that shows all, and one run at a time."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from denoise_batch.errors import OutputError, OutputExists
from denoise_batch.storage import publishing


@pytest.mark.parametrize("folder", [False, True])
def test_publish_shows_all_or_refuses(tmp_path: Path, folder: bool) -> None:
    def build(text: str) -> Path:
        built = tmp_path / f"built-{text}"
        if folder:
            built.mkdir()
            (built / "x").write_text(text)
        else:
            built.write_text(text)
        return built

    out = tmp_path / "out"
    publishing.publish(build("one"), out, overwrite=False)
    with pytest.raises(OutputError, match="exists"):
        publishing.publish(build("two"), out, overwrite=False)
    assert (out / "x" if folder else out).read_text() == "one"
    publishing.publish(tmp_path / "built-two", out, overwrite=True)
    assert (out / "x" if folder else out).read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV])
def test_what_cannot_be_swapped_is_moved_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """EXDEV: a folder of a container's image, which overlayfs does not rename either."""
    out, built, file = tmp_path / "out", tmp_path / "built", tmp_path / "file"
    for folder, text in ((out, "old"), (built, "new")):
        folder.mkdir()
        (folder / text).write_text(text)
    file.write_text("file")
    known, rename = publishing._rename_with, os.rename

    def rename_with(flags: int, source: Path, target: Path) -> None:
        if flags == publishing._RENAME_EXCHANGE or code != errno.EXDEV:
            raise OSError(code, os.strerror(code), str(target))
        known(flags, source, target)

    def plain(source: Path, target: Path) -> None:
        if code == errno.EXDEV and (Path(source) / "old").exists():
            raise OSError(code, os.strerror(code), str(source))
        rename(source, target)

    monkeypatch.setattr(publishing, "_rename_with", rename_with)
    monkeypatch.setattr(os, "rename", plain)
    with pytest.raises(OutputExists):
        publishing.publish(built, out, overwrite=False)
    publishing.publish(built, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
    publishing.publish(file, out, overwrite=True)  # a file in a folder's place
    assert out.read_text() == "file"


def test_an_empty_folder_is_not_silently_replaced(tmp_path: Path) -> None:
    # rename(2) alone would replace it.
    (tmp_path / "out").mkdir()
    (tmp_path / "built").mkdir()
    with pytest.raises(OutputError, match="exists"):
        publishing.publish(tmp_path / "built", tmp_path / "out", overwrite=False)


@pytest.mark.parametrize("late", [False, True])
def test_a_file_that_another_program_puts_there_gets_no_description_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    out, beside, description, data = (tmp_path / name for name in ("out", "_out.manifest", "description", "data"))
    description.mkdir()
    (description / "manifest.json").write_text("ours")
    data.write_text("ours")
    rename = publishing._rename_with

    def appear(flags: int, source: Path, target: Path) -> None:
        if target == out:
            out.write_text("foreign")
        rename(flags, source, target)

    if late:
        monkeypatch.setattr(publishing, "_rename_with", appear)
    else:
        out.write_text("foreign")
    with pytest.raises(OutputExists, match="out exists"):
        publishing.publish_described(data, out, description, beside, overwrite=False)
    assert out.read_text() == "foreign"
    assert not beside.exists()
    assert data.read_text() == "ours"
    description.mkdir(exist_ok=True)
    publishing.publish_described(data, out, description, beside, overwrite=True)
    assert (out.read_text(), beside.is_dir()) == ("ours", True)


def test_a_reader_never_sees_a_mix_while_overwriting(tmp_path: Path) -> None:
    out, stop, seen = tmp_path / "out", threading.Event(), set[str]()

    def poll() -> None:
        while not stop.is_set():
            try:
                seen.add((out / "x").read_text() + (out / "y").read_text())
            except FileNotFoundError:
                # Between the two reads the folder may be swapped and the old one deleted; it must still exist.
                seen.add("there" if out.exists() else "gone")

    for number in range(40):
        built = tmp_path / "built"
        built.mkdir()
        for name in "xy":
            (built / name).write_text(str(number % 10))
        publishing.publish(built, out, overwrite=True)
        if number == 0:
            reader = threading.Thread(target=poll)
            reader.start()
    stop.set()
    reader.join()
    assert "gone" not in seen


def test_only_one_holds_a_folder_and_a_dead_holder_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = (
        "import sys, time; from pathlib import Path; from denoise_batch.storage import publishing\n"
        "with publishing.exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match="another run"), publishing.exclusive(folder):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with publishing.exclusive(folder):
        pass


def test_write_file_replaces_whole(tmp_path: Path) -> None:
    publishing.write_file(tmp_path / "a", b"one")
    publishing.write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        publishing.write_file(tmp_path / "folder", b"three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


def test_several_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path, contents = tmp_path / "a", [bytes([number]) * 200_000 for number in range(4)]
    publishing.write_file(path, contents[0])
    begun = threading.Barrier(len(contents) + 1)

    def write(content: bytes) -> None:
        begun.wait()
        for _ in range(25):
            publishing.write_file(path, content, alone=False)

    with ThreadPoolExecutor() as pool:
        writing = [pool.submit(write, content) for content in contents]
        begun.wait()
        while not all(one.done() for one in writing):
            assert path.read_bytes() in contents
        assert [one.result() for one in writing] == [None] * len(contents)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_lock_that_is_open_is_removed_on_nfs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file that is open is renamed when it is deleted, until it is closed."""
    kept = ".nfs000000000a1b2c3d00000001"
    unlink = os.unlink

    def unlink_on_nfs(name: Any, *, dir_fd: int | None = None) -> None:
        if os.fsdecode(name).endswith("lock"):
            os.rename(name, Path(name).with_name(kept), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            unlink(name, dir_fd=dir_fd)

    folder = tmp_path / ".out.training"
    with publishing.exclusive(folder):
        (folder / "ray").mkdir()
        (folder / "ray" / "checkpoint").write_bytes(b"x")
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink_on_nfs)
            publishing.remove(folder)
        assert [path.name for path in folder.iterdir()] == [kept]
        (folder / kept).unlink()  # as closing it does
    assert not folder.exists()
    (folder / "sub").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "not empty")))
    (folder / "sub" / "other").write_bytes(b"x")
    with pytest.raises(OSError, match="not empty"):
        publishing.remove(folder)


def test_only_files_are_replaced_by_a_file(tmp_path: Path) -> None:
    """A rename in the place of a FIFO or of /dev/stdout would take it away from every program."""
    fifo, nowhere, plain = tmp_path / "fifo", tmp_path / "link.parquet", tmp_path / "plain.parquet"
    os.mkfifo(fifo)
    for output in (fifo, Path("/dev/stdout"), Path("/dev/null"), Path("/dev/fd/1"), Path("/proc/self/new")):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="no file that could be replaced"):
                publishing.check_output_file(output, overwrite=overwrite)
    nowhere.symlink_to(tmp_path / "missing")
    with pytest.raises(OutputExists):
        publishing.check_output_file(nowhere, overwrite=False)
    publishing.check_output_file(nowhere, overwrite=True)
    plain.touch()
    publishing.check_output_file(plain, overwrite=True)


def test_names_that_no_output_can_have_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not UTF-8"):
        publishing.check_output_file(tmp_path / os.fsdecode(b"bad\xff.parquet"), overwrite=False)
    with pytest.raises(OutputError, match="too long: 255 bytes"):
        publishing.check_output_file(tmp_path / ("x" * 255), overwrite=False)
    publishing.check_output_file(tmp_path / ("x" * 245), overwrite=False)


def test_what_describes_a_file_is_no_partition_and_each_files_own(tmp_path: Path) -> None:
    names = ["a.parquet", "a=b.parquet", "a%3Db.parquet", "a%253Db.parquet", "50%.parquet", "=", "%=", "%%3D", "%3D"]
    found = {publishing.file_sidecar(tmp_path / name).name for name in names}
    assert len(found) == len(names)
    assert not any("=" in name for name in found)
    assert {"_a.parquet.manifest", "_a%3Db.parquet.manifest", "_50%.parquet.manifest"} <= found
    for name in names:
        assert publishing.described_by(publishing.file_sidecar(tmp_path / name)) == tmp_path / name
    assert publishing.described_by(tmp_path / "_a=b.parquet.manifest") == tmp_path / "a=b.parquet"
    assert publishing.described_by(tmp_path / "a.manifest") is None


@pytest.mark.parametrize("beside", ["_k%3Dv.parquet.manifest", "_k=v.parquet.manifest"])
def test_a_manifest_of_infer_is_not_left_beside_another_file(tmp_path: Path, beside: str) -> None:
    output, described = tmp_path / "k=v.parquet", tmp_path / beside
    described.mkdir()
    (described / "_SUCCESS").touch()
    for there in (False, True):
        if there:
            output.touch()
        with pytest.raises(OutputError, match=f"has a manifest of infer beside it, {beside}, which") as caught:
            publishing.check_output_file(output, overwrite=True)
        assert "move both away" in caught.value.hint
    publishing.check_output_file(tmp_path / "other.parquet", overwrite=False)
    publishing.check_output_file(tmp_path / ("=" * 245), overwrite=False)  # too long a name for a manifest beside it


def test_a_file_in_a_finished_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "_denoise_batch").mkdir(parents=True)
    (out / "year=1").mkdir()
    (tmp_path / "link").symlink_to(out / "year=1")
    within = [out / "a", out / "year=1" / "a", out / "new" / "a", out / "_denoise_batch" / "a", tmp_path / "link" / "a"]
    for output in within:
        publishing.check_output_file(output, overwrite=False)
    (out / "_denoise_batch" / "manifest.json").touch()
    for output in within:
        with pytest.raises(OutputError, match=f"lies in {out}, an output of infer") as caught:
            publishing.check_output_file(output, overwrite=True)
        assert "outside" in caught.value.hint
    publishing.check_output_file(tmp_path / "a", overwrite=False)
