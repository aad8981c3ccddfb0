"""Products of several steps: einsum, attention, recurrent layers.

Each is written out as its documentation defines it, so that what enters the inner products (the
attention's probabilities, a recurrent layer's hidden state) can be seen and quantized too. Where
nothing is altered torch's own operator gives the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.intercept import Interception, reentrant
from halfstep.layout import rows_of
from halfstep.operators import Operand, einsum_arguments

Call = Callable[..., Any]
_SEQUENCE = Operand("input", -1)


def _einsum(mode: Interception, func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    arguments = (
        einsum_arguments(equation, [x.shape for x in operands]) if type(equation) is str else None
    )
    if arguments is None:
        return mode.elsewhere(func, args, kwargs)
    return mode.product(func, "einsum", tuple(arguments), (equation, *operands), kwargs)


def _attention(
    mode: Interception, func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``softmax(query @ key.T * scale + mask) @ value``, as torch's documentation writes it."""
    name = mode.operation("attention", [])
    with mode.measuring(name, "attention"):
        altered = _written_out(mode, name, *args, **kwargs)
        return altered if mode.alters else func(*args, **kwargs)


def _written_out(
    mode: Interception,
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    query = mode.visit(f"{name}.query", Operand("query", -1), query)
    key = mode.visit(f"{name}.key", Operand("key", -1), key)
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, -1)
    if attn_mask is not None:  # a query that may look at nothing gets nothing, as from torch
        weights = weights.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    weights = torch.dropout(weights, dropout_p, dropout_p > 0)
    weights = mode.visit(f"{name}.probabilities", Operand("probabilities", -1), weights)
    return weights @ mode.visit(f"{name}.value", Operand("value", -2), value)


def _multi_head(
    mode: Interception, func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with mode:
        return _MULTI_HEAD(*args, **kwargs)


_MULTI_HEAD = reentrant(F.multi_head_attention_forward)  # type: ignore[arg-type]


def _multiplied(mode: Interception, weight: Tensor, repeats: bool) -> Callable[[Tensor], Tensor]:
    """``x -> x @ weight.T`` as a site of its own."""
    own = mode.weight_names(weight)
    name = mode.operation("linear", own, repeats=repeats)
    if own:
        with mode.measuring(name, "recurrent"):
            mode.see_weight(own[0], weight, lambda: rows_of(weight.shape, [0]))

    def multiply(x: Tensor) -> Tensor:
        with mode.measuring(name, "recurrent"):
            return F.linear(mode.visit(name, _SEQUENCE, x), weight)

    return multiply


def _gates(kind: str, x: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step from both products (biases added): the new hidden and cell state.

    The formulas of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``. Only the LSTM has a cell state.
    """
    if kind == "lstm":
        i, f, g, o = (x + h).chunk(4, -1)
        state = torch.sigmoid(f) * state + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(state), state
    if kind == "gru":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        z = torch.sigmoid(xz + hz)
        new = (1 - z) * n + z * state
        return new, new
    new = torch.tanh(x + h) if kind == "rnn_tanh" else torch.relu(x + h)
    return new, new


def _recurrent(kind: str) -> Callable[..., Any]:
    def run(mode: Interception, func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(args[3], list | tuple):  # (data, batch_sizes, states, parameters …): packed
            for weight in args[3]:
                if weight.dim() == 2:
                    _multiplied(mode, weight, repeats=False)
            return mode.elsewhere(func, args, kwargs)
        altered = _unrolled(mode, kind, *args)
        return altered if mode.alters else func(*args)

    return run


def _unrolled(
    mode: Interception,
    kind: str,
    x: Tensor,
    states: Tensor | tuple[Tensor, Tensor],
    parameters: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    if batch_first:
        x = x.transpose(0, 1)
    first, second = states if isinstance(states, tuple) else (states, states)
    directions = 2 if bidirectional else 1
    each = len(parameters) // (layers * directions)
    last_hidden, last_state = [], []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            own = parameters[at * each : (at + 1) * each]
            steps = range(len(x) - 1, -1, -1) if direction else range(len(x))
            run = _one_direction(mode, kind, x, first[at], second[at], own, has_biases, steps)
            sequence, hidden, state = run
            outputs.append(sequence)
            last_hidden.append(hidden)
            last_state.append(state)
        x = torch.cat(outputs, -1)
    if batch_first:
        x = x.transpose(0, 1)
    hidden = torch.stack(last_hidden)
    return (x, hidden, torch.stack(last_state)) if kind == "lstm" else (x, hidden)


def _one_direction(
    mode: Interception,
    kind: str,
    x: Tensor,
    hidden: Tensor,
    state: Tensor,
    parameters: list[Tensor],
    has_biases: bool,
    steps: range,
) -> tuple[Tensor, Tensor, Tensor]:
    w_x, w_h, *rest = parameters
    b_x, b_h = (rest[0], rest[1]) if has_biases else (0.0, 0.0)
    projection = rest[-1] if len(rest) % 2 else None
    from_x = _multiplied(mode, w_x, repeats=False)(x) + b_x
    from_h = _multiplied(mode, w_h, repeats=False)
    project = _multiplied(mode, projection, repeats=False) if projection is not None else None
    outputs: list[Tensor] = [x] * len(x)
    for t in steps:
        hidden, state = _gates(kind, from_x[t], from_h(hidden) + b_h, state)
        if project is not None:
            hidden = project(hidden)
        outputs[t] = hidden
    return torch.stack(outputs), hidden, state


def _cell(kind: str) -> Callable[..., Any]:
    def run(mode: Interception, func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, states, w_x, w_h, b_x, b_h = (*args, None, None)[:6]
        hidden, state = states if isinstance(states, list | tuple) else (states, states)
        from_x = _multiplied(mode, w_x, repeats=True)(x)
        from_h = _multiplied(mode, w_h, repeats=True)(hidden)
        if b_x is not None:
            from_x, from_h = from_x + b_x, from_h + b_h
        if not mode.alters:
            return func(*args, **kwargs)
        new = _gates(kind, from_x, from_h, state)
        return new if kind == "lstm" else new[0]

    return run


def _table() -> Iterator[tuple[Call, Callable[..., Any]]]:
    yield torch.einsum, _einsum
    yield torch.functional.einsum, _einsum
    yield F.scaled_dot_product_attention, _attention
    yield F.multi_head_attention_forward, _multi_head
    for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        yield getattr(torch, kind), _recurrent(kind)
        yield getattr(torch, f"{kind}_cell"), _cell(kind)


COMPOSITES = dict(_table())
