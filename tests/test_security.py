"""Attacks: nothing that is read runs code, writes or deletes elsewhere, or shows a secret. See docs/security.md.

Every crafted input carries a canary: a file that its code, if it ran, would make.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import os
import pickle
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import denoise_batch
from denoise_batch import cluster, console, storage
from denoise_batch.bundle import read_bundle
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.cli import run
from denoise_batch.cluster import quiet_ray
from denoise_batch.digits import Split, load_mnist, mnist
from denoise_batch.errors import (
    ColumnError,
    DenoiseBatchError,
    FlagError,
    MissingFileError,
    ModelError,
    OutputError,
    ParquetError,
    ResumeError,
)
from denoise_batch.forward import in_float32
from denoise_batch.images import Polarity
from denoise_batch.images.encoded import UndecodableImage, decode_image
from denoise_batch.images.layouts import output_column
from denoise_batch.inference import assembly, manifest
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions, denoise_unit
from denoise_batch.inference.ledger import Ledger, Receipt
from denoise_batch.inference.plan import Plan, make_plan
from denoise_batch.inference.run_folder import open_run, work_folder
from denoise_batch.process import environment
from denoise_batch.process.environment import refuse_old_ray_train, refuse_unsafe_switches
from denoise_batch.storage import publishing, redaction
from denoise_batch.storage.listing import list_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(denoise_batch.__file__).parent
IDENTITY = {"model_sha256": "0" * 64, "on_bad_row": "null"}
SECRETS = ("TOPSECRET", "TOP/SECRET", "HIDDENTOKEN")


class _Bomb:
    """Pickles to a call that makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.canary),))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """Must not exist at the end of a test."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "what was read has run code"


def _payload(canary: Path) -> bytes:
    return pickle.dumps(_Bomb(canary))


def test_the_canary_can_sing(tmp_path: Path) -> None:
    pickle.loads(_payload(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


# --- nothing that could run code is called ----------------------------------------------------------------------------

_FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "code"}
_FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "np.load",
    "numpy.load",
    "pd.read_pickle",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "importlib.import_module",
    "runpy.run_path",
}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _unsafe(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names] + [str(node.module)]
            found += [name for name in names if set(name.split(".")) & _FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            name = _dotted(node.func)
            # `re.compile` and `.eval()` of a network are others than the built-ins.
            found += [name] if name in _FORBIDDEN_CALLS else []
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value in (False, None)
                if keyword.arg in {"shell", "allow_pickle", "trust_remote_code"} and not allowed:
                    found.append(f"{name}({keyword.arg}=)")
    return found


def test_no_module_of_ours_loads_or_runs_what_data_hold() -> None:
    found = {str(path.relative_to(PACKAGE)): _unsafe(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 50
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import _pickle as x; from ray import cloudpickle",
        "import torch; torch.load(f)",
        "np.load(f)",
        "eval(x)",
        "subprocess.run(x, shell=True)",
        "f(allow_pickle=True)",
        "import yaml; yaml.load(f)",
        "__import__(x)",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert _unsafe(line)


# --- crafted Parquet --------------------------------------------------------------------------------------------------


def _image(n: int = 4) -> pa.Array:
    return pa.array([bytes([255] * 5 + [0] * 779)] * n, pa.binary(784))


def _extension(name: str, metadata: bytes) -> dict[bytes, bytes]:
    return {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": metadata}


def _beside(array: pa.Array, name: str, metadata: bytes) -> pa.Table:
    """The image column, and one of an extension type that this process does not know."""
    field = pa.field("evil", array.type, metadata=_extension(name, metadata))
    return pa.table([_image(), array], schema=pa.schema([pa.field("image", pa.binary(784)), field]))


def _nested(array: pa.Array, name: str, metadata: bytes) -> pa.Table:
    inner = pa.field("x", array.type, metadata=_extension(name, metadata))
    struct = pa.StructArray.from_arrays([array], fields=[inner])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), struct)
    return pa.table({"image": _image(), "evil": lists})


def _crafted(payload: bytes, canary: Path) -> dict[str, pa.Table]:
    blobs = pa.array([payload] * 4, pa.large_binary())
    pixels = pa.array([[1] * 784] * 4, pa.list_(pa.uint8()))
    fixed = pa.array([[1] * 784] * 4, pa.list_(pa.uint8(), 784))
    plain = pa.table({"image": _image()})
    shell = f"$(mkdir {canary})"
    return {
        "a column of pickled objects": _beside(blobs, "ray.data.arrow_pickled_object", b""),
        "pickled objects with pickled metadata": _beside(blobs, "ray.data.arrow_pickled_object", payload),
        "a tensor with pickled metadata": _beside(pixels, "ray.data.arrow_tensor", payload),
        "a large tensor with pickled metadata": _beside(pixels, "ray.data.arrow_tensor_v2", payload),
        "a ragged tensor with pickled metadata": _beside(blobs, "ray.data.arrow_variable_shaped_tensor", payload),
        "Arrow's own Python type": _beside(blobs, "arrow.py_extension_type", payload),
        "an unknown type with pickled metadata": _beside(blobs, "evil.type", payload),
        "pandas' period type with pickled metadata": _beside(blobs, "pandas.period", payload),
        "Hugging Face's array type": _beside(pixels, "datasets.features.features.Array2DExtensionType", payload),
        "pickled objects in lists of structs": _nested(blobs, "ray.data.arrow_pickled_object", payload),
        "a tensor in lists of structs": _nested(fixed, "ray.data.arrow_tensor", payload),
        "pickles as a dictionary": pa.table({"image": _image(), "evil": blobs.cast(pa.binary()).dictionary_encode()}),
        "pandas metadata": plain.replace_schema_metadata(
            {
                "pandas": json.dumps(
                    {
                        "index_columns": [shell],
                        "columns": [{"name": "image", "pandas_type": "os.system", "numpy_type": f"exec:{shell}"}],
                    }
                )
            }
        ),
        "pandas metadata that are a pickle": plain.replace_schema_metadata({b"pandas": payload}),
        "Hugging Face metadata": plain.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "os.mkdir", "path": str(canary)}}}})}
        ),
        "an Arrow schema that is a pickle": plain.replace_schema_metadata({b"ARROW:schema": payload}),
        "our own note, a pickle": plain.replace_schema_metadata({b"denoise_batch": payload}),
        "names for a shell": pa.table({"image": _image(), shell: [1] * 4, f"`mkdir {canary}`": [2] * 4}),
        "names for a terminal": pa.table({"image": _image(), "\x1b]0;owned\x07\x1b[2J": [1] * 4}),
        "paths of other files": pa.table(
            {
                "image": pa.array(
                    [{"bytes": None, "path": f"|mkdir {canary}"}, {"bytes": payload, "path": "/etc/passwd"}]
                )
            }
        ),
        "images that are pickles": pa.table({"image": pa.array([payload] * 4, pa.binary())}),
        "image of a pickled tensor type": pa.table(
            [pixels],
            schema=pa.schema([pa.field("image", pixels.type, metadata=_extension("ray.data.arrow_tensor", payload))]),
        ),
        "image of pickled objects": pa.table(
            [blobs],
            schema=pa.schema(
                [pa.field("image", blobs.type, metadata=_extension("ray.data.arrow_pickled_object", payload))]
            ),
        ),
    }


REFUSED = {
    "an Arrow schema that is a pickle",
    "images that are pickles",
    "image of a pickled tensor type",
    "image of pickled objects",
}
NAMES = list(_crafted(b"", Path("x")))


def test_there_are_more_than_ten_attacks() -> None:
    assert len(NAMES) >= 20


def _registered_by_others() -> list[Any]:
    """A type of each of the attacks' names that a library registers, of those libraries that are loaded."""
    found = []
    if module := sys.modules.get("pandas.core.arrays.arrow.extension_types"):
        found.append(module._period_type)
    if module := sys.modules.get("datasets.features.features"):
        found.append(module.Array2DExtensionType((1, 2), "int64"))
    if module := sys.modules.get("ray.data._internal.tensor_extensions.arrow"):
        found += [module.ArrowTensorType((1,), pa.int64()), module.ArrowTensorTypeV2((1,), pa.int64())]
        found.append(module.ArrowVariableShapedTensorType(pa.int64(), 1))
    if module := sys.modules.get("ray.data._internal.object_extensions.arrow"):
        found.append(module.ArrowPythonObjectType())
    return found


