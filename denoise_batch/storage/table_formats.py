"""Folders that are tables of Delta Lake, Hudi or Iceberg: their log says which rows of which files are live.

Read as plain files they would give rows that were deleted or replaced long ago.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from denoise_batch.errors import ParquetError

if TYPE_CHECKING:
    from collections.abc import Iterable

LOGS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
"""Folders that such a table has at its top."""

ICEBERG_FOLDER, _ICEBERG_SUFFIX = "metadata", ".metadata.json"


def check_no_table(shown: str, names: Iterable[str]) -> None:
    """Refuses what holds a table.

    Args:
        shown: what the names are relative to, as a message may name it.
        names: of files at any depth, with slashes.

    Raises:
        ParquetError: it does.
    """
    for name in names:
        *folders, file = name.split("/")
        for depth, folder in enumerate(folders):
            if folder in LOGS:
                raise is_table("/".join([shown, *folders[:depth]]), LOGS[folder])
        if folders and folders[-1] == ICEBERG_FOLDER and file.endswith(_ICEBERG_SUFFIX):
            raise is_table("/".join([shown, *folders[:-1]]), "Iceberg")


def check_not_in_table(paths: Iterable[str]) -> None:
    """Refuses local files that lie in a table, however deep.

    Args:
        paths: absolute.

    Raises:
        ParquetError: one does.
    """
    folders: set[Path] = set()
    for parent in {os.path.dirname(path) for path in paths}:  # noqa: PTH120 (a million paths)
        folders.update((Path(parent), *Path(parent).parents))
    for folder in sorted(folders):
        for log, kind in LOGS.items():
            if os.path.isdir(folder / log):  # noqa: PTH112 (no error where it may not be looked at)
                raise is_table(str(folder), kind)
        if any((folder / ICEBERG_FOLDER).glob(f"*{_ICEBERG_SUFFIX}")):
            raise is_table(str(folder), "Iceberg")


def is_table(shown: str, kind: str) -> ParquetError:
    return ParquetError(
        f"{shown} is a table of {kind}, whose log says which rows of its files are live",
        hint="write the table's rows of today to plain Parquet files, and name these",
    )
