"""Integer products: equal, bit for bit, to whole-number arithmetic, by whichever way."""

import itertools

import pytest
import torch
from prepared import treatments_of
from torch import nn
from torch.nn import functional as F

from halfstep.apply import Treatment, applied
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerGroup, PerTensor, PerToken
from halfstep.integer import Integers, Kernel, available, differing, summary
from halfstep.scheme import Scheme, Spec

BY_FLOAT = Kernel("float", "the test asks for it")
native = pytest.mark.skipif(
    not available().integer, reason=f"no integer operators here: {available().reason}"
)


class Net(nn.Module):
    """Strides, dilation, groups, a tensor that enters two products, a weight used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=4, bias=False)
        self.right = nn.Conv2d(8, 8, (1, 3), stride=(2, 2), padding=(0, 1))
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.tanh(self.left(x)[..., :4, :4] + self.right(x)[..., :4, :4])
        x = x.flatten(2).transpose(1, 2)
        x = self.inner(x) + F.linear(x, self.inner.weight.T)  # the second reads it transposed
        return self.head(x.mean(1))


def scheme(weights="int8", activations="int8", granularity=None, token=False):
    act = PerToken() if token else PerTensor()
    return Scheme(
        Spec(FORMATS[weights], granularity or PerAxis(), "minmax"),
        Spec(FORMATS[activations], act, "percentile(99)"),
    )


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(12, 3, 8, 8)
    return model, x, treatments_of(model, x)[1]


def whole_number_outputs(model, treatment, x):
    """The formula of the module's documentation, in int64 arithmetic, one product at a time."""

    def product(name, module, x):
        quantizer, weight = treatment.activations[name].quantizer, treatment.weights[name]
        grid = quantizer.to_grid(x).long()
        codes = weight.codes().reshape(weight.values.shape).long()
        scale = weight.qparams.scale.reshape(-1).expand(len(codes))
        if isinstance(module, nn.Conv2d):
            acc = F.conv2d(grid.double(), codes.double(), None, module.stride, module.padding,
                           module.dilation, module.groups).long()  # fmt: skip
            y = acc.float() * quantizer.scale * scale.reshape(-1, 1, 1)
            return y if module.bias is None else y + module.bias.reshape(-1, 1, 1)
        return (grid @ codes.T).float() * quantizer.scale * scale + module.bias

    x = F.relu(product("stem", model.stem, x))
    return torch.cat(
        [product("left", model.left, x).flatten(), product("right", model.right, x).flatten()]
    )


@pytest.mark.parametrize(
    ("weights", "activations", "granularity"),
    [
        *itertools.product(
            ["int8", "int8_full", "int4", "int2"], ["int8", "uint8", "int8_asym", "int8_full",
                                                    "uint4", "int5"], [PerAxis()]
        ),
        ("int8", "int8", PerTensor()),
    ],
)  # fmt: skip
def test_products_are_whole_number_arithmetic(net, weights, activations, granularity):
    model, x, treatments = net
    chosen = scheme(weights, activations, granularity)
    treatment = treatments.for_scheme(chosen)
    seen = {}
    handles = [
        getattr(model, name).register_forward_hook(
            lambda module, inputs, y, name=name: seen.update({name: y})
        )
        for name in ("left", "right")
    ]
    try:
        for kernel in (BY_FLOAT, available()):
            integers = Integers(kernel)
            proofs = integers.prove(model, treatment, x)
            assert [p.operation for p in proofs] == ["stem", "left", "right", "inner", "head"]
            with torch.no_grad(), integers.applied(model, treatment, proofs):
                model(x)
            expected = whole_number_outputs(model, treatment, x)
            assert torch.equal(torch.cat([seen[n].flatten() for n in ("left", "right")]), expected)
    finally:
        for handle in handles:
            handle.remove()


@native
@pytest.mark.parametrize(("weights", "activations"), [("int8", "int8"), ("int4", "uint8")])
def test_both_ways_come_to_the_same_bits(net, weights, activations):
    model, x, treatments = net
    treatment = treatments.for_scheme(scheme(weights, activations))
    outputs = []
    for kernel in (BY_FLOAT, available()):
        integers = Integers(kernel)
        proofs = integers.prove(model, treatment, x)
        assert {p.kernel for p in proofs} == {"onednn" if kernel.integer else "float"}
        assert all((p.compared > 0) == kernel.integer and p.differing == 0 for p in proofs)
        with torch.no_grad(), integers.applied(model, treatment, proofs):
            outputs.append(model(x))
    assert torch.equal(*outputs)
    with torch.no_grad(), applied(model, treatment):
        simulated = model(x)
    assert torch.allclose(outputs[0], simulated, atol=0.05 * float(simulated.abs().max()))


