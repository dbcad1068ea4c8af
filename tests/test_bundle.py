"""Model folders: what is written can be read, and nothing that was changed can."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from denoise_batch import bundle as bundle_module
from denoise_batch.bundle import SHIPPED_FOLDER, find_bundle, read_bundle
from denoise_batch.bundle.history import EpochRow, read_history
from denoise_batch.bundle.saving import BundleCard, save_bundle
from denoise_batch.errors import ModelError, OutputError
from denoise_batch.models import build
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Callable

HISTORY = tuple(
    EpochRow(e, 100 * e, 0.3 / e, 0.2 / e, 10.0 + e, 12.0 + e, 1e-3, 900.0, 2.5 * e, None, 10.0 + e) for e in (1, 2, 3)
)
CARD = BundleCard(
    architecture="seed",
    noise={"sigma": [0.0, 2.0], "half_range": [0.01, 1.5], "clipped": 0.25},
    recipe={"name": "seed"},
    command="denoise-batch train --recipe seed",
    data={"source": "MNIST"},
    metrics={
        "epoch": 3,
        "validation_psnr_noisy": 13.0,
        "validation_psnr_clean": 15.0,
        "images_trained": 300,
        "seconds": 7.5,
        "workers": 1,
        "device": "cpu",
    },
    history=HISTORY,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_bundle(folder, build("seed"), CARD)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing hidden is left
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_what_is_saved_is_read(folder: Path) -> None:
    torch.manual_seed(0)
    network = build("seed")
    bundle = read_bundle(folder)
    assert bundle.architecture == "seed"
    assert bundle.metrics == CARD.metrics
    assert bundle.noise == CARD.noise
    assert bundle.model["pixels"]["ink"] == 1.0
    loaded = bundle.load()
    noisy = torch.rand((2, 1, 28, 28))
    assert torch.equal(loaded(noisy), network(noisy))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_folder_is_complete(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "model.json", "history.csv", "curves.png", "README.md"}
    rows = read_history(folder / "history.csv")
    assert [(row.epoch, row.val_psnr_noisy) for row in rows] == [(1, 11), (2, 12), (3, 13)]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for expected in ("4,385 parameters", "13.00 dB", "MNIST", "σ from 0 to 2", read_bundle(folder).sha256):
        assert expected in card


def test_memory_format_does_not_matter(tmp_path: Path) -> None:
    network = build("bounds-unet", {"width": 8, "deep": 8, "bottleneck": 4})
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_bundle(tmp_path / "m", network, BundleCard("bounds-unet", network.parameters_json))
    loaded = read_bundle(tmp_path / "m").load()
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_reading_loads_neither_torch_nor_ray(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from denoise_batch.bundle import read_bundle;"
        f"read_bundle(Path({str(folder)!r})); print({{'torch', 'ray', 'matplotlib'}} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "set()"


def test_an_existing_folder_is_kept_unless_told(folder: Path) -> None:
    before = read_bundle(folder).sha256
    with pytest.raises(OutputError, match="exists"):
        save_bundle(folder, build("seed"), CARD)
    assert read_bundle(folder).sha256 == before
    save_bundle(folder, build("seed"), CARD, overwrite=True)
    assert read_bundle(folder).sha256 != before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_it_is_built_where_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what a death leaves of it would stay beside the model for good."""
    (tmp_path / "work").mkdir()
    built: list[Path] = []
    real = publishing.publish

    def publish(source: Path, out: Path, *, overwrite: bool) -> None:
        built.append(source)
        real(source, out, overwrite=overwrite)

    monkeypatch.setattr(publishing, "publish", publish)
    save_bundle(folder, build("seed"), CARD, overwrite=True, build_in=tmp_path / "work")
    assert [path.parent for path in built] == [tmp_path / "work"]
    assert not any((tmp_path / "work").iterdir())
    assert read_bundle(folder)


