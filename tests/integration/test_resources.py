"""What runs out, or is killed for having taken too much: the job ends soon, says what it was, and can be gone on with.

What needs a disk of its own is in `small_disks.py`, which the last test here runs in a mount namespace.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch import models
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.digits import draw_digits
from denoise_batch.errors import DenoiseBatchError, JobFailed, ResourceExhausted
from denoise_batch.extra_columns import Denoised
from denoise_batch.images import encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference import infer as infer_module
from denoise_batch.inference import manifest, unit_pool
from denoise_batch.inference.infer import InferSettings, infer
from denoise_batch.inference.ledger import Ledger
from denoise_batch.inference.run_folder import work_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGE = output_column(None, "image", Layout.BINARY, "uint8")
UNITS, ROWS = 9, 60


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> InferSettings:
    """A request of nine small units; its output is named by each test."""
    folder = tmp_path_factory.mktemp("resources")
    (folder / "in").mkdir()
    for number in range(UNITS):
        pixels = draw_digits(ROWS, seed=3, start=number * ROWS)[0].reshape(ROWS, 784)
        table = pa.table({"id": range(number * ROWS, (number + 1) * ROWS), "image": encode(pixels, None, IMAGE)})
        pq.write_table(table, folder / "in" / f"{number}.parquet")
    save_bundle(folder / "model", models.build("seed"), BundleCard("seed"))
    return InferSettings((str(folder / "in"),), "", model=folder / "model", workers=1)


def _to(settings: InferSettings, out: Path) -> InferSettings:
    from dataclasses import replace

    return replace(settings, output=str(out))


def _dying(
    *,
    units: set[int] | None = None,
    begun: set[int] | None = None,
    loading: bool = False,
    error: Callable[[str], BaseException] | None = None,
    deaths: Path | None = None,
) -> type[Any]:
    """A DenoiseUnit that is killed in some units (None: in all), or while it loads its model; or raises an error.

    In those `begun`, after it has said that it began them. In the file `deaths` each leaves a byte.
    """

    def die(*_: object, **__: object) -> None:
        if deaths is not None:
            with deaths.open("ab") as file:
                file.write(b"x")
        if error is not None:
            raise error("16 EiB")
        os.kill(os.getpid(), signal.SIGKILL)

    class Half:
        """Stands in for the model, which takes seconds to load."""

        fingerprint = "half"

        def __init__(self, *_: object, **__: object) -> None:
            if loading:
                die()

        def prepare(self, *_: object) -> None: ...

        def denoise(self, pixels: Any, *_: object) -> Denoised:
            if units is None:
                die()
            return Denoised(pixels // 2)

    class Dying(unit_pool.DenoiseUnit):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            sys.modules["denoise_batch.denoiser"] = SimpleNamespace(Denoiser=Half)  # type: ignore[assignment]
            super().__init__(*arguments, **named)

        def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
            unit = json.loads(str(batch["assignment"][0]))["unit"]["index"]
            if unit in (units or ()):
                die()
            answers = super().__call__(batch)
            yield next(answers)
            if unit in (begun or ()):
                time.sleep(1)  # for the answer to leave
                die()
            yield from answers

    Dying.__name__ = "DenoiseUnit"
    return Dying


def _stops(settings: InferSettings, kind: type[DenoiseBatchError]) -> DenoiseBatchError:
    """The error that the run ends with. How soon, deaths count: how long one takes is the machine's affair."""
    with pytest.raises(kind) as caught:
        infer(settings)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert not Path(settings.output).exists()
    return caught.value


def _completes(settings: InferSettings, resumed: int) -> None:
    report = infer(settings)
    assert (report.rows_out, report.resumed_units) == (UNITS * ROWS, resumed)
    assert manifest.verify(Path(settings.output)) == []
    assert pq.read_table(settings.output)["id"].to_pylist() == list(range(UNITS * ROWS))


