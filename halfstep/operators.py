"""Operators: which of torch's functions multiply and accumulate, and which operands enter them.

Everything that halfstep quantizes enters one of these. Whether a layer calls them or a model's own
``forward`` makes no difference: `halfstep.intercept` sees the call itself.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.layout import Layout, rows_of, transposed_convolution

Read = Callable[[int, str, Any], Any]
"""Reads another argument of the same call: (index, name, default)."""


@dataclass(frozen=True)
class Operand:
    """What a tensor is to the operator it enters."""

    role: str
    """``input``, ``left``, ``right``, ``query`` …"""
    axis: int
    """The axis that is summed over, counted from the end; a convolution's channels."""
    whole_example: bool = False
    """True where one accumulator runs over space too: a convolution's input."""
    batch: int | None = None
    """The axis that counts examples, from the end, once discovery has seen it; None where no axis
    grows with the batch."""

    def of(self, dimensions: int) -> Operand:
        """Itself, or for a vector in place of a matrix the same along its only axis."""
        return self if -self.axis <= dimensions else replace(self, axis=-1)


@dataclass(frozen=True)
class Argument:
    """Where an operand stands in a call."""

    index: int
    name: str
    operand: Operand
    layout: Callable[[Tensor, Read], Layout]
    """How the operand becomes a matrix, should it be a weight."""


@dataclass(frozen=True)
class Operator:
    """A function of torch that multiplies and accumulates, or looks rows of a weight up."""

    kind: str
    arguments: tuple[Argument, ...]


def _rows(*axes: int) -> Callable[[Tensor, Read], Layout]:
    return lambda weight, read: rows_of(weight.shape, axes)


def _all_but(axis: int) -> Callable[[Tensor, Read], Layout]:
    """Every axis counts outputs but the one that is summed over."""

    def layout(weight: Tensor, read: Read) -> Layout:
        summed = axis % weight.dim() if weight.dim() >= -axis else 0
        return rows_of(weight.shape, [i for i in range(weight.dim()) if i != summed])

    return layout


def _linear() -> Operator:
    x = Argument(0, "input", Operand("input", -1), _all_but(-1))
    return Operator("linear", (x, Argument(1, "weight", Operand("weight", -1), _rows(0))))


def _convolution(dimensions: int) -> Operator:
    operand = Operand("input", -dimensions - 1, whole_example=True)
    x = Argument(0, "input", operand, _all_but(operand.axis))
    weight = Argument(1, "weight", Operand("weight", operand.axis), _rows(0))
    return Operator(f"conv{dimensions}d", (x, weight))


def _transposed(dimensions: int) -> Operator:
    def layout(weight: Tensor, read: Read) -> Layout:
        return transposed_convolution(weight.shape, read(6, "groups", 1))

    operand = Operand("input", -dimensions - 1, whole_example=True)
    x = Argument(0, "input", operand, _all_but(operand.axis))
    weight = Argument(1, "weight", Operand("weight", operand.axis - 1), layout)
    return Operator(f"conv_transpose{dimensions}d", (x, weight))


def _product(left: tuple[int, str], right: tuple[int, str], kind: str = "matmul") -> Operator:
    """``left @ right``: the last axis of the one meets the last but one of the other."""
    a = Argument(*left, Operand("left", -1), _all_but(-1))
    return Operator(kind, (a, Argument(*right, Operand("right", -2), _all_but(-2))))


def _embedding(index: int) -> Operator:
    return Operator("embedding", (Argument(index, "weight", Operand("weight", -1), _rows(0)),))


_MATMUL = _product((0, "input"), (1, "other"))
_MM = _product((0, "input"), (1, "mat2"))
_ADDMM = _product((1, "mat1"), (2, "mat2"), "linear")
_BADDBMM = _product((1, "batch1"), (2, "batch2"))

OPERATORS: Mapping[Callable[..., Any], Operator] = {
    F.linear: _linear(),
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.conv_transpose1d: _transposed(1),
    F.conv_transpose2d: _transposed(2),
    F.conv_transpose3d: _transposed(3),
    torch.matmul: _MATMUL,
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    Tensor.__rmatmul__: _product((1, "other"), (0, "input")),
    torch.mm: _MM,
    Tensor.mm: _MM,
    torch.bmm: _MM,
    Tensor.bmm: _MM,
    torch.addmm: _ADDMM,
    Tensor.addmm: _ADDMM,
    torch.baddbmm: _BADDBMM,
    Tensor.baddbmm: _BADDBMM,
    F.embedding: _embedding(1),
    torch.embedding: _embedding(0),
    F.embedding_bag: _embedding(1),
}
"""Functions whose operands stand in fixed arguments. What takes several steps (``einsum``,
attention, recurrent layers) is in `halfstep.composite`."""

SUM = "sum"
"""The kind of a sum of two activations, as a residual connection makes it."""
TERMS = ("augend", "addend")
SUMS: Mapping[Callable[..., Any], bool] = {
    torch.add: False,
    Tensor.add: False,
    Tensor.__add__: False,
    Tensor.__radd__: False,
    Tensor.add_: True,
    Tensor.__iadd__: True,
}
"""Functions that add two tensors, and whether they write to the first. Their terms are sites only
where some scheme quantizes them."""