@pytest.fixture
def as_in_a_driver() -> Iterator[None]:
    """Extension types that other tests have had registered in this process are unknown, as where the program runs."""
    taken = []
    for kind in _registered_by_others():
        with contextlib.suppress(pa.ArrowException):
            pa.unregister_extension_type(kind.extension_name)
            taken.append(kind)
    yield
    for kind in taken:
        pa.register_extension_type(kind)


@pytest.mark.slow
@pytest.mark.usefixtures("as_in_a_driver")
@pytest.mark.parametrize("name", NAMES)
def test_crafted_parquet_runs_nothing(name: str, tmp_path: Path, canary: Path) -> None:
    table = _crafted(_payload(canary), canary)[name]
    source = tmp_path / "in.parquet"
    pq.write_table(table, source)
    listing = list_inputs([str(source)])
    if name in REFUSED:
        with pytest.raises((ColumnError, ParquetError)):
            make_plan(listing.files, None, Polarity.LIGHT_ON_DARK, "denoised")
        return
    plan = make_plan(listing.files, None, Polarity.LIGHT_ON_DARK, "denoised")
    receipt, target = _denoise(plan, tmp_path)
    with pq.ParquetFile(target) as file:
        assert file.schema_arrow.names == [*table.schema.names, "denoised"]
        for field in table.schema:  # carried on as it is, for whoever trusts it
            assert (file.schema_arrow.field(field.name).metadata or {}).items() >= (field.metadata or {}).items()
    assert receipt.rows_out == len(table)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        run(["inspect", str(source), "--verify"])
        run(["inspect", str(source), "--json"])
    assert "\x1b" not in shown.getvalue()


def _denoise(plan: Plan, folder: Path) -> tuple[Receipt, Path]:
    options = UnitOptions(
        str(folder), plan.column, output_column(plan.column, "denoised"), plan.polarity, OnBadRow.NULL, "zstd"
    )
    receipt = denoise_unit(
        Assignment(plan.unit(0), plan.files[0], 1, "staged.parquet"), options, in_float32(lambda x: x)
    )
    assert isinstance(receipt, Receipt), receipt
    return receipt, folder / receipt.file


