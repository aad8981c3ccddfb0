"""Intercepting: every operand of every product of a forward pass, under a name that stays the same.

A `TorchFunctionMode` sees the calls themselves, so a layer, ``F.linear``, ``@`` and the inside of
``nn.MultiheadAttention`` are all one to it. Observing, certifying and applying are different
visitors of the same interception.

Names: an operation with a weight is called after that weight (``blocks.0.conv1``, or
``attn.in_proj_weight`` where the parameter has a name of its own); one without after the module
whose code runs it (``attn.matmul``). The second use in one forward pass gets ``#2``. Where an
operation has more than one activation, each is named by its role (``attn.matmul.left``).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halfstep.layout import Layout
from halfstep.operators import (
    EXPORTED,
    OPERATORS,
    SUM,
    SUMS,
    Argument,
    Operand,
    Read,
    terms_of,
)

Visitor = Callable[[str, Operand, Tensor], Tensor]
"""Sees an activation that enters a product, by its site; what it returns enters instead."""


class Interception(TorchFunctionMode):
    """While open, shows every activation operand of the model's products to a visitor.

    ``alters`` False promises that the visitor returns what it was given; then attention and
    recurrent layers give their own results, bit for bit, though what enters their inner products
    has to be computed beside them.
    """

    def __init__(self, visit: Visitor, *, alters: bool) -> None:
        from halfstep.composite import COMPOSITES  # which is written in terms of this class

        super().__init__()
        self._composites: Mapping[Callable[..., Any], Callable[..., Any]] = COMPOSITES
        self.visit = visit
        self.alters = alters
        self.read: Read = lambda index, name, default: default
        """Reads the arguments of the call that is running, for visitors that need more of it."""
        self._scope: list[str] = []
        self._uses: dict[str, int] = {}
        self._weights: dict[int, list[str]] = {}
        self._leaves: set[str] = set()

    @contextmanager
    def over(self, model: nn.Module, *, every: bool = False) -> Iterator[None]:
        """Intercepts the forward passes of the model while open, and follows its modules."""
        with self.following(model, every=every), self:
            yield

    @contextmanager
    def following(self, model: nn.Module, *, every: bool = False) -> Iterator[None]:
        """Knows the model's parameters, and which module's code is running, while open.

        Torch's own layers are followed only with ``every``: a hook costs more than a small layer,
        and what they run is named by its weight anyway.
        """
        self._weights = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._weights.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
        self._leaves = {
            name
            for name, module in model.named_modules()
            if all(child == "parametrizations" for child, _ in module.named_children())
        }
        handles: list[Any] = []
        for name, module in model.named_modules():
            if name and not every and self._named_by_weight(module):
                continue
            enter, leave = self._scope_hooks(name)
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _scope_hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, inputs: object) -> None:
            if not name:  # a new forward pass
                self._scope.clear()
                self._uses.clear()
            self._scope.append(name)

        def leave(module: nn.Module, inputs: object, outputs: object) -> None:
            if self._scope:
                self._scope.pop()

        return enter, leave

    def _named_by_weight(self, module: nn.Module) -> bool:
        """True for torch's own layers whose weight, if any, is a parameter of theirs alone."""
        if type(module).__module__.partition(".modules.")[0] != "torch.nn" or list(
            module.children()
        ):
            return False
        weight = getattr(module, "weight", None)
        if weight is None:
            return True
        return isinstance(weight, nn.Parameter) and len(self.weight_names(weight)) == 1

    @property
    def scope(self) -> str:
        """Path of the module whose code is running; empty for the model itself."""
        return self._scope[-1] if self._scope else ""

    def weight_names(self, x: Tensor) -> list[str]:
        """Every name of the parameter that a tensor is, or is a view of; empty for activations."""
        return self._weights.get(x.untyped_storage().data_ptr(), [])

    def operation(self, kind: str, weights: list[str], *, repeats: bool = False) -> str:
        """The name of the operation that is about to run.

        Args:
            weights: names of its weight; of tied ones, that of the running module is taken.
            repeats: the same operation at every step of a loop, one site however long the loop.
        """
        if weights:
            own = [name for name in weights if name.rpartition(".")[0] == self.scope]
            name = (own or weights)[0].removesuffix(".weight")
        elif self.scope and self.scope in self._leaves:
            name = self.scope
        else:
            name = f"{self.scope}.{kind}".lstrip(".")
        return name if repeats else self._numbered(name)

    def _numbered(self, name: str) -> str:
        self._uses[name] = self._uses.get(name, 0) + 1
        return name if self._uses[name] == 1 else f"{name}#{self._uses[name]}"

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        func = EXPORTED.get(func, func)
        operator = OPERATORS.get(func)
        if operator is not None:
            return self.product(func, operator.kind, operator.arguments, args, kwargs)
        composite = self._composites.get(func)
        if composite is not None:
            return composite(self, func, args, kwargs)
        if func in SUMS:
            terms = terms_of(args, kwargs)
            if terms and not any(self.weight_names(x) for x, _ in terms):
                return self.addition(func, terms)
        return self.elsewhere(func, args, kwargs)

    def elsewhere(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call that is no product we know."""
        return func(*args, **kwargs)

    def product(
        self,
        func: Callable[..., Any],
        kind: str,
        arguments: tuple[Argument, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A product whose operands stand in the arguments of one call."""

        def read(index: int, name: str, default: Any) -> Any:
            return args[index] if index < len(args) else kwargs.get(name, default)

        self.read = read
        operands = [read(a.index, a.name, None) for a in arguments]
        weights = [self.weight_names(x) for x in operands]
        weight = next(filter(None, weights), [])
        name = self.operation(kind, weight)
        with self.measuring(name, kind):
            return self.multiply(name, func, arguments, operands, weights, args, kwargs)

    def addition(self, func: Callable[..., Any], terms: Sequence[tuple[Tensor, Operand]]) -> Any:
        """A sum of two activations, its terms as the visitor has them."""
        name = self._numbered(f"{self.scope}.{SUM}".lstrip("."))
        with self.measuring(name, SUM):
            first, second = (self.visit(f"{name}.{o.role}", o, x) for x, o in terms)
            if SUMS[func]:
                given = terms[0][0]
                if first is not given:
                    given.copy_(first)
                first = given
            return func(first, second)

    def multiply(
        self,
        name: str,
        func: Callable[..., Any],
        arguments: tuple[Argument, ...],
        operands: Sequence[Tensor],
        weights: Sequence[list[str]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs the product of some name, its activations as the visitor has them.

        ``operands`` stand in the ``arguments``; ``weights`` are every name of each that is one.
        """
        changed = list(args)
        has_weight = any(weights)
        for argument, x, own in zip(arguments, operands, weights, strict=True):
            if own:
                self.see_weight(
                    own[0],
                    x,
                    lambda a=argument, x=x: a.layout(x, self.read),  # type: ignore[misc]
                )
                continue
            alone = has_weight or argument.operand.role == "input"
            site = name if alone else f"{name}.{argument.operand.role}"
            replaced = self.visit(site, argument.operand.of(x.dim()), x)
            if replaced is x:
                continue
            if argument.index < len(args):
                changed[argument.index] = replaced
            else:
                kwargs = kwargs | {argument.name: replaced}
        return func(*changed, **kwargs)

    def measuring(self, name: str, kind: str) -> Any:
        """A context around one operation; the survey counts in it."""
        return nullcontext()

    def see_weight(self, name: str, weight: Tensor, layout: Callable[[], Layout]) -> None:
        """A parameter enters the operation that is running; the survey takes note."""


def reentrant(function: types.FunctionType) -> Callable[..., Any]:
    """A copy of one of torch's Python functions that runs its body without asking for modes first.

    Called while a mode is open, the original would hand itself to the mode again, for ever; the
    copy goes on, and the functions that it calls reach the mode one by one.
    """
    never = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
        lambda *arguments: False,
    )
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **never},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