def _change_model(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        model = json.loads((folder / "model.json").read_text())
        change(model)
        (folder / "model.json").write_text(json.dumps(model))

    return damage


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _link(name: str, target: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def _fifo(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "missing"),
    "description missing": (lambda f: (f / "model.json").unlink(), "missing"),
    "one bit of the weights": (_flip, "SHA-256"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 500), "SHA-256"),
    "weights empty": (_write("model.safetensors", b""), "SHA-256"),
    "description cut": (lambda f: os.truncate(f / "model.json", 300), "damaged"),
    "description no object": (_write("model.json", b"[1]"), "no JSON object"),
    "description deeply nested": (_write("model.json", b"[" * 100_000), "damaged"),
    "description no text": (_write("model.json", b"\xff\xfe\x00"), "damaged"),
    "description with NaN": (_write("model.json", b'{"format": NaN}'), "NaN"),
    "description with a key twice": (_write("model.json", b'{"format": 1, "format": 2}'), "twice"),
    "another format": (_change_model(lambda m: m.update(format="gguf")), "does not describe"),
    "a later version": (_change_model(lambda m: m.update(format_version=2)), "format version 2"),
    "version true": (_change_model(lambda m: m.update(format_version=True)), "format version True"),
    "another pixel convention": (_change_model(lambda m: m["pixels"].update(ink=0.0)), "pixel convention"),
    "no hash": (_change_model(lambda m: m["weights"].pop("sha256")), "'sha256' is missing"),
    "weights a list": (_change_model(lambda m: m.update(weights=[])), "a list, not a dict"),
    "another hash": (_change_model(lambda m: m["weights"].update(sha256="0" * 64)), "SHA-256"),
    "other shapes": (
        _change_model(lambda m: m["weights"]["tensors"]["encode1.bias"].update(shape=[17])),
        "other tensors or shapes",
    ),
    "weights a link to nothing": (_link("model.safetensors", "nowhere"), "link to nothing"),
    "weights a link to itself": (_link("model.safetensors", "model.safetensors"), "cannot be read"),
    "weights a device": (_link("model.safetensors", "/dev/zero"), "not a regular file"),
    "weights a pipe": (_fifo, "not a regular file"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_refused_with_its_reason(folder: Path, name: str) -> None:
    damage, reason = DAMAGE[name]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        read_bundle(folder)
    assert reason in caught.value.message
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def _rehash(folder: Path, content: bytes) -> None:
    """What someone does who changes the weights and the hash with them."""
    (folder / "model.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    _change_model(lambda m: m["weights"].update(sha256=digest))(folder)


def _header(entry: object, data: int = 16, *, length: int | None = None) -> bytes:
    header = json.dumps(entry).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * data


def _tensor(shape: object = (4,), offsets: object = (0, 16), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"abc", "header is"),
        (_header({}, length=2**60), "header is"),
        (_header({}, 0), "no tensors"),
        (_header([1]), "no JSON object"),
        (_header({"a": 3}), "not described"),
        (_header({"a": _tensor(dtype="F99")}), "unknown number type"),
        (_header({"a": _tensor(dtype=["F32"])}), "unknown number type"),
        (_header({"a": _tensor(shape=[-4])}), "impossible shape"),
        (_header({"a": _tensor(shape=[2.0, 2])}), "impossible shape"),
        (_header({"a": _tensor(shape=[2**62, 2**62])}), "impossible shape"),
        (_header({"a": _tensor(offsets=[0])}), "impossible shape"),
        (_header({"a": _tensor(shape=[1] * 8 + [4])}), "impossible shape"),
        (_header({"a": _tensor(shape=[2**39] * 50_000)}), "impossible shape"),
        (_header({"a": _tensor(shape=[5], offsets=[0, 20])}), "outside the file"),
        (_header({"a": _tensor(offsets=[16, 0])}), "outside the file"),
        (_header({"a": _tensor(shape=[3])}), "takes 16 bytes"),
        (_header({"a": _tensor(shape=[2], offsets=[0, 8]), "b": _tensor(shape=[3], offsets=[4, 16])}), "overlap"),
        (_header({"a": _tensor(shape=[2], offsets=[8, 16])}), "overlap or leave gaps"),
        (_header({"a": _tensor()}, 20), "belong to no tensor"),
        (_header({"a": _tensor()}), "other tensors or shapes"),
    ],
    ids=range(20),
)
def test_a_header_that_lies_is_refused_though_the_hash_fits(folder: Path, content: bytes, reason: str) -> None:
    _rehash(folder, content)
    with pytest.raises(ModelError) as caught:
        read_bundle(folder)
    assert reason in caught.value.message


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    _change_model(lambda m: m.update(architecture="seed-transposed"))(folder)
    with pytest.raises(ModelError, match="the weights have it as"):
        read_bundle(folder).load()


def test_integers_that_are_none_are_refused(tmp_path: Path) -> None:
    network = build("bounds-unet", {"width": 2, "deep": 2, "bottleneck": 2})
    network.inlet.integers = network.inlet.integers.float()  # type: ignore[union-attr, operator, assignment]
    save_bundle(tmp_path / "m", network, BundleCard("bounds-unet", network.parameters_json))
    with pytest.raises(ModelError, match=r"'inlet\.integers' as \(2, 16, 3, 3\) of int8"):
        read_bundle(tmp_path / "m").load()


def test_weights_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    network = build("seed")
    name, weight = next(iter(network.named_parameters()))
    owner, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(owner), attribute, nn.Parameter(weight.round().int(), requires_grad=False))
    save_bundle(tmp_path / "m", network, BundleCard("seed"))
    with pytest.raises(ModelError, match=rf"{name}' as .*, the weights have it as .* of I32"):
        read_bundle(tmp_path / "m").load()


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [("unknown", {}), ("seed", {"width": 3}), ("bounds-unet", {"deep": 2**40}), ("bounds-unet", {"deep": "x"})],
)
def test_a_network_that_cannot_be_made_is_refused(folder: Path, architecture: str, parameters: dict[str, Any]) -> None:
    _change_model(lambda m: m.update(architecture=architecture, parameters=parameters))(folder)
    with pytest.raises(ModelError) as caught:
        read_bundle(folder).load()
    assert "\n" not in caught.value.message


