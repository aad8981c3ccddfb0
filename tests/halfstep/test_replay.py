"""Variants taken up from a record: bit for bit what a whole pass gives, whatever the model does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfstep import replay
from halfstep.apply import Treatment, applied
from halfstep.formats import FORMATS
from halfstep.granularity import parse_granularity
from halfstep.observe import calibrate
from halfstep.replay import Answers, Branches
from halfstep.scheme import Scheme, Spec
from halfstep.sites import discover
from halfstep.treatments import Calibration, Treatments


class Residual(nn.Module):
    """Two branches, one of them written to in place after it was read."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.left(x)
        x = F.relu(x, inplace=True)
        y += self.right(x)
        x[:, 0] = y[:, 1]
        return self.head(torch.relu_(x + y))


class Functional(nn.Module):
    """A weight that is used twice, once transposed by a call of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        turned = self.weight.t()
        return self.out(F.linear(torch.tanh(x @ turned), self.weight))


class Branching(nn.Module):
    """A number and a branch that depend on values."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.one(x)
        scale = y.abs().max().item()
        z = x * scale
        if float(y[0, 0]) * 1e6 % 2 < 1:
            z = z + 1
        return self.three(self.two(z))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return {"logits": self.head(self.lstm(x)[0][:, -1])}


MODELS = {
    "residual": (Residual, (5, 8)),
    "functional": (Functional, (5, 8)),
    "branching": (Branching, (5, 8)),
    "attention": (Attention, (5, 4, 8)),
    "recurrent": (Recurrent, (5, 4, 8)),
}


def prepared(name):
    """(model, batches, base treatments, variants of each)."""
    torch.manual_seed(3)
    make, shape = MODELS[name]
    model = make().eval()
    batches = [torch.randn(*shape) for _ in range(3)]
    sites = discover(model, batches[0][:1])
    observed = calibrate(model, sites.activations, batches, examples=15)
    treatments = Treatments(model, sites, Calibration(lambda: batches, 15, observed), batches[0])
    weights = Spec(FORMATS["int4"], parse_granularity("per_channel", "weights"), "mse")
    inputs = Spec(FORMATS["int8"], parse_granularity("per_tensor", "activations"), "minmax")
    full = treatments.for_scheme(Scheme(weights, inputs))
    plain = Treatment(known=full.known)
    alone, restored = [], []
    for site in sites.weights:
        own = {n: full.parameters[n] for n in site.parameters}
        alone.append(Treatment(own, {}, {}, full.known))
        kept = {n: v for n, v in full.parameters.items() if n not in own}
        restored.append(Treatment(kept, full.activations, {}, full.known))
    for site, treated in full.activations.items():
        alone.append(Treatment({}, {site: treated}, {}, full.known))
        others = {n: t for n, t in full.activations.items() if n != site}
        restored.append(Treatment(full.parameters, others, {}, full.known))
    return model, batches, [(plain, alone), (full, restored)]


def tensor(returned):
    return returned["logits"] if isinstance(returned, dict) else returned


@pytest.mark.parametrize("name", MODELS)
def test_every_variant_is_what_a_whole_pass_gives(name):
    model, batches, sides = prepared(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for base, variants in sides:
        branches = Branches(model, base, variants)
        with torch.no_grad():
            for batch in batches:
                returned = branches(batch.clone())
                with applied(model, base) as whole:
                    torch.testing.assert_close(tensor(returned), tensor(whole(batch.clone())))
            # A recurrent layer gathers its weights anew where they were exchanged: other calls.
            assert branches.repeatable or name == "recurrent"
            for variant, answers in zip(variants, branches.answers, strict=True):
                for batch, found in zip(batches, answers, strict=True):
                    with applied(model, variant) as whole:
                        wanted = tensor(whole(batch.clone()))
                    # Attention that nothing alters runs torch's fused operator in `applied`.
                    rtol, atol = (1e-5, 1e-6) if name == "attention" else (0, 0)
                    torch.testing.assert_close(tensor(found), wanted, rtol=rtol, atol=atol)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_it_is_less_work_than_whole_passes(name, monkeypatch):
    """Counted in calls of torch that are really run."""
    model, batches, sides = prepared(name)
    ran = []
    run = replay.Tape._run
    monkeypatch.setattr(replay.Tape, "_run", lambda tape, *a: (ran.append(tape), run(tape, *a))[1])
    for base, variants in sides:
        branches = Branches(model, base, variants)
        with torch.no_grad():
            branches(batches[0])  # checks itself
            ran.clear()
            branches(batches[1])
        whole = ran[-1].calls
        assert len(ran) < whole * (1 + 0.7 * len(variants))


def test_what_cannot_be_taken_up_is_run_from_the_start(monkeypatch):
    model, batches, sides = prepared("residual")
    monkeypatch.setattr(replay, "_writes", lambda *call: False)
    base, variants = sides[0]
    branches = Branches(model, base, variants)
    with torch.no_grad():
        branches(batches[0].clone())
        assert not branches.repeatable
        with applied(model, variants[0]) as whole:
            assert torch.equal(branches.answers[0][0], whole(batches[0].clone()))


def test_errors_are_relative_squared_distances():
    model, batches, sides = prepared("functional")
    base, variants = sides[0]
    branches = Branches(model, base, variants)
    with torch.no_grad():
        answers = torch.cat([branches(batch) for batch in batches]).double()
    for i, parts in enumerate(branches.answers):
        distance = (torch.cat(parts).double() - answers).square().sum(1)
        wanted = distance / answers.square().sum(1).mean()
        torch.testing.assert_close(branches.errors[1 + i], wanted)
    assert not branches.errors[0].any()


def test_answers_come_again_in_order():
    module = Answers([1, 2])
    assert [module(torch.ones(1)), module(a=torch.ones(1))] == [1, 2]
