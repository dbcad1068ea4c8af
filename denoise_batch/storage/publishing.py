"""Outputs: what may be written where, shown by one rename when it is complete, and one run at a time.

They are published on file systems that rename: local disks and shared POSIX file systems.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from denoise_batch.errors import OutputError, OutputExists
from denoise_batch.storage import is_uri, is_utf8, redact

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from denoise_batch.storage.listing import Listing

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems say that have neither."""
_MANIFEST = "_denoise_batch/manifest.json"
"""Stands in a folder that is an output of `infer`."""


def _rename_with(flags: int, source: Path, target: Path) -> None:
    """renameat2(2): the only way to swap two folders, or to refuse an existing target, in one step."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "renameat2 is missing")
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def publish(built: Path, out: Path, *, overwrite: bool) -> None:
    """Shows `built` (a file or a folder, complete and on the same file system) as `out`, by one rename.

    With `overwrite` an existing `out` is swapped: a reader sees the old one or the new one, never a mix. Where the
    file system cannot swap, a folder is moved away first, and for that moment `out` does not exist.

    Raises:
        OutputExists: and `overwrite` is off.
    """
    for folder in [built.parent, *(Path(parent) for parent, _, _ in os.walk(built))]:
        sync(folder)
    try:
        _rename_with(_RENAME_NOREPLACE, built, out)
    except OSError as error:
        if error.errno == errno.EEXIST:
            if not overwrite:
                raise output_exists(out) from error
            _swap(built, out)
        elif error.errno in _UNKNOWN:
            if out.exists() and not overwrite:
                raise output_exists(out) from error
            if out.exists():
                _swap(built, out)
            else:
                built.rename(out)
        else:
            raise
    sync(out.parent)


def publish_described(data: Path, out: Path, description: Path, beside: Path, *, overwrite: bool) -> None:
    """Shows a file as `out`, and the folder that describes it as `beside`, which replaces what stands there.

    The description first: while it stands alone there is no output, and the next run replaces it.

    Raises:
        OutputExists: and `overwrite` is off. What another program put there has no description of ours beside it.
    """
    if not overwrite and os.path.lexists(out):
        raise output_exists(out)
    publish(description, beside, overwrite=True)
    try:
        publish(data, out, overwrite=overwrite)
    except OutputExists:  # it appeared just now
        remove(beside)
        raise


def file_sidecar(out: Path) -> Path:
    """The folder beside a single file OUT of `infer` that describes it.

    No `=` is in its name, which would make a partition of it for readers that otherwise skip names with `_` in front;
    two files never share one.
    """
    name = re.sub("%(?=(25)*3D)", "%25", out.name).replace("=", "%3D")
    return out.with_name(f"_{name}.manifest")


def described_by(folder: Path) -> Path | None:
    """The single file that a folder of such a name describes, whether or not it is there; None for another name."""
    found = re.fullmatch(r"_(.+)\.manifest", folder.name, re.DOTALL)
    if found is None:
        return None
    name = re.sub("%(25)*3D", lambda escaped: "=" if escaped[0] == "%3D" else f"%{escaped[0][3:]}", found[1])
    return folder.with_name(name)


def former_sidecar(out: Path) -> Path | None:
    """Where that folder stood before, of a file with `=` in its name; None of others."""
    return out.with_name(f"_{out.name}.manifest") if "=" in out.name else None


def check_output_file(output: Path, *, overwrite: bool) -> None:
    """Refuses an output file that cannot be written; missing folders above it are no reason.

    Raises:
        OutputError: it is a folder or a device, exists without `overwrite`, or has a name that cannot be; or its folder
            is a file or not writable; or it would make a finished output of `infer` a faulty one.
    """
    if is_uri(str(output)):
        raise OutputError(f"{redact(str(output))} is not a local path", hint="write a local file, then copy it")
    if output.is_dir():
        raise OutputError(f"{output} is a folder", hint="give the name of a file")
    # A rename would put a file in the place of /dev/stdout, for all programs.
    standard = output.is_symlink() and output.parent == Path("/dev")
    if standard or (output.exists() and not output.is_file()) or _nearest(output).resolve().is_relative_to("/proc"):
        raise OutputError(f"{output} is no file that could be replaced", hint="give the name of a file")
    if os.path.lexists(output) and not overwrite:
        raise output_exists(output)
    check_utf8(output)
    check_name(output, [output.with_name(f".{output.name}.{'x' * 8}")])
    check_parent(output)
    check_outside_outputs(output)
    for beside in (file_sidecar(output), former_sidecar(output)):
        if beside is not None and os.path.isdir(beside):  # noqa: PTH112 (no error of a name that is too long)
            raise OutputError(
                f"{output} has a manifest of infer beside it, {beside.name}, which would not be true of the new file",
                hint="move both away, or give another output",
            )


def check_outside_outputs(output: Path) -> None:
    """Refuses an output in a finished output folder of `infer`, which would be faulty with it.

    Raises:
        OutputError: it lies in one, at any depth.
    """
    # Links followed: the file appears where they lead.
    parent = Path(os.path.realpath(output.parent))
    for folder in (parent, *parent.parents):
        if os.path.isfile(folder / _MANIFEST):  # noqa: PTH113 (no error where we may not look)
            raise OutputError(
                f"{output} lies in {folder}, an output of infer, which would be faulty with it",
                hint="give an output outside it",
            )


def check_utf8(output: Path) -> None:
    """Refuses an output whose path holds other bytes than text.

    Raises:
        OutputError: it does.
    """
    if not is_utf8(str(output)):
        raise OutputError(
            f"output {redact(str(output))}: its path is not UTF-8, and PyArrow opens no other", hint="give another name"
        )


def check_apart(output: Path, listing: Listing, *, beside: Sequence[Path] = ()) -> None:
    """Refuses an output that is an input, holds one or lies in a listed folder, links followed.

    Args:
        beside: what is replaced or deleted along with it, in the same folder.

    Raises:
        OutputError: it does, or one of those is an input or holds one.
    """
    real = Path(os.path.realpath(output))
    others = [(Path(os.path.realpath(path)), path) for path in beside]
    for file in listing.files:
        if is_uri(file.path):
            continue
        source = Path(os.path.realpath(file.path))
        if real == source or real in source.parents:
            raise OutputError(f"output {output} is, or holds, the input {file.path}", hint="give another output")
        for place, path in others:
            if place == source or place in source.parents:
                raise OutputError(
                    f"output {output} replaces {path}, which is, or holds, the input {file.path}",
                    hint="give another output, or a copy of that input",
                )
    for folder in listing.folders:
        if Path(os.path.realpath(folder)) in real.parents:
            raise OutputError(
                f"output {output} lies inside the input folder {folder}", hint="give an output outside the input"
            )


def check_name(output: Path, beside: Sequence[Path]) -> None:
    """Refuses an output whose name leaves no room for the longer ones that are made of it.

    Args:
        beside: what is made in the same folder.

    Raises:
        OutputError: one of those would be longer than the file system allows.
    """
    name, longest = len(os.fsencode(output.name)), max(len(os.fsencode(path.name)) for path in beside)
    most = os.pathconf(_nearest(output), "PC_NAME_MAX")
    if 0 < most < longest:  # -1: there is no limit
        raise OutputError(
            f"the name of output {output} is too long: {name} bytes",
            hint=f"give one of at most {most - (longest - name)}: names that are made of it are longer, {most} at most",
        )


def check_parent(output: Path) -> None:
    """Refuses an output whose folder cannot be written, or cannot be made.

    Raises:
        OutputError: the nearest folder above it is a file or not writable.
    """
    parent = _nearest(output)
    real = Path(os.path.realpath(parent))
    # What the kernel shows of itself: root may write there, but make nothing.
    of_kernel = any(real.is_relative_to(place) for place in ("/proc", "/sys"))
    if of_kernel or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{output} cannot be written: {parent} is not a writable folder", hint="give another output")


def _nearest(output: Path) -> Path:
    """What there is of the folders above it."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def output_exists(out: object) -> OutputExists:
    return OutputExists(f"{out} exists", hint="give --overwrite to replace it, or another output")


