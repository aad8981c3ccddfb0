"""Data sources: real sets, files of the documented format, and files that are broken."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.errors import UserError
from halfstep.examples import Column, Examples, Inputs
from sources.arrays import carve
from sources.context import Context
from sources.idx import DEBIAN, Idx, read_idx
from sources.sklearn_data import Sklearn

CONTEXT = Context(Path("unused"))


def idx_bytes(array, code=0x08):
    head = struct.pack(">HBB", 0, code, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for stem, n in (("train", 120), ("t10k", 40)):
        pixels = generator.integers(0, 256, (n, 6, 6), dtype=np.uint8)
        labels = (np.arange(n) % 4).astype(np.uint8)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pixels)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


def test_digits_are_split_without_overlap_and_with_equal_class_shares():
    pools = Sklearn("digits").load(CONTEXT)
    assert {name: len(pool) for name, pool in pools.items()} == {
        "validation": 500, "test": 500, "train": 797
    }  # fmt: skip
    rows = [set(pool.digests) for pool in pools.values()]
    assert len(set.union(*rows)) == 1797
    for pool in pools.values():
        shares = torch.bincount(pool.targets.all()) / len(pool)
        assert (shares - 0.1).abs().max() < 0.006
        assert (pool.inputs.tensor.min(), pool.inputs.tensor.max()) == (0.0, 1.0)


def test_carving_depends_on_the_seed_alone():
    one, same, other = (Sklearn("digits", seed=s).load(CONTEXT)["test"].digest for s in (0, 0, 1))
    assert one == same != other


def test_a_pool_that_would_take_everything_is_refused():
    examples = Examples(Inputs.of(torch.zeros(10, 1)), Column.of(torch.zeros(10).long()))
    with pytest.raises(UserError, match="ask for 10 of 10 examples and leave none for 'train'"):
        carve(examples, {"validation": 6, "test": 4}, "train", 0)


def test_idx_folder_plain_and_gzipped(folder):
    pools = Idx(str(folder), validation=20).load(CONTEXT)
    assert {name: len(pool) for name, pool in pools.items()} == {
        "validation": 20, "train": 100, "test": 40
    }  # fmt: skip
    assert pools["test"].inputs.tensor.shape == (40, 1, 6, 6)
    assert pools["test"].inputs.tensor.max() <= 1.0


@pytest.mark.parametrize(
    ("dtype", "code"), [(">i2", 0x0B), (">i4", 0x0C), (">f4", 0x0D), (">f8", 0x0E)]
)
def test_every_idx_type_is_read(tmp_path, dtype, code):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    (tmp_path / "x").write_bytes(idx_bytes(array, code))
    assert np.array_equal(read_idx(tmp_path / "x"), array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-7], r"holds \d+ bytes where its header promises"),
        (lambda b: b"\x1f\x8b" + b[2:], "not an IDX file"),
        (lambda b: b"", "not an IDX file"),
        (lambda b: b[:2] + b"\x07" + b[3:], "not an IDX file"),
    ],
)
def test_a_broken_idx_file_is_named(tmp_path, change, message):
    path = tmp_path / "broken-idx"
    path.write_bytes(change(idx_bytes(np.zeros((3, 2, 2), np.uint8))))
    with pytest.raises(UserError, match=f"broken-idx: {message}"):
        read_idx(path)


def test_a_cut_gzip_is_named(tmp_path):
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((30, 2), np.uint8)))[:-9])
    with pytest.raises(UserError, match=r"cut.gz: cannot be read"):
        read_idx(path)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_debian():
    pools = Idx().load(CONTEXT)
    assert {name: len(pool) for name, pool in pools.items()} == {
        "validation": 5000, "train": 55000, "test": 10000
    }  # fmt: skip
    assert pools["train"].inputs.shape == {"": [1, 28, 28]}
    assert torch.bincount(pools["test"].targets.all()).tolist() == [1000] * 10


def test_an_unknown_scikit_learn_set_is_named():
    with pytest.raises(UserError, match=r"'digit'.*did you mean 'digits'"):
        Sklearn("digit")


def test_row_digests_tell_content_not_place():
    x = torch.arange(12.0).reshape(4, 3)
    one, turned = (Examples(Inputs.of(v), Column.of(torch.arange(4))) for v in (x, x.flip(0)))
    assert np.array_equal(one.digests, turned.digests[::-1])
    assert one.digest != turned.digest
