"""Corrections: each against its published formula or an independent implementation, and on the
textbook case that it was made for."""

import itertools

import pytest
import torch
from prepared import treatments_of
from torch import nn
from torch.nn import functional as F

from halfstep.apply import applied
from halfstep.certificate import certify
from halfstep.corrections import (
    CORRECTIONS,
    AdaRound,
    Awq,
    BiasCorrection,
    CrossLayerEqualization,
    Gptq,
    SmoothQuant,
    parse_corrections,
)
from halfstep.corrections.adaround import neighbours, row_error
from halfstep.corrections.cle import find_pairs
from halfstep.errors import UserError
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerGroup, PerTensor
from halfstep.moments import gather
from halfstep.qparams import choose_qparams
from halfstep.quantize import fake_quantize
from halfstep.scheme import Scheme, Spec
from halfstep.sites import discover


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows, columns, seed=0):
    """Inputs whose columns depend on each other, as activations' do."""
    mix = random(columns, columns, seed=seed) / columns**0.5
    return random(rows, columns, seed=seed + 1) @ mix + 0.3 * random(rows, 1, seed=seed + 2)


def per_row(weight, name="int4"):
    fmt = FORMATS[name]
    return choose_qparams(fmt, weight.amin(1, keepdim=True), weight.amax(1, keepdim=True))


def gram_of(x):
    return (x.double().T @ x.double()) / len(x)


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


def scheme(corrections, weights="int4", activations=None, granularity=None):
    return Scheme(
        Spec(FORMATS[weights], granularity or PerAxis(), "minmax"),
        Spec(FORMATS[activations], PerTensor(), "minmax") if activations else None,
        parse_corrections(corrections),
    )


def output_error(model, x, treatments, chosen):
    with torch.no_grad():
        plain = model(x)
        with applied(model, treatments.for_scheme(chosen)):
            return float((model(x) - plain).double().square().mean())


# GPTQ


