"""Image sets in IDX files (the MNIST family), plain or gzipped."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfstep.errors import UserError
from halfstep.examples import Examples
from sources.arrays import carve, image_examples
from sources.context import Context, Pools

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class Idx:
    """A folder with ``train-images-idx3-ubyte[.gz]`` and its three companions.

    ``path`` defaults to where Debian's ``dataset-fashion-mnist`` puts Fashion-MNIST.
    ``validation`` examples are carved out of the training file, stratified by class.
    """

    path: str = str(DEBIAN)
    validation: int = 5000
    seed: int = 0

    def load(self, context: Context) -> Pools:
        train = self._read("train")
        pools = carve(train, {"validation": self.validation}, rest="train", seed=self.seed)
        return {**pools, "test": self._read("t10k")}

    def _read(self, stem: str) -> Examples:
        pixels = read_idx(self._file(f"{stem}-images-idx3-ubyte"))
        labels = read_idx(self._file(f"{stem}-labels-idx1-ubyte"))
        if len(pixels) != len(labels):
            raise UserError(f"{self.path}: {len(pixels)} {stem} images but {len(labels)} labels")
        brightest = 255.0 if pixels.dtype == np.uint8 else 1.0
        return image_examples(pixels, labels, brightest)

    def _file(self, name: str) -> Path:
        folder = Path(self.path).expanduser()
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
        raise UserError(
            f"no {name}[.gz] in {folder}. Install Debian's dataset-fashion-mnist "
            "(apt-get install dataset-fashion-mnist), name a folder of IDX files with "
            "data: {source: idx, path: FOLDER}, or load it from the hub with "
            "data: {source: datasets, path: zalando-datasets/fashion_mnist, image: {column: image, "
            "grey: true}, label: label}"
        )


def read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file (http://yann.lecun.com/exdb/mnist, "the IDX file format").

    Raises:
        UserError: the file is not IDX, or is cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise UserError(f"{path}: not an IDX file")
    dtype, axes = np.dtype(_DTYPES[data[2]]), data[3]
    head = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", data[4:head]) if len(data) >= head else ()
    expected = head + int(np.prod(shape)) * dtype.itemsize
    if len(data) != expected or not shape:
        raise UserError(f"{path}: holds {len(data)} bytes where its header promises {expected}")
    array = np.frombuffer(data, dtype, offset=head).reshape(shape)
    return array.astype(dtype.newbyteorder("="))
