"""Images as tensors: what is read is what was written, and every bad input is named."""

import gzip
import io
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pyro_vi.data import ImageData, binarize, digits, fashion_mnist, idx, npz, read_idx

IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DIGITS_TEST_INK = 112_332  # sum of all grey levels of the 360 test digits


def idx_bytes(array: npt.ArrayLike) -> bytes:
    array = np.asarray(array)
    header = struct.pack(">HBB", 0, IDX_CODES[array.dtype.str[1:]], array.ndim)
    lengths = struct.pack(f">{array.ndim}I", *array.shape)
    return header + lengths + array.astype(array.dtype.newbyteorder(">")).tobytes()


def grey(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path, train: npt.ArrayLike, test: npt.ArrayLike) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(train))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(test)))


# ImageData


def images(*shape: int) -> Tensor:
    return torch.rand(*shape)


def test_image_data() -> None:
    data = ImageData("noise", images(5, 3, 4, 2), images(1, 3, 4, 2), levels=None)
    assert data.shape == (3, 4, 2)
    with pytest.raises(AttributeError):
        data.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("levels", [2, 17, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_grey_level_is_accepted(levels: int, dtype: torch.dtype) -> None:
    x = (torch.arange(levels, dtype=torch.float32) / (levels - 1)).to(dtype).reshape(-1, 1, 1, 1)
    assert ImageData("levels", x, x, levels).levels == levels


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.zeros((5, 1, 4, 4)), TypeError, "expected a torch.Tensor, got ndarray"),
        (torch.zeros(5, 1, 4, 4, dtype=torch.uint8), TypeError, "floating-point .* torch.uint8"),
        (torch.zeros(5, 4, 4), ValueError, r"\(N, C, H, W\), got shape \(5, 4, 4\)"),
        (torch.zeros(0, 1, 4, 4), ValueError, r"at least one image.*\(0, 1, 4, 4\)"),
        (torch.full((5, 1, 4, 4), torch.nan), ValueError, r"in \[0, 1\], got 80 NaN"),
        (torch.full((5, 1, 4, 4), 1.5), ValueError, r"in \[0, 1\], got 1.5 to 1.5"),
        (torch.full((5, 1, 4, 4), -0.5), ValueError, r"in \[0, 1\], got -0.5 to -0.5"),
        (torch.full((5, 1, 4, 4), torch.inf), ValueError, r"in \[0, 1\], got inf"),
    ],
)
def test_bad_images(split: str, bad: Tensor, error: type[Exception], message: str) -> None:
    tensors = {"train": images(5, 1, 4, 4), "test": images(5, 1, 4, 4), split: bad}
    with pytest.raises(error, match=f"{split}: .*{message}"):
        ImageData("bad", **tensors, levels=None)


def test_images_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match=r"one shape and dtype, got \(1, 4, 4\)"):
        ImageData("bad", images(5, 1, 4, 4), images(5, 1, 4, 5), levels=None)
    with pytest.raises(ValueError, match=r"torch.float32 and .* torch.float64"):
        ImageData("bad", images(5, 1, 4, 4), images(5, 1, 4, 4).double(), levels=None)


def test_bad_levels() -> None:
    x = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1)
    for levels in (256.0, True, "256"):
        with pytest.raises(TypeError, match="levels: expected an int or None"):
            ImageData("bad", x, x, levels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="levels: expected at least 2 grey levels, got 1"):
        ImageData("bad", x, x, 1)
    with pytest.raises(ValueError, match=r"train: expected values k / 255, .* 0.5 of a level away"):
        ImageData("bad", x, x, 256)


# The data sets


def test_digits() -> None:
    data = digits()
    assert (data.name, data.shape, data.levels) == ("digits", (1, 8, 8), 17)
    assert data.train.shape == (1437, 1, 8, 8) and data.test.shape == (360, 1, 8, 8)
    assert data.train.dtype == data.test.dtype == torch.float32
    both = torch.cat([data.train, data.test]).reshape(1797, 64) * 16
    assert torch.equal(both, both.round())
    assert both.min() == 0 and both.max() == 16
    # Each image once: together the two parts are the original, in another order.
    original = load_digits().data
    assert sorted(both.int().tolist()) == sorted(original.astype(int).tolist())
    assert not np.array_equal(both.numpy(), original)


