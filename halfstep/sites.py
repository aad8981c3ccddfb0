"""Sites: where numbers of a subject get quantized, found by watching one forward pass."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from halfstep.batches import Batch, forward, twice
from halfstep.intercept import Interception
from halfstep.layout import Layout
from halfstep.operators import ARITHMETIC, OTHER_PRODUCTS, UNKNOWN_PRODUCT, Operand


@dataclass(frozen=True)
class WeightSite:
    """A parameter that enters at least one product, or whose rows are looked up."""

    name: str
    kind: str
    """Of the first operation that uses it."""
    parameters: tuple[str, ...]
    """Every name under which the model holds it; more than one where weights are tied."""
    layout: Layout

    def read(self, model: nn.Module) -> Tensor:
        """The weight, detached."""
        return model.get_parameter(self.parameters[0]).detach()


@dataclass(frozen=True)
class ActivationSite:
    """One activation that enters one product, or one sum."""

    name: str
    kind: str
    operand: Operand
    weight: str | None
    """The weight site that it is multiplied with, if it is a weight."""
    same_as: str
    """The first site that the very same tensor enters; its own name where there is none before."""


@dataclass(frozen=True)
class Operation:
    """One product, table of embeddings, or sum, in the order of the forward pass."""

    name: str
    kind: str
    weight: str | None
    activations: tuple[str, ...]
    macs: int
    """Multiply-accumulates for one example."""
    reduction: int
    """The most products that one accumulator adds up, on that example."""


@dataclass(frozen=True)
class Elsewhere:
    """Calls of one function by one module's code that stay at full precision."""

    scope: str
    function: str
    calls: int
    macs: int
    reason: str


