"""The graphs that integer kernels run: our codes, our scales, the simulation's outputs."""

import importlib.util

import numpy as np
import pytest
import torch
from prepared import treatments_of
from torch import nn
from torch.nn import functional as F

from backends import Artefact, backend, onnx_graph
from backends.inductor import no_compiler
from halfstep.apply import Treatment
from halfstep.corrections import parse_corrections
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerGroup, PerTensor, PerToken
from halfstep.scheme import Scheme, Spec, skipping

compiling = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())
BACKENDS = ["onnxruntime", "openvino", pytest.param("inductor", marks=compiling)]
onnxruntime = importlib.import_module("onnxruntime")
onnx = importlib.import_module("onnx")


class Net(nn.Module):
    """What a graph has to hold: convolutions of every setting, tied and transposed weights, a
    table, attention, a tensor that enters two products."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens, mask):
        x = self.table(tokens)
        x = x + torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        seen = mask[:, None, None, :] != 0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + mixed.transpose(1, 2).flatten(2)
        x = self.inner(x) + F.linear(x, self.inner.weight.T)
        x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"logits": self.head(x), "pooled": x}


def scheme(name, weights="int8", activations="uint8", granularity=None, **other):
    return Scheme(
        Spec(FORMATS[weights], granularity or PerAxis(), "minmax"),
        Spec(FORMATS[activations], PerTensor(), "minmax") if activations else None,
        backend=name,
        **other,
    )


def batch(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"tokens": torch.randint(0, 11, (rows, length), generator=generator), "mask": mask}


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    model = Net().eval()
    given = batch(16, 6)
    sites, treatments = treatments_of_batch(model, given)
    return model, given, sites, treatments


def treatments_of_batch(model, given):
    from halfstep.batches import first
    from halfstep.observe import calibrate
    from halfstep.sites import discover
    from halfstep.treatments import Calibration, Treatments

    sites = discover(model, first(given, 1))
    observations = calibrate(model, sites.activations, [given])
    return sites, Treatments(model, sites, Calibration(lambda: [given], 16, observations), given)


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, dilation=2),
        nn.Tanh(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5),
    ).eval()  # fmt: skip
    x = torch.randn(16, 3, 16, 16)
    return model, x, *treatments_of(model, x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.beside = nn.Conv2d(8, 16, 1, stride=2)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        inner = self.two(torch.relu(self.one(x)))
        inner += self.beside(x)
        return self.last(torch.relu(inner)).mean((2, 3))


@pytest.mark.parametrize("name", BACKENDS)
def test_sums_of_codes(name):
    """Convolutions that feed a sum run on codes where its terms are quantized."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(16, 8, 12, 12)
    sites, treatments = treatments_of(model, x, sums=True)
    runs = backend(name)
    low = {}
    for sums in (None, Spec(FORMATS["uint8"], PerTensor(), "minmax")):
        chosen = scheme(name, sums=sums)
        assert runs.refuses(chosen, sites) == ""
        treatment = treatments.for_scheme(chosen)
        opened = runs.open(runs.build(model, sites, chosen, treatment, x[:2]), model, 1)
        found = opened(x)
        with torch.no_grad(), treatments.applied(chosen.simulation) as quantized:
            expected = quantized(x)
        # A rounding that falls the other way moves one output by a step, of the mean of 36.
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        products = [node for node in opened.nodes(x) if node.precision != "other"]
        low[bool(sums)] = sum(node.precision == "int8" for node in products)
        assert len(products) == 4
        if sums and name == "onnxruntime":
            assert "QLinearAdd" in {node.kind for node in opened.nodes(x)}
            assert opened.codes(x).keys() >= {"sum.augend", "sum.addend"}
    if name == "onnxruntime":
        assert low == {False: 1, True: 3}  # the last one's result is not quantized


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("weights", "activations", "granularity"),
    [("int8", "uint8", PerAxis()), ("int8", "int8", PerTensor()),
     ("int8_full", "int8_asym", PerAxis()), ("int8", None, PerAxis())],
)  # fmt: skip
def test_outputs_are_the_simulations(image, name, weights, activations, granularity):
    model, x, sites, treatments = image
    chosen = scheme(name, weights, activations, granularity)
    runs = backend(name)
    assert runs.refuses(chosen, sites) == ""
    treatment = treatments.for_scheme(chosen)
    made = runs.build(model, sites, chosen, treatment, x[:2])
    found = runs.open(made, model, 1)(x)
    with torch.no_grad(), treatments.applied(chosen.simulation) as simulated:
        expected = simulated(x)
    with torch.no_grad():
        noise = (expected - model(x)).abs().max()
    # Float sums in another order: now and then a code is the next one.
    assert (found - expected).abs().max() < 0.5 * noise
    assert not torch.equal(found, model(x))