def obq(weight, qparams, gram, damp):
    """Optimal brain quantization in a fixed order: after each column the inverse Hessian loses its
    row and column by one step of Gaussian elimination (Frantar and Alistarh 2022, equation 4)."""
    w = weight.double().clone()
    damped = gram.clone()
    damped += torch.eye(len(gram)).double() * damp * gram.diagonal().mean()
    inverse = torch.linalg.inv(damped)
    rounded = torch.zeros_like(w)
    for j in range(w.shape[1]):
        rounded[:, j] = fake_quantize(w[:, j : j + 1].float(), qparams)[:, 0].double()
        error = (w[:, j] - rounded[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
        inverse[j, j] = 1.0  # the eliminated column takes no part any more
    return rounded.float()


@pytest.mark.parametrize("columns", [5, 128, 300])
def test_gptq_equals_column_by_column_elimination(columns):
    weight, x = random(12, columns), correlated(2000, columns, seed=4)
    qparams, gram = per_row(weight), gram_of(x)
    ours, _ = Gptq().round(weight, qparams, gram)
    theirs = obq(weight, qparams, gram, 0.01)
    assert torch.equal(ours, theirs)


def test_gptq_lowers_the_output_error_and_is_certified_against_what_it_rounded():
    weight, x = random(32, 64), correlated(3000, 64, seed=7)
    qparams, gram = per_row(weight, "int3"), gram_of(x)
    rounded, target = Gptq().round(weight, qparams, gram)
    nearest = fake_quantize(weight, qparams)
    before = row_error((nearest - weight).double(), gram).sum()
    after = row_error((rounded - weight).double(), gram).sum()
    assert after < 0.6 * before
    assert certify("site", "weight", target, rounded, qparams).holds


def test_gptq_on_independent_inputs_is_round_to_nearest():
    weight = random(8, 16)
    rounded, target = Gptq().round(weight, per_row(weight), torch.eye(16).double())
    assert torch.equal(rounded, fake_quantize(weight, per_row(weight)))
    assert torch.equal(target, weight)


def test_gptq_survives_an_input_that_never_occurs():
    weight, x = random(8, 16), correlated(500, 16)
    x[:, 5] = 0.0
    rounded, _ = Gptq().round(weight, per_row(weight), gram_of(x))
    assert torch.isfinite(rounded).all()


# AdaRound


def best_rounding(row, down, up, gram):
    """The least error over every one of the 2**n roundings of a row."""
    every = torch.tensor(list(itertools.product([False, True], repeat=len(row))))
    return float(row_error(torch.where(every, up, down) - row.double(), gram).min())


@pytest.mark.parametrize("name", ["int3", "int4_asym", "fp4_e2m1", "nf4"])
def test_adaround_comes_close_to_the_best_of_all_roundings(name):
    weight, x = random(40, 9, seed=3), correlated(400, 9, seed=5)
    gram, qparams = gram_of(x), per_row(weight, name)
    rounded, target = AdaRound().round(weight, qparams, gram)
    down, up = neighbours(weight, qparams)
    ours = row_error((rounded - weight).double(), gram)
    nearest = row_error((fake_quantize(weight, qparams) - weight).double(), gram)
    rows = zip(weight, down, up, strict=True)
    best = sum(best_rounding(*row, gram) for row in rows)
    assert (ours <= nearest + 1e-9).all()
    assert float(ours.sum()) <= 1.1 * best
    assert float(ours.sum()) < 0.8 * float(nearest.sum())
    assert certify("site", "weight", target, rounded, qparams, gaps=1.0).holds


def test_adaround_goes_to_a_neighbour_and_nowhere_else():
    weight, x = random(16, 40), correlated(800, 40)
    qparams = per_row(weight)
    rounded, _ = AdaRound(iterations=100).round(weight, qparams, gram_of(x))
    down, up = neighbours(weight, qparams)
    assert ((rounded == down.float()) | (rounded == up.float())).all()


# AWQ


def test_awq_equals_a_plain_search_over_samples():
    """Section 3.2 of the paper, with the output error measured on the samples themselves."""
    layer, x = seeded(lambda: nn.Linear(24, 16, bias=False)), correlated(600, 24)
    x[:, 3] *= 30
    model = nn.Sequential(layer)
    moments = gather(model, discover(model, x[:1]), [x], ["0"])["0"]
    spec = Spec(FORMATS["int3"], PerGroup(8), "minmax")
    weight = layer.weight.detach()

    def rounded(matrix):
        parts = matrix.reshape(-1, 8)
        return fake_quantize(parts, per_row(parts, "int3")).reshape(matrix.shape)

    _, alpha = Awq().search(weight, moments, rounded)
    errors = {}
    for step in range(20):
        s = x.abs().mean(0).clamp(min=1e-4).pow(step / 20)
        s = s / (s.max() * s.min()).sqrt()
        errors[step / 20] = float(((x @ (rounded(weight * s) / s - weight).T) ** 2).mean())
    assert alpha == min(errors, key=errors.get)
    assert alpha > 0
    assert errors[alpha] < 0.5 * errors[0.0]
    _, treatments = treatments_of(model, x)
    plain, scaled = (
        output_error(model, x, treatments, Scheme(spec, None, parse_corrections(c)))
        for c in ("none", "awq")
    )
    assert scaled == pytest.approx(errors[alpha], rel=1e-3)
    assert plain == pytest.approx(errors[0.0], rel=1e-3)


# SmoothQuant


def test_smoothquant_is_equation_four_and_changes_nothing_at_full_precision():
    model, x = nn.Sequential(seeded(lambda: nn.Linear(8, 6))), correlated(300, 8)
    x[:, 2] *= 40
    _, treatments = treatments_of(model, x)
    treatment = treatments.for_scheme(scheme("smoothquant(alpha=0.7)", "int8", "int8"))
    x_max, w_max = x.abs().amax(0), model[0].weight.abs().amax(0)
    expected = x_max**0.7 / w_max**0.3
    assert torch.allclose(treatment.activations["0"].divisor, expected, rtol=1e-5)
    exact = treatment.weights["0"].target
    with torch.no_grad():
        same = F.linear(treatment.activations["0"].divided(x), exact, model[0].bias)
        assert torch.allclose(same, model(x), atol=1e-4)


def test_smoothquant_helps_where_a_channel_of_the_input_is_an_outlier():
    model, x = nn.Sequential(seeded(lambda: nn.Linear(32, 32))), random(512, 32)
    x[:, 5] *= 100
    _, treatments = treatments_of(model, x)
    plain, smooth = (
        output_error(model, x, treatments, scheme(c, "int8", "int8"))
        for c in ("none", "smoothquant")
    )
    assert smooth < 0.1 * plain


def test_layers_that_read_one_input_share_their_smoothing():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x) - 3 * self.k(x)

    model, x = seeded(Two), correlated(200, 8)
    _, treatments = treatments_of(model, x)
    treatment = treatments.for_scheme(scheme("smoothquant", "int8", "int8"))
    q, k = (treatment.activations[n].divisor for n in ("q", "k"))
    assert torch.equal(q, k)
    widest = torch.stack([model.q.weight.abs().amax(0), model.k.weight.abs().amax(0)]).amax(0)
    expected = (x.abs().amax(0) / widest).sqrt().detach()
    assert torch.allclose(q, expected, rtol=1e-5)


# Cross-layer equalization


class Chain(nn.Module):
    """Channels of wildly different ranges, as batch norm folding leaves them."""

    def __init__(self, depthwise=False):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8 if depthwise else 1)
        self.c = nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            spread = torch.logspace(-2, 2, 8)
            self.a.weight *= spread.reshape(-1, 1, 1, 1)
            self.a.bias *= spread
            self.b.weight /= spread.reshape((-1, 1, 1, 1) if depthwise else (1, -1, 1, 1))

    def forward(self, x):
        return self.c(torch.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.parametrize("depthwise", [False, True])
def test_equalization_gives_both_layers_the_same_ranges_and_the_same_outputs(depthwise):
    model, x = seeded(lambda: Chain(depthwise)), random(16, 3, 6, 6)
    pairs, why = find_pairs(model)
    assert (pairs, why) == ([("a", "b"), ("b", "c")], "")
    _, treatments = treatments_of(model, x)
    rewrite = treatments._rewrite((CrossLayerEqualization(),))
    one = rewrite.parameters["a.weight"].flatten(1).abs().amax(1)
    two = rewrite.parameters["b.weight"]
    two = two.flatten(1).abs().amax(1) if depthwise else two.abs().amax((0, 2, 3))
    assert torch.allclose(one, two, rtol=1e-4)
    twin = seeded(lambda: Chain(depthwise))
    twin.load_state_dict(dict(twin.state_dict()) | rewrite.parameters)
    with torch.no_grad():
        assert torch.allclose(twin(x), model(x), rtol=1e-4, atol=1e-4)


def test_one_pair_is_equations_nine_to_eleven():
    layers = {"a": seeded(lambda: nn.Linear(4, 6)), "b": seeded(lambda: nn.Linear(6, 3))}
    r1 = layers["a"].weight.detach().abs().amax(1).double()
    r2 = layers["b"].weight.detach().abs().amax(0).double()
    factors = CrossLayerEqualization().equalize(layers, [("a", "b")])
    assert torch.allclose(factors["b"], (r1 * r2).sqrt() / r2)


def test_equalization_helps_per_tensor_quantization():
    model, x = seeded(Chain), random(64, 3, 6, 6)
    _, treatments = treatments_of(model, x)
    plain, equal = (
        output_error(model, x, treatments, scheme(c, "int8", "int8", PerTensor()))
        for c in ("none", "cle")
    )
    assert equal < 0.05 * plain


@pytest.mark.parametrize(
    "between", [nn.GELU(), nn.Sequential(nn.ReLU(), nn.Flatten())], ids=["gelu", "flatten"]
)
def test_layers_that_may_not_be_equalized_are_not(between):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), between, nn.Linear(2, 3)).eval()
    pairs, why = find_pairs(model)
    assert pairs == []
    assert "no two layers" in why


