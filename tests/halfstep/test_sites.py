"""Sites: every kind of product is found, named, counted, and quantized as a plain reading says."""

import dataclasses

import pytest
import torch
from prepared import treatments_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from halfstep.apply import applied
from halfstep.coverage import covered, places
from halfstep.fold import fold_batch_norm
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerPosition, PerTensor, PerToken
from halfstep.intercept import Interception
from halfstep.scheme import Scheme, Spec
from halfstep.sites import discover, matches


@pytest.fixture(autouse=True)
def plain_transformers():
    """As a sweep does: torch's fused transformer path is off for reference and cells alike."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


class Calls(nn.Module):
    """A model whose forward is a function over its modules and parameters."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, x):
        return self._forward(self, x)


def int8(weights="int8", activations="int8", granularity=None):
    return Scheme(
        Spec(FORMATS[weights], PerAxis(), "minmax") if weights else None,
        Spec(FORMATS[activations], granularity or PerTensor(), "minmax") if activations else None,
    )


def treated(model, x, scheme):
    return treatments_of(model, x)[1].for_scheme(scheme)


def output(model, x, treatment=None):
    with torch.no_grad():
        if treatment is None:
            return model(x)
        with applied(model, treatment):
            return model(x)


FUNCTIONAL = {
    "linear": (lambda m, x: F.linear(x, m.w), (3, 5, 8), {"w": random(6, 8)}, ["w"]),
    "matmul right": (lambda m, x: x @ m.w, (3, 5, 8), {"w": random(8, 6)}, ["w"]),
    "matmul left": (lambda m, x: m.w @ x, (3, 8, 5), {"w": random(6, 8)}, ["w"]),
    "method": (lambda m, x: x.matmul(m.w), (3, 8), {"w": random(8, 6)}, ["w"]),
    "mm": (lambda m, x: torch.mm(x, m.w), (3, 8), {"w": random(8, 6)}, ["w"]),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), (3, 8),
              {"w": random(8, 6), "b": random(6)}, ["w"]),
    "transposed view": (lambda m, x: x @ m.w.t(), (3, 8), {"w": random(6, 8)}, ["w"]),
    "slice of outputs": (lambda m, x: F.linear(x, m.w[:4]), (3, 8), {"w": random(6, 8)}, ["w"]),
    "bmm": (lambda m, x: torch.bmm(x, x.mT), (3, 5, 8), {}, ["matmul.left", "matmul.right"]),
    "baddbmm": (lambda m, x: torch.baddbmm(x[:, :, :5], x, x.mT), (3, 5, 8), {},
                ["matmul.left", "matmul.right"]),
    "einsum weight": (lambda m, x: torch.einsum("bti,oi->bto", x, m.w), (3, 5, 8),
                      {"w": random(6, 8)}, ["w"]),
    "einsum": (lambda m, x: torch.einsum("bti,bsi->bts", x, x * 2), (3, 5, 8), {},
               ["einsum.left", "einsum.right"]),
    "einsum with an ellipsis": (lambda m, x: torch.einsum("...i,oi->...o", x, m.w), (3, 5, 8),
                                {"w": random(6, 8)}, ["w"]),
    "einsum without an arrow": (lambda m, x: torch.einsum("bi,io", x, m.w), (3, 8),
                                {"w": random(8, 6)}, ["w"]),
    "a vector": (lambda m, x: (x[:, 0] @ m.v)[..., None] @ x[:1, 1], (3, 2, 8), {"v": random(8)},
                 ["v", "matmul.left", "matmul.right"]),
    "conv1d": (lambda m, x: F.conv1d(x, m.w, padding=1), (3, 4, 9), {"w": random(6, 4, 3)}, ["w"]),
    "conv2d": (lambda m, x: F.conv2d(x, m.w, groups=2), (3, 4, 6, 6),
               {"w": random(6, 2, 3, 3)}, ["w"]),
    "conv3d": (lambda m, x: F.conv3d(x, m.w), (2, 3, 4, 4, 4), {"w": random(5, 3, 2, 2, 2)}, ["w"]),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, x * 2, x - 1), (3, 2, 5, 8), {},
                  [f"attention.{r}" for r in ("query", "key", "probabilities", "value")]),
}  # fmt: skip
MODULES = {
    "Linear": (lambda: nn.Linear(8, 6), (3, 5, 8), (6, 8)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (3, 4, 9), (6, 12)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 9, 9), (6, 18)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), (3, 4, 4, 4, 4), (6, 32)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (3, 4, 9), (6, 12)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (3, 4, 5, 5), (6, 18)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3), (6, 32)),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTIONAL)
