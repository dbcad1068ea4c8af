"""Linux's control groups that this process is in, by which containers and batch systems limit it.

for group in groups_of("memory"):
    (group / "memory.max").exists()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def groups_of(controller: str) -> Iterator[Path]:
    """The folder of each group of a controller (`cpu`, `memory`) around this process, from its own to the root.

    Each limits it, v2's groups as v1's. Folders need not exist: a container may see its own group as the root, whatever
    its path outside. Other systems have no groups.
    """
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / controllers
        own = root / path.lstrip("/")
        yield from (group for group in (own, *own.parents) if group.is_relative_to(root))