def terms_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Tensor, Operand]]:
    """The terms of a call of one of `SUMS` with two tensors of one shape, of examples by features;
    empty where it adds something else."""
    if kwargs or len(args) != 2:
        return []
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in args):
        return []
    dimensions = args[0].dim()
    if dimensions < 2 or args[0].shape != args[1].shape:
        return []
    spatial = dimensions > 3  # then channels come before space, as convolutions have them
    axis = 1 - dimensions if spatial else -1
    return [(x, Operand(role, axis, spatial)) for x, role in zip(args, TERMS, strict=True)]


_ATEN = torch.ops.aten
EXPORTED: Mapping[Callable[..., Any], Callable[..., Any]] = {
    _ATEN.linear.default: F.linear,
    _ATEN.conv1d.default: F.conv1d,
    _ATEN.conv2d.default: F.conv2d,
    _ATEN.conv3d.default: F.conv3d,
    _ATEN.conv1d.padding: F.conv1d,
    _ATEN.conv2d.padding: F.conv2d,
    _ATEN.conv3d.padding: F.conv3d,
    _ATEN.conv_transpose1d.default: F.conv_transpose1d,
    _ATEN.conv_transpose2d.input: F.conv_transpose2d,
    _ATEN.conv_transpose3d.input: F.conv_transpose3d,
    _ATEN.matmul.default: torch.matmul,
    _ATEN.mm.default: torch.mm,
    _ATEN.bmm.default: torch.bmm,
    _ATEN.addmm.default: torch.addmm,
    _ATEN.baddbmm.default: torch.baddbmm,
    _ATEN.embedding.default: torch.embedding,
    _ATEN.einsum.default: torch.einsum,
    _ATEN.add.Tensor: torch.add,
    _ATEN.add_.Tensor: Tensor.add_,
    _ATEN.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
}
"""The overloads that programs of ``torch.export`` call, as the functions of equal arguments."""


def einsum_arguments(equation: str, shapes: Sequence[Sequence[int]]) -> list[Argument] | None:
    """The operands of an ``einsum``; None where it is not a product of two tensors.

    Labels of an operand that the result lacks are summed over; where several are, the last of them
    is taken as the operand's axis.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(shapes) != 2 or len(terms) != 2:
        return None
    if not arrow:  # by convention the labels that occur once, in alphabetic order
        once = sorted(c for c in set(left) - set(",.") if left.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    unused = "".join(sorted(set(string.ascii_letters) - set(left + result)))
    terms = [
        _spelled_out(term, len(shape), unused) for term, shape in zip(terms, shapes, strict=True)
    ]
    result = result.replace("...", unused)
    found = []
    for index, (labels, role) in enumerate(zip(terms, ("left", "right"), strict=True)):
        summed = [i for i, label in enumerate(labels) if label not in result]
        if not summed or len(set(labels)) != len(labels):
            return None
        rows = [i for i in range(len(labels)) if i not in summed]
        operand = Operand(role, summed[-1] - len(labels))
        found.append(Argument(index + 1, role, operand, _rows(*rows)))
    return found


def _spelled_out(term: str, dimensions: int, unused: str) -> str:
    """An ellipsis as labels of their own, the last ones where two operands have several."""
    hidden = dimensions - len(term.replace("...", ""))
    return term.replace("...", unused[len(unused) - hidden :])


def _because(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, reason)


ARITHMETIC: dict[str, str] = {
    **_because(
        "an addition: both sides would need one scale",
        *("add", "add_", "__add__", "__radd__", "__iadd__"),
        *("sub", "sub_", "__sub__", "__rsub__", "__isub__"),
    ),
    **_because(
        "elementwise: nothing accumulates",
        *("mul", "mul_", "__mul__", "__rmul__", "__imul__"),
        *("div", "div_", "__truediv__", "__rtruediv__", "__itruediv__"),
    ),
    **_because(
        "a normalisation: exponentials or square roots",
        *("softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "batch_norm"),
        *("instance_norm", "normalize"),
    ),
    **_because(
        "an activation function: elementwise",
        *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish"),
        *("sigmoid", "tanh", "softplus", "exp", "log", "sqrt", "rsqrt", "pow", "__pow__", "erf"),
    ),
    **_because("the gates of a recurrent layer: elementwise", "gates"),
    **_because(
        "a reduction or pooling: no weights",
        *("mean", "sum", "cumsum", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "interpolate"),
    ),
}
"""Arithmetic that stays at full precision, and why; listed where a model's own code calls it."""

UNKNOWN_PRODUCT = "a product by a function that halfstep does not quantize"
OTHER_PRODUCTS: dict[str, str] = {
    **_because(
        UNKNOWN_PRODUCT,
        *("mv", "addmv", "dot", "vdot", "inner", "outer", "tensordot", "bilinear", "cdist"),
        *("addbmm", "chain_matmul", "multi_dot", "kron", "addr", "ger", "einsum"),
    ),
    **_because(
        "packed sequences: the weights are quantized, what they meet is not",
        *("lstm", "gru", "rnn_tanh", "rnn_relu"),
    ),
}
"""Products that are not sites, and why; listed wherever they occur."""