def test_functional_operators_are_sites(case):
    forward, shape, parts, names = FUNCTIONAL[case]
    model, x = Calls(forward, **parts).eval(), random(*shape, seed=1)
    sites = discover(model, x)
    assert [a.name for a in sites.activations] == names
    assert [w.name for w in sites.weights] == [name for name in parts if name != "b"]
    assert sites.operations[0].macs > 0 or case == "a vector"  # which torch does not count
    plain, changed = output(model, x), output(model, x, treated(model, x, int8("int4", "int4")))
    assert not torch.equal(plain, changed)
    assert (plain - changed).abs().max() < 0.5 * plain.abs().max()


@pytest.mark.parametrize("case", [c for c in FUNCTIONAL if "w" in FUNCTIONAL[c][2]])
def test_a_functional_weight_has_one_scale_for_each_output(case):
    """Scaling one output's weights by 1000 must not cost the others any precision."""
    forward, shape, parts, _ = FUNCTIONAL[case]
    model, x = Calls(forward, **parts).eval(), random(*shape, seed=1)
    site = discover(model, x).weights[0]
    rows = 6 if "w" in parts and parts["w"].shape[0] != 5 else 5
    assert site.layout.shape[0] == rows
    before = treated(model, x, int8(activations=None)).weights["w"].values
    with torch.no_grad():
        matrix = site.layout.matrix(model.w).clone()
        matrix[2] *= 1000
        model.w.copy_(site.layout.weight(matrix, model.w.shape))
    after = treated(model, x, int8(activations=None)).weights["w"].values
    one, other = site.layout.matrix(before), site.layout.matrix(after)
    others = [r for r in range(rows) if r != 2]
    assert torch.equal(one[others], other[others])
    assert torch.equal(matrix[2] != one[2], torch.ones(len(matrix[2]), dtype=torch.bool))


@pytest.mark.parametrize("case", MODULES)
def test_every_layer_is_quantized_along_its_output_channels(case):
    build, shape, matrix = MODULES[case]
    model, x = nn.Sequential(seeded(build)).eval(), random(*shape, seed=1)
    sites = discover(model, x)
    assert [(w.name, w.layout.shape) for w in sites.weights] == [("0", matrix)]
    layer = model[0].requires_grad_(False)
    treatment = treated(model, x, int8())
    # Independently: output channel c of the layer must not depend on other channels' scales.
    weight, scale = treatment.weights["0"].values, treatment.weights["0"].qparams.scale
    groups = getattr(layer, "groups", 1)
    for channel in range(6):
        if "Transpose" in case:
            per = weight.shape[1]
            inputs = weight.shape[0] // groups
            group = channel // per
            own = layer.weight[group * inputs : (group + 1) * inputs, channel % per]
            got = weight[group * inputs : (group + 1) * inputs, channel % per]
        else:
            own, got = layer.weight[channel], weight[channel]
        step = own.abs().max() / 127
        assert scale[channel, 0] == pytest.approx(float(step), rel=1e-6)
        assert torch.allclose((own / step).round() * step, got, rtol=1e-6)
    # And the treated layer is the layer with that weight on the quantized input.
    entered = treatment.activations["0"].quantizer(x)
    expected = output(_with(layer, weight), entered)
    assert torch.equal(output(model, x, treatment), expected)


def _with(layer, weight):
    import copy

    twin = copy.deepcopy(layer)
    twin.weight = nn.Parameter(weight, requires_grad=False)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


