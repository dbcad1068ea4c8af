"""Shows a finished run's output in an object store: copies within the store, then the manifest, then `_SUCCESS`.

Each step may be repeated. A reader that goes by `_SUCCESS` sees the old output, none, or the new one: never a mix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xxhash

from denoise_batch.errors import DenoiseBatchError
from denoise_batch.inference import assembly
from denoise_batch.inference.manifest import BAD_ROWS, FOLDER, MANIFEST, REPORT, RUN, SUCCESS
from denoise_batch.inference.store_run import CLEARED, REPLACING, STAGING, StoreRun, check_ours, withdraw
from denoise_batch.storage import publishing
from denoise_batch.storage.object_store import in_parallel

if TYPE_CHECKING:
    from denoise_batch.images.layouts import ImageColumn
    from denoise_batch.inference.ledger import Receipt


def publish(run: StoreRun, column: ImageColumn, compression: str, report: dict[str, Any]) -> None:
    """Makes OUT of the committed objects.

    Raises:
        OutputError: another run has taken the output.
        DenoiseBatchError: what stands in the store is not what was committed.
    """
    store = run.out
    run.ledger.flush()
    run.owner.check(ask=True)
    _make_room(run)
    files = [entry for _, entry in assembly.parts(run)]
    aside = [entry for _, entry in assembly.set_aside(run)]
    _copy_all(run)
    folder = run.built / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if not files:
        files.append(assembly.write_empty_part(run, column, run.built, compression))
        store.put(files[0]["path"], run.built / files[0]["path"])
    _fetch_bad_rows(run)
    assembly.describe(run, folder, files, aside, report, success=run.built / SUCCESS)
    for name in (BAD_ROWS, REPORT, MANIFEST):
        if (folder / name).exists():
            store.put(f"{FOLDER}/{name}", folder / name)
    run.owner.check(ask=True)
    store.put(SUCCESS, run.built / SUCCESS)
    for name in (f"{FOLDER}/{MANIFEST}", SUCCESS):
        if store.read(name) != (run.built / name).read_bytes():
            raise DenoiseBatchError(
                f"{store}/{name} is not what was written: another run writes there too",
                hint="run the same command again once no other run works on this output",
            )
    run.discard()


def _make_room(run: StoreRun) -> None:
    """Deletes an output that stood there: first what makes it one, so that no reader takes what is left for it."""
    store = run.out
    if store.read(CLEARED) == run.id.encode():
        return
    names = store.sizes()
    check_ours(store, names)  # others may have come since the run began
    old = [name for name in names if not name.startswith(f"{RUN}/")]
    if old:
        store.put(REPLACING, run.id.encode())
        for name in (SUCCESS, f"{FOLDER}/{MANIFEST}"):
            store.delete([name])
        store.delete(old)
    store.put(CLEARED, run.id.encode())


def _copy_all(run: StoreRun) -> None:
    store = run.out
    wanted = {entry["path"]: (name, entry["bytes"]) for name, entry in assembly.parts(run)}
    wanted |= {f"{FOLDER}/{entry['path']}": (name, entry["bytes"]) for name, entry in assembly.set_aside(run)}
    # Since there was room, what stands there is ours: copies appear whole.
    there = store.sizes()
    missing = [path for path, (_, size) in wanted.items() if there.get(path) != size]
    in_parallel(lambda path: store.copy(f"{STAGING}/{wanted[path][0]}", path), missing)
    there = store.sizes() if missing else there
    for path, (_, size) in wanted.items():
        if there.get(path) != size:
            raise DenoiseBatchError(
                f"{store}/{path} has {there.get(path, 0)} bytes, not {size}", hint="run the same command again"
            )
    check_ours(store, there)
    # Left by a run of this very identity that was planned anew: nothing that the manifest would not name stays.
    store.delete(path for path in there if path not in wanted and not path.startswith(f"{RUN}/"))


def _fetch_bad_rows(run: StoreRun) -> None:
    receipts = [receipt for receipt in run.ledger.receipts.values() if receipt.bad_file]

    def fetch(receipt: Receipt) -> bool:
        name = receipt.bad_file
        content = run.out.read(f"{STAGING}/{name}")
        if content is None:
            raise DenoiseBatchError(f"{run.out}/{STAGING}/{name} is gone", hint="run the same command again")
        publishing.write_file(run.staging / name, content)
        return receipt.bad_digest in {"", xxhash.xxh3_128_hexdigest(content)}

    whole = in_parallel(fetch, receipts)
    damaged = [receipt for receipt, is_whole in zip(receipts, whole, strict=True) if not is_whole]
    if damaged:
        withdraw(run, [receipt.unit for receipt in damaged], "its list of bad rows is damaged")
        raise assembly.damaged_file(f"{run.out}/{STAGING}/{damaged[0].bad_file}")