_WITH_RAY = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import ray.data
from ray.data._internal.tensor_extensions import arrow as tensors
from ray.data._internal.object_extensions import arrow as objects
tensors._AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA = True  # as a node has it where the driver has not: Ray looks only once
from denoise_batch.storage.listing import list_inputs
from denoise_batch.bundle import SHIPPED_FOLDER, find_bundle
from denoise_batch.images import Polarity
from denoise_batch.images.layouts import output_column
from denoise_batch.inference.denoise_unit import Assignment, OnBadRow, UnitOptions
from denoise_batch.inference.plan import make_plan
from denoise_batch.inference.pool_size import PoolSize
from denoise_batch.inference.unit_pool import DenoiseUnit, ModelToLoad
from denoise_batch.precision import Precision
staging = Path(sys.argv[1])
model = ModelToLoad(str(SHIPPED_FOLDER), find_bundle(SHIPPED_FOLDER).sha256, None, "cpu", Precision.AUTO)
for number, source in enumerate(sys.argv[2:]):
    plan = make_plan(list_inputs([source]).files, None, Polarity.LIGHT_ON_DARK, "denoised")
    options = UnitOptions(
        str(staging), plan.column, output_column(plan.column, "denoised"), plan.polarity, OnBadRow.NULL, "zstd"
    )
    actor = DenoiseUnit(options, model, PoolSize(1, 1, 1, 1, 0.9, 0.0))
    assignment = Assignment(plan.unit(0), plan.files[0], 1, f"{number}.parquet")
    answers = [json.loads(answer["answer"][0])[0] for answer in actor({"assignment": [json.dumps(asdict(assignment))]})]
    print(number, answers[-1])
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_crafted_parquet_runs_nothing_in_a_worker_of_ray(tmp_path: Path, canary: Path) -> None:
    tables = _crafted(_payload(canary), canary)
    names = [name for name in NAMES if name not in REFUSED]
    for number, name in enumerate(names):
        pq.write_table(tables[name], tmp_path / f"{number}.in.parquet")
    staging = tmp_path / "staging"
    staging.mkdir()
    sources = [str(tmp_path / f"{number}.in.parquet") for number in range(len(names))]
    script = [sys.executable, "-P", "-c", _WITH_RAY, str(staging), *sources]
    done = subprocess.run(
        script, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.stdout.splitlines() == [f"{number} receipt" for number in range(len(names))], done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["pyarrow", "numpy", "json", "denoise_batch", "multiprocessing", "runpy"])