RECURRENT = {
    "lstm": lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True),
    "lstm projected": lambda: nn.LSTM(8, 6, proj_size=4),
    "gru": lambda: nn.GRU(8, 6, bidirectional=True),
    "rnn tanh": lambda: nn.RNN(8, 6, batch_first=True),
    "rnn relu": lambda: nn.RNN(8, 6, nonlinearity="relu", bias=False),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_layers_written_out_equal_torchs(case):
    model, x = seeded(RECURRENT[case]), random(3, 5, 8, seed=1)
    seen = set()

    def visit(site, operand, value):
        seen.add(site)
        return value

    for alters in (False, True):
        mode = Interception(visit, alters=alters)
        with torch.no_grad():
            with mode.over(model):
                ours, state = model(x)
            theirs, expected = model(x)
        assert torch.allclose(ours, theirs, atol=1e-6)
        if not alters:
            assert torch.equal(ours, theirs)
        states = (
            zip(state, expected, strict=True) if isinstance(state, tuple) else [(state, expected)]
        )
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in states)
    weights = {n for n, p in model.named_parameters() if p.dim() == 2}
    assert seen == weights


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_in_a_loop_is_one_site_however_long_the_loop(cell):
    def forward(m, x):
        state = None
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state

    model = Calls(forward, cell=seeded(lambda: cell(8, 6))).eval()
    x = random(4, 5, 8, seed=1)
    sites = discover(model, x[:1])
    assert [a.name for a in sites.activations] == ["cell.weight_ih", "cell.weight_hh"]
    assert "elementwise" in {p.name: p.reason for p in places(model, sites)}["cell.gates"]
    treatment = treated(model, x, int8())
    longer = random(4, 9, 8, seed=2)
    error = (output(model, longer, treatment) - output(model, longer)).abs().max()
    assert 0 < error < 0.1


def test_a_hidden_state_is_certified_over_all_steps():
    model, x = seeded(lambda: nn.LSTM(8, 6, batch_first=True)), random(4, 5, 8, seed=1)
    _, treatments = treatments_of(model, x)
    found = {(c.site, c.target): c for c in treatments.certificates(int8())}
    hidden = found["weight_hh_l0", "activation"]
    assert hidden.elements == 4 * 5 * 6
    assert 0.5 < hidden.error_over_bound <= 1.0


def test_a_packed_sequence_keeps_its_inputs_at_full_precision_and_says_so():
    def forward(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5] * len(x)), batch_first=True)
        return m.rnn(packed)[1][0]

    model, x = Calls(forward, rnn=seeded(lambda: nn.GRU(8, 6))).eval(), random(3, 5, 8)
    sites = discover(model, x[:1])
    assert {w.name for w in sites.weights} == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert not sites.activations
    treatment = treated(model, x, int8("int4", None))
    assert not torch.equal(output(model, x, treatment), output(model, x))
    row = next(p for p in places(model, sites) if p.name == "rnn.gru")
    assert "packed sequences: the weights are quantized" in row.reason


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention_written_out_equals_torchs(mask, grouped):
    q, k, v = (
        random(2, 4, 5, 8),
        random(2, 2 if grouped else 4, 7, 8, seed=1),
        random(2, 2 if grouped else 4, 7, 8, seed=2),
    )
    kept = random(5, 7, seed=3) > -0.5
    kept[:, 0] = True
    kept[2] = False  # a padded query may look at nothing
    options = {
        None: {},
        "bool": {"attn_mask": kept},
        "float": {"attn_mask": random(5, 7, seed=3)},
        "causal": {"is_causal": True},
    }[mask]
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, scale=0.3, **options)
    model = Calls(
        lambda m, x: F.scaled_dot_product_attention(
            x, k, v, enable_gqa=grouped, scale=0.3, **options
        )
    )
    for alters in (False, True):
        mode = Interception(lambda site, operand, x: x, alters=alters)
        with mode.over(model):
            ours = model(q)
        assert torch.allclose(ours, expected, atol=1e-6)
        assert torch.equal(ours, expected) or alters


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention_shows_its_projections_and_its_products(other, weights):
    def forward(m, x):
        key = x * 2 if other else x
        return m.attn(x, key, key if other else x, need_weights=weights)[0]

    attn = seeded(lambda: nn.MultiheadAttention(16, 4, batch_first=True))
    model, x = Calls(forward, attn=attn).eval(), random(3, 5, 16)
    sites = discover(model, x[:1])
    assert [w.name for w in sites.weights] == ["attn.in_proj_weight", "attn.out_proj"]
    assert sites.weights[0].layout.shape == (48, 16)
    inner = "attn.softmax" if weights else "attn.attention.softmax"
    assert "normalisation" in {p.name: p.reason for p in places(model, sites)}[inner]
    kinds = [o.kind for o in sites.operations]
    assert kinds.count("attention") + kinds.count("matmul") == (2 if weights else 1)
    assert sum(o.macs for o in sites.operations) == 4 * 5 * 16 * 16 + 2 * 4 * 5 * 5 * 4
    error = (output(model, x, treated(model, x, int8())) - output(model, x)).abs().max()
    assert 0 < error < 0.05


