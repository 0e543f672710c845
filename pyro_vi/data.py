"""Images as tensors: `ImageData`, and the functions that read it from where it lies.

An image is an array of grey levels k = 0 ... L - 1, stored as x = k / (L - 1) in [0, 1]. `levels`
keeps L, since a likelihood of discrete pixels has to know the width of a level, 1 / (L - 1).

    digits()           1,797 real 8x8 digits; they come with scikit-learn
    fashion_mnist()    70,000 articles of clothing, 28x28, from Debian's `dataset-fashion-mnist`
    idx(folder)        any folder of MNIST-style IDX files
    npz(path)          your own arrays, `train` and `test`

Nothing here uses the network.
"""

__all__ = ["ImageData", "binarize", "digits", "fashion_mnist", "idx", "npz", "read_idx"]

import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True, eq=False)
class ImageData:
    """A named set of images, split into training and test images.

    Attributes:
        name: what to call it in a report.
        train: training images in [0, 1], shape (N, C, H, W), float32 from every loader here.
        test: test images, shape (M, C, H, W), same C, H, W and dtype.
        levels: number L of grey levels: every value is k / (L - 1), k = 0 ... L - 1. None if the
            values are continuous.

    Raises:
        TypeError: `train` or `test` is not a floating-point tensor, or `levels` not an int or None.
        ValueError: not four axes, no images, images of different shapes, dtypes that differ, NaN,
            values outside [0, 1], or off the grid that `levels` promises.

    Example:
        >>> train, test = torch.rand(10, 1, 4, 4), torch.rand(5, 1, 4, 4)
        >>> ImageData("noise", train, test, levels=None).shape
        (1, 4, 4)
    """

    name: str
    train: Tensor  # (N, C, H, W) in [0, 1]
    test: Tensor  # (M, C, H, W) in [0, 1]
    levels: int | None

    def __post_init__(self) -> None:
        if self.levels is not None:
            if isinstance(self.levels, bool) or not isinstance(self.levels, int):
                raise TypeError(f"levels: expected an int or None, got {self.levels!r}")
            if self.levels < 2:
                raise ValueError(f"levels: expected at least 2 grey levels, got {self.levels}")
        _check_images("train", self.train, self.levels)
        _check_images("test", self.test, self.levels)
        if self.train.shape[1:] != self.test.shape[1:] or self.train.dtype != self.test.dtype:
            raise ValueError(
                "train, test: expected images of one shape and dtype, "
                f"got {tuple(self.train.shape[1:])} {self.train.dtype} "
                f"and {tuple(self.test.shape[1:])} {self.test.dtype}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width (C, H, W) of one image, in pixels."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width


def digits() -> ImageData:
    """Real handwritten digits, 8x8 pixels in 17 grey levels: 1,437 to train on, 360 to test.

    The images are scikit-learn's copy of the UCI test set (a pixel counts the ink in a 4x4 block).
    They are shuffled before the split by a fixed seed of a generator whose stream NumPy has frozen,
    so that the split is the same for everyone.

    Returns:
        Images of shape (1, 8, 8), values k / 16.

    References:
        Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning
        Repository, 1998.

    Example:
        >>> data = digits()
        >>> tuple(data.train.shape), tuple(data.test.shape), data.levels
        ((1437, 1, 8, 8), (360, 1, 8, 8), 17)
    """
    from sklearn.datasets import load_digits  # a second's import, and only this function's

    images = load_digits().images.astype(np.uint8)[np.random.RandomState(0).permutation(1797)]
    return ImageData("digits", _scaled(images[:1437], 17), _scaled(images[1437:], 17), levels=17)


def fashion_mnist(
    folder: str | os.PathLike[str] = "/usr/share/datasets/fashion-mnist",
) -> ImageData:
    """Fashion-MNIST: articles of clothing, 28x28 pixels in 256 grey levels, 60,000 and 10,000.

    Args:
        folder: where the IDX files are; the default is where Debian's package
            `dataset-fashion-mnist` puts them.

    Returns:
        Images of shape (1, 28, 28), values k / 255.

    Raises:
        FileNotFoundError: no such files in `folder`.
        ValueError: the files are not what they should be (see `idx`).

    References:
        Xiao, Rasul, Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine
        learning algorithms", arXiv:1708.07747.

    Example:
        >>> fashion_mnist("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: Fashion-MNIST: expected /nowhere/train-images-idx3-ubyte or ...
    """
    try:
        return _idx_images(Path(folder), "fashion-mnist")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Fashion-MNIST: {error}. Install Debian's package dataset-fashion-mnist, or name the "
            "folder that holds the files: fashion_mnist(folder=...)"
        ) from error