@pytest.mark.parametrize("name", BACKENDS)
def test_tables_attention_tied_weights_and_several_outputs(text, name):
    model, given, sites, treatments = text
    chosen = scheme(name, overrides=skipping(("conv",)) if name == "inductor" else ())
    runs = backend(name)
    assert runs.refuses(chosen, sites) == ""
    made = runs.build(model, sites, chosen, treatments.for_scheme(chosen), given)
    opened = runs.open(made, model, 1)
    for other in (given, batch(5, 9, seed=3), batch(1, 4, seed=4)):  # other lengths and sizes
        found = opened(**other)
        with torch.no_grad(), treatments.applied(chosen.simulation) as simulated:
            expected = simulated(**other)
        assert list(found) == ["logits", "pooled"]
        for key, value in expected.items():
            assert torch.allclose(found[key], value, atol=0.02 * float(value.abs().max()))


@pytest.mark.parametrize("name", [BACKENDS[0], BACKENDS[2]])
def test_a_graph_with_a_fixed_size_is_refused(name):
    from halfstep.examples import Inputs
    from tasks.deployed import FIXED, check_shapes

    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(int(x.shape[0]), -1)[:, :4]

    model, x = Fixed().eval(), torch.randn(8, 6)
    chosen = scheme(name)
    runs = backend(name)

    def check():
        made = runs.build(model, None, chosen, Treatment(), x[:2])
        opened = runs.open(made, model, 1)
        assert torch.equal(opened(x[:2]), model(x[:2]))
        check_shapes(opened, model, Inputs.of(x))

    with pytest.raises(ValueError, match=FIXED if name == "onnxruntime" else "Constraints"):
        check()


def test_codes_are_the_simulations_site_by_site(image):
    model, x, sites, treatments = image
    chosen = scheme("onnxruntime")
    treatment = treatments.for_scheme(chosen)
    runs = backend("onnxruntime")
    opened = runs.open(runs.build(model, sites, chosen, treatment, x[:2]), model, 1)
    theirs, ours = opened.codes(x), treatments.integers.codes(model, treatment, x)
    assert list(theirs) == list(ours) == ["0", "2", "5"]
    assert torch.equal(theirs["0"].int(), ours["0"])  # nothing came before it
    for site in ours:
        steps = (theirs[site].int() - ours[site]).abs()
        assert steps.max() <= 1
        assert (steps > 0).float().mean() < 0.01


def test_an_exported_model_is_left_as_it_was(image):
    model, x, sites, treatments = image
    chosen = scheme("onnxruntime")
    before = model(x)
    made = [
        backend("onnxruntime").build(model, sites, chosen, treatments.for_scheme(chosen), x[:2])
        for _ in range(2)
    ]
    assert not model.training  # the exporter puts back the mode of what it exports
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(x), before)
    assert made[0].digest == made[1].digest
    assert made[0].files == made[1].files


def test_a_dropout_stays_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    x = torch.randn(8, 8)
    onnx_graph.export(model, Treatment(), x)
    assert torch.equal(model(x), model(x))


