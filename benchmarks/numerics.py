"""What the numeric core costs, each against a named peer.

    make bench-numerics       (or: python -m benchmarks.numerics)

- entropy calibration against a straightforward loop of the reference algorithm, the same answer;
- fake quantization of an activation against ``torch.fake_quantize_per_tensor_affine``, bit-equal;
- a calibration pass that serves every static calibrator and format against a plain pass, and what
  it takes to derive all their ranges from it;
- GPTQ and AdaRound on a weight of 384 x 1536.

Peer and ours alternate in one run; ratios are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from halfstep.activations import StaticQuantizer, quantizer
from halfstep.calibrators import CALIBRATORS, HISTOGRAM_BINS, entropy_candidate
from halfstep.corrections import AdaRound, Gptq
from halfstep.corrections.adaround import row_error
from halfstep.formats import FORMATS
from halfstep.granularity import PerTensor
from halfstep.observe import calibrate
from halfstep.qparams import choose_qparams
from halfstep.quantize import fake_quantize
from halfstep.scheme import Spec
from halfstep.sites import discover
from sources.small_cnn import Network
from tests.support.slow_reference import entropy_bins


def main() -> None:
    torch.set_num_threads(1)
    _entropy()
    _fake_quantization()
    _calibration()
    torch.set_num_threads(2)
    _roundings()


def _entropy() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).abs().numpy()
    histogram = np.histogram(x, HISTOGRAM_BINS, (0, x.max()))[0].astype(float)
    edges = FORMATS["int8"].positive_edges(unsigned=False).numpy()
    kept = []
    slow = _timed(lambda: kept.append(entropy_bins(histogram, len(edges) - 1)), 1, False)
    fast = _timed(lambda: kept.append(entropy_candidate(histogram, edges).bins), 20)
    assert len(set(kept)) == 1, "both must choose the same range"
    print(
        f"entropy: a loop takes {slow / fast:.0f} times as long ({slow:.2f} s, {fast * 1e3:.1f} ms)"
    )


def _fake_quantization() -> None:
    x = torch.randn(1_600_000, generator=torch.Generator().manual_seed(0))
    amax = x.abs().max().reshape(1, 1)
    ours = StaticQuantizer(choose_qparams(FORMATS["int8"], -amax, amax))
    scale, zero = float(ours.qparams.scale), 0
    out = torch.empty_like(x)

    def theirs() -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, -127, 127)

    assert torch.equal(ours(x).view(torch.int32), theirs().view(torch.int32)), "must be bit-equal"
    with torch.inference_mode():
        pairs = [(_timed(theirs, 5), _timed(lambda: ours(x, out), 5)) for _ in range(9)]
    print(f"fake quantization: torch's operator takes {_ratio(pairs):.1f} times as long, bit-equal")


def _calibration() -> None:
    torch.manual_seed(0)
    model = Network(1, 16, 2, 10).eval()
    x = torch.rand(512, 1, 28, 28)
    batches = x.split(32)
    sites = discover(model, x[:1]).activations

    def plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    pairs = [
        (_timed(lambda: calibrate(model, sites, batches, examples=512), 1), _timed(plain, 1))
        for _ in range(9)
    ]
    observations = calibrate(model, sites, batches, examples=512)
    formats = ["int8", "int8_asym", "uint8", "int4", "fp8_e4m3", "fp8_e5m2"]
    specs = [Spec(FORMATS[f], PerTensor(), c) for f in formats for c in CALIBRATORS]
    took = _timed(
        lambda: [quantizer(s.operand, observations[s.name], spec) for s in sites for spec in specs],
        1,
    )
    each = took / (len(specs) * len(sites))
    print(f"calibration pass: {_ratio(pairs):.2f} times a plain one (one torch thread)")
    print(
        f"  from it {len(specs)} static schemes for {len(sites)} sites: {took:.2f} s, "
        f"{each * 1e3:.1f} ms a range"
    )


def _roundings() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 1536, generator=generator) * 0.05
    mix = torch.randn(1536, 1536, generator=generator) / 1536**0.5
    x = (torch.randn(4000, 1536, generator=generator) @ mix).double()
    gram = x.T @ x / len(x)
    qparams = choose_qparams(FORMATS["int4"], weight.amin(1, True), weight.amax(1, True))

    def error(rounded: Tensor) -> float:
        return float(row_error((rounded - weight).double(), gram).sum())

    nearest = error(fake_quantize(weight, qparams))
    for correction in (Gptq(), AdaRound()):
        made: list[Tensor] = []
        took = _timed(
            lambda c=correction, m=made: m.append(c.round(weight, qparams, gram)[0]), 1, False
        )
        print(
            f"{correction.name} on 384 x 1536, int4 per channel, two threads: {took:.2f} s, output "
            f"error {error(made[-1]) / nearest:.2f} of round-to-nearest"
        )


def _ratio(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(one / other for one, other in pairs)


def _timed(act: Callable[[], object], times: int, warm_up: bool = True) -> float:
    if warm_up:
        act()
    before = time.perf_counter()
    for _ in range(times):
        act()
    return (time.perf_counter() - before) / times


if __name__ == "__main__":
    main()