def replaced(out: Path) -> Path:
    """Where the old `out` is moved on file systems that cannot swap; it stays there if the process dies right then."""
    return out.with_name(f".{out.name}.replaced")


def _swap(built: Path, out: Path) -> None:
    try:
        _rename_with(_RENAME_EXCHANGE, built, out)
    except OSError as error:
        if error.errno not in _UNKNOWN | {errno.EXDEV}:
            raise
        if out.is_file() and built.is_file():
            built.replace(out)
            return
        old = replaced(out)
        remove(old)
        try:
            out.rename(old)
        except OSError as cannot:
            if cannot.errno != errno.EXDEV:
                raise
            shutil.move(out, old)  # in a container: the folder is part of its image, and is copied, then deleted
        built.rename(out)
        remove(old)
        return
    remove(built)  # what was `out` before the swap


def remove(path: Path) -> None:
    """Deletes a file or a folder, if there is one.

    A file that is still open keeps a name on NFS (`.nfs…`), and its folder with it: that is no fault.
    """
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except OSError as error:
            names = [name for _, _, names in os.walk(path) for name in names]
            if error.errno not in {errno.ENOTEMPTY, errno.EBUSY} or not all(name.startswith(".nfs") for name in names):
                raise
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes, *, private: bool = False, alone: bool = True) -> None:
    """Writes a small file so that it holds all of `content` or does not exist, and survives a power cut.

    Args:
        private: nobody else may read it.
        alone: nobody else writes it at this moment. What a killed writer has left is then replaced by the next.
    """
    ours = "" if alone else f".{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}{ours}.writing")
    temporary.unlink(missing_ok=True)
    mode = 0o600 if private else 0o666  # less the umask
    # A new file or none: what somebody else puts there at this moment, a link to another file, is not written to.
    new = os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags | new, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's work folder, so that two runs on one output cannot mix.

    The kernel drops the lock with the process, however it dies. The folder is private: nobody else may read or
    write in it. Only a folder of our own is gone on with, and none that leads elsewhere: what is left over in it is
    deleted, and the result is made of it.

    Raises:
        OutputError: another run holds it; it belongs to somebody else; it is, or holds, a link.
    """
    while True:
        if folder.is_symlink():
            raise OutputError(f"{folder} is a link; a run's own folder is none", hint="remove it, then run again")
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue  # the run before us has just removed its folder
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OutputError(f"{path} is a link", hint=f"remove {folder}, then run again") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"another run is writing this output (it holds {path})",
                    hint="wait for it, stop it, or give another output",
                ) from error
            # A run that finished between our open and our lock has unlinked the file we hold: start over.
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                _check_own(folder)
                yield
                return
        finally:
            os.close(descriptor)
            if not path.exists():  # the folder was removed while its lock was open, which NFS does only now
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _check_own(folder: Path) -> None:
    """Refuses a work folder that somebody else prepared.

    Raises:
        OutputError: it belongs to another user, or something in it is a link.
    """
    # Not `os.geteuid`: network file systems give files other owners than the process has.
    with tempfile.TemporaryFile(dir=folder) as probe:
        owner = os.fstat(probe.fileno()).st_uid
    if folder.stat().st_uid != owner:
        raise OutputError(
            f"{folder} belongs to another user, so what it says of an unfinished run is not trusted",
            hint="remove it, or give another output",
        )
    for path in folder.iterdir():
        if path.is_symlink():
            raise OutputError(f"{path} is a link; a run makes none", hint=f"remove {folder}, then run again")
