"""Running a model again only where a change can reach.

What enters a site does not depend on how that site is treated, nor on anything after it or beside
it. So one forward pass is recorded call by call, and a variant of it that differs at one site runs
again only the calls that are given something else than they were; all others are handed out from
the record. Over the sites of a model that saves about half of the work, whatever its code is like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.apply import Treatment, applied, exchanged, quantizing
from halfstep.batches import answer
from halfstep.intercept import Interception
from halfstep.operators import Operand


class Unrepeatable(Exception):
    """A call changed a tensor in a way that was not foreseen, so the record cannot be used."""


class Tape(Interception):
    """One recorded forward pass. Record and resume while `following` the model.

    Calls are counted at the outermost level: one of torch's composite layers is one call. What a
    call writes in place is noted with what stood there before, so that every moment can be gone
    back to.
    """

    def __init__(self, model: nn.Module, base: Treatment) -> None:
        self._quantize = quantizing(base)
        super().__init__(self._seen, alters=True)
        self._model = model
        self._base = base
        self._functions: list[Callable[..., Any]] = []
        self._results: list[Any] = []
        self._uses_at: list[dict[str, int]] = []
        self._written: list[tuple[int, Tensor, Tensor]] = []
        self._final: list[tuple[Tensor, Tensor]] = []
        self._calls_of: dict[str, set[int]] = {}  # by parameter, and by activation site
        self._recording = True
        self._spans: dict[nn.Module, tuple[int, Any]] = {}  # the call after it, and what it gave
        self._call = -1
        self._inside = False
        self._must: set[int] = set()
        self._from = 0
        self._changed: set[int] = set()  # storages of what came out otherwise than recorded
        self._diverged = False

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns under the base treatment.

        Raises:
            Unrepeatable: it cannot be run again in part.
        """
        with self._noting_modules():
            returned = self._forward(self._base, args, kwargs)
        tensors = {id(tensor): tensor for _, tensor, _ in self._written}
        self._final = [(tensor, tensor.clone()) for tensor in tensors.values()]
        self._recording = False
        return returned

    def resume(
        self, treatment: Treatment, args: Sequence[Any], kwargs: Mapping[str, Any], at: int = -1
    ) -> Any:
        """What the model returns under another treatment, on the inputs that were recorded.

        Raises:
            Unrepeatable: the model's code takes another way before anything has changed.

        ``at``: a call to run again even if the treatment does not ask for it.
        """
        self._must = self._differing(treatment) | {call for call in (at,) if call >= 0}
        self._from = min(self._must, default=len(self._results))
        self._go_back(self._from)
        self._call, self._changed, self._diverged = -1, set(), False
        self._quantize = quantizing(treatment)
        with self._handing_out(self._model):
            return self._forward(treatment, args, kwargs)

    def _forward(self, treatment: Treatment, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        for name, value in treatment.parameters.items():
            known = self._weights.setdefault(_storage(value), [])
            if name not in known:
                known.append(name)
        with exchanged(self._model, treatment.parameters), self:
            return self._model(*args, **kwargs)

    @contextmanager
    def _noting_modules(self) -> Iterator[None]:
        """Notes which calls are those of a module that runs once and is given tensors and plain
        values alone: such a module, wholly before a change, need not be entered again."""
        entered: dict[nn.Module, bool] = {}

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves = _leaves((args, kwargs))
            plain = all(x is None or isinstance(x, Tensor | int | float | str) for x in leaves)
            entered[module] = plain and module not in entered

        def leave(module: nn.Module, args: Any, returned: Any) -> None:
            self._spans[module] = (self._call + 1, returned)
            if not entered[module]:
                del self._spans[module]

        handles: list[Any] = []
        for name, module in self._model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _handing_out(self, model: nn.Module) -> Iterator[None]:
        """Modules that lie wholly before the first changed call give what they gave."""
        patched = self._whole_modules(model)
        for module in patched:
            module.__dict__["forward"] = partial(self._given, *self._spans[module])
        try:
            yield
        finally:
            for module in patched:
                del module.__dict__["forward"]

    def _whole_modules(self, model: nn.Module) -> list[nn.Module]:
        found = []
        for child in model.children():
            span = self._spans.get(child)
            if span is not None and span[0] <= self._from and "forward" not in child.__dict__:
                found.append(child)
            else:
                found += self._whole_modules(child)
        return found

    def _given(self, after: int, returned: Any, *args: Any, **kwargs: Any) -> Any:
        self._call = after - 1
        return returned

    @property
    def calls(self) -> int:
        """How many were recorded."""
        return len(self._results)

    def _differing(self, treatment: Treatment) -> set[int]:
        """The calls where a treatment is another than the base."""
        base, found = self._base, set()
        for name in {*base.parameters, *treatment.parameters}:
            if base.parameters.get(name) is not treatment.parameters.get(name):
                found |= self._calls_of.get(name) or self._beside(name)
        for site in {*base.activations, *treatment.activations}:
            if base.activations.get(site) is not treatment.activations.get(site):
                found |= self._calls_of.get(site, set())
        return found

    def _beside(self, name: str) -> set[int]:
        """Of a bias that the base does not have: the calls that are given its neighbours."""
        owner = name.rpartition(".")[0]
        near = [calls for n, calls in self._calls_of.items() if n.rpartition(".")[0] == owner]
        return set().union(*near) if near else {0}

    def _go_back(self, call: int) -> None:
        """Leaves every tensor that is written to in place as it was when a call came."""
        with torch.no_grad():
            for tensor, content in self._final:
                tensor.copy_(content)
            for at, tensor, content in reversed(self._written):
                if at >= call:
                    tensor.copy_(content)

    def _seen(self, site: str, operand: Operand, x: Tensor) -> Tensor:
        if self._recording:
            self._calls_of.setdefault(site, set()).add(self._call)
        return self._quantize(site, operand, x)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._inside:
            return super().__torch_function__(func, types, args, kwargs)
        self._call += 1
        if self._recording:
            return self._record(func, types, args, kwargs or {})
        if self._diverged:
            return self._run(func, types, args, kwargs or {})
        if self._call >= self.calls or func != self._functions[self._call]:
            raise Unrepeatable("the model's code runs other calls under a variant")
        if self._call < self._from or not self._reached(args, kwargs):
            return self._results[self._call]
        self._uses = dict(self._uses_at[self._call])
        result = self._run(func, types, args, kwargs or {})
        self._mark(result)
        return result

    def _reached(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        """Whether the call that is due has to be run: it is changed itself, is given something that
        is, or writes to what later calls may read."""
        if self._call in self._must or self._call in self._writers:
            return True
        leaves = _leaves((args, kwargs))
        return any(isinstance(x, Tensor) and _storage(x) in self._changed for x in leaves)

    @cached_property
    def _writers(self) -> set[int]:
        return {call for call, _, _ in self._written}

    def _mark(self, result: Any) -> None:
        """Takes note of what came out of a call that was run again."""
        for now, then in zip(_leaves(result), _leaves(self._results[self._call]),
                             strict=True):  # fmt: skip
            if isinstance(now, Tensor):
                self._changed.add(_storage(now))
            elif now != then:
                self._diverged = True  # a number or a branch of the code depends on values

    def _record(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._functions.append(func)
        self._uses_at.append(dict(self._uses))
        tensors = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in tensors:
            for name in self.weight_names(x):
                self._calls_of.setdefault(name, set()).add(self._call)
        versions = [x._version for x in tensors]
        before = [x.clone() for x in tensors] if _writes(func, args, kwargs) else []
        result = self._run(func, types, args, kwargs)
        for i, (x, version) in enumerate(zip(tensors, versions, strict=True)):
            if x._version != version:
                if not before:
                    name = getattr(func, "__name__", str(func))
                    raise Unrepeatable(f"{name} writes in place where it was not expected to")
                self._written.append((self._call, x, before[i]))
        self._results.append(result)
        return result

    def _run(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._inside = True
        try:
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            self._inside = False


def _leaves(value: Any) -> list[Any]:
    """Everything in nested lists, tuples and mappings."""
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return [value]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may write to its arguments; saying so in vain costs a copy."""
    name = getattr(func, "__name__", "")
    if "out" in kwargs or any(value is True for value in (*args, *kwargs.values())):
        return True  # inplace=True, however it is passed
    return name.endswith("_") or name.startswith("__i") or name in ("__setitem__", "__set__")


class Branches(nn.Module):
    """A model that, asked once, also answers as each of several variants would.

    It stands in the model's place in an evaluation; what it returns is the base's answer. All
    answers are kept, with their squared distance to a target's.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Treatment,
        variants: Sequence[Treatment],
        target: Sequence[Any] | None = None,
    ) -> None:
        """``target``: answers to the same calls in the same order; the base's own by default."""
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is no submodule: its names stay its own
        self._base = base
        self._variants = variants
        self._target = target
        self.base_answers: list[Any] = []
        self.answers: list[list[Any]] = [[] for _ in variants]
        """By variant, what the model returned at each call."""
        self._distances: list[list[Tensor]] = [[] for _ in (base, *variants)]
        self._signal: list[Tensor] = []
        self.repeatable = True
        """False where passes could not be taken up in the middle and were run from the start."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model[0]
        tape = Tape(model, self._base)
        with tape.following(model):
            returned = self._recorded(tape, args, kwargs)
            given = [self._resumed(tape, variant, args, kwargs) for variant in self._variants]
        target = returned if self._target is None else self._target[len(self.base_answers)]
        wanted = answer(target).double()
        for kept, found in zip(self._distances, (returned, *given), strict=True):
            kept.append(_row_squares(answer(found).double() - wanted))
        self._signal.append(_row_squares(wanted))
        self.base_answers.append(returned)
        for answers, found in zip(self.answers, given, strict=True):
            answers.append(found)
        return returned

    def _recorded(self, tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.repeatable:
            try:
                returned = tape.record(*args, **kwargs)
                if self._repeats(tape, returned, args, kwargs):
                    return returned
            except Unrepeatable:
                pass
            self.repeatable = False
        return self._whole(self._base, args, kwargs)

    def _resumed(
        self, tape: Tape, variant: Treatment, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.repeatable:
            try:
                return tape.resume(variant, args, kwargs)
            except Unrepeatable:
                self.repeatable = False
        return self._whole(variant, args, kwargs)

    def _whole(self, treatment: Treatment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with applied(self._model[0], treatment) as model:
            return model(*args, **kwargs)

    def _repeats(
        self, tape: Tape, returned: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """At the first call: whether the record, run again from its middle, gives the very same
        answer."""
        if self.base_answers or not self._variants:
            return True
        again = tape.resume(self._base, args, kwargs, at=tape.calls // 2)
        return torch.equal(answer(again), answer(returned))

    @property
    def errors(self) -> Tensor:
        """float64 ``[1 + variants, rows]``: squared distance of each row's answer to the target's,
        over the mean squared answer there; the base first."""
        signal = torch.cat(self._signal).mean()
        return torch.stack([torch.cat(parts) for parts in self._distances]) / signal


def _row_squares(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).square().sum(dim=1)


class Answers(nn.Module):
    """Gives a variant's answers again, in the order in which they were given."""

    def __init__(self, answers: Sequence[Any]) -> None:
        super().__init__()
        self._left = iter(answers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next(self._left)
