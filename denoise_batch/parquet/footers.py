"""Reads Parquet footers and first rows in processes that may die: a damaged file can crash its parser.

The driver calls `read_footers` and `read_samples`. Each child is this module run as a program: it takes one JSON
request a line on stdin and answers one JSON line on stdout, so that after a crash the first request without an answer
names the file at fault.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import queue
import resource
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from denoise_batch.errors import JobFailed, first_line
from denoise_batch.process.cores import cores_here
from denoise_batch.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

TIMEOUT_S = 60.0
"""How long one file may take before its parser counts as hung."""

MEMORY = 4 << 30
"""Bytes of address space that a child may take: a damaged file can ask for any number. A third is taken at rest."""

_REMOTE_PROCESSES = 16
UNSUPPORTED = "PyArrow cannot read its schema"
"""What is said of a file that may be whole, but has a type that PyArrow does not know."""

OTHER_TYPE = "write the column that PyArrow does not know as another type (integers of 128 bits as decimals, say)"

NOT_UTF8 = "its path is not UTF-8, and PyArrow opens no other"
RENAME = "rename the file or the folder whose name is not UTF-8"

_MEASURED_ROWS = 4
_SAMPLE_BYTES = 8 << 20
_ENCRYPTED = "it is encrypted"


def spread_over(count: int, most: int) -> list[int]:
    """Which of `count` row groups to sample: at most so many, evenly spread, the first and the last among them."""
    return sorted({round(place * (count - 1) / max(most - 1, 1)) for place in range(most)}) if count else []


def check_type(paths: Sequence[str], found: Sequence[Footer], name: str, type_: pa.DataType) -> None:
    """Refuses files of which a column is missing, or of a type that has no `common_type` with the one given.

    Raises:
        ColumnError: there is one.
    """
    import pyarrow as pa

    from denoise_batch.errors import ColumnError
    from denoise_batch.parquet.type_changes import common_type
    from denoise_batch.storage.redaction import redact

    types: list[pa.DataType | None] = []
    for footer in found:
        schema = pa.ipc.read_schema(pa.py_buffer(footer.schema))
        place = schema.get_field_index(name)
        types.append(None if place < 0 else schema.field(place).type)
    fits = [other is not None and common_type(type_, other) is not None for other in types]
    if not all(fits):
        odd = fits.index(False)
        like = fits.index(True) if any(fits) else 0  # the first file may be an empty one of another type
        there = "no such column" if types[odd] is None else f"it of type {types[odd]}"
        raise ColumnError(
            f"column {name!r} is {type_} in {redact(paths[like])}, but {redact(paths[odd])} has {there}",
            hint="give files of one schema at a time",
        )


@dataclass(frozen=True, slots=True)
class Footer:
    """What a file's footer says.

    Attributes:
        schema: the Arrow schema, serialised (`pa.ipc.read_schema`). Files that differ in the schema's metadata alone
            share one, with the metadata of the first.
        row_groups: rows of each row group.
        row_bytes: the largest uncompressed bytes a row takes in any row group.
        changes: Parquet types that Arrow cannot carry, `column 'x': Interval becomes 12 bytes`.
    """

    schema: bytes
    row_groups: tuple[int, ...]
    row_bytes: int
    changes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True, slots=True)
class Sample:
    """First rows of a row group.

    Attributes:
        row_bytes: of Arrow memory that one of the first rows takes, in all columns of the file.
    """

    table: pa.Table
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file whose footer or rows could not be read, and why, in one line."""

    reason: str


def read_footers(paths: Sequence[str], processes: int | None = None) -> list[Footer | Unreadable]:
    """The footers of many files, in their order, read by several processes side by side."""
    schemas: dict[str, bytes] = {}  # a million files have a handful of them
    found: list[Footer | Unreadable] = []
    for answer in _ask([{"path": path} for path in paths], processes):
        if "error" in answer:
            found.append(Unreadable(answer["error"]))
            continue
        if answer["schema_id"] not in schemas:
            schemas[answer["schema_id"]] = base64.b64decode(answer["schema"])
        rows, changes = tuple(answer["row_groups"]), tuple(answer["changes"])
        found.append(Footer(schemas[answer["schema_id"]], rows, answer["row_bytes"], changes))
    return found


