"""Checkpoints are whole or absent, and no byte of them can be wrong unnoticed."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import DrivetrainError, IntegrityError, StoreError
from drivetrain.hal.bytes import CHUNK_BYTES, checksum
from drivetrain.migration import checkpoint, checkpoint_form
from drivetrain.migration import loaded as loaded_checkpoint
from drivetrain.migration.integrity import Layout, Manifest, TensorSpec, state_hash
from drivetrain.pytorch.image import summed
from drivetrain.store.crash import crash_points

TREE = b'{"rng":[1,2,3],"u":"\\u00e9"}'
MANIFEST = Manifest(
    (
        TensorSpec("flag", "bool", (3,), (1,), 3),
        TensorSpec("w", "float32", (5, 7), (7, 1), 140),
        TensorSpec("tied", "float32", (7,), (1,), 28, alias_of="w", alias_offset=28),
        TensorSpec("half", "bfloat16", (3,), (1,), 6),
        TensorSpec("none", "float32", (0,), (1,), 0),
        TensorSpec("step", "int64", (), (), 8, klass="read_only"),
        TensorSpec("turned", "float32", (2, 3), (1, 2), 24),
        TensorSpec("c", "complex128", (2,), (1,), 32),
    ),
    {"main": [{"params": ["w"]}]},
    {"length": 9},
    "f00d",
    {"loop": {"epochs": 1}},
)


def hashes_of(layout: Layout, image: int) -> list[int]:
    """The chunk hashes of a state that lies in its layout at address ``image``."""
    parts = [(p.chunk, checksum(image + p.start, p.nbytes, p.first_word)) for p in layout.pieces()]
    return summed(layout.nbytes, parts)


def address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer else 0


def image_of(manifest: Manifest, seed: int = 1) -> bytearray:
    layout = Layout.of(manifest)
    image = bytearray(layout.nbytes)
    rng = random.Random(seed)
    for spec in manifest.tensors:
        if spec.alias_of is None:
            offset = layout.offsets[layout.index[spec.name]]
            image[offset : offset + spec.nbytes] = rng.randbytes(spec.nbytes)
    if "flag" in layout.index:
        offset = layout.offsets[layout.index["flag"]]
        image[offset : offset + 3] = b"\x01\x00\x01"
    return image


def save(
    directory: Path,
    step: int = 10,
    epoch: int = 1,
    manifest: Manifest = MANIFEST,
    content: bytearray | None = None,
    **more: Any,
) -> Path:
    content = image_of(manifest, step) if content is None else content
    digest = state_hash(hashes_of(Layout.of(manifest), address(content)), TREE)
    given: dict[str, Any] = {
        "facts": manifest.to_json(),
        "tree_json": TREE,
        "state_hash": digest,
        "image": memoryview(content),
    }
    return checkpoint.write(directory, step=step, epoch=epoch, **(given | more))


def contents(path: Path) -> bytes:
    with loaded_checkpoint.load(path) as loaded:
        buffer = bytearray(b"\xee" * loaded.nbytes)
        loaded.read_into(address(buffer))
        return bytes(buffer)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "deep" / "checkpoints", step=12, epoch=3)
    assert path.name == "step-000000000012-e3"
    image = image_of(MANIFEST, 12)
    assert contents(path) == image
    with loaded_checkpoint.load(path) as loaded:
        assert (loaded.step, loaded.epoch, loaded.nbytes) == (12, 3, len(image))
        assert loaded.facts == MANIFEST.to_json()
        assert loaded.manifest == MANIFEST
        assert loaded.tree_json == TREE
        hashes = hashes_of(loaded.layout, address(image))
        assert loaded.state_hash == state_hash(hashes, TREE)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state.safetensors"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_single_tensors_aliases_and_ranges_are_read(tmp_path: Path) -> None:
    image = image_of(MANIFEST, 10)
    with loaded_checkpoint.load(save(tmp_path)) as loaded:
        w = loaded.layout.offsets[loaded.layout.index["w"]]
        for name, start, nbytes in (("w", w, 140), ("tied", w + 28, 28)):
            buffer = bytearray(nbytes)
            assert loaded.read(name, address(buffer)) == nbytes
            assert buffer == image[start : start + nbytes]
        for start in range(0, loaded.nbytes, 100):
            stop = min(start + 100, loaded.nbytes)
            buffer = bytearray(b"\xee" * (stop - start))
            loaded.read_into(address(buffer), start, stop)
            assert buffer == image[start:stop]
        with pytest.raises(StoreError, match="no tensor"):
            loaded.read("other", 0)


@cache
def big() -> tuple[Manifest, bytearray]:
    sizes = [CHUNK_BYTES + 12, 40, 3, CHUNK_BYTES // 2, 2 * CHUNK_BYTES + 4]
    dtypes = ["float32", "int64", "uint8", "float16", "float32"]
    width = {"float32": 4, "int64": 8, "uint8": 1, "float16": 2}
    manifest = Manifest(
        tuple(
            TensorSpec(f"t{i}", d, (n // width[d],), (1,), n)
            for i, (n, d) in enumerate(zip(sizes, dtypes, strict=True))
        )
    )
    return manifest, image_of(manifest)


@pytest.mark.parametrize("step", [1 << 30, 1 << 20, 65_536 + 64])
def test_several_chunks_come_back_however_they_were_cut(tmp_path: Path, step: int) -> None:
    manifest, image = big()
    view = memoryview(image)
    parts = (view[i : i + step].toreadonly() for i in range(0, len(image), step))
    digest = state_hash(hashes_of(Layout.of(manifest), address(image)), TREE)
    path = checkpoint.write(
        tmp_path,
        step=1,
        epoch=1,
        facts=manifest,
        tree_json=TREE,
        state_hash=digest,
        image=parts,
    )
    assert contents(path) == image


def test_the_safetensors_library_reads_the_data(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    numpy = pytest.importorskip("numpy")
    from safetensors import safe_open

    path = save(tmp_path)
    layout, image = Layout.of(MANIFEST), image_of(MANIFEST, 10)
    raw = {
        n: image[o : o + s]
        for n, o, s in zip(layout.names, layout.offsets, layout.sizes, strict=False)
    }
    with safe_open(path / "state.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(layout.names)
        assert file.metadata()["step"] == "10"
        for name, shape in (("w", (5, 7)), ("step", ()), ("flag", (3,)), ("none", (0,))):
            tensor = file.get_tensor(name)
            assert tensor.shape == shape
            assert tensor.tobytes() == raw[name]
        assert file.get_tensor("w").dtype == numpy.float32
        assert file.get_tensor("c").tobytes() == raw["c"]
        turned = file.get_tensor("turned")  # in memory order: the transposed
        assert turned.shape == (3, 2)
        assert turned.tobytes() == raw["turned"]
        assert file.get_slice("half").get_dtype() == "BF16"


def test_an_empty_state_is_a_state(tmp_path: Path) -> None:
    empty = Manifest()
    path = save(tmp_path, manifest=empty, content=bytearray())
    loaded_checkpoint.verify(path)
    assert contents(path) == b""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_flipped_byte_anywhere_is_found(saved: Path, data: Any) -> None:
    name = data.draw(st.sampled_from(["manifest.json", "state.safetensors"]))
    file = saved / name
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(damaged)
    try:
        with pytest.raises(IntegrityError):
            loaded_checkpoint.verify(saved)
        with pytest.raises(IntegrityError):
            contents(saved)
    finally:
        file.write_bytes(whole)
    loaded_checkpoint.verify(saved)  # the control: unflipped it is valid


def test_a_flipped_byte_in_any_chunk_is_found_when_its_tensor_is_read(tmp_path: Path) -> None:
    manifest, image = big()
    path = save(tmp_path, manifest=manifest, content=image)
    file = path / "state.safetensors"
    for offset in (0, 9, 500, CHUNK_BYTES, 2 * CHUNK_BYTES - 1, file.stat().st_size - 1):
        with open(file, "r+b") as f:
            f.seek(offset)
            byte = f.read(1)[0]
            f.seek(offset)
            f.write(bytes([byte ^ 0x10]))
            f.flush()
            with pytest.raises(IntegrityError):
                contents(path)
            f.seek(offset)
            f.write(bytes([byte]))
    assert contents(path) == image


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_a_shortened_or_missing_file_is_found(tmp_path: Path, name: str) -> None:
    path = save(tmp_path)
    size = (path / name).stat().st_size
    for keep in (size - 1, 1, 0):
        os.truncate(path / name, keep)
        with pytest.raises(IntegrityError):
            loaded_checkpoint.load(path)
    (path / name).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        loaded_checkpoint.load(path)


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, step=5)
    other = path.rename(tmp_path / "step-000000000006-e1")
    with pytest.raises(IntegrityError, match="renamed"):
        loaded_checkpoint.load(other)


def test_two_are_kept_and_the_newest_is_of_the_highest_epoch(tmp_path: Path) -> None:
    for step, epoch in ((10, 1), (20, 1), (30, 1), (15, 2)):
        save(tmp_path, step, epoch)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-000000000015-e2", "step-000000000030-e1"]
    assert checkpoint.newest_valid(tmp_path).path == tmp_path / "step-000000000015-e2"
    assert checkpoint.newest_valid(tmp_path / "none").path is None


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 10)
    bad = save(tmp_path, 20)
    (bad / "manifest.json").write_bytes(b"{}")
    save(tmp_path, 30)
    names = sorted(p.name[:17] for p in tmp_path.iterdir())
    assert names == ["step-000000000010", "step-000000000020", "step-000000000030"]


def test_the_newest_valid_falls_back_and_says_why(tmp_path: Path) -> None:
    old = save(tmp_path, 10)
    new = save(tmp_path, 20)
    assert checkpoint.newest_valid(tmp_path) == checkpoint.Found(new, ())
    data = bytearray((new / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (new / "state.safetensors").write_bytes(data)
    found = checkpoint.newest_valid(tmp_path)
    assert found.path == old
    assert found.skipped[0][0] == new
    assert "damaged" in found.skipped[0][1]
    (old / "manifest.json").unlink()
    assert checkpoint.newest_valid(tmp_path).path is None


def test_bytes_that_are_not_the_state_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="hash"):
        save(tmp_path, state_hash="0" * 32)
    with pytest.raises(IntegrityError, match="64 bytes"):
        save(tmp_path, image=memoryview(bytearray(64)))
    assert list(tmp_path.iterdir()) == []


FAULTS = [
    "enospc:checkpoint.data:1",
    "enospc:checkpoint.data:2",
    "eio:checkpoint.data.sync:1",
    "enospc:checkpoint.manifest.write:1",
    "eio:checkpoint.manifest.sync:1",
    "eio:checkpoint.manifest.dirsync:1",
    "eio:checkpoint.temporary.dirsync:1",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_or_failing_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    before = save(tmp_path, 10)
    monkeypatch.setenv("DRIVETRAIN_FAULT_WRITE", fault)
    with pytest.raises(StoreError, match="full" if fault.startswith("enospc") else "EIO"):
        save(tmp_path, 20)
    assert list(tmp_path.iterdir()) == [before]
    loaded_checkpoint.verify(before)


def test_saving_the_same_step_again_keeps_or_replaces_it(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    inode = path.stat().st_ino
    assert save(tmp_path, 10) == path
    assert path.stat().st_ino == inode
    (path / "manifest.json").write_bytes(b"{}")
    assert save(tmp_path, 10) == path
    assert contents(path) == image_of(MANIFEST, 10)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


SCRIPT = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from test_checkpoint import save
save(pathlib.Path(sys.argv[1]), 30)
"""
POINTS = {
    "checkpoint.data": False,
    "checkpoint.data.sync": False,
    "checkpoint.manifest": False,
    "files.sync": False,
    "files.rename": False,
    "files.dirsync": False,
    "files.done": False,
    "checkpoint.temporary.dirsync": False,
    "checkpoint.rename": False,
    "checkpoint.dirsync": True,
    "checkpoint.done": True,
    "checkpoint.prune": True,
    "checkpoint.pruned": True,
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_a_valid_checkpoint_stays_and_the_rest_is_tidied(
    tmp_path: Path, point: str
) -> None:
    home, directory = tmp_path / "home", tmp_path / "checkpoints"
    save(directory, 10)
    save(directory, 20)
    env = os.environ | {"DRIVETRAIN_HOME": str(home), "DRIVETRAIN_CRASH_AT": f"{point}:1"}
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(directory), here], env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    found = checkpoint.newest_valid(directory)
    assert found.skipped == ()
    assert found.path is not None
    assert found.path.name.startswith("step-000000000030" if POINTS[point] else "step-000000000020")
    save(directory, 40)
    names = sorted(p.name[:17] for p in directory.iterdir())
    second = "step-000000000030" if POINTS[point] else "step-000000000020"
    assert names == [second, "step-000000000040"]


def test_every_point_of_writing_is_tried() -> None:
    named = {n for n in crash_points() if n.startswith(("checkpoint.", "files."))}
    # Replacing a damaged checkpoint, and what the training room does with one after it is written.
    elsewhere = {"checkpoint.replace", "checkpoint.record"}
    assert named - elsewhere == set(POINTS)


def test_a_format_of_the_future_is_said(tmp_path: Path) -> None:
    path = save(tmp_path)
    body = {"format": 99}
    (path / "manifest.json").write_bytes(checkpoint_form.sealed(body))
    with pytest.raises(DrivetrainError, match="format 99"):
        loaded_checkpoint.load(path)


def test_two_threads_saving_the_same_step_leave_one_whole_checkpoint(tmp_path: Path) -> None:
    """A periodic checkpoint and one that was asked for meet at a step."""
    with ThreadPoolExecutor(8) as pool:
        for step in range(10):
            paths = set(pool.map(lambda _, step=step: save(tmp_path, step), range(8)))
            assert len(paths) == 1
            loaded_checkpoint.verify(paths.pop())
    assert [path.name for path in tmp_path.glob(".*")] == []
