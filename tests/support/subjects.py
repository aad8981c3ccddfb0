"""Models and data for tests, reached through ``source: factory``."""

import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, nan=False, dead=False, breaks_on=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
        self.breaks_on = breaks_on
        if nan:
            self.first.weight.data[2, 1] = float("nan")
        if dead:
            self.first.weight.data.zero_()

    def forward(self, x):
        levels = self.first.weight.unique().numel()
        if self.breaks_on and levels <= self.breaks_on:
            raise RuntimeError("the weights have too few levels")
        return self.last(torch.relu(self.first(x)))


def model(**options):
    return Tiny(**options).eval()


def data(nan=False, shared=0, constant=False, pools=(200, 300, 300)):
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, n in zip(("train", "validation", "test"), pools, strict=True):
        x = torch.randn(n, 4, generator=generator)
        made[name] = (x, (x.sum(1) > 0).long())
    if nan:
        made["validation"][0][7, 2] = float("nan")
    if shared:
        made["test"][0][:shared] = made["validation"][0][10 : 10 + shared]
    if constant:
        made = {name: (torch.full_like(x, 0.5) + torch.arange(len(x))[:, None] * 0, y)
                for name, (x, y) in made.items()}  # fmt: skip
    return made


def not_a_model():
    return 42


class Attentive(nn.Module):
    """A transformer layer, a functional product, a recurrent layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.rnn = nn.GRU(16, 12, batch_first=True)
        self.mix = nn.Parameter(torch.eye(12) + 0.1 * torch.randn(12, 12))
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        h, _ = self.rnn(self.layer(self.embed(x)))
        return self.head(h.mean(1) @ self.mix)


def attentive():
    return Attentive().eval()


def sequences(scale=1.0):
    """Sequences of six tokens whose label is the sign of a sum; ``scale`` is that of all pools but
    the one that calibration takes."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, n in (("train", 200), ("validation", 300), ("test", 300)):
        x = torch.randn(n, 6, 4, generator=generator) * (1.0 if name == "train" else scale)
        made[name] = (x, (x.sum((1, 2)) > 0).long())
    return made