def test_weights_are_stored_as_our_codes(image):
    model, x, _, treatments = image
    chosen = scheme("onnxruntime")
    treatment = treatments.for_scheme(chosen)
    graph = onnx_graph.export(model, treatment, x[:2]).model
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    for site, weight in treatment.weights.items():
        codes, scale = weight.by_row()
        assert np.array_equal(held[f"{site}.weight.codes"], codes.numpy())
        assert np.array_equal(held[f"{site}.weight.scale"], scale.numpy())
        assert f"model.{site}.weight" not in held  # the float weight is gone
    quantizer = treatment.activations["2"].quantizer
    assert held["2.scale"] == np.float32(quantizer.scale)
    assert held["2.zero_point"] == quantizer.unsigned_zero_point


@compiling
def test_what_a_backend_keeps_compiled_is_bounded(image):
    from backends import inductor

    model, x, sites, treatments = image
    runs = backend("inductor")
    chosen = scheme("inductor")
    made = runs.build(model, sites, chosen, treatments.for_scheme(chosen), x[:2])
    opened = runs.open(made, model, 1)
    assert runs.open(made, model, 1) is opened
    for number in range(inductor.KEPT):
        runs.open(Artefact({**made.files, "another": bytes([number])}), model, 1)
    assert runs.open(made, model, 1) is not opened


def test_a_corrections_divisor_is_part_of_the_graph(image):
    model, x, sites, treatments = image
    chosen = scheme("onnxruntime", corrections=parse_corrections("smoothquant"))
    treatment = treatments.for_scheme(chosen)
    assert any(t.divisor is not None for t in treatment.activations.values())
    runs = backend("onnxruntime")
    found = runs.open(runs.build(model, sites, chosen, treatment, x[:2]), model, 1)(x)
    with torch.no_grad(), treatments.applied(chosen.simulation) as simulated:
        assert torch.allclose(found, simulated(x), atol=0.05 * float(found.abs().max()))


def test_the_profile_says_what_ran_at_low_precision(image):
    model, x, sites, treatments = image
    chosen = scheme("onnxruntime")
    runs = backend("onnxruntime")
    made = runs.build(model, sites, chosen, treatments.for_scheme(chosen), x[:2])
    nodes = [n for n in runs.open(made, model, 1).nodes(x) if n.precision != "other"]
    kinds = [(node.kind, node.precision) for node in nodes]
    assert ("QLinearConv", "int8") in kinds  # its ReLU and the next site are fused with it
    assert ("Gemm", "fp32") in kinds  # nothing quantizes what it returns
    plain = scheme("onnxruntime", activations=None)
    made = runs.build(model, sites, plain, treatments.for_scheme(plain), x[:2])
    assert {n.precision for n in runs.open(made, model, 1).nodes(x)} <= {"fp32", "other"}


@compiling
@pytest.mark.parametrize(
    ("activations", "expected"),
    [("uint8", ["int8", "int8", "int8"]), (None, ["fp32", "fp32", "fp32"])],
)
def test_inductor_runs_every_product_on_codes(image, activations, expected):
    model, x, sites, treatments = image
    chosen = scheme("inductor", activations=activations)
    runs = backend("inductor")
    made = runs.build(model, sites, chosen, treatments.for_scheme(chosen), x[:2])
    nodes = runs.open(made, model, 1).nodes(x)
    assert [n.precision for n in nodes if n.precision != "other"] == expected