def test_digits_are_split_the_same_for_everyone() -> None:
    numpy_state, torch_state = np.random.get_state(legacy=False), torch.get_rng_state()
    first, second = digits(), digits()
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)
    assert int((16 * first.test.double()).sum()) == DIGITS_TEST_INK
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_idx_folder(tmp_path: Path) -> None:
    folder = tmp_path / "squares"
    folder.mkdir()
    train, test = grey(7, 5, 4), grey(3, 5, 4, seed=1)
    write_images(folder, train, test)
    data = idx(folder)
    assert (data.name, data.shape, data.levels) == ("squares", (1, 5, 4), 256)
    assert data.train.dtype == torch.float32
    assert np.array_equal((data.train * 255).round().numpy().astype(np.uint8)[:, 0], train)
    assert np.array_equal((data.test * 255).round().numpy().astype(np.uint8)[:, 0], test)
    assert torch.equal(idx(str(folder)).train, data.train)
    assert fashion_mnist(folder).name == "fashion-mnist"


def test_bad_idx_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte or .*gz, found neither"):
        idx(tmp_path)
    write_images(tmp_path, grey(7, 5, 4), grey(3, 5, 5))
    with pytest.raises(ValueError, match=f"{tmp_path.name}: train, test: expected images of one"):
        idx(tmp_path)
    write_images(tmp_path, grey(7, 5, 4), grey(3, 5))
    with pytest.raises(
        ValueError, match=r"t10k.*gz: expected uint8 images .* got uint8 .*\(3, 5\)"
    ):
        idx(tmp_path)
    write_images(tmp_path, grey(7, 5, 4).astype(np.int32), grey(3, 5, 4))
    with pytest.raises(ValueError, match=r"train.*ubyte: expected uint8 images .* got int32"):
        idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    write_images(tmp_path, grey(0, 5, 4), grey(3, 5, 4))
    with pytest.raises(ValueError, match="train: expected at least one image"):
        idx(tmp_path)


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"package dataset-fashion-mnist.*folder="
    ) as caught:
        fashion_mnist(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist() -> None:
    data = fashion_mnist()
    assert (data.name, data.shape, data.levels) == ("fashion-mnist", (1, 28, 28), 256)
    assert len(data.train) == 60_000 and len(data.test) == 10_000
    # The mean and standard deviation that everyone normalises these images by.
    assert float(data.train.mean()) == pytest.approx(0.2860, abs=5e-5)
    assert float(data.train.std()) == pytest.approx(0.3530, abs=5e-5)


# npz


def save(path: Path, **arrays: npt.ArrayLike) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's stub offers `allow_pickle` first
    return path


def test_npz_of_grey_levels(tmp_path: Path) -> None:
    train, test = grey(7, 3, 5, 4), grey(2, 3, 5, 4)
    data = npz(save(tmp_path / "colour.npz", train=train, test=test))
    assert (data.name, data.shape, data.levels) == ("colour", (3, 5, 4), 256)
    assert data.train.dtype == torch.float32
    assert np.array_equal((data.train * 255).round().numpy().astype(np.uint8), train)
    few = npz(save(tmp_path / "few.npz", train=train % 17, test=test % 17, levels=17))
    assert few.levels == 17
    assert np.array_equal((few.test * 16).round().numpy().astype(np.uint8), test % 17)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_of_floats(tmp_path: Path, dtype: type[np.floating]) -> None:
    train, test = (np.random.default_rng(0).random((n, 5, 4)).astype(dtype) for n in (7, 2))
    data = npz(str(save(tmp_path / "soft.npz", train=train, test=test)))
    assert (data.shape, data.levels, data.train.dtype) == ((1, 5, 4), None, torch.float32)
    assert np.array_equal(data.train[:, 0].numpy(), train.astype(np.float32))
    black_and_white = save(tmp_path / "bw.npz", train=train.round(), test=test.round(), levels=2)
    assert npz(black_and_white).levels == 2


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"train": grey(2, 4, 4)}, ValueError, r"got \['train'\] \(\['test'\] missing\)"),
        ({"x": grey(2, 4, 4)}, ValueError, "expected arrays named train and test"),
        (
            {"train": grey(2, 4, 4).astype(int), "test": grey(2, 4, 4)},
            TypeError,
            "got int64 and uint8. Store grey levels k = 0 ... L - 1 as uint8",
        ),
        ({"train": grey(2, 4, 4) > 9, "test": grey(2, 4, 4) > 9}, TypeError, "got bool and bool"),
        ({"train": grey(2, 4, 4), "test": np.zeros((2, 4, 4))}, TypeError, "got uint8 and float64"),
        ({"train": grey(2, 16), "test": grey(2, 16)}, ValueError, r"train: .* got \(2, 16\)"),
        ({"train": grey(0, 4, 4), "test": grey(2, 4, 4)}, ValueError, "train: .*at least one"),
        ({"train": grey(2, 4, 4), "test": grey(2, 4, 5)}, ValueError, "images of one shape"),
        (
            {"train": np.full((2, 4, 4), 7.0), "test": np.zeros((2, 4, 4))},
            ValueError,
            r"train: expected values in \[0, 1\], got 7 to 7",
        ),
        (
            {"train": np.zeros((2, 4, 4)), "test": np.full((2, 4, 4), np.nan)},
            ValueError,
            "test: .* 32 NaN",
        ),
        (
            {"train": np.full((2, 4, 4), 0.3), "test": np.zeros((2, 4, 4)), "levels": 17},
            ValueError,
            "train: expected values k / 16",
        ),
        (
            {"train": np.full((2, 4, 4), 16, np.uint8), "test": grey(2, 4, 4) % 2, "levels": 16},
            ValueError,
            "train: expected grey levels 0 to 15, since levels=16, got 16",
        ),
        ({"train": grey(2, 4, 4), "test": grey(2, 4, 4), "levels": 1}, ValueError, "levels"),
        (
            {"train": grey(2, 4, 4), "test": grey(2, 4, 4), "levels": 256.0},
            ValueError,
            "levels: expected one whole number, got float64",
        ),
        (
            {"train": grey(2, 4, 4), "test": grey(2, 4, 4), "levels": [256]},
            ValueError,
            r"levels: expected one whole number, got int64 of shape \(1,\)",
        ),
        (
            {"train": np.array([None, {}]), "test": grey(2, 4, 4)},
            ValueError,
            "numeric arrays.*holds objects",
        ),
    ],
)
def test_bad_npz(
    tmp_path: Path, arrays: dict[str, npt.ArrayLike], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        npz(save(tmp_path / "bad.npz", **arrays))
    assert "bad.npz" in str(caught.value)


def test_npz_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with pytest.raises(FileNotFoundError, match=r"bad\.npz"):
        npz(path)
    whole = save(tmp_path / "good.npz", train=grey(9, 4, 4), test=grey(9, 4, 4)).read_bytes()
    for content in (b"", b"not an archive", whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz: expected an \.npz file"):
            npz(path)
    with path.open("wb") as stream:
        np.save(stream, grey(2, 4, 4))
    with pytest.raises(ValueError, match="single array"):
        npz(path)


def members(path: Path, **contents: bytes) -> Path:
    """An archive of files `<name>.npy`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array: npt.ArrayLike, **header: str) -> bytes:
    """A .npy file, with other words in its header."""
    stream = io.BytesIO()
    np.save(stream, array)
    content = stream.getvalue()
    for old, new in header.items():
        assert content.count(old.encode()) == 1
        content = content.replace(old.encode(), new.encode())
    return content


def patched(content: bytes, *, field: int, value: int) -> bytes:
    """An archive with another 16-bit number in the headers of its first member."""
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    damaged = bytearray(content)
    for place in (local + field, central + field + 2):
        damaged[place : place + 2] = value.to_bytes(2, "little")
    return bytes(damaged)


def npz_bytes(path: Path, *, compressed: bool = False) -> bytes:
    write = np.savez_compressed if compressed else np.savez
    write(path, train=grey(9, 4, 4), test=grey(9, 4, 4))
    return path.read_bytes()


DAMAGED_NPZ: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an unknown compression": (
        lambda p: p.write_bytes(patched(npz_bytes(p), field=8, value=77)),
        "That compression method is not supported",
    ),
    "an encrypted member": (
        lambda p: p.write_bytes(patched(npz_bytes(p), field=6, value=1)),
        "encrypted, password required",
    ),
    "a later version of zip": (
        lambda p: p.write_bytes(patched(npz_bytes(p), field=4, value=99)),
        "zip file version 9.9",
    ),
    "a directory at no place": (
        lambda p: p.write_bytes(npz_bytes(p)[:-6] + b"\xff\xff\xff\x7f\0\0"),
        "",
    ),
    "a gigantic shape": (
        lambda p: members(p, train=npy(grey(9, 4, 4), **{"(9, 4, 4)": "(" + "9" * 15 + ",)"})),
        "Unable to allocate",
    ),
    "a header without end": (
        lambda p: members(p, train=npy(grey(9, 4, 4), **{"9,": "(" * 500})),
        "",
    ),
    "a shape beyond 64 bits": (
        lambda p: members(p, train=npy(grey(9, 4, 4), **{"(9, 4, 4)": "(9, " + "9" * 30 + ")"})),
        "",
    ),
    "an unknown type": (
        lambda p: members(p, train=npy(grey(9, 4, 4), **{"'|u1'": "'|q9'"})),
        "descr is not a valid dtype",
    ),
    "a short array": (lambda p: members(p, train=npy(grey(9, 4, 4))[:-9]), "EOF: reading array"),
    "no array": (lambda p: members(p, train=b"hello", test=b"hello"), "is no array"),
    "a broken stream": (
        lambda p: p.write_bytes(
            (c := npz_bytes(p, compressed=True))[:60] + bytes(40) + c[100:],
        ),
        "",
    ),
    "objects": (lambda p: np.savez(p, train=np.array([None, {}])), "or holds objects"),
}


@pytest.mark.parametrize("name", DAMAGED_NPZ)
def test_damaged_npz(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    make, message = DAMAGED_NPZ[name]
    make(path)
    with pytest.raises(ValueError, match=rf"bad\.npz: expected an \.npz file.*{message}") as caught:
        npz(path)
    assert "\n" not in str(caught.value)


def test_any_wrong_byte_of_an_npz_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    whole = npz_bytes(path, compressed=True)
    expected = npz(path)
    generator = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            images = npz(path)
        except ValueError as error:
            assert "bad.npz: expected a" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert torch.equal(images.train, expected.train)
            assert torch.equal(images.test, expected.test)
    assert refused > 250


# IDX files


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 3, 2), (2, 1, 3, 2), (0, 28, 28)])
@pytest.mark.parametrize("dtype", IDX_CODES)
def test_idx_round_trip(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(50 * np.random.default_rng(0).normal(size=shape)).astype("i1").astype(dtype)
    (tmp_path / "plain").write_bytes(idx_bytes(array))
    (tmp_path / "packed").write_bytes(gzip.compress(idx_bytes(array)))
    for name in ("plain", "packed"):
        got = read_idx(tmp_path / name)
        assert got.dtype == np.dtype(dtype) and got.dtype.isnative and got.flags.writeable
        assert got.shape == shape
        assert np.array_equal(got, array)


GOOD = idx_bytes(grey(2, 3, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX file.*got an empty file"),
        (b"\0\0", "expected an IDX file.*got 00 00"),
        (b"\x89PNG\r\n\x1a\n" + GOOD, "expected an IDX file.*got 89 50 4e 47"),
        (b"\0\0\x07\x01" + GOOD[4:], "expected an IDX file.*got 00 00 07 01"),
        (GOOD[:10], "truncated: expected a header of 16 bytes, got 10"),
        (GOOD[:-1], r"truncated: expected 34 bytes for uint8 of shape \(2, 3, 3\), got 33"),
        (GOOD + b"\0", "trailing bytes: expected 34 bytes .* got 35"),
        (b"\0\0\x0e\x02" + b"\xff" * 8, "truncated: expected .* bytes for float64"),
        (b"\0\0\x08\x46" + b"\0\0\0\1" * 70 + b"x", r"NumPy takes no array of shape \(1, 1"),
        (b"\0\0\x08\x04" + b"\0" * 4 + b"\xff" * 12, r"NumPy takes no array of shape \(0, 42"),
        (gzip.compress(GOOD, mtime=0)[:-4], "broken or truncated gzip file"),
        (gzip.compress(GOOD, mtime=0)[:-12], "broken or truncated gzip file"),
        (gzip.compress(GOOD, mtime=0)[:5], "broken or truncated gzip file"),
        (gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20, "broken or truncated gzip file"),
        (gzip.compress(GOOD, mtime=0) + b"more", "broken or truncated gzip file"),
        (gzip.compress(GOOD + b"\0", mtime=0), "trailing bytes"),
        (gzip.compress(b"text", mtime=0), "expected an IDX file"),
    ],
)
def test_bad_idx(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad-idx3-ubyte: {message}"):
        read_idx(path)


def test_missing_idx(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        read_idx(tmp_path / "no-such-file")


# binarize


def test_binarize_draws_bernoulli(device: torch.device) -> None:
    p = torch.linspace(0, 1, 11, device=device)
    draws = torch.stack([binarize(p.expand(100, 11)) for _ in range(100)]).reshape(-1, 11)
    assert draws.dtype == p.dtype and draws.device == p.device
    assert torch.equal(draws, draws.round())
    error = (p * (1 - p) / len(draws)).sqrt()
    assert torch.all((draws.mean(0) - p).abs() <= 4 * error)


def test_binarize_is_new_at_every_call_and_follows_the_seed() -> None:
    x = torch.full((4, 1, 8, 8), 0.5, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = binarize(x), binarize(x)
    torch.manual_seed(1)
    assert torch.equal(binarize(x), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.float64
    assert binarize(x[:0]).shape == (0, 1, 8, 8)


def test_bad_binarize() -> None:
    for bad, message in ((1.01, "0 to 1.01"), (-0.5, "-0.5 to 0"), (torch.nan, "1 NaN")):
        with pytest.raises(ValueError, match=rf"x: expected values in \[0, 1\], got {message}"):
            binarize(torch.tensor([0.0, bad]))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.int64"):
        binarize(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"expected a torch.Tensor, got list"):
        binarize([0.0, 1.0])  # type: ignore[arg-type]
