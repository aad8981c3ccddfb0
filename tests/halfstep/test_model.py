"""Folding, sites, observing and applying, on small models with every trap in them."""

import copy
import dataclasses

import pytest
import torch
from prepared import treatments_of
from torch import nn
from torch.nn import functional as F

from halfstep.apply import UnknownSite, applied
from halfstep.certificate import BoundViolated, certify
from halfstep.coverage import covered, places
from halfstep.digest import digest_tensors
from halfstep.errors import UserError
from halfstep.fold import WATCHED, fold_batch_norm
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerTensor, PerToken
from halfstep.observe import calibrate
from halfstep.qparams import choose_qparams
from halfstep.quantize import fake_quantize
from halfstep.scheme import Scheme, Spec, skipping
from halfstep.sites import discover
from halfstep.sketch import Sketch


class Net(nn.Module):
    """Convolution with batch norm, two arms that share an input, a functional matmul, a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.mix = nn.Parameter(torch.eye(8))

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = self.left(x) + self.right(x)
        return self.head(x.mean((2, 3)) @ self.mix)


def build(seed=0):
    torch.manual_seed(seed)
    model = Net()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.2, 3)
    model.bn.weight.data.normal_()
    model.bn.bias.data.normal_()
    return model.eval(), torch.randn(12, 3, 6, 6)


def scheme(weights="int8", activations="int8", calibrator="minmax", token=False, skip=()):
    granularity = PerToken() if token else PerTensor()
    return Scheme(
        Spec(FORMATS[weights], PerAxis(), calibrator),
        Spec(FORMATS[activations], granularity, calibrator),
        overrides=skipping(skip),
    )


def prepared(seed=0):
    model, x = build(seed)
    folded = fold_batch_norm(model, x).model
    return folded, x, *treatments_of(folded, x)


def test_folding_keeps_the_outputs_and_the_original():
    model, x = build()
    before = digest_tensors(model.state_dict())
    folding = fold_batch_norm(model, x)
    assert folding.folded == ("bn",)
    assert folding.max_relative_difference < 1e-6
    assert isinstance(folding.model.bn, nn.Identity)
    assert digest_tensors(model.state_dict()) == before
    assert torch.allclose(folding.model(x), model(x), atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv1d(4, 6, 3), nn.Conv3d(4, 6, 2)])
def test_folding_covers_linear_and_all_convolutions(layer):
    norm = {nn.Conv3d: nn.BatchNorm3d}.get(type(layer), nn.BatchNorm1d)(6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    shape = {nn.Linear: (5, 4), nn.Conv1d: (5, 4, 9), nn.Conv3d: (5, 4, 4, 4, 4)}[type(layer)]
    model = nn.Sequential(layer, norm).eval()
    folding = fold_batch_norm(model, torch.randn(shape))
    assert folding.folded == ("1",)
    assert folding.max_relative_difference < 1e-6


def test_a_norm_whose_input_is_read_elsewhere_is_not_folded_and_is_named():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    folding = fold_batch_norm(Shared().eval(), torch.randn(3, 2, 4, 4))
    assert folding.folded == ()
    assert folding.notes == ("batch norm bn could not be folded",)


def test_a_model_that_cannot_be_traced_is_watched_and_named():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    x = torch.rand(3, 2, 4, 4)
    for batch, folded in ((x, ("bn",)), (-x, ())):
        folding = fold_batch_norm(Branching().eval(), batch)
        assert folding.folded == folded
        assert folding.notes[0].startswith(WATCHED)


def test_a_layer_whose_output_something_else_reads_is_not_folded_by_watching():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.bn.running_mean.fill_(0.5)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y if x.sum() > 0 else y

    folding = fold_batch_norm(Both().eval(), torch.rand(3, 2, 4, 4))
    assert folding.folded == ()
    assert "folding would change outputs" in folding.notes[-1]


def test_coverage_accounts_for_every_parameter_and_every_multiply_accumulate():
    folded, _, sites, _ = prepared()
    found = places(folded, sites, ["bn"])
    macs = {p.name: p.macs for p in found}
    assert macs["conv"] == 8 * 3 * 9 * 36
    assert macs["right"] == 8 * 8 * 9 * 36
    assert macs["head"] == 8 * 5
    assert macs["mix"] == 8 * 8
    assert sum(p.parameters for p in found) == sum(p.numel() for p in folded.parameters())
    reasons = {p.name: p.reason for p in found if p.reason}
    assert reasons["bn"] == "folded into the layer before it"
    assert "one scale" in reasons["add"]


def test_a_skipped_site_says_which_pattern_took_it():
    folded, _, sites, _ = prepared()
    skip = ("he*",)
    rows = covered(places(folded, sites), scheme(skip=skip), sites, skip)
    reasons = {row.place.name: row.reason for row in rows}
    assert reasons["head"] == "skipped by pattern 'he*'"
    assert reasons["mix"] == ""


def test_one_pass_sees_what_entered_each_site():
    folded, x, sites, _ = prepared()
    entered = {site.name: [] for site in sites.activations if site.name != "mix"}
    hooks = [
        folded.get_submodule(s.name).register_forward_pre_hook(
            lambda m, i, name=s.name: entered[name].append(i[0].detach().clone())
        )
        for s in sites.activations
        if s.name != "mix"
    ]
    observed = calibrate(folded, sites.activations, x.split(5))
    for hook in hooks:
        hook.remove()
    for name, tensors in entered.items():
        expected = Sketch.of(torch.cat([t.flatten() for t in tensors]))
        sketch = observed[name].sketch
        assert (sketch.counts == expected.counts).all()
        assert (sketch.lo, sketch.hi) == (expected.lo, expected.hi)


def test_a_shared_input_that_is_changed_in_place_is_counted_anew():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x * 1.0
            y = self.first(x)
            x.mul_(3.0)
            return y + self.second(x)

    model, x = InPlace().eval(), torch.randn(7, 4)
    sites, treatments = treatments_of(model, x)
    observed = calibrate(model, sites.activations, [x])
    assert observed["second"].sketch.hi == pytest.approx(3 * observed["first"].sketch.hi)
    treated = treatments.for_scheme(scheme())
    with applied(model, treated), torch.no_grad():
        changed = model(x)
    first, second = (treated.activations[n].quantizer for n in ("first", "second"))
    expected = F.linear(first(x), treated.weights["first"].values, model.first.bias) + F.linear(
        second(x * 3), treated.weights["second"].values, model.second.bias
    )
    assert torch.allclose(changed, expected, atol=1e-6)


@pytest.mark.parametrize("activations", ["int8", "uint8", "fp8_e4m3", "fp16", "int4_asym"])
@pytest.mark.parametrize("token", [False, True])
def test_applied_model_computes_what_a_plain_reading_of_the_scheme_gives(activations, token):
    folded, x, _, treatments = prepared()
    treated = treatments.for_scheme(scheme(activations=activations, token=token))

    def quantized(name, value, call):
        weight = treated.weights[name].values
        if token and FORMATS[activations].scaled:
            axes = [value.dim() - 1] if name in ("head", "mix") else [1, 2, 3]
            fmt = FORMATS[activations]
            q = choose_qparams(fmt, value.amin(axes, keepdim=True), value.amax(axes, keepdim=True))
            return call(fake_quantize(value, q), weight)
        return call(treated.activations[name].quantizer(value), weight)

    m = folded
    h = F.relu(quantized("conv", x, lambda a, w: F.conv2d(a, w, m.conv.bias, padding=1)))
    h = quantized("left", h, lambda a, w: F.conv2d(a, w, m.left.bias)) + quantized(
        "right", h, lambda a, w: F.conv2d(a, w, m.right.bias, padding=1)
    )
    h = quantized("mix", h.mean((2, 3)), lambda a, w: a @ w)
    expected = quantized("head", h, lambda a, w: F.linear(a, w, m.head.bias))
    with applied(folded, treated), torch.no_grad():
        first, second = folded(x), folded(x)
    assert torch.equal(first, expected)
    assert torch.equal(first, second)


@pytest.mark.parametrize("raises", [False, True])
def test_applying_leaves_the_subject_bit_identical(raises):
    folded, x, _, treatments = prepared()
    before = digest_tensors(folded.state_dict())
    parameters = dict(folded.named_parameters())
    with torch.no_grad():
        output = folded(x)
    try:
        with applied(folded, treatments.for_scheme(scheme("int2", "int4"))), torch.no_grad():
            assert not torch.equal(folded(x), output)
            if raises:
                raise RuntimeError("evaluation broke")
    except RuntimeError:
        assert raises
    assert digest_tensors(folded.state_dict()) == before
    assert all(p is parameters[name] for name, p in folded.named_parameters())
    assert not any(m._forward_pre_hooks for m in folded.modules())
    with torch.no_grad():
        assert torch.equal(folded(x), output)


def test_an_error_while_applying_also_puts_everything_back():
    folded, _, _, treatments = prepared()
    before = digest_tensors(folded.state_dict())
    treated = treatments.for_scheme(scheme())
    parameters = dict(treated.parameters) | {"no.such.parameter": torch.zeros(1)}
    broken = dataclasses.replace(treated, parameters=parameters)
    with pytest.raises(AttributeError), applied(folded, broken):
        pass
    assert digest_tensors(folded.state_dict()) == before
    assert not any(m._forward_pre_hooks for m in folded.modules())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("calibrator", ["minmax", "percentile(99)", "entropy", "mse"])
def test_every_format_and_calibrator_is_certified(name, calibrator):
    _, _, sites, treatments = prepared()
    found = treatments.certificates(scheme(name, name, calibrator))
    assert len(found) == len(sites.weights) + len(sites.activations) == 10
    assert all(c.holds for c in found)
    assert max(c.error_over_bound for c in found) > 0.5


def test_a_value_moved_by_more_than_half_a_step_is_a_violation():
    x = torch.linspace(-1, 1, 101)
    qparams = choose_qparams(FORMATS["int8"], x.amin()[None], x.amax()[None])
    approximation = fake_quantize(x, qparams)
    certify("site", "weight", x, approximation, qparams)
    worse = approximation.clone()
    worse[50] += 0.501 * qparams.scale.item()
    with pytest.raises(BoundViolated, match="weight of site"):
        certify("site", "weight", x, worse, qparams)


@pytest.mark.parametrize("shape", [(12, 1, 1), (1, 5, 1), (1, 1, 1), (1,), ()])
@pytest.mark.parametrize("name", ["int8", "uint4", "fp8_e4m3", "nf4"])
def test_a_certificate_in_parts_says_the_same(name, shape, monkeypatch):
    torch.manual_seed(0)
    x, hi = 2 * torch.randn(12, 5, 7), torch.rand(shape) + 0.5
    qparams = choose_qparams(FORMATS[name], -hi, hi)
    approximation = fake_quantize(x, qparams)
    found = []
    for size in (10**6, 100, 1):
        monkeypatch.setattr("halfstep.certificate.PART", size)
        found.append(certify("site", "weight", x, approximation, qparams).to_json())
    powers = [one.pop("sqnr_db") for one in found]
    assert powers == pytest.approx([powers[0]] * 3, rel=1e-12)
    assert found[0]["clipped"] > 0
    assert found[1] == found[2] == found[0]


def test_a_value_out_of_bound_is_found_in_any_part(monkeypatch):
    monkeypatch.setattr("halfstep.certificate.PART", 10)
    x = torch.linspace(-1, 1, 100)
    qparams = choose_qparams(FORMATS["int8"], x.amin()[None], x.amax()[None])
    for value in (1.0, torch.nan):
        approximation = fake_quantize(x, qparams)
        approximation[57] = value
        with pytest.raises(BoundViolated):
            certify("site", "weight", x, approximation, qparams)


def test_clipped_values_are_counted_apart_with_their_excess():
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, -3.0])
    one = torch.ones(1)
    qparams = choose_qparams(FORMATS["int8"], -one, one)
    found = certify("site", "activation", x, fake_quantize(x, qparams), qparams)
    assert found.clipped == 2
    assert found.clip_excess == pytest.approx(2.0)
    assert found.max_error == pytest.approx(2.0)
    assert found.max_in_range_error <= 0.5 / 127


def test_nan_activations_are_refused_with_the_site_named():
    model, x = build()
    x[3, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="entering conv hold 1 NaN"):
        calibrate(model, discover(model, x[:1]).activations, [x])


class Sometimes(nn.Module):
    """Its second layer runs only where the input is large."""

    def __init__(self):
        super().__init__()
        self.used, self.rare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.used(x)
        return self.rare(x) if x.abs().max() > 100 else x


def test_a_module_that_no_forward_pass_reaches_is_in_the_ledger():
    model, x = Sometimes().eval(), torch.randn(1, 3)
    found = {p.name: p for p in places(model, discover(model, x))}
    assert found["rare"].reason == "no forward pass reached it"
    assert found["rare"].parameters == 12


def test_a_site_that_calibration_never_reaches_is_refused_with_the_way_out():
    model = Sometimes().eval()
    sites = discover(model, torch.full((1, 3), 1e4))
    with pytest.raises(UserError, match=r"site rare saw no activations.*skip: \[rare\]"):
        calibrate(model, sites.activations, [torch.randn(4, 3)])


def test_a_product_that_discovery_never_saw_stops_the_cell_by_name():
    model, x = Sometimes().eval(), torch.randn(8, 3)
    _, treatments = treatments_of(model, x)
    treated = treatments.for_scheme(scheme(token=True))
    with applied(model, treated), torch.no_grad():
        model(x)
        with pytest.raises(UnknownSite, match="rare ran in evaluation"):
            model(x * 1e6)


def test_nan_in_a_dynamic_activation_is_refused_with_the_site_named():
    folded, x, _, treatments = prepared()
    x[0, 0, 0, 0] = float("inf")
    with (
        applied(folded, treatments.for_scheme(scheme(token=True))),
        torch.no_grad(),
        pytest.raises(UserError, match="entering conv hold NaN or infinite"),
    ):
        folded(x)


def test_constant_activations_are_named():
    model, x = build()
    _, treatments = treatments_of(model, torch.full_like(x, 0.25))
    treated = treatments.for_scheme(scheme())
    assert treated.activations["conv"].quantizer.notes == (
        "activation is constant at 0.25 over the calibration data",
    )


def test_a_scheme_gives_the_same_bits_in_two_copies_of_the_model():
    digests = []
    for _ in range(2):
        folded, x, _, treatments = prepared()
        twin = copy.deepcopy(folded)
        with applied(twin, treatments.for_scheme(scheme("int4", "uint8", "mse"))), torch.no_grad():
            digests.append(digest_tensors({"out": twin(x)}))
    assert digests[0] == digests[1]
