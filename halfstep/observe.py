"""Observing: one instrumented forward pass that fills a sketch for each activation site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from halfstep.errors import UserError
from halfstep.sites import Site
from halfstep.sketch import Sketch


@contextmanager
def observing(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, Sketch]]:
    """While open, every forward pass of ``model`` adds the sites' inputs to their sketches."""
    sketches = {site.name: Sketch() for site in sites}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sketches[name] = sketches[name] + Sketch.of(inputs[0])

        return count

    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(hook(site.name)) for site in sites
    ]
    try:
        yield sketches
    finally:
        for handle in handles:
            handle.remove()


def calibrate(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Tensor]
) -> dict[str, Sketch]:
    """Runs the calibration data through the model once and returns each site's sketch.

    Raises:
        UserError: a site saw NaN or infinite activations, or nothing at all.
    """
    with observing(model, sites) as sketches, torch.inference_mode():
        for batch in batches:
            model(batch)
    for name, sketch in sketches.items():
        if sketch.nonfinite:
            raise UserError(
                f"activations entering {name} hold {sketch.nonfinite} NaN or infinite value(s) "
                "on the calibration data"
            )
        if sketch.total == 0:
            raise UserError(
                f"site {name} saw no activations on the calibration data; skip it with "
                f"sites: {{skip: [{name}]}} or use data that reaches it"
            )
    return sketches
