"""Integer arithmetic: products of 8-bit codes as hardware runs them, to the same bits everywhere.

    y = fl(fl(fl(acc) * s_a) * s_w) + b,    acc = sum((a - z_a) * w)

``acc`` is a whole number, exact; float32 rounds once when it is converted, once for each scale and
once for the bias (Jacob et al. 2018, section 2.2, with float scales). Two ways lead to these bits:

- torch's float32 product of the codes. While no sum of magnitudes reaches 2**24, every partial sum
  is a whole number that float32 holds, so nothing is rounded, whatever the order; beyond that
  float64 does the same.
- oneDNN's integer operators, where the processor has 8-bit dot products. Without them they may
  saturate at 16 bits: so they are probed before use, and every product is proven on real inputs.

A product qualifies where its activation has one static scale and both sides are integers of at
most 8 bits, the weight's symmetric, per tensor or per channel. All others are fake-quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.activations import StaticQuantizer, TreatedActivation
from halfstep.apply import SCRATCH_SHAPES, Treatment, applied, exchanged, quantizing
from halfstep.batches import Batch, forward
from halfstep.codes import Coded
from halfstep.errors import first_line
from halfstep.formats import Uniform
from halfstep.intercept import Interception
from halfstep.operators import Argument, Operand
from halfstep.qparams import QParams
from halfstep.weights import QuantizedWeight

EXACT_FLOAT = 2**24
"""Whole numbers up to here are all held by float32."""
OPERATORS = (F.linear, F.conv2d)


@dataclass(frozen=True)
class Kernel:
    """The operators that add up in integers here, or why there are none."""

    name: str
    """What ran the products: ``onednn`` with torch's word for the processor, or ``float``."""
    reason: str = ""
    """Why it is not ``onednn``; empty where it is."""

    @property
    def integer(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Proof:
    """One product, computed in both ways on real inputs and compared bit for bit."""

    operation: str
    kernel: str
    """``onednn``, or ``float`` where the integer operator was not used."""
    zero_points: tuple[int, ...]
    """Of the unsigned codes that the integer operator may be given: those that it was tried with,
    where nothing differed."""
    compared: int
    """Outputs that were compared; 0 where there was nothing to compare with."""
    differing: int
    largest_sum: int
    """Bound on the magnitudes that one accumulator adds up."""

    def to_json(self) -> dict[str, object]:
        return {
            "operation": self.operation,
            "kernel": self.kernel,
            "zero_points": " ".join(map(str, self.zero_points)),
            "compared": self.compared,
            "differing": self.differing,
            "largest_sum": self.largest_sum,
        }


@dataclass(frozen=True)
class _Call:
    """The settings of a call of one of `OPERATORS`."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def convolves(self) -> bool:
        return bool(self.stride)


class _Weight:
    """Codes (int8, in the weight's own shape) and their scales (float32 ``[out]``), and how each
    kernel wants them."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale
        self.column = scale.reshape(-1, 1, 1)  # beside a convolution's outputs [n, out, h, w]
        self.magnitude = int(codes.reshape(len(codes), -1).int().abs().sum(1).max())
        self.zero_points = torch.zeros(len(codes), dtype=torch.int32)
        self._packed: dict[_Call, Tensor] = {}

    def packed(self, call: _Call, shape: Sequence[int]) -> Tensor:
        """As oneDNN wants it. The scale and zero point of the activation, which it asks for, do
        not change the result; every product is proven with what was packed without them."""
        if call not in self._packed:
            if call.convolves:
                made = torch.ops.onednn.qconv_prepack(
                    self.codes, self.scale, 1.0, 0, call.stride, call.padding,
                    call.dilation, call.groups, list(shape),
                )  # fmt: skip
            else:
                made = torch.ops.onednn.qlinear_prepack(self.codes, list(shape))
            self._packed[call] = made
        return self._packed[call]


def _weight(quantized: QuantizedWeight) -> _Weight | None:
    """A weight for integer products; None where it does not qualify."""
    found = quantized.by_row() if quantized.spec.format.bits <= 8 else None
    return _Weight(*found) if found is not None else None


@dataclass(frozen=True, eq=False)
class _Product:
    """What a product multiplies, and how."""

    treated: TreatedActivation
    quantizer: StaticQuantizer
    weight: _Weight
    call: _Call

    @cached_property
    def largest_sum(self) -> int:
        lower, upper = self.quantizer.qparams.format.limits(self.quantizer.qparams.zero_point)
        return self.weight.magnitude * int(max(-float(lower), float(upper)))


class Integers:
    """The integer products of treatments of one model; weights are prepared once."""

    def __init__(self, kernel: Kernel | None = None) -> None:
        """
        Args:
            kernel: what to run them with; what this machine has by default.
        """
        self.kernel = kernel or available()
        # By identity, each with what it belongs to, so that no other gets its place.
        self._weights: dict[int, tuple[QuantizedWeight, _Weight | None]] = {}
        self._proofs: dict[tuple[int, int], tuple[_Product, Proof]] = {}

    @contextmanager
    def applied(
        self, model: nn.Module, treatment: Treatment, proofs: Sequence[Proof]
    ) -> Iterator[nn.Module]:
        """As `halfstep.apply.applied`, with the products that qualify in integer arithmetic: by
        the integer operator where it was proven, else by float products of codes."""
        if not proofs:
            with applied(model, treatment):
                yield model
            return
        proven = {p.operation: p.zero_points for p in proofs}
        with exchanged(model, treatment.parameters):
            mode = _Running(self, treatment, proven)
            with mode.over(model):
                yield model

    def prove(self, model: nn.Module, treatment: Treatment, batch: Batch) -> tuple[Proof, ...]:
        """Runs a batch with every product that qualifies computed in both ways.

        One that differs in any bit, on any of its uses, is left to float products of codes.
        """
        if not any(_integer(treated.quantizer) for treated in treatment.activations.values()):
            return ()
        mode = _Proving(self, treatment)
        with torch.no_grad(), exchanged(model, treatment.parameters), mode.over(model):
            forward(model, batch)
        return tuple(mode.proofs.values())

    def codes(self, model: nn.Module, treatment: Treatment, batch: Batch) -> dict[str, Tensor]:
        """The codes (int32, zero points included) that enter every site with one static integer
        scale, over all its uses, while the model runs a batch under the treatment."""
        mode = _Watching(self, treatment)
        with torch.no_grad(), exchanged(model, treatment.parameters), mode.over(model):
            forward(model, batch)
        return mode.seen

    def weight(self, quantized: QuantizedWeight) -> _Weight | None:
        """Prepared for products, once; None where it does not qualify."""
        if id(quantized) not in self._weights:
            self._weights[id(quantized)] = (quantized, _weight(quantized))
        return self._weights[id(quantized)][1]

    def remembered(self, product: _Product) -> Proof | None:
        """What was proven of a product in an earlier cell."""
        found = self._proofs.get((id(product.treated), id(product.weight)))
        return found[1] if found else None

    def remember(self, product: _Product, proof: Proof) -> None:
        self._proofs[id(product.treated), id(product.weight)] = (product, proof)


def _integer(quantizer: object) -> bool:
    if not isinstance(quantizer, StaticQuantizer):
        return False
    fmt = quantizer.qparams.format
    return isinstance(fmt, Uniform) and fmt.bits <= 8


class _Running(Interception):
    """Runs the products that qualify in integer arithmetic, the others fake-quantized."""

    def __init__(
        self,
        integers: Integers,
        treatment: Treatment,
        proven: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            proven: the zero points that the integer operator may be given, by operation.
        """
        super().__init__(quantizing(treatment), alters=True)
        self._integers = integers
        self._treatment = treatment
        self._proven = proven
        self._products: dict[str, _Product | None] = {}
        self._codes: dict[tuple[torch.Size, bool], Coded] = {}

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
        x = operands[0]
        if (
            func in OPERATORS
            and weights[1]
            and not weights[0]
            and x.dtype == torch.float32
            and (func is not F.conv2d or x.dim() == 4)
        ):
            if name not in self._products:
                self._products[name] = self._product(name, func, operands[1], weights[1])
            product = self._products[name]
            if product is not None:
                made = self._multiplied(name, product, x, self.read(2, "bias", None))
                if made is not None:
                    return made
        return super().multiply(name, func, arguments, operands, weights, args, kwargs)

    def _multiplied(
        self, name: str, product: _Product, x: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        x = product.treated.divided(x)
        coded = self._coded(product, x)
        if coded.broken:
            return None  # NaN stays NaN in fake-quantized products
        proven, zero_point = self._proven.get(name, ()), coded.zero_point
        if proven:
            if zero_point not in proven:  # the proof saw values below zero, and this batch has none
                zero_point = product.quantizer.unsigned_zero_point
            codes = coded.unsigned(x, product.quantizer, zero_point)
            return by_onednn(product, codes, zero_point, bias)
        return by_float(product, coded.grid(x, product.quantizer), bias)

    def _product(
        self, name: str, func: Callable[..., Any], seen: Tensor, weights: list[str]
    ) -> _Product | None:
        """The product of an operation; None where it does not qualify."""
        treated = self._treatment.activations.get(name)
        quantized = next(
            (found for own in weights
             if (found := self._treatment.weights.get(own.removesuffix(".weight")))),
            None,
        )  # fmt: skip
        if treated is None or quantized is None or not _integer(treated.quantizer):
            return None
        weight, call = self._integers.weight(quantized), self._call(func)
        if weight is None or call is None:
            return None
        if seen.shape != weight.codes.shape or not seen.is_contiguous():
            return None  # a slice or transpose of the weight is another matrix
        return _Product(treated, treated.quantizer, weight, call)  # type: ignore[arg-type]

    def _call(self, func: Callable[..., Any]) -> _Call | None:
        if func is not F.conv2d:
            return _Call()
        stride, padding = self.read(3, "stride", 1), self.read(4, "padding", 0)
        if isinstance(padding, str):
            return None
        return _Call(
            _pair(stride), _pair(padding), _pair(self.read(5, "dilation", 1)),
            self.read(6, "groups", 1),
        )  # fmt: skip

    def _coded(self, product: _Product, x: Tensor) -> Coded:
        key = (x.shape, product.call.convolves)
        last = self._codes.get(key)
        if last is None:
            if len(self._codes) >= SCRATCH_SHAPES:  # texts come in many lengths
                self._codes.pop(next(iter(self._codes)))
            last = self._codes[key] = Coded(channels_last=product.call.convolves)
        last.hold(x, product.quantizer)
        return last


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def by_onednn(product: _Product, codes: Tensor, zero_point: int, bias: Tensor | None) -> Tensor:
    """The product by oneDNN's integer operator, from unsigned codes."""
    weight, scale, call = product.weight, product.quantizer.scale, product.call
    packed = weight.packed(call, codes.shape)
    if call.convolves:
        return torch.ops.onednn.qconv_pointwise(  # type: ignore[no-any-return]
            codes, scale, zero_point, packed, weight.scale, weight.zero_points, bias,
            call.stride, call.padding, call.dilation, call.groups,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
    return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
        codes, scale, zero_point, packed, weight.scale, weight.zero_points, bias,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


def by_float(product: _Product, grid: Tensor, bias: Tensor | None) -> Tensor:
    """The product by float arithmetic on grid points, each a whole number."""
    weight, call = product.weight, product.call
    # Made anew for each call: held, it would be four times the codes.
    dtype = torch.float32 if product.largest_sum < EXACT_FLOAT else torch.float64
    a, w = grid.to(dtype), weight.codes.to(dtype)
    if call.convolves:
        # oneDNN's integer convolutions give channels last, and later sums go by the layout.
        y = F.conv2d(a, w, None, call.stride, call.padding, call.dilation, call.groups)
        y = y.float().contiguous(memory_format=torch.channels_last)
        y.mul_(product.quantizer.scale).mul_(weight.column)
        return y if bias is None else y.add_(bias.reshape(-1, 1, 1))
    y = F.linear(a, w).float().mul_(product.quantizer.scale).mul_(weight.scale)
    return y if bias is None else y.add_(bias)


class _Watching(_Running):
    """Notes the codes that enter each site, by float products."""

    def __init__(self, integers: Integers, treatment: Treatment) -> None:
        super().__init__(integers, treatment)
        self.seen: dict[str, Tensor] = {}
        self._quantizes, self.visit = self.visit, self._note_and_quantize

    def _note(self, site: str, x: Tensor) -> None:
        treated = self._treatment.activations.get(site)
        if treated is not None and _integer(treated.quantizer):
            assert isinstance(treated.quantizer, StaticQuantizer)
            grid = treated.quantizer.to_grid(treated.divided(x))
            zero_point = treated.quantizer.qparams.zero_point.reshape(())
            self.seen[site] = (grid + zero_point).int()

    def _note_and_quantize(self, site: str, operand: Operand, x: Tensor) -> Tensor:
        self._note(site, x)
        return self._quantizes(site, operand, x)

    def _multiplied(
        self, name: str, product: _Product, x: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        self._note(name, x)
        return super()._multiplied(name, product, x, bias)


class _Proving(_Running):
    """Computes every product that qualifies in both ways, and goes on with the float one."""

    def __init__(self, integers: Integers, treatment: Treatment) -> None:
        super().__init__(integers, treatment)
        self.proofs: dict[str, Proof] = {}

    def _multiplied(
        self, name: str, product: _Product, x: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        x = product.treated.divided(x)
        coded = self._coded(product, x)
        if coded.broken:
            return None
        by_codes = by_float(product, coded.grid(x, product.quantizer), bias)
        known = self._integers.remembered(product)
        if known is None:
            known = self._proof(name, product, coded, x, bias, by_codes)
            self._integers.remember(product, known)
        self.proofs[name] = known
        return by_codes

    def _proof(
        self,
        name: str,
        product: _Product,
        coded: Coded,
        x: Tensor,
        bias: Tensor | None,
        expected: Tensor,
    ) -> Proof:
        if not self._integers.kernel.integer:
            return Proof(name, "float", (), 0, 0, product.largest_sum)
        # Later batches may have values below zero where this one has none.
        zero_points = sorted({coded.zero_point, product.quantizer.unsigned_zero_point})
        differing = 0
        for zero_point in zero_points:
            codes = coded.unsigned(x, product.quantizer, zero_point)
            made = by_onednn(product, codes, zero_point, bias)
            if not torch.equal(made, expected):
                differing += int((made != expected).sum())
        compared = len(zero_points) * expected.numel()
        if differing:
            return Proof(name, "float", (), compared, differing, product.largest_sum)
        return Proof(name, "onednn", tuple(zero_points), compared, 0, product.largest_sum)


def summary(kernel: Kernel, proofs: Sequence[Proof]) -> Mapping[str, object]:
    """What a cell's record says of its integer products."""
    return {
        "products": len(proofs),
        "kernel": kernel.name,
        "why_not": kernel.reason,
        "integer_operators": sum(p.kernel != "float" for p in proofs),
        "compared": sum(p.compared for p in proofs),
        "differing": sum(p.differing for p in proofs),
    }


def differing(proofs: Sequence[Proof]) -> list[str]:
    """A note on each product that the integer operator computed otherwise."""
    return [
        f"{p.operation}: the integer operator differs in {p.differing:,} of {p.compared:,} "
        "outputs; float products of codes are used"
        for p in proofs
        if p.differing
    ]


@lru_cache(maxsize=1)
def available() -> Kernel:
    """Which kernel this machine runs integer products with, by trying them.

    The private operators are called with extreme and with random codes and compared, bit for bit,
    with whole-number arithmetic: without 8-bit dot products they saturate at 16 bits and fail.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        wrong = [
            what
            for what, product, codes in _trials()
            if not all(
                torch.equal(
                    by_onednn(product, codes, zero_point, None),
                    by_float(product, codes.float() - zero_point, None),
                )
                for zero_point in (0, 3, 128)
            )
        ]
    except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
        return Kernel("float", f"oneDNN's integer operators cannot be called: {first_line(error)}")
    if wrong:
        return Kernel(
            "float",
            f"oneDNN's integer operators are not exact on this processor ({capability}): "
            f"{', '.join(wrong)} differ(s) from whole-number arithmetic",
        )
    return Kernel(f"onednn ({capability})")


def _trials() -> Iterator[tuple[str, _Product, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    uint8 = Uniform("uint8", 8, 0, 255, symmetric=False)
    zero_point = torch.zeros(1, 1, dtype=torch.int32)
    quantizer = StaticQuantizer(QParams(uint8, torch.tensor([[0.0123]]), zero_point))
    treated = TreatedActivation(Operand("input", -1), quantizer)
    for call, shape, weight_shape in (
        (_Call(), (5, 384), (24, 384)),
        (_Call((1, 1), (1, 1), (1, 1)), (2, 16, 7, 7), (24, 16, 3, 3)),
    ):
        random = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        w = torch.randint(-127, 128, weight_shape, generator=generator).to(torch.int8)
        scale = torch.rand(len(w), generator=generator) + 0.5
        for what, codes, own in (
            ("random codes", random, w),
            ("full-scale codes", torch.full_like(random, 255), torch.full_like(w, 127)),
        ):
            if call.convolves:
                codes = codes.contiguous(memory_format=torch.channels_last)
            product = _Product(treated, quantizer, _Weight(own, scale), call)
            yield f"{what} of a {'convolution' if call.convolves else 'linear'}", product, codes