def test_modules_that_lie_beside_the_data_are_not_imported(module: str, tmp_path: Path, canary: Path) -> None:
    (tmp_path / f"{module}.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    pq.write_table(pa.table({"image": _image()}), tmp_path / "in.parquet")
    start = "from denoise_batch.console import *; import sys; from denoise_batch.cli import run; "
    done = subprocess.run(
        # -P stands for the installed command: it starts beside itself, not in the current folder.
        [sys.executable, "-P", "-c", start + "sys.exit(run(sys.argv[1:]))", "inspect", "in.parquet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    joining = (
        "import multiprocessing, concurrent.futures as f\n"
        "from denoise_batch.inference.merging import _safe_path\n"
        "with _safe_path(), f.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:\n"
        "    assert pool.submit(abs, -1).result() == 1\n"
    )
    subprocess.run([sys.executable, "-P", "-c", joining], cwd=tmp_path, check=True)


# --- crafted images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "WEBP", "TGA", "EPS", "PDF", "ICNS", "JPEG2000"])
def test_only_png_and_jpeg_are_decoded(kind: str, canary: Path) -> None:
    data = io.BytesIO()
    try:
        Image.new("L", (28, 28)).save(data, kind)
    except (KeyError, OSError):
        pytest.skip(f"this pillow does not write {kind}")
    content = data.getvalue()
    if kind == "EPS":  # pillow hands EPS to Ghostscript, whose language can run commands
        content = content.replace(b"%%EndComments", f"%%EndComments\n(%pipe%mkdir {canary}) (r) file".encode())
    for head in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"):
        with pytest.raises(UndecodableImage):
            decode_image(head + content)


def test_profiles_and_exif_are_data() -> None:
    image, exif = Image.new("RGB", (28, 28), "white"), Image.Exif()
    exif[0x010E] = "$(reboot)"
    exif[0x0112] = 6  # turned by 90°: pixels are taken as they are stored
    for kind in ("PNG", "JPEG"):
        data = io.BytesIO()
        image.save(data, kind, exif=exif, icc_profile=os.urandom(3000))
        assert decode_image(data.getvalue()).min() > 250


# --- crafted model folders --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from denoise_batch.models import build

    folder = tmp_path / "model"
    save_bundle(folder, build("seed"), BundleCard("seed"))
    return folder


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _weights(folder: Path, content: bytes) -> None:
    """Weights that model.json vouches for."""
    import hashlib

    (folder / "model.safetensors").write_bytes(content)
    described = json.loads((folder / "model.json").read_text())["weights"]
    _change(folder, weights=described | {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)})


def _attacks_on_models(canary: Path) -> dict[str, Callable[[Path], object]]:
    payload = _payload(canary)
    code = f"__import__('os').mkdir({str(canary)!r})"
    bomb = b'{"a":{"dtype":"F32","shape":[1099511627775],"data_offsets":[0,4398046511100]}}'
    return {
        "a pickle as weights": lambda folder: _weights(folder, payload),
        "a zip of torch.save as weights": lambda folder: _weights(folder, _torch_file(payload)),
        "a header that asks for terabytes": lambda f: _weights(f, len(bomb).to_bytes(8, "little") + bomb + bytes(64)),
        "a header longer than the file": lambda f: _weights(f, (2**63).to_bytes(8, "little") + b"{}"),
        "a module as architecture": lambda folder: _change(folder, architecture="os.system"),
        "a path as architecture": lambda folder: _change(folder, architecture="../../evil.py"),
        "code as architecture": lambda folder: _change(folder, architecture=code),
        "a class attribute as architecture": lambda folder: _change(folder, architecture="__class__"),
        "code as a parameter": lambda folder: _change(folder, parameters={"width": code}),
        "a dunder as a parameter": lambda folder: _change(folder, parameters={"__class__": "os"}),
        "self as a parameter": lambda folder: _change(folder, parameters={"self": 1}),
        "10⁹ layers": lambda f: _change(f, architecture="bounds-unet", parameters={"blocks_in": 10**9}),
        "10¹⁵ channels": lambda f: _change(f, architecture="bounds-unet", parameters={"width": 10**15}),
        "endless channels": lambda f: _change(f, architecture="bounds-unet", parameters={"width": 1e999}),
        "a deep model.json": lambda f: (f / "model.json").write_text("[" * 200_000),
        "a large model.json": lambda f: os.truncate(f / "model.json", 1 << 30),
        "a key twice": lambda f: (f / "model.json").write_text('{"format": 1, "format": 2}'),
        "a number of a million digits": lambda f: (f / "model.json").write_text("1" * 1_000_000),
        "a pipe": lambda f: ((f / "model.json").unlink(), os.mkfifo(f / "model.json")),
        "a device": lambda f: ((f / "model.json").unlink(), (f / "model.json").symlink_to("/dev/zero")),
    }


def _torch_file(payload: bytes) -> bytes:
    import zipfile

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    return content.getvalue()


@pytest.mark.parametrize("name", _attacks_on_models(Path("x")))
@pytest.mark.timeout(30)
def test_a_crafted_model_folder_is_refused_and_runs_nothing(name: str, model: Path, canary: Path) -> None:
    _attacks_on_models(canary)[name](model)
    with pytest.raises(ModelError):
        read_bundle(model).load()


def test_other_files_in_a_model_folder_are_never_looked_at(model: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", "model.pkl", "modeling.py", "__init__.py", "sitecustomize.py"):
        (model / name).write_bytes(_payload(canary))
    (model / "README.md").unlink()
    (model / "README.md").symlink_to("/etc/passwd")
    assert read_bundle(model).load()


def test_a_link_in_tensorboards_folder_brings_nothing_along(tmp_path: Path) -> None:
    from denoise_batch.models import build

    (tmp_path / "private").write_text("TOPSECRET")
    board = tmp_path / "tensorboard"
    board.mkdir()
    (board / "events").write_text("fine")
    (board / "link").symlink_to(tmp_path / "private")
    save_bundle(tmp_path / "model", build("seed"), BundleCard("seed"), tensorboard=board)
    assert [path.name for path in (tmp_path / "model" / "tensorboard").iterdir()] == ["events"]


# --- crafted run folders and outputs ----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Run:
    """An unfinished run whose only unit is committed, and a file elsewhere that must survive."""

    source: Path
    out: Path
    precious: Path

    @property
    def folder(self) -> Path:
        return work_folder(self.out)

    def start(self, *, overwrite: bool = False) -> list[str]:
        """Runs to the end, all units made anew where they are missing; gives OUT's files."""
        listing = list_inputs([str(self.source)])

        def plan() -> Plan:
            return make_plan(listing.files, None, Polarity.LIGHT_ON_DARK, "denoised")

        with open_run(self.out, listing.files, IDENTITY, plan, overwrite=overwrite) as run_folder:
            column = output_column(run_folder.plan.column, "denoised")
            if 0 not in run_folder.ledger.receipts:
                receipt, _ = _denoise(run_folder.plan, run_folder.staging)
                run_folder.ledger.commit(receipt)
            if not self.stop:
                publishing.publish(assembly.build_folder(run_folder, column, "zstd", {}), self.out, overwrite=overwrite)
                run_folder.discard()
        return sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*")) if not self.stop else []

    stop: bool = True

    def rewrite(self, **changes: Any) -> None:
        """The receipt as an attacker would have it, with a digest that fits its line."""
        segment = self.folder / "ledger" / "000001.jsonl"
        with Ledger(self.folder / "ledger", read_only=True) as ledger:
            receipt = dataclasses.replace(ledger.receipts[0], **changes)
        segment.unlink()
        with Ledger(self.folder / "ledger") as ledger:
            ledger.commit(receipt)

    def intact(self) -> bool:
        return self.precious.read_text() == "precious" and not self.precious.is_symlink()


@pytest.fixture
def unfinished(tmp_path: Path, footers_read_here: None) -> _Run:  # noqa: ARG001
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": _image()}), tmp_path / "in" / "a.parquet")
    (tmp_path / "elsewhere").mkdir()
    precious = tmp_path / "elsewhere" / "precious"
    precious.write_text("precious")
    found = _Run(tmp_path / "in", tmp_path / "out", precious)
    found.start()
    found.stop = False
    return found


def test_an_honest_run_goes_on(unfinished: _Run) -> None:
    assert "part-00000.parquet" in unfinished.start()


@pytest.mark.parametrize("field", ["file", "bad_file", "quarantine_file"])
@pytest.mark.parametrize("name", ["../../elsewhere/precious", "{precious}", "..", "sub/dir"])
def test_a_receipt_that_names_another_folder_is_refused(unfinished: _Run, field: str, name: str) -> None:
    name = name.format(precious=unfinished.precious)
    unfinished.rewrite(**{field: name, "bytes": 8})
    with pytest.raises(ResumeError, match="outside"):
        unfinished.start()
    assert unfinished.intact()
    assert "part-00000.parquet" in unfinished.start(overwrite=True)
    assert unfinished.intact()


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp", "year=2024/..", "a=b/../../../x", "plain"])
def test_a_plan_that_names_another_folder_is_refused(unfinished: _Run, name: str) -> None:
    path = unfinished.folder / "plan.json"
    content = json.loads(path.read_text())
    content["files"][0][1] = name
    path.write_text(json.dumps(content))
    with pytest.raises(ResumeError, match="damaged run"):
        unfinished.start()
    assert unfinished.intact()


def test_a_staged_link_is_not_published(unfinished: _Run) -> None:
    with Ledger(unfinished.folder / "ledger", read_only=True) as ledger:
        staged = unfinished.folder / "staging" / ledger.receipts[0].file
    elsewhere = unfinished.precious.with_name("copy.parquet")
    staged.rename(elsewhere)
    staged.symlink_to(elsewhere)  # right size, right digest: still not ours
    (unfinished.folder / "staging" / "stray").symlink_to(unfinished.precious.parent)
    files = unfinished.start()
    assert not any((unfinished.out / name).is_symlink() for name in files)
    assert elsewhere.exists()
    assert unfinished.intact()


@pytest.mark.parametrize("name", ["staging", "ledger", "output", "plan.json", "identity.json", "anything"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_in_a_run_folder_is_refused(unfinished: _Run, name: str, overwrite: bool) -> None:
    publishing.remove(unfinished.folder / name)
    (unfinished.folder / name).symlink_to(unfinished.precious.parent)
    with pytest.raises(OutputError, match="is a link"):
        unfinished.start(overwrite=overwrite)
    assert unfinished.intact()


def test_a_run_folder_that_is_a_link_is_refused(unfinished: _Run) -> None:
    moved = unfinished.folder.rename(unfinished.precious.with_name("run"))
    unfinished.folder.symlink_to(moved)
    with pytest.raises(OutputError, match="is a link"):
        unfinished.start(overwrite=True)
    unfinished.folder.unlink()
    unfinished.folder.symlink_to(unfinished.precious.parent)  # where all would be deleted as left over
    with pytest.raises(OutputError, match="is a link"):
        unfinished.start(overwrite=True)
    assert unfinished.intact()


def test_a_lock_that_is_a_link_makes_no_file(unfinished: _Run) -> None:
    (unfinished.folder / "lock").unlink(missing_ok=True)
    (unfinished.folder / "lock").symlink_to(unfinished.precious.with_name("made"))
    with pytest.raises(OutputError, match="is a link"):
        unfinished.start()
    assert not unfinished.precious.with_name("made").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_run_that_another_user_prepared_is_refused(unfinished: _Run) -> None:
    os.chown(unfinished.folder, 12345, 12345)
    with pytest.raises(OutputError, match="another user"):
        unfinished.start(overwrite=True)


def test_a_run_folder_is_private(unfinished: _Run) -> None:
    assert stat.S_IMODE(unfinished.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((unfinished.folder / "plan.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("mask", [0o077, 0o027])
def test_outputs_follow_the_umask(unfinished: _Run, mask: int) -> None:
    unfinished.start(overwrite=True)
    publishing.remove(unfinished.out)
    before = os.umask(mask)
    try:
        unfinished.start()
        paths = [unfinished.out, *unfinished.out.rglob("*")]
        assert all(stat.S_IMODE(path.stat().st_mode) & mask == 0 for path in paths)
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["../elsewhere/precious", "{precious}", "a/../../elsewhere/precious"])
def test_a_manifest_that_names_other_files_is_a_fault_and_they_are_left_alone(unfinished: _Run, name: str) -> None:
    unfinished.start()
    path = unfinished.out / "_denoise_batch" / "manifest.json"
    content = json.loads(path.read_text())
    name = name.format(precious=unfinished.precious)
    entry = {"path": name, "bytes": 8, "digest": manifest.file_digest(unfinished.precious)}
    for kind in ("files", "sidecar"):
        content[kind].append(entry)
    path.write_text(json.dumps(content))
    (unfinished.out / "_SUCCESS").write_text(f"{manifest.DIGEST} {manifest.file_digest(path)}\n")
    assert any("no file of the output" in fault for fault in manifest.verify(unfinished.out))
    (unfinished.out / "link").symlink_to(unfinished.precious.parent)
    unfinished.start(overwrite=True)
    assert unfinished.intact()


def test_a_link_planted_under_a_temporary_name_is_not_followed(
    unfinished: _Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"
    planted = tmp_path / ".report.json.writing"
    planted.symlink_to(unfinished.precious)
    publishing.write_file(target, b"one")
    assert unfinished.intact()
    planted.symlink_to(unfinished.precious)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # as if planted after we looked
    with pytest.raises(FileExistsError):
        publishing.write_file(target, b"two")
    assert unfinished.intact()


def test_a_training_that_names_another_folder_is_refused(tmp_path: Path) -> None:
    from denoise_batch.training.request import _check_snapshot

    path = tmp_path / "checkpoint_manager_snapshot.json"
    (tmp_path / "checkpoint_2026").mkdir()
    good = {"checkpoint_dir_name": "checkpoint_2026", "metrics": {}}
    for name in ("../../elsewhere", "/etc", "..", ""):
        bad = {"checkpoint_dir_name": name, "metrics": {}}
        for results, pending, latest in (([bad], [], good), ([good], [bad], good), ([], [], bad)):
            content = {"checkpoint_results": results, "pending_training_results": pending}
            path.write_text(json.dumps(content | {"latest_checkpoint_result": latest}))
            with pytest.raises(ResumeError, match="elsewhere"):
                _check_snapshot(path)
    content = {"checkpoint_results": [good], "pending_training_results": [], "latest_checkpoint_result": good}
    path.write_text(json.dumps(content))
    _check_snapshot(path)


# --- secrets ----------------------------------------------------------------------------------------------------------

URIS = [
    "nonsense://KEY:TOPSECRET@bucket/x.parquet",
    "nonsense://KEY:TOP/SECRET@bucket/x.parquet",
    "s3://KEY:TOP/SECRET@bucket/x.parquet",
    "s3://KEY:TOPSECRET?@bucket/x.parquet",
    "s3://KEY:TOPSECRET#@bucket/x.parquet",
    "s3://KEY:TOPSECRET@bucket:port/x.parquet",
    "s3://KEY:%54OPSECRET%zz@bucket/x.parquet",
    "s3://KEY:TOPSECRET@bucket/x?secret_key=HIDDENTOKEN",
    "s3://KEY:TOPSECRET@bucket/x?allow_bucket_creation=HIDDENTOKEN",
    "s3://bucket/x?access_token=HIDDENTOKEN",
    "s3://bucket/x?scheme=zzz&endpoint_override=http://KEY:TOPSECRET@host",
    "gs://bucket/x?retry_limit_seconds=HIDDENTOKEN",
    "gs://KEY:TOPSECRET@bucket/x",
    "abfs://KEY:TOPSECRET@container/x?sas=HIDDENTOKEN",
    "file://KEY:TOPSECRET@host/x.parquet",
    "s3:/KEY:TOPSECRET@bucket/x.parquet",
]


@pytest.mark.parametrize("uri", URIS)
def test_secrets_are_redacted(uri: str) -> None:
    for text in (redaction.redact(uri), redaction.redact(f"--data={uri}")):
        assert not _leaks(text)
    assert not _leaks(redaction.without_secrets(f"cannot open '{uri}': no 'HIDDENTOKEN' or TOPSECRET", uri))
    assert not _leaks(redaction.without_secrets("cannot resolve KEY:TOPSECRET@host or HIDDENTOKEN", uri)) or (
        # A text may hold what this URI does not: that is no leak of it.
        "TOPSECRET" not in uri or "HIDDENTOKEN" not in uri
    )


def _leaks(text: str) -> bool:
    return any(secret in text for secret in SECRETS)


def test_what_is_no_secret_is_shown() -> None:
    for path in ("/data/a@b:c?d.parquet", "s3://bucket/a@b/c.parquet", "hdfs://name:8020/x", "x:y@z", "in.parquet"):
        assert redaction.redact(path) == path
        assert redaction.without_secrets(f"{path} is damaged", path) == f"{path} is damaged"


COMMANDS = {
    "infer": ["infer", "{}", "out"],
    "dry run": ["infer", "{}", "out", "--dry-run", "--json"],
    "output": ["infer", "in.parquet", "{}"],
    "inspect": ["inspect", "{}", "--verify", "--json"],
    "corrupt": ["corrupt", "{}", "noisy.parquet"],
    "corrupt's output": ["corrupt", "in.parquet", "{}"],
    "train": ["train", "--data={}", "--out", "model"],
    "evaluate": ["evaluate", "--data", "{}"],
    "evaluate a model": ["evaluate", "--model", "{}"],
    "preview": ["preview", "{}", "sheet.png"],
    "preview's output": ["preview", "in.parquet", "{}"],
    "digits": ["digits", "{}", "--source", "synthetic", "--count", "1"],
    "infer's model": ["infer", "in.parquet", "out", "--model={}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("uri", [URIS[1], URIS[6], URIS[8], URIS[11], URIS[14], URIS[15]])
def test_no_command_shows_a_secret(
    command: str,
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if "in.parquet" in COMMANDS[command]:  # what is read is ours
        request.getfixturevalue("footers_read_here")
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"image": _image()}), "in.parquet")
    arguments = [part.format(uri) for part in COMMANDS[command]]
    for more in ([], ["-v"]):
        assert run([*arguments, *more]) != 0
        shown = capsys.readouterr()
        assert not _leaks(shown.out + shown.err), shown


def test_the_command_to_go_on_with_says_that_something_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.session, "arguments", ("infer", "s3://KEY:TOPSECRET@bucket/x", "out"))
    assert console.session.again() == (
        "denoise-batch infer s3://bucket/x out (with what its URIs had of user, password and query)"
    )
    monkeypatch.setattr(console.session, "arguments", ("infer", "in", "out"))
    assert console.session.again() == "denoise-batch infer in out"


def test_nothing_that_a_run_leaves_behind_has_a_secret(unfinished: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "s3://KEY:TOPSECRET@bucket/a.parquet?session=HIDDENTOKEN"
    local = unfinished.source / "a.parquet"
    listing = list_inputs([str(unfinished.source)])
    remote = dataclasses.replace(listing.files[0], path=uri)
    planned = make_plan(listing.files, None, Polarity.LIGHT_ON_DARK, "denoised")
    planned = dataclasses.replace(planned, files=(dataclasses.replace(planned.files[0], path=uri),))
    for module in ("denoise_unit", "assembly"):
        monkeypatch.setattr(f"denoise_batch.inference.{module}.stat_input", lambda _: (remote.size, remote.mtime_ns))
    monkeypatch.setattr(storage, "locate", lambda _: (pa.fs.LocalFileSystem(), str(local)))
    out = unfinished.out.with_name("remote")
    bad = pa.table({"image": pa.array([None, *_image(3)], pa.binary(784))})
    pq.write_table(bad, local)
    with open_run(out, [remote], IDENTITY, lambda: planned, overwrite=False) as run_folder:
        receipt, _ = _denoise(run_folder.plan, run_folder.staging)
        run_folder.ledger.commit(receipt)
        assembly.reconcile(run_folder)
        private = run_folder.folder / "plan.json"
        for path in run_folder.folder.rglob("*"):
            if path.is_file() and path != private:
                assert not _leaks(path.read_bytes().decode("latin-1")), path
        column = output_column(run_folder.plan.column, "denoised")
        publishing.publish(assembly.build_folder(run_folder, column, "zstd", {}), out, overwrite=False)
        run_folder.discard()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any(path.name == "bad_rows.parquet" for path in files)
    for path in files:
        assert not _leaks(path.read_bytes().decode("latin-1")), path
    assert pq.read_table(out / "_denoise_batch" / "bad_rows.parquet")["file"].to_pylist() == ["s3://bucket/a.parquet"]


def test_a_failure_that_repeats_a_uri_is_cleaned(unfinished: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "s3://KEY:TOPSECRET@bucket/a.parquet?session=HIDDENTOKEN"
    listing = list_inputs([str(unfinished.source)])
    plan = make_plan(listing.files, None, Polarity.LIGHT_ON_DARK, "denoised")
    file = dataclasses.replace(plan.files[0], path=uri)
    monkeypatch.setattr("denoise_batch.inference.denoise_unit.stat_input", lambda _: (file.size, file.mtime_ns))

    def locate(path: str) -> None:
        raise OSError(f"cannot reach {path}, that is TOPSECRET with HIDDENTOKEN")

    monkeypatch.setattr(storage, "locate", locate)
    options = UnitOptions(
        str(unfinished.source), plan.column, output_column(plan.column, "d"), plan.polarity, OnBadRow.NULL, "zstd"
    )
    failure = denoise_unit(Assignment(plan.unit(0), file, 1, "x.parquet"), options, in_float32(lambda x: x))
    assert not _leaks(str(failure))


def test_a_model_folder_has_no_secret(tmp_path: Path) -> None:
    from denoise_batch.models import build

    uri = "s3://KEY:TOPSECRET@bucket/a.parquet?session=HIDDENTOKEN"
    card = BundleCard(
        "seed",
        command=f"denoise-batch train --data='{uri}' --column image",
        data={"source": "Parquet", "files": [[uri, 1, 2]], "rows": 1, "column": "image"},
    )
    save_bundle(tmp_path / "model", build("seed"), card)
    for path in (tmp_path / "model").rglob("*"):
        assert not _leaks(path.read_bytes().decode("latin-1")), path
    assert read_bundle(tmp_path / "model").model["command"].endswith("--data=s3://bucket/a.parquet --column image")


def test_a_trainings_identity_has_no_secret() -> None:
    from denoise_batch.images.layouts import ImageColumn, Layout
    from denoise_batch.training.data import ParquetImages

    column = ImageColumn("image", Layout.BINARY, "uint8", pa.binary(784))
    images = ParquetImages((("s3://K:TOPSECRET@b/x?t=HIDDENTOKEN", 1, 2),), (), column, None, Polarity.LIGHT_ON_DARK)
    assert not _leaks(json.dumps(images.identity()))


def test_messages_do_not_steer_a_terminal() -> None:
    error = DenoiseBatchError("column '\x1b]0;owned\x07' \x9b2J", hint="\x1b[31mred")
    assert error.message == "column '\\x1b]0;owned\\x07' \\x9b2J"
    assert error.hint == "\\x1b[31mred"


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
        "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
        "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
        "RAY_DATA_AUTOLOAD_SOMETHING_NEW",
        "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
    ],
)
@pytest.mark.parametrize("value", ["1", "true", "True", "yes", "2"])
def test_unsafe_switches_of_ray_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    refuse_unsafe_switches()
    monkeypatch.setenv(name, value)
    with pytest.raises(FlagError, match=name):
        refuse_unsafe_switches()


def test_the_first_version_of_ray_train_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("1", "true", "True"):
        monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", value)
        refuse_old_ray_train()
    for value in ("0", "false", ""):
        monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", value)
        with pytest.raises(FlagError, match="RAY_TRAIN_V2_ENABLED"):
            refuse_old_ray_train()
    monkeypatch.delenv("RAY_TRAIN_V2_ENABLED")
    refuse_old_ray_train()


def test_ray_has_no_unsafe_switch_that_we_do_not_know() -> None:
    """In the source of the Ray that is installed."""
    import importlib.util

    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    found = set()
    for path in (Path(spec.origin).parent / "data").rglob("*.py"):
        for word in path.read_text("utf-8", errors="replace").replace('"', " ").replace("`", " ").split():
            if word.startswith("RAY_DATA_") and any(part in word for part in ("AUTOLOAD", "UNSAFE", "PICKLE", "TRUST")):
                found.add(word.split("=")[0].strip("(),.:'"))
    found.discard("RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE")  # how Ray writes its own types; we write none
    known = {
        name for name in found if name.startswith(environment._UNSAFE_PREFIX) or name in environment._UNSAFE_SWITCHES
    }
    assert known
    assert found == known


def test_a_worker_refuses_them_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from denoise_batch.inference.unit_pool import DenoiseUnit

    monkeypatch.setenv("RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR", "1")
    staging: Any = type("Options", (), {"staging": str(tmp_path)})()
    with pytest.raises(FlagError):
        DenoiseUnit(staging, None, None)  # type: ignore[arg-type]


def test_what_is_started_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dashboard, nothing on another machine; and the cluster is not told a secret of the command line."""
    import ray
    from ray._private import utils

    seen: dict[str, Any] = {}

    def init(**arguments: Any) -> None:
        seen.update(arguments, entrypoint=utils.get_entrypoint_name())
        raise ConnectionError("far enough")

    before = utils.get_entrypoint_name
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # The integration tests' Ray may run in this process: it is neither used nor ended.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_shut_down", lambda _: None)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(sys, "argv", ["denoise-batch", "infer", "s3://KEY:TOPSECRET@bucket/x"])
    with pytest.raises(DenoiseBatchError, match="far enough"), cluster.connect():
        pass
    assert seen["address"] == "local"
    assert seen["include_dashboard"] is False
    assert seen["entrypoint"] == "denoise-batch infer s3://bucket/x"
    assert utils.get_entrypoint_name is before


def test_rays_token_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    with quiet_ray.private_token():
        token.parent.mkdir()
        token.write_text("x")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    token.chmod(0o644)
    with quiet_ray.private_token():
        pass
    assert stat.S_IMODE(token.stat().st_mode) == 0o644  # it was there: not ours to change


@pytest.mark.parametrize("where", ["RAY_TMPDIR", "TMPDIR"])
def test_a_token_that_no_home_has_a_place_for_is_private(tmp_path: Path, where: str) -> None:
    """And ends with the process. A file stands in for the home: root may write into any folder, but into none there."""
    script = (
        "import os; from denoise_batch.cluster import quiet_ray; from pathlib import Path\n"
        "from ray._private.authentication import authentication_token_setup as setup\n"
        "before = setup.generate_and_save_token\n"
        "with quiet_ray.private_token(): setup.generate_and_save_token()\n"
        "assert setup.generate_and_save_token is before\n"
        "path = Path(os.environ['RAY_AUTH_TOKEN_PATH'])\n"
        "child = os.fork()\n"
        "if not child: raise SystemExit\n"
        "os.waitpid(child, 0)\n"
        "from ray._raylet import AuthenticationTokenLoader\n"
        "assert AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)\n"
        "print(path, oct(path.stat().st_mode), oct(path.parent.stat().st_mode), len(path.read_text()))"
    )
    (tmp_path / "home").touch()
    (tmp_path / "tmp").mkdir()
    folder = tmp_path / ("new/ray" if where == "RAY_TMPDIR" else "tmp")
    named = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), where: str(folder)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", script], env=kept | named, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path, *modes, length = done.stdout.split()
    assert Path(path).parent.parent == folder
    assert (modes, length) == (["0o100600", "0o40700"], "64")
    assert not list(folder.iterdir())


# --- downloads --------------------------------------------------------------------------------------------------------


def test_mnist_comes_over_https_alone() -> None:
    assert all(mirror.startswith("https://") for mirror in mnist.MIRRORS)
    request = urllib.request.Request(mnist.MIRRORS[0])
    follow = mnist._SameScheme().redirect_request
    assert follow(request, io.BytesIO(), 302, "", {}, "https://example.org/x") is not None
    with pytest.raises(urllib.error.URLError):
        follow(request, io.BytesIO(), 302, "", {}, "http://example.org/x")


def test_a_huge_file_in_mnists_place_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "t10k-images-idx3-ubyte").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(MissingFileError, match="more"):
        load_mnist(tmp_path, Split.TEST)


def test_arrays_of_mnist_are_only_numbers(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"\x93NUMPY" + _payload(canary))
    with pytest.raises(MissingFileError):
        load_mnist(tmp_path, Split.TEST)
    assert np.uint8 is not object
