"""Observing: one instrumented forward pass that fills a sketch for each activation site."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from halfstep.errors import UserError
from halfstep.sites import Site
from halfstep.sketch import BINS, Sketch


@dataclass
class _Tally:
    """A sketch in the making, added to in place: a batch comes by every few milliseconds."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    lo: float = float("inf")
    hi: float = float("-inf")

    def add(self, sketch: Sketch) -> None:
        self.counts += sketch.counts
        self.lo, self.hi = min(self.lo, sketch.lo), max(self.hi, sketch.hi)


@dataclass
class _Recent:
    """A tensor that may enter another site too (the two arms of a residual block).

    Known again by identity and version counter, so a tensor that was freed or changed in place is
    counted anew.
    """

    tensor: weakref.ref[Tensor]
    version: int
    sites: list[str]

    def of(self, x: Tensor) -> bool:
        return self.tensor() is x and self.version == x._version


@contextmanager
def observing(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, _Tally]]:
    """While open, every forward pass of ``model`` adds the sites' inputs to their tallies.

    Where torch leaves a core free, the forward pass only copies what entered a site and one thread
    beside it counts; where it takes all cores, a thread more would only be in its way. Tallies are
    complete when the context is left.
    """
    tallies = {site.name: _Tally() for site in sites}
    recent: dict[int, _Recent] = {}
    counting: deque[Future[None]] = deque()
    spare_core = (os.cpu_count() or 1) > torch.get_num_threads()

    def count(x: Tensor, names: list[str]) -> None:
        sketch = Sketch.of(x)
        for name in names:
            tallies[name].add(sketch)

    def hook(name: str):  # type: ignore[no-untyped-def]
        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            known = recent.get(id(x))
            if known is not None and known.of(x):
                known.sites.append(name)
                return
            recent[id(x)] = _Recent(weakref.ref(x), x._version, [name])
            # A copy: what entered a site may be changed in place before it is counted.
            pending.append((x.detach().clone(), recent[id(x)].sites))

        return observe

    pending: list[tuple[Tensor, list[str]]] = []

    def hand_over(module: nn.Module, inputs: object, outputs: object) -> None:
        """After each forward pass: which sites share a tensor is known only then."""
        for work in pending:
            if spare_core:
                counting.append(beside.submit(count, *work))
            else:
                count(*work)
        pending.clear()
        recent.clear()
        while len(counting) > 2 * len(sites):  # a batch may wait, not the whole data set
            counting.popleft().result()

    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(hook(site.name)) for site in sites
    ]
    handles.append(model.register_forward_hook(hand_over))
    with ThreadPoolExecutor(1) as beside:
        try:
            yield tallies
        finally:
            for handle in handles:
                handle.remove()
        for waiting in counting:
            waiting.result()


def calibrate(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Tensor]
) -> dict[str, Sketch]:
    """Runs the calibration data through the model once and returns each site's sketch.

    Raises:
        UserError: a site saw NaN or infinite activations, or nothing at all.
    """
    with observing(model, sites) as tallies, torch.no_grad():
        for batch in batches:
            model(batch)
    sketches = {name: Sketch(t.counts, t.lo, t.hi) for name, t in tallies.items()}
    for name, sketch in sketches.items():
        if sketch.nonfinite:
            raise UserError(
                f"activations entering {name} hold {sketch.nonfinite} NaN or infinite value(s) "
                "on the calibration data"
            )
        if sketch.total == 0:
            raise UserError(
                f"site {name} saw no activations on the calibration data; skip it with "
                f"sites: {{skip: [{name}]}} or use data that reaches it"
            )
    return sketches
