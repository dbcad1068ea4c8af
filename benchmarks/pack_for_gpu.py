"""Packs Ray, and what else this project needs, for a machine without network that has PyTorch and a GPU.

    python benchmarks/pack_for_gpu.py OUT --mnist FOLDER [--python 3.12]

Such a machine is often lent for minutes, and takes little. Ray's wheel alone is 79 MB; this writes 32 MB into the
folder OUT, 11 of them MNIST:

- `site.tar.xz`: Ray without the parts in `UNUSED` and without symbols, and the packages in `CARRIED`. The other
  dependencies are taken to be there: PyTorch, NumPy, PyArrow, pandas, typer, aiohttp, grpcio, …;
- `mnist/`: MNIST's files;
- `setup.sh`: unpacks the one, and prints what the environment needs.

OUT is copied beside a checkout, and there, in the checkout's folder,

    eval "$(sh OUT/setup.sh)" && python3 -m denoise_batch.cli infer …

`OUT/setup.sh FOLDER` unpacks to another folder than /tmp/site. `pip` must reach a package index here; what it downloads
has the versions in constraints.txt, and is for x86-64 Linux.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"

CARRIED = (
    "ray",
    # what Ray imports
    "annotated-types",
    "jsonschema",
    "jsonschema-specifications",
    "pydantic",
    "pydantic_core",
    "referencing",
    "rpds-py",
    "typing-inspection",
    # what the agents of its nodes, and its dashboard's server, import: without one of them all of them do less
    "aiohttp-cors",
    "colorful",
    "googleapis-common-protos",
    "opencensus",
    "opencensus-context",
    "opentelemetry-api",
    "opentelemetry-exporter-prometheus",
    "opentelemetry-proto",
    "opentelemetry-sdk",
    "opentelemetry-semantic-conventions",
    # what denoise_batch imports
    "platformdirs",
    "tensorboardX",
)
"""What machines that have PyTorch and its usual company still lack."""

UNUSED = (
    "ray/cpp",
    "ray/dashboard/client/**/*.map",
    "ray/jars",
    "ray/llm",
    "ray/rllib",
    "ray/serve",
    "ray/**/examples",
    "ray/**/tests",
    "**/*.pyi",
    "**/*.pxd",
    "**/*.pxi",
    "**/*.pyx",
    "*.dist-info/RECORD",
)
"""What nothing that we run imports, as patterns of paths."""

# The newest kind of wheel first; pip takes no "or older".
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]

SETUP = """\
#!/bin/sh
# In the folder of the checkout: eval "$(sh {name}/setup.sh)"; made by benchmarks/pack_for_gpu.py
set -e
here=$(cd "$(dirname "$0")" && pwd)
site=${{1:-/tmp/site}}
if [ ! -e "$site/.unpacked" ]; then
  mkdir -p "$site"
  tar -xJf "$here/site.tar.xz" -C "$site" || python3 -m tarfile -e "$here/site.tar.xz" "$site" >&2
  touch "$site/.unpacked"
fi
echo "export PYTHONPATH='$site:$PWD${{PYTHONPATH:+:$PYTHONPATH}}'"
echo "export DENOISE_BATCH_MNIST='$here/mnist'"
"""
"""Workers import the checkout's modules before they know of the driver, so PYTHONPATH has its folder too."""


def download(folder: Path, python: str) -> None:
    """Unpacks the wheels of `CARRIED` for that version of Python into the folder."""
    with tempfile.TemporaryDirectory(prefix="wheels-") as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--constraint", str(CONSTRAINTS), "--dest", wheels, "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp"]
        command += [word for name in PLATFORMS for word in ("--platform", name)]
        subprocess.run([*command, *CARRIED], check=True)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.infolist():
                    file = Path(archive.extract(member, folder))
                    if not member.is_dir():
                        file.chmod(0o755 if member.external_attr >> 16 & 0o100 else 0o644)


def remove_unused(folder: Path) -> None:
    for pattern in UNUSED:
        for path in list(folder.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def strip(folder: Path) -> None:
    """Takes the symbols out of programs and libraries, which are a third of them."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                is_program = file.read(4) == b"\x7fELF"
            if is_program:
                subprocess.run(["strip", "--strip-unneeded", str(path)], check=True)


def pack(folder: Path, archive: Path) -> None:
    """Files of one kind side by side, in the order that packs best; machine code as xz knows it."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.suffix, path.name))
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    with (
        lzma.open(archive, "wb", format=lzma.FORMAT_XZ, filters=filters) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.GNU_FORMAT) as tar,
    ):
        for path in files:
            entry = tar.gettarinfo(path, str(path.relative_to(folder)))
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            with path.open("rb") as file:
                tar.addfile(entry, file)


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in [folder, *folder.rglob("*")] if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--mnist", type=Path, required=True, metavar="FOLDER", help="MNIST's IDX files, gzipped")
    parser.add_argument("--python", default="3.12", metavar="3.N", help="that machine's Python; default: 3.12")
    options = parser.parse_args()
    images = sorted(options.mnist.glob("*.gz"))
    if not images:
        parser.error(f"{options.mnist} has no .gz files")
    out: Path = options.out
    (out / "mnist").mkdir(parents=True, exist_ok=True)
    for file in images:
        shutil.copyfile(file, out / "mnist" / file.name)
    (out / "setup.sh").write_text(SETUP.format(name=out.name))
    with tempfile.TemporaryDirectory(prefix="site-") as base:
        site = Path(base)
        download(site, options.python)
        whole = megabytes(site)
        remove_unused(site)
        strip(site)
        begun = time.monotonic()
        pack(site, out / "site.tar.xz")
        print(f"site: {whole:.0f} MB, {megabytes(site):.0f} MB without what is unused, ", end="")
        print(f"{megabytes(out / 'site.tar.xz'):.1f} MB packed in {time.monotonic() - begun:.0f} s")
    print(f"{out}: {megabytes(out):.1f} MB")


if __name__ == "__main__":
    main()