# Bias correction


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_bias_correction_restores_the_mean_of_every_output(kind, bias):
    x = random(200, 4, 6, 6).abs() + 1 if kind != "linear" else random(500, 8).abs() + 1
    build = {
        "linear": lambda: nn.Linear(8, 6, bias=bias),
        "conv": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=bias),
        "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=bias),
    }[kind]
    model = nn.Sequential(seeded(build))
    _, treatments = treatments_of(model, x)
    axes = [0] if kind == "linear" else [0, 2, 3]
    with torch.no_grad():
        mean = model(x).mean(axes)
        shifts = []
        for correction in ("none", "bias_correction"):
            with applied(model, treatments.for_scheme(scheme(correction, "int3"))):
                shifts.append(float((model(x).mean(axes) - mean).abs().max()))
    assert shifts[0] > 0.02
    assert shifts[1] < 1e-5
    assert (model[0].bias is not None) == bias


# Together


@pytest.mark.parametrize("name", CORRECTIONS)
def test_every_correction_lowers_the_output_error_on_its_textbook_case(name):
    if name == "cle":
        model, x, weights, activations = seeded(Chain), random(64, 3, 6, 6), "int8", "int8"
    else:
        model = nn.Sequential(seeded(lambda: nn.Linear(24, 16)))
        x, weights, activations = correlated(500, 24) + 0.5, "int3", None
        x[:, 3] *= 30
    activations = "int8" if name == "smoothquant" else activations
    _, treatments = treatments_of(model, x)
    granularity = PerTensor() if name == "cle" else PerAxis()
    plain, corrected = (
        output_error(model, x, treatments, scheme(c, weights, activations, granularity))
        for c in ("none", name)
    )
    assert corrected < 0.9 * plain