def test_sums_beyond_float32_are_added_in_float64():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4096, 2)).eval(), torch.rand(3, 4096)
    model[0].weight.data.fill_(1.0)[0, 0] = -1.0
    treatment = treatments_of(model, x)[1].for_scheme(scheme())
    integers = Integers(BY_FLOAT)
    (proof,) = integers.prove(model, treatment, x)
    assert proof.largest_sum == 4096 * 127 * 127 > 2**24
    with torch.no_grad(), integers.applied(model, treatment, (proof,)):
        y = model(x)
    grid = treatment.activations["0"].quantizer.to_grid(x).long()
    acc = grid @ treatment.weights["0"].codes().long().T
    scale = treatment.weights["0"].qparams.scale.reshape(-1)
    expected = acc.float() * treatment.activations["0"].quantizer.scale * scale + model[0].bias
    assert torch.equal(y, expected)
    if available().integer:
        assert [p.differing for p in Integers().prove(model, treatment, x)] == [0]


@pytest.mark.parametrize(
    "other",
    [
        scheme(token=True),
        scheme("uint8"),
        scheme("int8", "fp8_e4m3"),
        scheme("int8", granularity=PerGroup(4)),
        scheme("nf4"),
    ],
    ids=lambda s: s.name,
)
def test_what_does_not_qualify_is_fake_quantized(net, other):
    model, x, treatments = net
    treatment, integers = treatments.for_scheme(other), Integers()
    proofs = integers.prove(model, treatment, x)
    assert proofs == ()
    with torch.no_grad(), integers.applied(model, treatment, proofs):
        y = model(x)
    with torch.no_grad(), applied(model, treatment):
        assert torch.equal(model(x), y)


def test_nan_is_not_turned_into_a_code(net):
    model, x, treatments = net
    treatment, integers = treatments.for_scheme(scheme()), Integers()
    proofs = integers.prove(model, treatment, x)
    poisoned, extreme = x.clone(), x.clone()
    poisoned[3, 1, 2, 2] = float("nan")
    extreme[3, 1, 2, 2] = float("inf")
    with torch.no_grad(), integers.applied(model, treatment, proofs):
        found, saturated = model(poisoned), model(extreme)
    assert found[3].isnan().all()
    assert saturated.isfinite().all()


def test_an_operator_that_differs_is_not_used(net, monkeypatch):
    """As on a processor where the operator saturates: the cell goes on by floats, and says so."""
    model, x, treatments = net
    treatment = treatments.for_scheme(scheme())

    def saturating(product, codes, zero_point, bias):
        grid = codes.clamp(max=140 if zero_point else 12).float() - zero_point
        return integer.by_float(product, grid, bias)

    from halfstep import integer

    monkeypatch.setattr(integer, "by_onednn", saturating)

    broken = Integers(Kernel("onednn"))
    proofs = broken.prove(model, treatment, x)
    assert {p.kernel for p in proofs if p.differing} == {"float"}
    assert any(p.differing for p in proofs)
    assert "the integer operator differs in" in differing(proofs)[0]
    assert summary(broken.kernel, proofs)["differing"] > 0
    with torch.no_grad(), broken.applied(model, treatment, proofs):
        y = model(x)
    by_float = Integers(BY_FLOAT)
    with torch.no_grad(), by_float.applied(model, treatment, by_float.prove(model, treatment, x)):
        assert torch.equal(model(x), y)
    integer.available.cache_clear()
    try:
        kernel = integer.available()
        assert not kernel.integer
        assert "full-scale codes of a linear" in kernel.reason
    finally:
        monkeypatch.undo()
        integer.available.cache_clear()


def test_inference_mode_comes_to_the_same_bits(net):
    _, x, treatments = net
    with treatments.applied(scheme()) as quantized:
        with torch.no_grad():
            expected = quantized(x)
        with torch.inference_mode():
            found = quantized(x.clone())
            again = quantized(x.clone())
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)


def test_nothing_is_left_changed(net):
    model, x, treatments = net
    before = model(x)
    with pytest.raises(RuntimeError, match="midway"), treatments.applied(scheme()):
        raise RuntimeError("midway")
    assert torch.equal(model(x), before)
    with Integers().applied(model, Treatment(), ()):
        assert torch.equal(model(x), before)