def test_a_module_used_twice_has_one_weight_and_an_activation_for_each_use():
    model = Calls(lambda m, x: m.fc(torch.relu(m.fc(x)) * 5), fc=seeded(lambda: nn.Linear(8, 8)))
    x = random(6, 8)
    sites = discover(model.eval(), x[:1])
    assert [w.name for w in sites.weights] == ["fc"]
    assert [a.name for a in sites.activations] == ["fc", "fc#2"]
    treatment = treated(model, x, int8())
    first, second = (treatment.activations[n].quantizer for n in ("fc", "fc#2"))
    weight = treatment.weights["fc"].values
    with torch.no_grad():
        h = F.linear(first(x), weight, model.fc.bias)
        expected = F.linear(second(torch.relu(h) * 5), weight, model.fc.bias)
    assert torch.equal(output(model, x, treatment), expected)
    assert sum(p.parameters for p in places(model, sites)) == 72


def test_tied_weights_are_one_site_counted_once_and_stay_tied():
    table, head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    head.weight = table.weight
    model = Calls(lambda m, x: m.head(m.table(x)), table=table, head=head).eval()
    x = torch.arange(12).reshape(3, 4)
    sites = discover(model, x[:1])
    assert [w.parameters for w in sites.weights] == [("table.weight", "head.weight")]
    assert [o.name for o in sites.operations] == ["table", "head"]
    treatment = treated(model, x, int8())
    with applied(model, treatment):
        assert model.table.weight is model.head.weight
        assert torch.equal(model.table.weight, treatment.weights["table"].values)
    assert model.table.weight is model.head.weight is head.weight
    assert sum(p.parameters for p in places(model, sites)) == 96


def test_an_embedding_is_weight_only_with_a_scale_for_each_row():
    model = Calls(lambda m, x: m.table(x).sum(1), table=seeded(lambda: nn.Embedding(12, 8))).eval()
    x = torch.arange(12).reshape(3, 4)
    sites = discover(model, x[:1])
    assert not sites.activations
    treatment = treated(model, x, int8(activations=None))
    assert treatment.weights["table"].qparams.scale.shape == (12, 1)
    expected = treatment.weights["table"].values[x].sum(1)
    assert torch.equal(output(model, x, treatment), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "normalise",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm,
     nn.utils.spectral_norm],
)  # fmt: skip
def test_a_parametrized_weight_is_quantized_at_its_effective_value(normalise):
    model = nn.Sequential(seeded(lambda: normalise(nn.Linear(8, 6))), nn.ReLU()).eval()
    x = random(5, 8)
    folding = fold_batch_norm(model, x)
    assert "effective value" in folding.notes[0]
    with torch.no_grad():
        assert torch.allclose(folding.model(x), model(x), atol=1e-6)
        effective = model[0].weight.clone()
    sites = discover(folding.model, x[:1])
    assert [w.name for w in sites.weights] == ["0"]
    quantized = treated(folding.model, x, int8(activations=None)).weights["0"]
    assert torch.allclose(quantized.target, effective, atol=1e-6)
    # The names on the subject as delivered are those of the working copy.
    assert discover(model, x[:1]).activations[0].name == "0"


def test_what_stays_at_full_precision_is_listed_with_its_reason():
    def forward(m, x):
        h = torch.softmax(m.norm(m.fc(x)), -1) + x
        return torch.tensordot(h, m.rest, dims=1) * 2

    model = Calls(forward, fc=nn.Linear(8, 8), norm=nn.LayerNorm(8), rest=random(8, 3),
                  token=random(8)).eval()  # fmt: skip
    found = {p.name: p for p in places(model, discover(model, random(1, 8)))}
    assert "normalisation" in found["softmax"].reason
    assert "one scale" in found["add"].reason
    assert "does not quantize" in found["tensordot"].reason
    assert found["tensordot"].macs == 24
    assert found["norm"].reason == "modules of type LayerNorm are not quantized"
    assert found["rest, token"].reason == "parameters that enter no product"
    assert found["(biases)"].parameters == 8
    assert sum(p.parameters for p in found.values()) == 72 + 16 + 24 + 8