def idx(folder: str | os.PathLike[str]) -> ImageData:
    """Images from a folder of MNIST-style IDX files, 8 bits a pixel.

    Args:
        folder: holds `train-images-idx3-ubyte` and `t10k-images-idx3-ubyte`, plain or compressed
            (`.gz`), as MNIST, Fashion-MNIST and KMNIST do.

    Returns:
        Images of shape (1, H, W), values k / 255, named after the folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no IDX file (see `read_idx`), or holds no 8-bit grey images.

    Example:
        >>> idx("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: expected /nowhere/train-images-idx3-ubyte or ...
    """
    path = Path(folder)
    return _idx_images(path, path.resolve().name)


def npz(path: str | os.PathLike[str]) -> ImageData:
    """Your own images, from an `.npz` file with the arrays `train` and `test`.

    Args:
        path: a file that `numpy.savez` wrote (never unpickled), with

            - `train`, `test`: shape (N, H, W) or (N, C, H, W), both of uint8 grey levels
              k = 0 ... L - 1, stored as k / (L - 1), or both of floats in [0, 1];
            - `levels`, if you like: the number L of grey levels, a whole number. Without it, uint8
              means 256 and floats are continuous (`levels=None`).

    Returns:
        Images of shape (C, H, W) as float32, named after the file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: arrays that are neither uint8 nor floats; the message says how to store them.
        ValueError: no `.npz` file, an array is missing, or has the wrong shape or values.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/squares.npz", train=np.ones((9, 4, 4)), test=np.ones((3, 4, 4)))
        ...     images = npz(f"{folder}/squares.npz")
        >>> images.name, images.shape, images.levels
        ('squares', (1, 4, 4), None)
    """
    path = Path(path)
    arrays = _load_npz(path)
    levels = _levels(path, arrays.get("levels"))
    kinds = {name: arrays[name].dtype for name in ("train", "test")}
    if all(dtype == np.uint8 for dtype in kinds.values()):
        levels = 256 if levels is None else levels
    elif not all(dtype.kind == "f" for dtype in kinds.values()):
        raise TypeError(
            f"{path}: expected train and test both of uint8 or both of floats in [0, 1], got "
            f"{kinds['train']} and {kinds['test']}. Store grey levels k = 0 ... L - 1 as uint8, "
            "with a scalar levels=L if L is not 256, or k / (L - 1) as float32, with levels=L"
        )
    images = {}
    for name in kinds:
        array = arrays[name]
        if array.ndim not in (3, 4):
            raise ValueError(
                f"{path}: {name}: expected shape (N, H, W) or (N, C, H, W), got {array.shape}"
            )
        if array.dtype == np.uint8 and levels is not None and array.max(initial=0) >= levels:
            raise ValueError(
                f"{path}: {name}: expected grey levels 0 to {levels - 1}, since levels={levels}, "
                f"got {array.max()}"
            )
        images[name] = _scaled(array, levels if array.dtype == np.uint8 else None)
    try:
        return ImageData(path.stem, images["train"], images["test"], levels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """The array in one IDX file, plain or gzip-compressed, of any of the format's types and shapes.

    The format: two zero bytes; the type (0x08 uint8, 0x09 int8, 0x0B int16, 0x0C int32, 0x0D
    float32, 0x0E float64); the number of axes, one byte; the length of each axis, a big-endian
    uint32; the numbers, big-endian, last axis fastest. Compression is known by its first bytes,
    whatever the name.

    Args:
        path: the file.

    Returns:
        The array, in the machine's byte order, writable.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no IDX file, fewer or more bytes than its header says, or broken compression.

    References:
        LeCun, Cortes, Burges, "The MNIST database of handwritten digits", section on file formats.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "three-idx1-ubyte"
        ...     _ = file.write_bytes(bytes([0, 0, 0x08, 1, 0, 0, 0, 3, 7, 8, 9]))
        ...     read_idx(file)
        array([7, 8, 9], dtype=uint8)
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected an IDX file at {path}, got nothing there")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: broken or truncated gzip file: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_DTYPES:
        raise ValueError(
            f"{path}: expected an IDX file, which begins with 00 00, a type (08, 09, 0b to 0e) and "
            f"a number of axes, got {content[:4].hex(' ') or 'an empty file'}"
        )
    dtype, ndim = np.dtype(_IDX_DTYPES[content[2]]), content[3]
    start = 4 + 4 * ndim
    if len(content) < start:
        raise ValueError(
            f"{path}: truncated: expected a header of {start} bytes, got {len(content)}"
        )
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        problem = "truncated" if len(content) < expected else "trailing bytes"
        raise ValueError(
            f"{path}: {problem}: expected {expected} bytes for {dtype.name} of shape {shape}, "
            f"got {len(content)}"
        )
    try:
        array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    except ValueError as error:
        raise ValueError(f"{path}: NumPy takes no array of shape {shape}: {error}") from error
    return array.astype(dtype.newbyteorder("="))


def binarize(x: Tensor) -> Tensor:
    """Black and white images, drawn anew at every call: each pixel is Bernoulli(x).

    Applied to every batch this is dynamic binarization: the grey level is the probability of white,
    and no image is seen twice in the same form. Randomness comes from torch's global generator.

    Args:
        x: values in [0, 1], any shape, floating point.

    Returns:
        Zeros and ones: shape, dtype and device of `x`.

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: NaN, or values outside [0, 1].

    References:
        Salakhutdinov and Murray, "On the quantitative analysis of deep belief networks", ICML 2008.
        Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", arXiv:1509.00519.

    Example:
        >>> binarize(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    _check_float("x", x)
    _check_unit_interval("x", x)
    return torch.bernoulli(x)


def _check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def _check_unit_interval(name: str, x: Tensor) -> None:
    if x.numel() == 0:
        return
    low, high = torch.stack(
        x.detach().aminmax()
    ).tolist()  # one transfer from a GPU; NaN carries over
    if math.isnan(low):
        raise ValueError(f"{name}: expected values in [0, 1], got {int(x.isnan().sum())} NaN")
    if low < 0 or high > 1:
        raise ValueError(f"{name}: expected values in [0, 1], got {low:g} to {high:g}")


def _check_images(name: str, x: Tensor, levels: int | None) -> None:
    _check_float(name, x)
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(
            f"{name}: expected at least one image, shape (N, C, H, W), got shape {tuple(x.shape)}"
        )
    _check_unit_interval(name, x)
    if levels is None:
        return
    rounding = 4 * (levels - 1) * max(torch.finfo(dtype).eps for dtype in (x.dtype, torch.float32))
    for part in x.split(8192):  # bounds the memory
        k = part * (levels - 1)
        off = float((k - k.round()).abs().max())
        if off > rounding:
            raise ValueError(
                f"{name}: expected values k / {levels - 1}, since levels={levels}, "
                f"got some that are {off:.2g} of a level away"
            )


def _scaled(images: npt.NDArray[Any], levels: int | None) -> Tensor:
    """(N, H, W) or (N, C, H, W) as float32 (N, C, H, W), divided by L - 1 if there are L levels."""
    x = torch.from_numpy(images.astype(np.float32))
    if levels is not None:
        x /= levels - 1
    return x.unsqueeze(1) if x.dim() == 3 else x


def _idx_images(folder: Path, name: str) -> ImageData:
    images = {}
    for split in ("train", "t10k"):
        plain = folder / f"{split}-images-idx3-ubyte"
        packed = plain.with_name(plain.name + ".gz")
        if not (plain.exists() or packed.exists()):
            raise FileNotFoundError(f"expected {plain} or {packed.name}, found neither")
        path = plain if plain.exists() else packed
        array = read_idx(path)
        if array.dtype != np.uint8 or array.ndim != 3:
            raise ValueError(
                f"{path}: expected uint8 images of shape (N, H, W), "
                f"got {array.dtype} of shape {array.shape}"
            )
        images[split] = _scaled(array, 256)
    try:
        return ImageData(name, images["train"], images["t10k"], levels=256)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _load_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    if not path.exists():
        raise FileNotFoundError(f"expected an .npz file at {path}, got nothing there")
    with path.open("rb") as stream:
        try:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array (.npy)")
            found = sorted(file.files)
            arrays: dict[str, npt.NDArray[Any]] = {
                name: file[name] for name in found if name in ("train", "test", "levels")
            }
            for name, array in arrays.items():  # numpy gives bytes for a file of another kind
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"{name} is no array")
        except Exception as error:  # numpy and zipfile raise many types on damaged archives
            reason = str(error).partition("\n")[0] or type(error).__name__
            if isinstance(error, OSError):
                reason = f"it is damaged ({reason})"
            elif "pickle" in str(error):
                # numpy takes every unknown file for a pickle, and advises to load it unsafely
                reason = "it is no archive, or holds objects"
            raise ValueError(
                f"{path}: expected an .npz file of numeric arrays, as numpy.savez writes: {reason}"
            ) from error
    missing = [name for name in ("train", "test") if name not in arrays]
    if missing:
        raise ValueError(
            f"{path}: expected arrays named train and test, got {found} ({missing} missing)"
        )
    return arrays


def _levels(path: Path, levels: npt.NDArray[Any] | None) -> int | None:
    if levels is None:
        return None
    if levels.ndim != 0 or levels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: levels: expected one whole number, got {levels.dtype} of shape {levels.shape}"
        )
    return int(levels)