@pytest.mark.parametrize(
    "text",
    ["gptq", "adaround", "awq", "awq + gptq", "gptq + bias_correction", "smoothquant + gptq",
     "cle + smoothquant + adaround"],
)  # fmt: skip
def test_corrections_give_the_same_bits_in_another_process_worth_of_state(text):
    x = random(64, 3, 6, 6)
    found = []
    for _ in range(2):
        model = seeded(Chain)
        _, treatments = treatments_of(model, x)
        done = treatments.for_scheme(scheme(text, "int4", None if "awq" in text else "int8"))
        found.append(done.parameters)
        torch.rand(7)  # whatever else draws random numbers must not matter
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_grouped_convolution_is_corrected_group_by_group():
    x = correlated(300 * 16, 36).reshape(300, 4, 12, 12)
    model = nn.Sequential(seeded(lambda: nn.Conv2d(4, 6, 3, groups=2)))
    sites, treatments = treatments_of(model, x)
    moments = gather(model, sites, [x], ["0"])["0"]
    patches = F.unfold(x, 3).transpose(1, 2).reshape(-1, 2, 18)
    step = -(-len(patches) // 8192)
    for group in range(2):
        expected = gram_of(patches[::step, group])
        assert torch.allclose(moments.gram[group], expected, rtol=1e-4, atol=1e-6)
    done = treatments.for_scheme(scheme("gptq", "int3")).weights["0"]
    before, after = done.output_error
    assert after < before
    assert done.of == "compensated weight"
    qparams = done.broadcast()
    own = type(qparams)(qparams.format, qparams.scale[3:], qparams.zero_point[3:])
    alone, _ = Gptq().round(model[0].weight.detach().flatten(1)[3:], own, moments.gram[1])
    assert torch.equal(done.rounded[3:], alone)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(4, 6, 3, padding=2, stride=2), nn.Conv3d(4, 6, 3, padding="same"),
     nn.Conv2d(4, 6, (3, 1), padding=(1, 0), dilation=(2, 1)), nn.Linear(5, 6)],
    ids=["conv1d", "conv3d", "conv2d", "linear"],
)  # fmt: skip
def test_patches_meet_the_rows_of_the_matrix_as_the_operator_does(layer):
    shape = {nn.Conv1d: (7, 4, 9), nn.Conv3d: (7, 4, 4, 4, 4), nn.Conv2d: (7, 4, 6, 5)}
    x = random(*shape.get(type(layer), (7, 4, 5)))
    model = nn.Sequential(layer).eval()
    moments = gather(model, discover(model, x[:1]), [x], ["0"])["0"]
    with torch.no_grad():
        y = (
            F.linear(x, layer.weight)
            if isinstance(layer, nn.Linear)
            else model(x) - layer.bias.reshape(-1, *[1] * (x.dim() - 2))
        )
        power = y.movedim(1 if x.dim() > 2 and not isinstance(layer, nn.Linear) else -1, -1)
        power = power.double().square().flatten(0, -2).mean(0)
    assert torch.allclose(moments.output_error(layer.weight.detach().flatten(1)), power, rtol=1e-4)


def test_a_correction_that_cannot_apply_says_so():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3)).eval()
    _, treatments = treatments_of(model, random(8, 4, 5, 5))
    treatment = treatments.for_scheme(scheme("gptq + bias_correction"))
    assert "gptq does not apply" in treatment.weights["0"].notes[0]
    assert treatment.notes == (
        "bias_correction does not apply to 0: its inputs are not known row by row",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpqt", "did you mean 'gptq'"),
        ("gptq + smoothquant", "rewrite before scale before rounding before bias"),
        ("gptq + adaround", "only one of stage 'rounding'"),
        ("gptq(dump=1)", "unknown parameter 'dump'.*'damp'"),
        ("gptq(damp=x)", "damp is not a number: 'x'"),
        ("gptq(damp=0)", "damp is above 0"),
        ("smoothquant(alpha=2)", "alpha lies between 0 and 1"),
        ("adaround(iterations=0)", "iterations are at least 1"),
        ("awq(grid=1)", "grid is at least 2"),
    ],
)
def test_wrong_corrections_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_corrections(text)


def test_corrections_are_written_as_configs_write_them():
    text = "cle + smoothquant(alpha=0.7) + gptq + bias_correction"
    found = parse_corrections(text)
    assert " + ".join(map(str, found)) == text
    assert found[1].to_json() == {"name": "smoothquant", "alpha": 0.7}
    assert parse_corrections("none") == ()
    assert isinstance(found[1], SmoothQuant)
    assert isinstance(found[3], BiasCorrection)