@dataclass(frozen=True)
class Sites:
    """What one forward pass of one example showed."""

    weights: tuple[WeightSite, ...]
    activations: tuple[ActivationSite, ...]
    operations: tuple[Operation, ...]
    elsewhere: tuple[Elsewhere, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Every name that a pattern may match."""
        names = [w.name for w in self.weights] + [a.name for a in self.activations]
        return list(dict.fromkeys(names))

    @property
    def ends(self) -> tuple[str, str]:
        """Names of the first and the last operation that multiply by a weight."""
        named = [o.name for o in self.operations if o.weight and o.kind != "embedding"]
        return (named[0], named[-1]) if named else ("", "")


def matches(name: str, pattern: str) -> bool:
    """Shell style (``head*``); a pattern that names an operation matches all its uses and
    operands."""
    return any(fnmatch.fnmatchcase(name, p) for p in (pattern, f"{pattern}#*", f"{pattern}.*"))


@dataclass
class _Seen:
    kind: str
    weight: str | None = None
    activations: list[str] = field(default_factory=list)
    macs: int = 0
    reduction: int = 0


WITHIN = {"attention": "softmax", "recurrent": "gates"}
"""What runs at full precision between the products of an operation of several steps."""


class _Survey(Interception):
    def __init__(self, model: nn.Module, counter: FlopCounterMode, sums: bool) -> None:
        super().__init__(self._see, alters=True)
        self._sums = sums
        self.operations: dict[str, _Seen] = {}
        self.weights: dict[str, tuple[str, Layout]] = {}
        self.activations: dict[str, tuple[Operand, str]] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.others: dict[tuple[str, str], list[int]] = {}
        self.notes: list[str] = []
        self._counter = counter
        self._model = model
        self._kept: list[tuple[Tensor, str]] = []  # keeps tensors alive, so that ids stay theirs
        self._running: list[str] = []

    def _see(self, site: str, operand: Operand, x: Tensor) -> Tensor:
        first = next((name for tensor, name in self._kept if tensor is x), site)
        self._kept.append((x, site))
        self.activations.setdefault(site, (operand, first))
        self.shapes.setdefault(site, x.shape)
        seen = self.operations[self._running[-1]]
        seen.reduction = max(seen.reduction, x.shape[operand.axis])
        if site not in seen.activations:
            seen.activations.append(site)
        return x

    def see_weight(self, name: str, weight: Tensor, layout: Callable[[], Layout]) -> None:
        site = name.removesuffix(".weight")
        if self._running:
            self.operations[self._running[-1]].weight = site
        if name in self.weights:
            return
        found = whole_layout(layout(), weight, self._model.get_parameter(name))
        if found is None:
            self.notes.append(f"{name} is used through a view that cannot be followed")
        else:
            self.weights[name] = (site, found)

    @contextmanager
    def measuring(self, name: str, kind: str) -> Iterator[None]:
        self.operations.setdefault(name, _Seen(kind))
        if kind in WITHIN:
            place = name if kind == "attention" else self.scope
            self.others.setdefault((place, WITHIN[kind]), [1, 0])
        self._running.append(name)
        before = self._counter.get_total_flops()
        yield
        self._running.pop()
        self.operations[name].macs += (self._counter.get_total_flops() - before) // 2

    def addition(self, func: Callable[..., Any], terms: Sequence[tuple[Tensor, Operand]]) -> Any:
        if self._sums:
            return super().addition(func, terms)
        return self.elsewhere(func, tuple(x for x, _ in terms), {})

    def elsewhere(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **kwargs)
        macs = (self._counter.get_total_flops() - before) // 2
        name = getattr(func, "__name__", str(func))
        arithmetic = name in ARITHMETIC and self.scope not in self._leaves
        if macs or arithmetic or name in OTHER_PRODUCTS:
            tally = self.others.setdefault((self.scope, name), [0, 0])
            tally[0] += 1
            tally[1] += macs
        return result


def whole_layout(layout: Layout, view: Tensor, parameter: Tensor) -> Layout | None:
    """The layout of a whole parameter from that of a view that an operation used.

    Axes are followed by their strides, through transposes and through slices along outputs; None
    where a view mixes axes.
    """
    if view.shape == parameter.shape and view.stride() == parameter.stride():
        return layout
    if layout.view != tuple(view.shape):
        return None
    rows, summed = [], []
    for i, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size == 1:
            continue
        found = [a for a in range(parameter.dim()) if parameter.stride(a) == stride]
        found = [a for a in found if parameter.shape[a] > 1]
        if len(found) != 1:
            return None
        if i in layout.rows:
            rows.append(found[0])
        elif parameter.shape[found[0]] == size:
            summed.append(found[0])
        else:
            return None
    left = [a for a in range(parameter.dim()) if a not in rows and a not in summed]
    rows += [a for a in left if parameter.shape[a] > 1 or not summed]
    return Layout(tuple(parameter.shape), tuple(sorted(rows)))


def _batch_axes(
    model: nn.Module, example: Batch, shapes: dict[str, torch.Size]
) -> dict[str, int | None]:
    """For each activation the axis, from the end, that grows with the batch: two examples are run,
    and their shapes compared with those of one."""
    axes: dict[str, int | None] = dict.fromkeys(shapes)

    def visit(site: str, operand: Operand, x: Tensor) -> Tensor:
        one = shapes.get(site)
        if one is not None and len(one) == x.dim():
            grown = [i - x.dim() for i, size in enumerate(x.shape) if size != one[i]]
            axes[site] = grown[0] if grown else None
        return x

    mode = Interception(visit, alters=False)
    with torch.no_grad(), mode.over(model, every=True):
        forward(model, twice(example))
    return axes


def discover(model: nn.Module, example: Batch, *, sums: bool = False) -> Sites:
    """Finds every site by running one example.

    Multiply-accumulates are torch's own count over every operator, so a product that halfstep does
    not know shows up by the name of its function.

    Args:
        example: a batch of one, as the model takes it.
        sums: the terms of sums of two activations are sites too.
    """
    counter = FlopCounterMode(display=False)
    survey = _Survey(model, counter, sums)
    with torch.no_grad(), counter, survey.over(model, every=True):
        forward(model, example)
    total = counter.get_total_flops() // 2
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    kinds: dict[str, str] = {}
    for seen in survey.operations.values():
        if seen.weight is not None:
            kinds.setdefault(seen.weight, seen.kind)
    weights = tuple(
        WeightSite(site, kinds.get(site, "recurrent"), tuple(sorted_first(
            holders[id(model.get_parameter(name))], name)), layout)
        for name, (site, layout) in survey.weights.items()
    )  # fmt: skip
    known = {site.name for site in weights}
    batches = _batch_axes(model, example, survey.shapes)
    owners = {s: o for o in survey.operations.values() for s in o.activations}
    activations = tuple(
        ActivationSite(
            name,
            owners[name].kind,
            replace(operand, batch=batches[name]),
            owners[name].weight if owners[name].weight in known else None,
            first,
        )
        for name, (operand, first) in survey.activations.items()
    )
    operations = tuple(
        Operation(name, o.kind, o.weight if o.weight in known else None,
                  tuple(o.activations), o.macs, o.reduction)
        for name, o in survey.operations.items()
    )  # fmt: skip
    reasons = ARITHMETIC | OTHER_PRODUCTS
    elsewhere = [
        Elsewhere(scope, name, calls, macs, reasons.get(name, UNKNOWN_PRODUCT))
        for (scope, name), (calls, macs) in survey.others.items()
    ]
    missing = total - sum(o.macs for o in operations) - sum(e.macs for e in elsewhere)
    if missing > 0:
        elsewhere.append(Elsewhere("", "(unseen)", 1, missing, UNSEEN))
    return Sites(weights, activations, operations, tuple(elsewhere), tuple(survey.notes))


UNSEEN = "products that never pass through torch's Python functions (scripted or compiled code)"


def sorted_first(names: Sequence[str], first: str) -> list[str]:
    """The names, one of them in front."""
    return [first, *[name for name in names if name != first]]