@pytest.mark.usefixtures("ray_session")
def test_units_that_kill_their_workers_are_named_and_the_others_finish(
    tmp_path: Path, settings: InferSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _to(settings, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(unit_pool, "DenoiseUnit", _dying(units={2}, begun={6}))
        patch.setattr(infer_module, "ATTEMPTS", 2)  # each takes seconds; that there are three, `test_failed_units` says
        error = _stops(settings, JobFailed)
    assert f"2 of {UNITS} units failed: unit 2 (" in error.message
    assert "out of memory" in error.message
    with Ledger(work_folder(tmp_path / "out") / "ledger") as ledger:
        assert sorted(ledger.receipts) == [unit for unit in range(UNITS) if unit not in {2, 6}]
        for unit in (2, 6):
            assert [failure.attempt for failure in ledger.failures.pop(unit)] == [1, 2]
        assert not ledger.failures  # those that waited behind them are not charged for it
    _completes(settings, UNITS - 2)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("loading", [False, True])
def test_workers_that_all_die_end_the_run_rather_than_be_replaced_for_ever(
    tmp_path: Path, settings: InferSettings, monkeypatch: pytest.MonkeyPatch, loading: bool
) -> None:
    dying = _dying(loading=loading, units=set() if loading else None, deaths=tmp_path / "deaths")
    monkeypatch.setattr(unit_pool, "DenoiseUnit", dying)
    error = _stops(_to(settings, tmp_path / "out"), ResourceExhausted)
    # Each takes two of the nine units along at first, so that units end before deaths do; the next wave counts anew.
    assert 5 <= (tmp_path / "deaths").stat().st_size <= 5 + 8
    assert "memory ran out" in error.message
    assert ("while they loaded the model" in error.message) == loading


@pytest.mark.usefixtures("ray_session")
def test_a_gpu_without_room_for_the_model_is_named(
    tmp_path: Path, settings: InferSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of no name that could be looked up: a worker does not find this module.
    no_room = lambda what: ResourceExhausted(f"no room for {what}", hint="make some")  # noqa: E731
    monkeypatch.setattr(unit_pool, "DenoiseUnit", _dying(loading=True, error=no_room))
    error = _stops(_to(settings, tmp_path / "out"), ResourceExhausted)
    assert error.message == "no room for 16 EiB"


@pytest.mark.usefixtures("ray_session")
def test_memory_that_runs_out_in_every_unit_ends_the_run(
    tmp_path: Path, settings: InferSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _to(settings, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(unit_pool, "DenoiseUnit", _dying(error=MemoryError))
        error = _stops(settings, ResourceExhausted)
    assert error.message.startswith("memory ran out in 6 attempts and no unit was finished: unit ")
    assert error.message.endswith("16 EiB (MemoryError)")
    _completes(settings, 0)


# --- a Ray of their own -----------------------------------------------------------------------------------------------

_FULL_STORE = """
import sys
import ray
from denoise_batch import cli
ray.init(
    "local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False,
    logging_level="ERROR", log_to_driver=False,
    _system_config={"automatic_object_spilling_enabled": False},
)
held = [ray.put(bytes(4_000_000)) for _ in range(17)]
code = cli.run(sys.argv[1:])
print(len(held), "objects held,", ray.available_resources().get("object_store_memory"))
sys.exit(code)
"""


def _command(settings: InferSettings) -> list[str]:
    return ["infer", *settings.inputs, settings.output, "--model", str(settings.model), "--workers", "1"]


def test_a_full_object_store_does_no_harm(tmp_path: Path, settings: InferSettings) -> None:
    script = tmp_path / "driver.py"
    script.write_text(_FULL_STORE)
    settings = _to(settings, tmp_path / "out")
    run = subprocess.run(
        [sys.executable, str(script), *_command(settings)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert manifest.verify(tmp_path / "out") == []


def test_workers_that_rays_memory_monitor_kills_end_the_run(tmp_path: Path, settings: InferSettings) -> None:
    settings = _to(settings, tmp_path / "out")
    run = subprocess.run(
        [sys.executable, "-m", "denoise_batch.cli", *_command(settings)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"},
    )
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("error: ") and "memory" in line], run.stderr


def test_disks_that_are_full_or_read_only_end_the_run_and_it_goes_on_when_they_are_mended() -> None:
    namespace = ["unshare", "--mount", *(["--map-root-user", "--user"] if os.geteuid() else [])]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted here")
    # Not tmp_path: the paths of Ray's sockets, which go below it, may have 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="disks-") as folder:
        script = Path(__file__).with_name("small_disks.py")
        run = subprocess.run(
            [*namespace, sys.executable, str(script), folder], capture_output=True, text=True, timeout=280
        )
    if run.returncode == 77:  # CANNOT_MOUNT there
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr
