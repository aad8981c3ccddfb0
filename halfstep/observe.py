"""Observing: one instrumented forward pass that fills an observation for each activation site.

The examples run in an order that their content fixes, and in batches of a fixed size. So neither
the order of the data, nor the batch size of the evaluation, nor how the data is dealt to workers
can move a bit of what is observed. Workers get whole segments: 64 pieces of equal size, each of
whole batches.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from halfstep.activations import TreatedActivation
from halfstep.batches import Batch, forward, size
from halfstep.errors import UserError
from halfstep.examples import Inputs
from halfstep.identity import Identity
from halfstep.intercept import Interception
from halfstep.observation import GROWTH_SHARES, Observation
from halfstep.operators import Operand
from halfstep.sites import ActivationSite
from halfstep.sketch import Sketch
from halfstep.tally import Tally

BATCH = 32
"""Examples of one calibration batch, whatever the batch size of the evaluation."""
SEGMENTS = 64
"""The finest division of the calibration data among workers."""
FEWEST_PARTS = round(1 / GROWTH_SHARES[0])
"""With at least so many parts, the range after each share of `GROWTH_SHARES` is known."""
WAITING_BYTES = 256 * 2**20
"""Copies of activations that may wait to be counted."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def canonical(inputs: Inputs) -> list[np.ndarray]:
    """The calibration batches, as rows: in order of their content digests, `BATCH` at a time.

    The digests are as good as random, so any beginning of this order is a fair sample. Rows of
    different lengths wait until `BATCH` of one length have come by, or the rows end.
    """
    waiting: dict[object, list[int]] = {}
    full = []
    for row in np.argsort(inputs.digests, kind="stable"):
        length = None if inputs.lengths is None else tuple(inputs.lengths[row])
        waiting.setdefault(length, []).append(int(row))
        if len(waiting[length]) == BATCH:
            full.append(waiting.pop(length))
    return [np.array(rows) for rows in (*full, *waiting.values())]


@dataclass
class Observer:
    """Tallies in the making, complete once `observing` is left."""

    tallies: dict[str, Tally]
    in_turn: Callable[[Callable[[], None]], None]
    """Runs something after all that was seen so far has been counted."""
    batch: int = 0
    segment: int = 0
    """What the next forward pass belongs to."""

    def stand(self, share: float, examples: int) -> None:
        """Notes every site's range down."""

        def note() -> None:
            for tally in self.tallies.values():
                tally.stand(share, examples)

        self.in_turn(note)


@contextmanager
def observing(
    model: nn.Module,
    sites: Sequence[ActivationSite],
    *,
    treated: Mapping[str, TreatedActivation] | None = None,
    positions: bool = False,
) -> Iterator[Observer]:
    """While open, every forward pass of ``model`` adds what enters the sites to their tallies.

    The outputs are those of the plain model, bit for bit. Where torch leaves a core free, the pass
    only copies what entered a site and one thread beside it counts; where it takes all cores, a
    thread more would only be in its way.

    Args:
        treated: divisors of a correction: what is counted is the activation divided by them, and
            the model is run with them.
        positions: also note the range at each token position.
    """
    operands = {site.name: site.operand for site in sites}
    observer = Observer({name: Tally() for name in operands}, lambda act: submit(0, act))
    recent: dict[int, tuple[Identity, list[str]]] = {}  # tensors that may enter another site too
    counting: deque[tuple[Future[None], int]] = deque()
    spare_core = usable_cores() > torch.get_num_threads()
    pending: list[tuple[Tensor, list[str]]] = []
    divisors = treated or {}

    def count(x: Tensor, names: list[str], batch: int, segment: int) -> None:
        sketch = Sketch.of(x)
        for name in names:
            observer.tallies[name].add(sketch, batch)
            observer.tallies[name].add_channels(x, operands[name], segment)
            if positions:
                observer.tallies[name].add_positions(x, operands[name])

    def submit(weight: int, act, *arguments) -> None:  # type: ignore[no-untyped-def]
        if not spare_core:
            act(*arguments)
            return
        counting.append((beside.submit(act, *arguments), weight))
        waiting = sum(s for _, s in counting)
        while counting and (waiting > WAITING_BYTES or counting[0][0].done()):
            future, freed = counting.popleft()
            future.result()
            waiting -= freed

    def visit(name: str, operand: Operand, x: Tensor) -> Tensor:
        if name not in operands or x.numel() == 0:
            return x
        if name in divisors:
            x = divisors[name].divided(x)
            pending.append((x.detach(), [name]))
            return x
        known = recent.get(id(x))
        if known is not None and known[0].still(x):
            known[1].append(name)
            return x
        if x.is_inference():
            pending.append((x.detach().clone(), [name]))
            return x
        names = [name]
        recent[id(x)] = Identity.of(x), names
        # A copy: what entered a site may be changed in place before it is counted.
        pending.append((x.detach().clone(), names))
        return x

    def hand_over(module: nn.Module, inputs: object, outputs: object) -> None:
        """After each forward pass: which sites share a tensor is known only then."""
        for x, names in pending:
            weight = x.numel() * x.element_size()
            submit(weight, count, x, list(names), observer.batch, observer.segment)
        pending.clear()
        recent.clear()
        observer.batch += 1

    mode = Interception(visit, alters=bool(divisors))
    handle = model.register_forward_hook(hand_over)
    with ThreadPoolExecutor(1) as beside:
        try:
            with mode.over(model):
                yield observer
        finally:
            handle.remove()
        for future, _ in counting:
            future.result()


def calibrate(
    model: nn.Module,
    sites: Sequence[ActivationSite],
    batches: Iterable[Batch],
    *,
    treated: Mapping[str, TreatedActivation] | None = None,
    positions: bool = False,
    examples: int | None = None,
) -> dict[str, Observation]:
    """Runs the calibration batches through the model once; each site's observation.

    Args:
        batches: in canonical order, see `canonical`.
        examples: how many there are in all; with it, the growth of the ranges is noted.

    Raises:
        UserError: a site saw NaN or infinite activations, or nothing at all.
    """
    left = [(share, share * (examples or 0)) for share in GROWTH_SHARES]
    done = 0
    with observing(model, sites, treated=treated, positions=positions) as observer, torch.no_grad():
        for batch in batches:
            observer.segment = done * SEGMENTS // examples if examples else 0
            forward(model, batch)
            done += size(batch)
            while examples and left and done >= left[0][1] and done < examples:
                observer.stand(left.pop(0)[0], done)
        if examples:
            observer.stand(1.0, done)
    return _checked(observer.tallies)


@dataclass(frozen=True)
class Part:
    """Consecutive calibration batches for one worker: whole segments."""

    batches: slice
    """Of the canonical order."""
    before: int
    """Examples in the batches before it."""


def parts_of(sizes: Sequence[int], count: int) -> list[Part]:
    """Divides batches of these sizes into at most ``count`` parts, a power of two from
    `FEWEST_PARTS` to `SEGMENTS`. Parts that hold no batch are left out."""
    starts = [0, *np.cumsum(sizes).tolist()]
    examples, each = starts[-1], SEGMENTS // count
    segment = [start * SEGMENTS // examples for start in starts[:-1]]
    cuts = [bisect_left(segment, first) for first in range(0, SEGMENTS, each)] + [len(sizes)]
    return [Part(slice(begin, end), starts[begin]) for begin, end in pairwise(cuts) if begin < end]


def observe_part(
    model: nn.Module,
    sites: Sequence[ActivationSite],
    batches: Iterable[Batch],
    part: Part,
    *,
    examples: int,
    positions: bool = False,
) -> dict[str, Tally]:
    """What one worker makes of its part; `merged` takes all of them.

    Args:
        batches: those of the part, in canonical order.
        examples: in all parts together.
    """
    done = part.before
    with observing(model, sites, positions=positions) as observer, torch.no_grad():
        observer.batch = part.batches.start
        for batch in batches:
            observer.segment = done * SEGMENTS // examples
            forward(model, batch)
            done += size(batch)
    return observer.tallies


def merged(
    parts: Iterable[tuple[Part, Mapping[str, Tally]]], sizes: Sequence[int]
) -> dict[str, Observation]:
    """What `calibrate` would have observed, bit for bit, from all parts in order.

    Raises:
        UserError: as `calibrate`.
    """
    whole: dict[str, Tally] = {}
    examples, left = sum(sizes), list(GROWTH_SHARES)
    for part, tallies in parts:
        done = sum(sizes[: part.batches.stop])
        for name, tally in tallies.items():
            whole.setdefault(name, Tally()).merge(tally)
        while left and done >= left[0] * examples and done < examples:
            share = left.pop(0)
            for tally in whole.values():
                tally.stand(share, done)
    for tally in whole.values():
        tally.stand(1.0, examples)
    return _checked(whole)


def _checked(tallies: Mapping[str, Tally]) -> dict[str, Observation]:
    found = {name: tally.observation() for name, tally in tallies.items()}
    for name, observation in found.items():
        check_finite(name, observation.sketch, "the calibration data")
        if observation.sketch.total == 0:
            raise UserError(
                f"site {name} saw no activations on the calibration data; skip it with "
                f"sites: {{skip: [{name}]}} or use data that reaches it"
            )
    return found


def check_finite(name: str, sketch: Sketch, where: str) -> None:
    """Raises UserError where a site saw NaN or infinity."""
    if sketch.nonfinite:
        raise UserError(
            f"activations entering {name} hold {sketch.nonfinite} NaN or infinite value(s) "
            f"on {where}"
        )
