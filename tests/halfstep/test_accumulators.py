"""Accumulators: the static bound holds on real integer sums, and overflow is found where it is."""

import pytest
import torch
from prepared import treatments_of
from torch import nn

from halfstep.accumulators import INT32_MAX, overflowing
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerGroup, PerTensor, PerToken
from halfstep.scheme import Scheme, Spec


def scheme(weights="int8", activations="int8", granularity=None, token=False):
    return Scheme(
        Spec(FORMATS[weights], granularity or PerAxis(), "minmax"),
        Spec(FORMATS[activations], PerToken() if token else PerTensor(), "minmax"),
    )


def linear(inputs, outputs=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, outputs)).eval()


@pytest.mark.parametrize("activations", ["int8", "int8_asym", "uint8", "int8_full"])
@pytest.mark.parametrize("weights", ["int8", "int4_asym"])
def test_the_bound_is_met_by_the_worst_input_and_never_passed(weights, activations):
    model, x = linear(50), torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    treatments = treatments_of(model, x)[1]
    chosen = scheme(weights, activations)
    found = treatments.accumulators(chosen)[0]
    treatment = treatments.for_scheme(chosen)
    weight, quantize = treatment.weights["0"], treatment.activations["0"].quantizer
    q = weight.broadcast()
    codes = (weight.codes().long() - q.zero_point).double()
    scale = float(quantize.qparams.scale)
    entered = (quantize(x) / scale).round().double()
    bias = (model[0].bias.double() / (q.scale[:, 0].double() * scale)).round().detach()
    sums = (entered @ codes.T).abs() + bias.abs()
    assert float(sums.max()) <= found.largest
    assert found.bias == int(bias.abs().max())
    low, high = (float(e) for e in quantize.qparams.format.limits(quantize.qparams.zero_point))
    end = max(abs(low), abs(high))
    worst = codes.abs().sum(1).max() * end + bias.abs().max()
    assert found.largest == int(worst)
    assert not found.overflows
    assert 2 ** (found.bits - 1) > found.largest >= 2 ** (found.bits - 2)


def test_a_long_reduction_overflows_and_says_so():
    inputs = INT32_MAX // (127 * 127) + 200
    model = linear(inputs, outputs=1)
    with torch.no_grad():
        model[0].weight.fill_(0.01)
    x = torch.rand(16, inputs)
    found = treatments_of(model, x)[1].accumulators(scheme())
    assert found[0].overflows
    assert "0: an int32 accumulator could overflow" in overflowing(found)[0]
    fewer = treatments_of(model, x)[1].accumulators(scheme("int4"))
    assert overflowing(fewer) == ()


def test_a_large_bias_over_a_small_scale_overflows():
    model = linear(8)
    with torch.no_grad():
        model[0].bias.fill_(1e6)
    x = torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    treatments = treatments_of(model, x)[1]
    assert treatments.accumulators(scheme())[0].overflows
    dynamic = treatments.accumulators(scheme(token=True))[0]
    assert dynamic.bias is None
    assert not dynamic.overflows


def test_groups_are_added_up_apart():
    model, x = linear(64), torch.rand(16, 64)
    treatments = treatments_of(model, x)[1]
    whole = treatments.accumulators(scheme())[0].largest
    grouped = treatments.accumulators(scheme(granularity=PerGroup(16)))[0].largest
    assert grouped < 0.4 * whole


def test_products_of_activations_are_bounded_by_their_length():
    class Scores(nn.Module):
        def forward(self, x):
            return x @ x.mT

    x = torch.randn(4, 5, 30)
    found = treatments_of(Scores(), x)[1].accumulators(scheme())
    assert [(a.operation, a.largest) for a in found] == [("matmul", 30 * 127 * 127)]


@pytest.mark.parametrize(
    ("weights", "activations"),
    [("fp8_e4m3", "int8"), ("int8", "fp8_e4m3"), ("nf4", "int8"), ("mxint8", "mxint8")],
)
def test_only_products_of_integers_have_integer_accumulators(weights, activations):
    model, x = linear(8), torch.rand(16, 8)
    assert treatments_of(model, x)[1].accumulators(scheme(weights, activations)) == ()