class HuggingFace:
    """Tiny models of real architectures, from their configs."""

    @staticmethod
    def build(name):
        import transformers as t

        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 32}  # fmt: skip
        torch.manual_seed(0)
        if name == "gpt2":
            config = t.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=4)
            return t.GPT2LMHeadModel(config)
        if name == "bert":
            return t.BertForSequenceClassification(
                t.BertConfig(vocab_size=64, max_position_embeddings=16, **size)
            )
        if name == "llama":
            return t.LlamaForCausalLM(
                t.LlamaConfig(
                    vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **size
                )
            )
        return t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=8, **size))


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "vit"])
def test_transformers_are_covered_whole(name):
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).logits

    model = Logits(HuggingFace.build(name)).eval()
    ids = torch.randint(0, 64, (8, 7), generator=torch.Generator().manual_seed(0))
    x = random(8, 3, 16, 16) if name == "vit" else ids
    sites = discover(model, x[:1])
    rows = covered(places(model, sites), int8(), sites, ())
    macs = sum(r.place.macs for r in rows)
    assert sum(r.place.macs for r in rows if r.quantized) == macs > 0
    assert sum(r.place.parameters for r in rows) == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    loose = sum(p.numel() for n, p in model.named_parameters() if "position_emb" in n or "cls" in n)
    stored = sum(r.place.parameters for r in rows if r.weights)
    assert stored == matrices - (loose if name == "vit" else 0)
    assert [o.kind for o in sites.operations].count("attention") == 2
    plain = output(model, x)
    for scheme in (int8(), int8("int8", "int8_asym", PerToken()), int8("nf4", None)):
        changed = output(model, x, treated(model, x, scheme))
        assert 0 < (changed - plain).abs().max() < plain.abs().max()


def test_hugging_faces_conv1d_is_quantized_along_its_columns():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(seeded(lambda: Conv1D(6, 8))).eval()
    x = random(2, 5, 8)
    assert discover(model, x).weights[0].layout.shape == (6, 8)
    weight = treated(model, x, int8(activations=None)).weights["0"]
    step = model[0].weight.abs().amax(0) / 127
    assert torch.allclose(weight.qparams.scale[:, 0], step.detach())


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_axis_of_examples_is_the_one_that_grows_with_the_batch(batch_first):
    """Multi-head attention turns its input round; a static scale for each token must not become
    one for each example."""
    attn = seeded(lambda: nn.MultiheadAttention(16, 4, batch_first=batch_first))

    def forward(m, x):
        x = x if batch_first else x.transpose(0, 1)
        return m.attn(x, x, x, need_weights=False)[0].mean(1 if batch_first else 0)

    model, x = Calls(forward, attn=attn).eval(), random(6, 5, 16)
    sites = {a.name: a.operand for a in discover(model, x[:1]).activations}
    assert sites["attn.in_proj_weight"].batch == -2
    assert sites["attn.attention.query"].batch == -4
    treatment = treated(model, x, int8(granularity=PerPosition()))
    scales = treatment.activations["attn.in_proj_weight"].quantizer.qparams.scale
    expected = x.abs().amax((0, 2)) / 127
    assert torch.allclose(scales, torch.cat([expected, expected.max()[None]]))


