"""Activations as codes: one way or the other, the same numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from halfstep import codes
from halfstep.activations import StaticQuantizer
from halfstep.codes import Coded, at_once, at_once_is_exact, in_passes
from halfstep.formats import FORMATS
from halfstep.qparams import QParams, choose_qparams


def quantizer(name: str, lo: float, hi: float) -> StaticQuantizer:
    return StaticQuantizer(
        choose_qparams(FORMATS[name], torch.tensor([[lo]]), torch.tensor([[hi]]))
    )


def expected(x: Tensor, own: StaticQuantizer) -> Tensor:
    """By whole-number arithmetic of Python's own rounding, ties to even."""
    fmt, zero_point = own.qparams.format, int(own.qparams.zero_point)
    inverse = own.qparams.scale.reciprocal()
    scaled = (x * inverse).reshape(-1).tolist()
    shift = 128 if fmt.quant_min < 0 else 0
    made = [
        min(max(round(max(min(u, 1e6), -1e6)) + zero_point, fmt.quant_min), fmt.quant_max) + shift
        for u in scaled
    ]
    return torch.tensor(made, dtype=torch.uint8).reshape(x.shape)


@pytest.mark.parametrize("name", ["int8", "int8_full", "uint8", "int8_asym", "int4", "uint3"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rectified", [False, True])
def test_codes_are_those_of_whole_number_arithmetic(
    name: str, layout: torch.memory_format, rectified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = (3 * torch.randn(3, 5, 6, 7, generator=generator)).contiguous(memory_format=layout)
    x = x.relu() if rectified else x
    own = quantizer(name, -1.7, 4.1)
    at_once_is_exact()  # torch warns of its operator once
    for channels_last, at_once_too in itertools.product((False, True), (True, False)):
        monkeypatch.setattr(codes, "at_once_is_exact", lambda known=at_once_too: known)
        coded = Coded(channels_last=channels_last)
        coded.hold(x, own)
        grid = expected(x, own).float() - own.unsigned_zero_point
        assert torch.equal(coded.grid(x, own), grid)
        # Without a value below zero, codes that are not shifted are unsigned as they stand.
        assert coded.zero_point == (
            0 if rectified and own.zero_point == 0 else own.unsigned_zero_point
        )
        for zero_point in {coded.zero_point, own.unsigned_zero_point}:
            unsigned = coded.unsigned(x, own, zero_point)
            assert unsigned.dtype == torch.uint8
            assert torch.equal(unsigned.float() - zero_point, grid)


def test_ties_and_what_lies_beyond_the_range() -> None:
    assert at_once_is_exact()  # on each machine that the tests have run on
    own = quantizer("int8", -127.0, 127.0)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, -128.0, 1e30, -1e30, torch.inf, -torch.inf])
    wanted = [128, 130, 130, 128, 126, 255, 1, 255, 1, 255, 1]
    assert at_once(x, own, 128).tolist() == wanted
    assert in_passes(own.to_grid(x), own, 128).tolist() == wanted


def test_an_operator_that_rounds_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.quantize_per_tensor

    def truncating(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
        return exact((x / scale).trunc() * scale, scale, zero_point, dtype)

    def absent(*arguments: object) -> Tensor:
        raise NotImplementedError("removed in a later torch")

    own = quantizer("int8", -127.0, 127.0)
    x = torch.tensor([0.75, -2.75])
    for stand_in in (truncating, absent):
        monkeypatch.setattr(torch, "quantize_per_tensor", stand_in)
        at_once_is_exact.cache_clear()
        assert not at_once_is_exact()
        coded = Coded(channels_last=False)
        coded.hold(x, own)
        assert coded.unsigned(x, own, 128).tolist() == [129, 125]
    at_once_is_exact.cache_clear()


def test_zero_points_are_added_after_rounding() -> None:
    own = StaticQuantizer(
        QParams(FORMATS["uint8"], torch.ones(1, 1), torch.tensor([[3]], dtype=torch.int32))
    )
    x = torch.tensor([0.5, 1.5, -0.5])
    coded = Coded(channels_last=False)
    coded.hold(x, own)
    assert coded.unsigned(x, own, 3).tolist() == [3, 5, 3]  # torch's own would round 0.5 + 3 to 4


def test_nan_is_seen_and_infinity_is_not_taken_for_it() -> None:
    own = quantizer("int8", -1.0, 1.0)
    coded = Coded(channels_last=False)
    for values, broken in (
        ([1.0, torch.nan], True),
        ([torch.inf, -torch.inf], False),
        ([3e38, 3e38], False),
        ([torch.inf, torch.nan], True),
        ([], False),
    ):
        coded.hold(torch.tensor(values), own)
        assert coded.broken is broken


def test_a_tensor_is_quantized_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    at_once_is_exact()  # which calls it too
    real = codes.at_once
    monkeypatch.setattr(codes, "at_once", lambda *given: made.append(1) or real(*given))
    own, x = quantizer("int8", -1.0, 1.0), torch.tensor([0.5, 0.25])
    coded = Coded(channels_last=False)
    for changes in (False, False, True):
        if changes:
            x.mul_(-1)
        coded.hold(x, own)
        assert torch.equal(coded.unsigned(x, own, 128), expected(x, own))
    assert len(made) == 2
