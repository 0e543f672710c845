"""Files of fits: whole or not at all, checked to the last byte, and no code is run from them."""

from __future__ import annotations

import os
import pickle
import random
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_vi import files

torch.set_num_threads(1)

CONTENT = {
    "tensors": {"a": torch.arange(200.0), "b": torch.tensor([True, False])},
    "recipe": {"family": "flow", "levels": 17, "shape": [1, 8, 8]},
    "template": (torch.ones(2, 3, dtype=torch.float64), None, 3.5, "name"),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "fit.pt"
    files.save(path, CONTENT)
    return path


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_what_is_saved_is_loaded(saved: Path) -> None:
    assert same(files.load(saved), CONTENT)
    assert same(files.load(str(saved)), CONTENT)


def test_a_file_is_replaced_whole(saved: Path) -> None:
    files.save(saved, {"tensors": {}})
    assert files.load(saved) == {"tensors": {}}
    assert list(saved.parent.iterdir()) == [saved]


def test_files_have_the_usual_permissions(saved: Path) -> None:
    plain = saved.with_name("plain")
    plain.write_text("")
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
def test_a_failing_write_leaves_the_old_file_and_no_litter(
    saved: Path, call: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        files.save(saved, {"tensors": {}})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("stranger", "name"),
    [(Path("runs"), "pathlib"), (torch.ones(2).numpy(), "numpy"), (torch.nn.Tanh(), "Tanh")],
    ids=["path", "array", "module"],
)
def test_what_could_not_be_loaded_is_not_saved(saved: Path, stranger: object, name: str) -> None:
    before = saved.read_bytes()
    with pytest.raises(TypeError, match=f"holds tensors, numbers, strings.* this one has .*{name}"):
        files.save(saved, {"recipe": {"x": stranger}})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing to write fit\.pt to"):
        files.save(tmp_path / "missing" / "fit.pt", {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"no saved fit at .*fit\.pt"):
        files.load(tmp_path / "fit.pt")
    with pytest.raises(IsADirectoryError, match="is a folder: name a saved fit in it"):
        files.load(tmp_path)
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        files.save(tmp_path, {})


def test_truncated_files_are_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        saved.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"fit\.pt is truncated or no saved fit$"):
            files.load(saved)


def test_damaged_files_are_refused(saved: Path) -> None:
    """A wrong byte anywhere is an error or harmless; it never changes a value."""
    whole = saved.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        saved.write_bytes(damaged)
        try:
            assert same(files.load(saved), CONTENT)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 150
    tensor = whole.index(torch.arange(200.0).numpy().tobytes())
    saved.write_bytes(whole[: tensor + 5] + b"!" + whole[tensor + 6 :])
    with pytest.raises(ValueError, match=r"is damaged: '.*' in it does not match its checksum$"):
        files.load(saved)


@pytest.mark.parametrize(
    "junk", [b"", b"hello\n", bytes(range(256)), pickle.dumps([1, 2])], ids=len
)
def test_files_that_are_no_archive_are_refused(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "junk"
    path.write_bytes(junk)
    with pytest.raises(ValueError, match=r"junk is truncated or no saved fit$"):
        files.load(path)


@pytest.mark.parametrize("other", [[1], {"weight": torch.ones(2)}, torch.ones(2)], ids=repr)
def test_other_files_of_torch_are_refused(tmp_path: Path, other: object) -> None:
    path = tmp_path / "other.pt"
    torch.save(other, path)
    with pytest.raises(ValueError, match=r"other\.pt is no saved fit of pyro_vi$"):
        files.load(path)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": [1]}], ids=repr)
def test_files_without_content_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "fit.pt"
    torch.save({"format": "pyro_vi fit", "version": 5, **content}, path)
    with pytest.raises(
        ValueError, match=r"fit\.pt is damaged: expected a dict as its content, got"
    ):
        files.load(path)


def test_a_damaged_pickle_in_an_intact_archive_is_refused(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    [pickled] = (name for name in entries if name.endswith("data.pkl"))
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(entries[pickled])
        damaged[generator.randrange(2, len(damaged))] = generator.randrange(256)
        with zipfile.ZipFile(saved, "w") as archive:
            for name, whole in {**entries, pickled: bytes(damaged)}.items():
                archive.writestr(name, whole)
        try:
            files.load(saved)
        except ValueError as error:
            assert str(saved) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("version", [1, None, torch.ones(2)], ids=["old", "none", "tensor"])
def test_other_versions_are_refused(tmp_path: Path, version: Any) -> None:
    path = tmp_path / "fit.pt"
    torch.save({"format": "pyro_vi fit", "version": version, "content": {}}, path)
    with pytest.raises(
        ValueError, match=f"of version {re.escape(str(version))}; this release reads version 5$"
    ):
        files.load(path)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "fit.pt", tmp_path / "trace"
    content = {"format": "pyro_vi fit", "version": 2, "content": Malicious(trace)}
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"holds .*mkdir .*\(nothing in it was run\)$"):
        files.load(path)
    assert not trace.exists()
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="no saved fit"):
        files.load(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists()  # the trap does work where pickles are trusted


def test_bytes_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    files.write(path, b"a,b\n")
    files.write(str(path), b"c\n")
    assert path.read_bytes() == b"c\n"
    assert list(tmp_path.iterdir()) == [path]
