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
