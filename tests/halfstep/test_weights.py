"""Weights: granularities, sizes, and degenerate channels that must be named."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.errors import UserError
from halfstep.formats import FORMATS
from halfstep.granularity import (
    PerAxis,
    PerBlock,
    PerGroup,
    PerTensor,
    expand,
    from_blocks,
    grid_shape,
    parse_granularity,
    to_blocks,
)
from halfstep.quantize import dequantize
from halfstep.scheme import Spec
from halfstep.weights import packed_bytes, quantize_weight

GRANULARITIES = [
    PerTensor(), PerAxis(), PerGroup(4), PerGroup(7), PerGroup(1000), PerBlock(2, 4),
    PerBlock(4, 3),
]  # fmt: skip


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 50), st.integers(1, 10))
def test_each_value_meets_the_scale_of_its_own_block(rows, columns, size, height):
    matrix = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    for granularity in (PerTensor(), PerAxis(), PerGroup(size), PerBlock(height, size)):
        block = granularity.block_size((rows, columns))
        parts = [part.amax(1) for part in to_blocks(matrix, block)]
        largest = from_blocks(parts, (rows, columns), block)
        assert largest.shape == grid_shape((rows, columns), block)
        spread = expand(largest, (rows, columns), block).expand(rows, columns)
        for r in range(rows):
            for c in range(columns):
                top, left = r // block[0] * block[0], c // block[1] * block[1]
                own = matrix[top : top + block[0], left : left + block[1]]
                assert spread[r, c] == own.max()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 3, 3), (2, 5, 7)])
@pytest.mark.parametrize("name", ["int8", "int4_asym", "fp8_e5m2"])
def test_codes_and_qparams_rebuild_the_values(granularity, shape, name):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    done = quantize_weight(weight, Spec(FORMATS[name], granularity, "mse"))
    assert torch.equal(dequantize(done.codes(), done.broadcast()).reshape(shape), done.values)


@pytest.mark.parametrize(
    ("granularity", "scales"),
    [(PerTensor(), 1), (PerAxis(), 6), (PerGroup(4), 18), (PerGroup(16), 6)],
)
def test_size_counts_packed_codes_and_every_scale(granularity, scales):
    shape = (6, 10)
    symmetric = Spec(FORMATS["int4"], granularity, "minmax")
    asymmetric = Spec(FORMATS["int4_asym"], granularity, "minmax")
    assert packed_bytes(shape, symmetric) == 30 + 4 * scales
    assert packed_bytes(shape, asymmetric) == 30 + 5 * scales
    assert packed_bytes(shape, Spec(FORMATS["bf16"], granularity, "minmax")) == 120
    assert packed_bytes((1, 3), Spec(FORMATS["int3"], PerTensor(), "minmax")) == 2 + 4


def test_a_ragged_last_group_is_named():
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    done = quantize_weight(weight, Spec(FORMATS["int8"], PerGroup(4), "minmax"))
    assert done.qparams.scale.shape == (3, 3)
    assert "last group of each row holds 2 of 4 values" in done.notes


@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "mse", "entropy"])
def test_all_zero_channels_stay_zero_and_are_named(calibrator):
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    weight[1] = weight[3] = 0.0
    done = quantize_weight(weight, Spec(FORMATS["int8"], PerAxis(), calibrator))
    assert not done.values[[1, 3]].any()
    assert "2 of 4 block(s) hold only zeros" in done.notes


def test_an_all_zero_weight_stays_zero():
    done = quantize_weight(torch.zeros(4, 4), Spec(FORMATS["int8"], PerTensor(), "mse"))
    assert not done.values.any()
    assert "1 of 1 block(s) hold only zeros" in done.notes


def test_finer_granularity_never_adds_error_under_minmax():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -2, 1, 8
    ).reshape(-1, 1)
    errors = []
    for granularity in (PerTensor(), PerAxis(), PerGroup(16)):
        done = quantize_weight(weight, Spec(FORMATS["int4"], granularity, "minmax"))
        errors.append(float((done.values - weight).square().sum()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    "text",
    ["per_group", "per_group(0)", "per_channel(3)", "per_chanel", "per_block(2x0)", "per_token"],
)
def test_granularities_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match="granularity"):
        parse_granularity(text, "weights")
