"""Activation granularities against plain loops."""

import pytest
import torch

from halfstep.activations import position_axis, quantizer
from halfstep.certificate import certify
from halfstep.errors import UserError
from halfstep.formats import FORMATS
from halfstep.granularity import (
    PerPosition,
    PerTensor,
    PerToken,
    PerTokenBlock,
    parse_granularity,
)
from halfstep.operators import Operand
from halfstep.qparams import QParams, choose_qparams
from halfstep.quantize import fake_quantize
from halfstep.scheme import Spec
from halfstep.sketch import Sketch
from halfstep.tally import Tally

LAST = Operand("input", -1, batch=-3)
ROWS = Operand("input", -1, batch=-2)
COLUMNS = Operand("right", -2, batch=-3)
IMAGE = Operand("input", -3, whole_example=True, batch=-4)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(batches, operand):
    tally = Tally()
    for number, batch in enumerate(batches):
        tally.add(Sketch.of(batch), number)
        tally.add_positions(batch, operand)
    return tally.observation()


def by_itself(values, fmt):
    """A tensor quantized by its own extremes; blocks and tokens always hold zero."""
    lo, hi = values.amin(), values.amax()
    return fake_quantize(values, choose_qparams(fmt, lo[None], hi[None]))


@pytest.mark.parametrize("name", ["int8", "int8_asym", "fp8_e4m3", "int4"])
def test_a_token_is_quantized_by_its_own_range(name):
    fmt, x = FORMATS[name], random(3, 5, 8)
    done = quantizer(LAST, None, Spec(fmt, PerToken(), "minmax"))(x)
    for b in range(3):
        for t in range(5):
            assert torch.equal(done[b, t], by_itself(x[b, t], fmt))


def test_a_token_of_a_right_factor_is_a_column_and_of_an_image_the_whole_example():
    fmt, x, image = FORMATS["int8"], random(3, 5, 8), random(2, 3, 4, 4)
    done = quantizer(COLUMNS, None, Spec(fmt, PerToken(), "minmax"))(x)
    for b in range(3):
        for column in range(8):
            assert torch.equal(done[b, :, column], by_itself(x[b, :, column], fmt))
    done = quantizer(IMAGE, None, Spec(fmt, PerToken(), "minmax"))(image)
    for b in range(2):
        assert torch.equal(done[b], by_itself(image[b], fmt))


@pytest.mark.parametrize("operand", [LAST, COLUMNS, IMAGE], ids=lambda o: str(o.axis))
@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize("name", ["int8", "int4_asym", "mxfp4", "mxint8", "nf4"])
def test_a_block_lies_along_the_accumulator_inside_one_token(operand, size, name):
    fmt = FORMATS[name]
    size = fmt.block or size
    x = random(2, 40, 5, 6) if operand is IMAGE else random(3, 40, 40)
    done = quantizer(operand, None, Spec(fmt, PerTokenBlock(size), "minmax"))(x)
    rows, ours = (v.movedim(operand.axis, -1).reshape(-1, 40) for v in (x, done))
    for row, got in zip(rows[::7], ours[::7], strict=True):
        for start in range(0, 40, size):
            block = row[start : start + size]
            lo, hi = block.amin().clamp(max=0), block.amax().clamp(min=0)
            expected = fake_quantize(block, choose_qparams(fmt, lo[None], hi[None]))
            assert torch.equal(got[start : start + size], expected)


@pytest.mark.parametrize("granularity", [PerToken(), PerTokenBlock(3), PerTensor()], ids=str)
@pytest.mark.parametrize("operand", [LAST, IMAGE], ids=lambda o: str(o.axis))
def test_what_stands_beside_an_example_in_the_batch_cannot_change_it(granularity, operand):
    x = random(4, 6, 5, 5)
    observation = observed([x], operand)
    quantize = quantizer(operand, observation, Spec(FORMATS["int8"], granularity, "minmax"))
    assert torch.equal(quantize(x)[1:2], quantize(x[1:2]))


def test_nvfp4_activations_take_the_tensor_scale_from_calibration():
    fmt, x = FORMATS["nvfp4"], random(4, 48)
    quantize = quantizer(LAST, observed([x], LAST), Spec(fmt, PerTensor(), "minmax"))
    assert torch.equal(quantize(x)[2:3], quantize(x[2:3]))
    whole = choose_qparams(fmt, x.reshape(-1, 16).amin(1), x.reshape(-1, 16).amax(1))
    blocks = QParams(fmt, whole.scale[:, None], whole.zero_point[:, None])
    assert torch.equal(quantize(x), fake_quantize(x.reshape(-1, 16), blocks).reshape(4, 48))
    # Beyond the calibrated range the block scale saturates: the certificate counts the clipping.
    big = x * 10
    found = certify("site", "activation", big, quantize(big), quantize.qparams_for(big))
    assert found.holds
    assert found.clipped > 0


def test_each_position_has_the_scale_that_calibration_saw_there():
    fmt, batches = (
        FORMATS["int8"],
        [random(4, 5, 8, seed=s) * torch.arange(1, 6)[:, None] for s in (0, 1)],
    )
    quantize = quantizer(LAST, observed(batches, LAST), Spec(fmt, PerPosition(), "mse"))
    everything = torch.cat(batches)
    fresh = random(2, 5, 8, seed=9)
    for t in range(5):
        amax = everything[:, t].abs().max()
        expected = fake_quantize(fresh[:, t], choose_qparams(fmt, -amax[None], amax[None]))
        assert torch.equal(quantize(fresh)[:, t], expected)


def test_positions_beyond_those_seen_take_the_widest_range():
    fmt, x = FORMATS["int8"], random(4, 3, 8)
    quantize = quantizer(
        LAST, observed([x, random(4, 5, 8, seed=1)], LAST), Spec(fmt, PerPosition(), "mse")
    )
    longer = random(2, 9, 8, seed=2)
    scales = quantize.qparams_for(longer).scale.flatten()
    assert len(scales) == 9
    assert (scales[5:] == scales[:5].max()).all()


def test_inputs_without_an_axis_of_tokens_have_one_position():
    assert position_axis(random(4, 8), ROWS) is None
    assert position_axis(random(2, 3, 4, 4), IMAGE) is None
    assert position_axis(random(2, 3, 4), LAST) == 1
    assert position_axis(random(2, 3, 4), COLUMNS) == 2
    quantize = quantizer(
        ROWS, observed([random(4, 8)], ROWS), Spec(FORMATS["int8"], PerPosition(), "minmax")
    )
    assert "one position" in quantize.notes[0]


@pytest.mark.parametrize(
    ("text", "made"),
    [("per_block(128)", PerTokenBlock(128)), ("per_block(1x32)", PerTokenBlock(32)),
     ("per_token_static", PerPosition()), ("per_token", PerToken())],
)  # fmt: skip
def test_granularities_of_activations_parse(text, made):
    assert parse_granularity(text, "activations") == made


@pytest.mark.parametrize("text", ["per_channel", "per_group(4)", "per_block(2x32)", "per_block"])
def test_granularities_that_make_no_sense_for_activations_are_refused(text):
    with pytest.raises(UserError, match="granularity"):
        parse_granularity(text, "activations")