@pytest.mark.parametrize(
    ("chosen", "because"),
    [
        (scheme("onnxruntime", "int4"), "int4 has 4 bits"),
        (scheme("onnxruntime", "uint8"), "uint8 has zero points"),
        (scheme("onnxruntime", "fp8_e4m3"), "fp8_e4m3 is not an integer format"),
        (scheme("onnxruntime", granularity=PerGroup(4)), "scales per_group(4)"),
        (scheme("onnxruntime", activations="fp8_e4m3"), "activation 0: fp8_e4m3 is not"),
        (
            Scheme(Spec(FORMATS["int8"], PerAxis(), "minmax"),
                   Spec(FORMATS["int8"], PerToken(), "minmax"), backend="onnxruntime"),
            "scales per_token where its kernels take one static scale",
        ),
        (Scheme(None, Spec(FORMATS["int8"], PerTensor(), "minmax")), "weights at full precision"),
        (scheme("onnxruntime", activations=None, corrections=parse_corrections("awq")), "awq"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_run_is_refused_with_the_reason(image, chosen, because):
    _, _, sites, _ = image
    for name in ("onnxruntime", "openvino", "inductor"):
        assert because in backend(name).refuses(chosen, sites)


@compiling
def test_inductor_compiles_a_model_of_linear_layers_for_every_length(text):
    """Without convolutions one code serves all shapes; its profile too."""
    model, given, _, _ = text
    plain = _Pooled(model)
    sites, treatments = treatments_of_batch(plain, given)
    chosen, runs = scheme("inductor"), backend("inductor")
    assert runs.refuses(chosen, sites) == ""
    opened = runs.open(
        runs.build(plain, sites, chosen, treatments.for_scheme(chosen), given), plain, 1
    )
    for other in (given, batch(3, 9, seed=3), batch(1, 4, seed=4), batch(1, 7, seed=5)):
        with torch.no_grad(), treatments.applied(chosen.simulation) as simulated:
            expected = simulated(**other)
        assert torch.allclose(opened(**other), expected, atol=0.02 * float(expected.abs().max()))
        nodes = [n.precision for n in opened.nodes(other) if n.precision != "other"]
        # Of a single row the compiler makes plain code instead of the head's product.
        assert nodes == ["int8"] * (1 if len(expected) == 1 else 2)
    torch.use_deterministic_algorithms(True)  # it would have the code compiled anew
    try:
        assert {n.precision for n in opened.nodes(given)} == {"int8"}
    finally:
        torch.use_deterministic_algorithms(False)


class _Pooled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.table, self.inner, self.head = model.table, nn.Linear(8, 8), model.head

    def forward(self, tokens, mask):
        x = torch.tanh(self.inner(self.table(tokens)))
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_inductor_takes_two_dimensional_convolutions(text):
    """Its pass gives one-dimensional ones the wrong shape (torch 2.13)."""
    _, _, sites, _ = text
    assert "activation conv enters a conv1d" in backend("inductor").refuses(
        scheme("inductor"), sites
    )


def test_inductor_without_a_compiler_is_refused(image, monkeypatch):
    from torch._inductor import cpp_builder

    from backends import inductor

    def missing():
        raise RuntimeError("No working C++ compiler found in {'search': ('g++',)}")

    _, _, sites, _ = image
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    inductor.no_compiler.cache_clear()
    reason = backend("inductor").refuses(scheme("inductor"), sites)
    inductor.no_compiler.cache_clear()
    assert "needs a C++ compiler (g++ or clang++): No working C++ compiler" in reason


def test_an_artefact_of_inductor_holds_no_data_and_no_path(image):
    model, x, sites, treatments = image
    chosen = scheme("inductor")
    treatment = treatments.for_scheme(chosen)
    made = [
        backend("inductor").build(model, sites, chosen, treatment, rows) for rows in (x[:2], x[2:4])
    ]
    assert made[0].files == made[1].files  # of other examples
    for data in made[0].files.values():
        assert b"site-packages" not in data
        assert __file__.encode() not in data


def test_sites_left_out_are_not_refused(image):
    _, _, sites, _ = image
    chosen = scheme("onnxruntime", "int8", overrides=skipping(("0",)))
    assert backend("onnxruntime").refuses(chosen, sites) == ""


@pytest.mark.parametrize("name", BACKENDS)
def test_an_artefact_reloads_to_the_same_digest(image, tmp_path, name):
    model, x, sites, treatments = image
    chosen = scheme(name)
    made = backend(name).build(model, sites, chosen, treatments.for_scheme(chosen), x[:2])
    for file, data in made.files.items():
        (tmp_path / file).write_bytes(data)
    again = Artefact.read(tmp_path, sorted(made.files))
    assert again.digest == made.digest
    assert again.bytes == sum((tmp_path / file).stat().st_size for file in made.files)
    outputs = [backend(name).open(a, model, 1)(x) for a in (made, again)]
    assert torch.equal(*outputs)
