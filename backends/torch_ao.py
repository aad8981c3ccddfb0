"""torchao: linear layers whose weights are its tensors, made of our codes and scales.

Its integer product takes int8 weights and int8 activations with one scale for each token, as they
pass, or one static scale. Without those, and for int1 to int7 and FP8, the weight is widened to
full precision as it is multiplied. Codes of less than eight bits are stored a byte each.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import (
    Float8Tensor,
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    PerRow,
    PerTensor,
)
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows.int8.int8_tensor import (
    QuantizeTensorToInt8Kwargs,
)

from backends.backend import Artefact, Deployed, NodeRun
from halfstep.activations import StaticQuantizer
from halfstep.apply import Treatment
from halfstep.batches import Batch, forward
from halfstep.corrections import Awq
from halfstep.formats import FORMATS, Uniform
from halfstep.granularity import PerAxis, PerGroup, PerToken
from halfstep.granularity import PerTensor as OneScale
from halfstep.scheme import Scheme, Spec
from halfstep.sites import Sites, WeightSite
from halfstep.weights import QuantizedWeight

STATE = "model.pt"
FULL = FORMATS["int8_full"]
EIGHT_BITS = (FULL, FORMATS["int8"])
FLOATS = (FORMATS["fp8_e4m3"], FORMATS["fp8_e5m2"])
SAFE = [Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor, QuantizeTensorToInt8Kwargs, PerRow,
        PerTensor, MappingType, Float8MMConfig, KernelPreference]  # fmt: skip
"""What a file may hold beside tensors: it is loaded with ``weights_only=True``."""
PRODUCTS = {"_int_mm": "int8", "mm": "fp32", "addmm": "fp32", "bmm": "fp32", "baddbmm": "fp32",
            "convolution": "fp32"}  # fmt: skip


class TorchAo:
    """The backend ``torchao``."""

    name: ClassVar[str] = "torchao"
    full_precision: ClassVar[str] = (
        "torchao multiplies codes in linear layers whose activation is quantized, and nowhere else"
    )

    def version(self) -> str:
        return version("torchao")

    def refuses(self, scheme: Scheme, sites: Sites) -> str:
        if scheme.weights is None:
            return "torchao's tensors are weights, and the scheme leaves those at full precision"
        if any(isinstance(c, Awq) or c.stage == "rewrite" for c in scheme.corrections):
            return "corrections that divide activations have no place in its tensors"
        for weight in sites.weights:
            spec = scheme.weight_spec(weight, sites)
            if spec is not None and (reason := _refused_weight(weight, spec)):
                return f"weight {weight.name}: {reason}"
        weights = {site.name: scheme.weight_spec(site, sites) for site in sites.weights}
        for active in sites.activations:
            spec = scheme.activation_spec(active, sites)
            if spec is None:
                continue
            if active.kind != "linear" or active.weight is None or not weights[active.weight]:
                return (
                    f"activation {active.name} enters a {active.kind} without a quantized weight; "
                    "keep it at full precision with sites.overrides"
                )
            own = weights[active.weight]
            if reason := _refused_activation(spec) or _refused_beside(own):
                return f"activation {active.name}: {reason}"
        return ""

    def build(
        self, model: nn.Module, sites: Sites, scheme: Scheme, treatment: Treatment, example: Batch
    ) -> Artefact:
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        state |= {name: tensor for name, tensor in treatment.parameters.items() if name in state}
        for site, weight in treatment.weights.items():
            made = _tensor(weight, treatment.activations.get(site))
            own = [n for n, p in treatment.parameters.items() if p is weight.values]
            state |= dict.fromkeys(own, made)
        out = io.BytesIO()
        torch.save(state, out)
        return Artefact({STATE: out.getvalue()})

    def open(self, artefact: Artefact, model: nn.Module, threads: int) -> Deployed:
        return _Model(artefact, model)


def _refused_weight(site: WeightSite, spec: Spec) -> str:
    if site.kind != "linear":
        return (
            f"it enters a {site.kind}, and torchao's tensors are made for linear layers; keep it "
            "at full precision with sites.overrides"
        )
    if spec.format in EIGHT_BITS + FLOATS:
        if not isinstance(spec.granularity, PerAxis | OneScale):
            return f"scales {spec.granularity} where its tensor takes one, or one a channel"
        return ""
    fmt = spec.format
    if not isinstance(fmt, Uniform) or fmt.bits >= 8 or fmt.quant_min >= 0:
        return f"torchao has no tensor here for {fmt.name}"
    if isinstance(spec.granularity, PerAxis | OneScale):
        return ""
    if not isinstance(spec.granularity, PerGroup):
        return f"scales {spec.granularity} where its tensor takes them a channel or a group"
    if site.layout.shape[1] % spec.granularity.size:
        return f"its rows of {site.layout.shape[1]} are no whole groups of {spec.granularity.size}"
    return ""


def _refused_beside(weight: Spec | None) -> str:
    if weight is None or weight.format not in EIGHT_BITS:
        name = weight.format.name if weight else "full-precision"
        return f"it meets {name} weights, which torchao multiplies at full precision"
    return ""


def _refused_activation(spec: Spec) -> str:
    if spec.format is not FULL:
        return f"{spec.format.name} where torchao's scale is amax / 127.5: that is int8_full"
    if not isinstance(spec.granularity, PerToken | OneScale):
        return f"scales {spec.granularity} where it takes one a token, or one static"
    return ""


def _tensor(weight: QuantizedWeight, treated: Any) -> Tensor:
    """Our codes as torchao's tensor, with how the activation is quantized on the way."""
    fmt, codes = weight.spec.format, weight.codes()
    scale, zero_point = weight.qparams.scale, weight.qparams.zero_point
    if len(scale) == 1:  # one for the tensor: one a channel, all the same
        scale, zero_point = (t.expand(len(codes), -1).contiguous() for t in (scale, zero_point))
    block = [1, codes.shape[1] // scale.shape[1]]
    if fmt in FLOATS:
        return Float8Tensor(  # type: ignore[no-any-return]
            codes, scale, block, kernel_preference=KernelPreference.TORCH, dtype=torch.float32
        )
    if fmt not in EIGHT_BITS:
        return IntxUnpackedToInt8Tensor(  # type: ignore[no-any-return]
            codes, scale, zero_point.to(torch.int8), getattr(torch, f"int{fmt.bits}"), block,
            torch.float32, None,
        )  # fmt: skip
    settings: dict[str, Any] = {}
    if treated is not None:
        static = isinstance(treated.quantizer, StaticQuantizer)
        settings["act_quant_kwargs"] = QuantizeTensorToInt8Kwargs(
            granularity=PerTensor() if static else PerRow(),
            mapping_type=MappingType.SYMMETRIC,
        )
        if static:
            settings["act_quant_scale"] = treated.quantizer.qparams.scale
    return Int8Tensor(  # type: ignore[no-any-return]
        codes, scale, block, torch.float32, zero_point=zero_point.to(torch.int8), **settings
    )


class _Model(Deployed):
    def __init__(self, artefact: Artefact, model: nn.Module) -> None:
        super().__init__()
        with torch.serialization.safe_globals(SAFE):
            state: Mapping[str, Tensor] = torch.load(
                io.BytesIO(artefact.files[STATE]), weights_only=True
            )
        self.model = copy.deepcopy(model)
        self.model.load_state_dict(state, assign=True)
        self.eval()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.model(*args, **kwargs)

    def nodes(self, batch: Batch) -> list[NodeRun]:
        watch = _Watch()
        with torch.no_grad(), watch:
            forward(self.model, batch)
        return watch.seen


class _Watch(TorchDispatchMode):
    """Every operator that ran, with its time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[NodeRun] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        started = time.perf_counter()
        made = func(*args, **(kwargs or {}))
        taken = (time.perf_counter() - started) * 1e6
        kind = func.overloadpacket.__name__
        name = f"{kind}#{sum(node.kind == kind for node in self.seen) + 1}"
        self.seen.append(NodeRun(name, kind, PRODUCTS.get(kind, "other"), taken))
        return made