def test_weights_exchanged_after_reading_are_refused(folder: Path) -> None:
    bundle = read_bundle(folder)
    _flip(folder)
    with pytest.raises(ModelError, match="has changed"):
        bundle.load()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = build("seed")
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    save_bundle(tmp_path / "m", network, BundleCard("seed"))
    with pytest.raises(ModelError, match="not finite"):
        read_bundle(tmp_path / "m").load()


def test_links_to_good_files_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    (tmp_path / "link").symlink_to("model")
    assert read_bundle(tmp_path / "link").load().parameter_count() == 4385


@pytest.mark.parametrize("kind", ["missing", "file", "broken link", "empty"])
def test_folders_that_are_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("x")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(ModelError) as caught:
        read_bundle(path)
    assert str(path) in caught.value.message


def test_which_model_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundle_module, "SHIPPED_FOLDER", tmp_path / "shipped")
    with pytest.raises(ModelError, match="no model"):
        find_bundle()
    shutil.copytree(folder, tmp_path / "shipped")
    assert find_bundle().folder == tmp_path / "shipped"
    shutil.copytree(folder, tmp_path / "denoise-model")
    assert find_bundle().folder == Path("denoise-model")
    assert find_bundle(folder).folder == folder
    (tmp_path / "denoise-model" / "model.json").unlink()
    with pytest.raises(ModelError, match="missing"):  # an unfit model is not passed over for another
        find_bundle()


def test_models_that_ship_have_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bounds-unet", "seed"):
        assert find_bundle(Path(name)).folder == SHIPPED_FOLDER.with_name(name)
        assert find_bundle(Path(name)).architecture == name
    assert find_bundle("seed").architecture == "seed"  # type: ignore[arg-type]
    for unknown in ("other", "reader", ".", "..", "", "pretrained/seed", "./seed/..", "a" * 300):
        with pytest.raises(ModelError):
            find_bundle(Path(unknown))
    (tmp_path / "bounds-unet").mkdir()  # no model, but it has the name
    with pytest.raises(ModelError, match=r"bounds-unet/model\.json is missing") as caught:
        find_bundle(Path("bounds-unet"))
    assert f"--model {SHIPPED_FOLDER}" in str(caught.value.hint)
    (tmp_path / ".seed.training").mkdir()  # so does one that is not finished
    with pytest.raises(ModelError, match="model folder seed"):
        find_bundle(Path("seed"))
    shutil.copytree(folder, tmp_path / "seed")  # a folder that is here goes first
    assert find_bundle(Path("seed")).folder == Path("seed")