class Residual(nn.Module):
    """Sums of every spelling, of which three are sums of two activations of one shape."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.place = nn.Parameter(random(2, 5, 5))
        self.offset = nn.Parameter(random(1, 2, 5, 5))

    def forward(self, x):
        kept = self.one(x)
        alias = kept
        kept += self.two(x)
        x = torch.add(alias, x) + self.offset  # sees what was written in place
        x = x + self.place
        x = x + 1.0
        return x.add(x.mean((2, 3), keepdim=True)).add(kept, alpha=0.5) + alias


def sums_of(weights="int8", activations="int8", sums="int8"):
    return dataclasses.replace(
        int8(weights, activations), sums=Spec(FORMATS[sums], PerTensor(), "minmax")
    )


def test_terms_of_sums_are_sites_where_they_are_asked_for():
    model, x = seeded(Residual), random(4, 2, 5, 5)
    assert not any(site.kind == "sum" for site in discover(model, x[:1]).activations)
    sites = discover(model, x[:1], sums=True)
    terms = [site for site in sites.activations if site.kind == "sum"]
    assert [site.name for site in terms] == [
        f"sum{use}.{role}" for use in ("", "#2", "#3") for role in ("augend", "addend")
    ]
    assert all(site.operand.axis == -3 and site.operand.batch == -4 for site in terms)
    operations = {o.name: o for o in sites.operations}
    assert operations["sum#2"].macs == 0
    assert operations["sum#2"].activations == ("sum#2.augend", "sum#2.addend")
    # Sums that are none of these stay where they were.
    assert {e.function: e.calls for e in sites.elsewhere}["add"] == 5
    assert not any(s.startswith("sum") for o in sites.operations if o.weight for s in o.activations)


def test_terms_of_sums_are_quantized_as_the_scheme_says():
    model, x = seeded(Residual), random(4, 2, 5, 5)
    sites, treatments = treatments_of(model, x, sums=True)
    scheme = sums_of()
    treatment = treatments.for_scheme(scheme)
    assert len(treatments.certificates(scheme)) == len(sites.weights) + len(sites.activations)

    def term(use, role, value):
        return treatment.activations[f"sum{use}.{role}"].quantizer(value)

    def product(module, value):
        name = "one" if module is model.one else "two"
        entering = treatment.activations[name].quantizer(value)
        weight = treatment.weights[name].values
        return F.conv2d(entering, weight, module.bias, padding=module.padding)

    with torch.no_grad():
        kept = term("", "augend", product(model.one, x)) + term("", "addend", product(model.two, x))
        y = term("#2", "augend", kept) + term("#2", "addend", x)
        y = y + model.offset + model.place + 1.0
        y = y.add(y.mean((2, 3), keepdim=True)).add(kept, alpha=0.5)
        y = term("#3", "augend", y) + term("#3", "addend", kept)
    with torch.no_grad(), applied(model, treatment):
        assert torch.equal(model(x), y)
    with torch.no_grad(), treatments.applied(scheme) as quantized:
        assert torch.allclose(quantized(x), y, atol=0.1)
    plain = treatments.for_scheme(int8())
    assert not any(name.startswith("sum") for name in plain.activations)
    with torch.no_grad(), applied(model, plain):  # a sum that is known and left alone
        assert not torch.equal(model(x), y)


def test_a_scheme_without_sums_is_the_same_whether_others_have_them():
    model, x = seeded(Residual), random(4, 2, 5, 5)
    outputs = []
    for sums in (False, True):
        _, treatments = treatments_of(model, x, sums=sums)
        with torch.no_grad(), treatments.applied(int8()) as quantized:
            outputs.append(quantized(x))
    assert torch.equal(*outputs)


def test_the_ledger_says_why_a_sum_stays():
    model, x = seeded(Residual), random(4, 2, 5, 5)
    sites = discover(model, x[:1], sums=True)
    rows = {
        name: {row.place.name: row for row in covered(places(model, sites), scheme, sites, [])}
        for name, scheme in (("plain", int8()), ("sums", sums_of()))
    }
    assert rows["plain"]["sum"].reason == "a sum, and the scheme leaves its terms at full precision"
    assert rows["sums"]["sum"].activations == "int8 per_tensor minmax"
    assert rows["sums"]["sum"].quantized


def test_a_sum_has_no_accumulator():
    model, x = seeded(Residual), random(4, 2, 5, 5)
    _, treatments = treatments_of(model, x, sums=True)
    assert {a.operation for a in treatments.accumulators(sums_of())} == {"one", "two"}


def test_patterns_name_all_uses_and_operands_of_an_operation():
    assert matches("fc#2", "fc")
    assert matches("attn.attention.query", "attn.attention")
    assert matches("attn.in_proj_weight", "attn")
    assert not matches("fc2", "fc")
    assert matches("blocks.0.conv1", "blocks.*.conv?")


def test_interception_puts_everything_back_and_survives_an_exception():
    model = nn.Sequential(nn.Linear(4, 4))
    mode = Interception(lambda site, operand, x: x, alters=True)
    with pytest.raises(RuntimeError), mode.over(model):
        model(random(3, 5))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(model(random(3, 4)), model(random(3, 4)))


def test_sites_are_plain_values():
    model = nn.Sequential(nn.Linear(4, 4))
    one, other = (discover(model, random(1, 4)) for _ in range(2))
    assert dataclasses.asdict(one) == dataclasses.asdict(other)