def read_samples(requests: Sequence[tuple[str, int, tuple[str, ...]]], rows: int) -> list[Sample | Unreadable]:
    """The first rows of row groups; few of them where rows are large.

    Args:
        requests: (path, row group, names of the columns that are wanted).
        rows: how many rows of each, at most.
    """
    import pyarrow as pa

    answers = _ask([{"path": p, "group": g, "columns": list(c), "rows": rows} for p, g, c in requests], None)
    return [
        Unreadable(answer["error"])
        if "error" in answer
        else Sample(pa.ipc.open_stream(base64.b64decode(answer["table"])).read_all(), answer["row_bytes"])
        for answer in answers
    ]


def _ask(requests: list[dict[str, Any]], processes: int | None) -> list[dict[str, Any]]:
    if not requests:
        return []
    # A process starts in 0.3 s and reads some thousand local footers a second; for a store it waits most of the time.
    if is_remote(requests[0]["path"]):
        count = processes or min(_REMOTE_PROCESSES, len(requests) // 10 + 1)
    else:
        count = processes or max(1, min(cores_here(), 8, len(requests) // 200 + 1))
    chunk = -(-len(requests) // count)
    answers: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    failed: list[OSError] = []

    def run(index: int) -> None:
        pending = requests[index * chunk : (index + 1) * chunk]
        try:
            while pending:
                done = _serve(pending)
                answers[index] += done
                pending = pending[len(done) :]
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise JobFailed(
            f"no process can be started to read the files' footers: {failed[0].strerror or failed[0]}",
            hint=f"see that {sys.executable} can be run, and that there is room for processes and temporary files",
        ) from failed[0]
    return [answer for part in answers for answer in part]


def _serve(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers from one child; where it dies or hangs, the last answer names its fate and the rest is left out."""
    with tempfile.TemporaryFile() as log:  # not a pipe, which a child with much to say would fill
        return _serve_logged(requests, log)


def _serve_logged(requests: list[dict[str, Any]], log: IO[bytes]) -> list[dict[str, Any]]:
    child = subprocess.Popen(
        # -P: not a module that lies beside the data, in the current folder.
        [sys.executable, "-P", "-m", "denoise_batch.parquet.footers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    stdin, stdout = child.stdin, child.stdout

    def write() -> None:
        try:
            stdin.writelines(json.dumps(request) + "\n" for request in requests)
            stdin.close()
        except OSError:
            pass  # the child is dead; its missing answers say so

    def read() -> None:
        for line in stdout:
            lines.put(line)
        lines.put("")

    workers = [threading.Thread(target=work, daemon=True) for work in (write, read)]
    for worker in workers:
        worker.start()
    answers: list[dict[str, Any]] = []
    schemas: dict[str, str] = {}
    try:
        while len(answers) < len(requests):
            try:
                line = lines.get(timeout=TIMEOUT_S)
            except queue.Empty:
                answers.append({"error": f"its parser did not answer within {TIMEOUT_S:g} s"})
                break
            if not line.endswith("\n"):
                code = child.wait()
                cause = f"signal {-code}" if code < 0 else f"exit code {code}"
                answers.append({"error": _last_words(log) or f"its parser crashed ({cause})"})
                break
            answer = json.loads(line)
            if "schema_id" in answer:  # the schema itself comes with the first file that has it
                answer["schema"] = schemas.setdefault(answer["schema_id"], answer.get("schema", ""))
            answers.append(answer)
    finally:
        child.kill()
        child.wait()
        for worker in workers:
            worker.join()
        stdout.close()
    return answers


def _last_words(log: IO[bytes]) -> str:
    """pyarrow aborts, rather than raises, where it meets a column that is encrypted."""
    log.seek(0)
    return _ENCRYPTED if b"decrypt" in log.read(1 << 16).lower() else ""


def _read_footer(path: str) -> dict[str, Any]:
    from denoise_batch.parquet.input_file import full_schema
    from denoise_batch.parquet.type_changes import type_changes

    try:
        file = _open(path)
    except NotImplementedError as error:
        return {"error": f"{UNSUPPORTED}: {_first_line(error)}"}
    with file:
        metadata = file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        rows = [group.num_rows for group in groups]
        if sum(rows) != metadata.num_rows or any(count < 0 for count in rows):
            return {"error": f"its footer says {metadata.num_rows} rows, its row groups hold {sum(rows)}"}
        # Every column is looked at: that alone can crash pyarrow, where parts disagree or one is encrypted. A column
        # without lists has a value for each row, null or not; of two numbers pyarrow would believe the smaller one.
        flat = [file.schema.column(index).max_repetition_level == 0 for index in range(metadata.num_columns)]
        for group in groups:
            chunks = [group.column(index) for index in range(metadata.num_columns)]
            for chunk in (chunk for chunk, is_flat in zip(chunks, flat, strict=True) if is_flat):
                if chunk.num_values != group.num_rows:
                    return {
                        "error": f"its footer says {group.num_rows} rows of a row group, but {chunk.num_values} "
                        f"values of its column {chunk.path_in_schema!r}"
                    }
        row_bytes = max((-(-group.total_byte_size // group.num_rows) for group in groups if group.num_rows), default=0)
        # Metadata of the schema (pandas' index, say) may be another in each of a million files.
        schema_id = hashlib.sha256(file.schema_arrow.remove_metadata().serialize()).hexdigest()
        return {
            "schema_id": schema_id,
            "schema": base64.b64encode(full_schema(file).serialize()).decode(),
            "row_groups": rows,
            "row_bytes": row_bytes,
            "changes": type_changes(file),
        }


def _read_sample(path: str, group: int, columns: list[str], rows: int) -> dict[str, Any]:
    import pyarrow as pa

    from denoise_batch.parquet.pages import check_pages

    with _open(path) as file:
        check_pages(path, file.metadata, [group])
        few = next(file.iter_batches(_MEASURED_ROWS, row_groups=[group], use_threads=False), None)
        row_bytes = _row_bytes(few) if few is not None and few.num_rows else 0
        rows = max(_MEASURED_ROWS, min(rows, _SAMPLE_BYTES // max(row_bytes, 1)))
        whole = file.schema_arrow
        names = [name for name in dict.fromkeys(columns) if len(whole.get_all_field_indices(name)) == 1]
        batch = next(file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False), None)
        schema = pa.schema([whole.field(name) for name in names], whole.metadata)
        table = pa.Table.from_batches([] if batch is None else [batch.select(names)], schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(0, rows))
    return {"table": base64.b64encode(sink.getvalue()).decode(), "row_bytes": row_bytes}


def _row_bytes(batch: pa.RecordBatch) -> int:
    """The bytes of one row; of a dictionary, which is there once for all rows, an average entry."""
    from denoise_batch.parquet.output_file import without_dictionaries

    rows, dictionaries = without_dictionaries(batch)
    entries = sum(-(-values.nbytes // max(len(values), 1)) for values in dictionaries)
    return int(-(-rows.nbytes // rows.num_rows) + entries)


def _open(path: str) -> Any:
    from denoise_batch.parquet.input_file import open_parquet

    return open_parquet(path, buffer=1 << 20)


def _fault_of_ends(path: str) -> str | None:
    from denoise_batch.parquet.input_file import fault_of_ends

    with contextlib.suppress(Exception):  # it may be gone, or out of reach: the first error has said so
        return fault_of_ends(path)
    return None


def _first_line(error: BaseException) -> str:
    if isinstance(error, UnicodeEncodeError):
        return NOT_UTF8
    return _ENCRYPTED if "decrypt" in str(error) else first_line(error)  # pyarrow's word is about its own options


def _main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    sent: set[str] = set()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "group" in request:
                answer = _read_sample(request["path"], request["group"], request["columns"], request["rows"])
            else:
                answer = _read_footer(request["path"])
        except Exception as error:  # a foreign file can raise anything; the answer carries it
            answer = {"error": _fault_of_ends(request["path"]) or _first_line(error)}
        if answer.get("schema_id") in sent:
            del answer["schema"]
        elif "schema_id" in answer:
            sent.add(answer["schema_id"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