def test_the_card_of_a_model_of_pairs_says_nothing_of_drawn_noise(tmp_path: Path) -> None:
    recipe = {"name": "default", "sigma": [0.0, 2.25], "clipped": 0.25, "batch": 256}
    card = replace(CARD, noise={"source": "noisy column", "column": "scan"}, recipe=recipe)
    save_bundle(tmp_path / "m", build("seed"), card)
    text = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    for said in (
        "the data's own, column `scan`",
        "their noise is the data's own",
        "--noisy-column COLUMN",
        '"batch": 256',
    ):
        assert said in text
    for unsaid in ("drawn as in training", '"sigma"', '"clipped"'):
        assert unsaid not in text


def test_the_card_of_a_model_of_pairs_says_what_was_drawn_beside_them(tmp_path: Path) -> None:
    recipe = {"name": "default", "sigma": [0.0, 2.25], "half_range": [0.01, 1.8], "gaussian": 0.15, "drawn_every": 4}
    card = replace(CARD, noise={"source": "noisy column", "column": "scan"}, recipe=recipe)
    save_bundle(tmp_path / "m", build("seed"), card)
    text = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert "the data's own, column `scan`; in its place for 25% of the images Gaussian blur, σ from 0 to 2.25" in text
    assert "15% of these have Gaussian" in text
    assert '"drawn_every": 4' in text
    save_bundle(tmp_path / "n", build("seed"), replace(CARD, recipe=recipe))
    assert '"drawn_every"' not in (tmp_path / "n" / "README.md").read_text(encoding="utf-8")


def test_the_card_names_every_kind_of_noise_and_how_sure_it_is(tmp_path: Path) -> None:
    noise = {"sigma": [0.0, 2.0], "half_range": [0.01, 1.5], "clipped": 0.25, "gaussian": 0.15, "impulse": 0.07}
    card = replace(CARD, noise=noise | {"clean": 0.05}, metrics=CARD.metrics | {"validation_quality_error": 1.37})
    save_bundle(tmp_path / "m", build("seed"), card)
    text = (tmp_path / "m" / "README.md").read_text()
    for words in ("15% of the images have Gaussian", "7% of the images have salt", "5% of the images are neither"):
        assert words in text
    assert "blurred only" not in text
    assert "another kind than these" in text
    assert "off by 1.37 dB" in text


def test_the_card_tells_of_each_training_that_weights_went_through(tmp_path: Path) -> None:
    first = {"sha256": "a" * 64, "command": "train one", "images_trained": 1000, "seconds": 2.0}
    second = {"sha256": "b" * 64, "command": "", "images_trained": 0, "seconds": 0, "init": first}
    save_bundle(tmp_path / "m", build("seed"), replace(CARD, data={"source": "MNIST", "init": second}))
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert (
        "- Began with the weights bbbbbbbbbbbb…\n- These began with the weights aaaaaaaaaaaa…, of a training of 1,000"
        in card
    )
    assert "in 2 s: `train one`\n" in card


def test_the_card_tells_what_was_no_digit(tmp_path: Path) -> None:
    recipe = {"name": "default", "sigma": [0.0, 2.25], "half_range": [0.01, 1.8], "batch": 256, "drawn_every": 4}
    recipe |= {"blank_every": 52, "foreign_every": 16, "foreign_still": 1 / 3}
    head = {"images": 1_234_567, "foreign_every": 8}
    save_bundle(tmp_path / "m", build("seed"), replace(CARD, recipe=recipe, data={"quality_head": head}))
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert "- One image in 52 is empty before its noise is drawn\n- One image in 16 is no digit" in card
    assert "its own images are, 33% of these have no noise\n" in card
    assert "1,234,567 images, one in 8 no digit" in card

    def said(**changes: Any) -> list[str]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "n"
        save_bundle(folder, build("seed"), replace(CARD, **changes))
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
        return [line[:25] for line in lines if line.startswith("- One image in ")]

    noise = {"source": "noisy column", "column": "scan"}
    assert said(recipe=recipe, noise=noise) == ["- One image in 52 is empt", "- One image in 64 is no d"]
    assert said(recipe=recipe | {"drawn_every": 0}, noise=noise) == []
    # Steps of fewer images have none.
    assert said(recipe=recipe | {"batch": 17}) == ["- One image in 16 is no d"]
    assert said(recipe=recipe | {"batch": 8}) == []
    assert said(recipe=recipe | {"batch": 17}, noise=noise) == []
