"""torchao runs our codes: its outputs are the simulation's."""

import pytest
import torch
from prepared import treatments_of
from torch import nn

from backends import backend
from halfstep.corrections import parse_corrections
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerGroup, PerTensor, PerToken
from halfstep.scheme import Override, Scheme, Spec


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.first, self.last = nn.Linear(64, 48), nn.Linear(48, 5)

    def forward(self, x):
        return self.last(torch.relu(self.first(self.conv(x).flatten(1))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(24, 1, 6, 6)
    return model, x, *treatments_of(model, x)


NO_CONV = Override(names=("conv",), weights=None, activations=None)


def scheme(
    weights="int8",
    activations="int8_full",
    granularity=None,
    overrides=(NO_CONV,),
    weights_by=None,
    **other,
):
    return Scheme(
        Spec(FORMATS[weights], weights_by or PerAxis(), "mse"),
        Spec(FORMATS[activations], granularity or PerToken(), "minmax") if activations else None,
        overrides=overrides,
        backend="torchao",
        **other,
    )


@pytest.mark.parametrize(
    ("chosen", "ran"),
    [
        (scheme(), {"int8": 2}),
        (scheme("int8_full", granularity=PerTensor()), {"int8": 2}),
        (scheme(activations=None), {"fp32": 2}),
        (scheme("int4", None, weights_by=PerGroup(16)), {"fp32": 2}),
        (scheme("int3_asym", None), {"fp32": 2}),
        (scheme("fp8_e4m3", None), {"fp32": 2}),
        (scheme("fp8_e5m2", None), {"fp32": 2}),
    ],
    ids=["dynamic", "static", "weight only", "int4 by group", "int3", "e4m3", "e5m2"],
)
def test_outputs_are_the_simulations(net, chosen, ran):
    model, x, sites, treatments = net
    runs = backend("torchao")
    assert runs.refuses(chosen, sites) == ""
    made = [runs.build(model, sites, chosen, treatments.for_scheme(chosen), x[:2])
            for _ in range(2)]  # fmt: skip
    assert made[0].digest == made[1].digest
    opened = runs.open(made[0], model, 1)
    with torch.no_grad():
        found = opened(x)
        with treatments.applied(chosen.simulation) as simulated:
            expected = simulated(x)
        assert not torch.equal(model(x), expected)
    assert torch.allclose(found, expected, rtol=0, atol=2e-6)
    nodes = [node for node in opened.nodes(x) if node.kind in ("_int_mm", "mm", "addmm")]
    assert {p: sum(n.precision == p for n in nodes) for p in ran} == ran
    assert len(nodes) == 2


@pytest.mark.parametrize(
    ("chosen", "because"),
    [
        (scheme(overrides=()), "weight conv: it enters a conv2d"),
        (scheme(activations="int8"), "torchao's scale is amax / 127.5: that is int8_full"),
        (scheme("int4"), "activation first: it meets int4 weights, which torchao multiplies at"),
        (scheme("nf4", None), "weight first: torchao has no tensor here for nf4"),
        (scheme("uint4", None), "weight first: torchao has no tensor here for uint4"),
        (scheme("int8", None, weights_by=PerGroup(8)), "scales per_group(8)"),
        (scheme("int4", None, weights_by=PerGroup(10)), "are no whole groups of 10"),
        (
            scheme(overrides=(Override(names=("conv",), weights=None),)),
            "activation conv enters a conv2d without a quantized weight",
        ),
        (scheme(corrections=parse_corrections("smoothquant")), "divide activations"),
        (Scheme(None, Spec(FORMATS["int8_full"], PerToken(), "minmax")), "at full precision"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(net, chosen, because):
    assert because in backend("torchao").refuses(chosen, net[2])
