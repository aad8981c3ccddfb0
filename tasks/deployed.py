"""Deployed: a scheme's artefact, built once, and opened for whoever runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from backends import Artefact, Deployed, backend
from halfstep.batches import answer, forward
from halfstep.errors import first_line
from halfstep.examples import Inputs
from halfstep.scheme import Scheme
from halfstep.treatments import Treatments
from tasks.load import Loaded

EXAMPLE_ROWS = 2
FIXED = "the artefact does not follow batches of another size or length than it was traced with"
_BUILT: WeakKeyDictionary[Treatments, dict[Scheme, Artefact]] = WeakKeyDictionary()


def artefact(loaded: Loaded, treatments: Treatments, scheme: Scheme) -> Artefact:
    """What a deployment of a scheme consists of.

    Raises:
        ValueError: the backend's format cannot express the model under the scheme.
    """
    built = _BUILT.setdefault(treatments, {})
    if scheme not in built:
        runs = backend(scheme.backend)
        made = runs.build(
            loaded.model,
            loaded.sites,
            scheme,
            treatments.for_scheme(scheme),
            loaded.calibration.sample(EXAMPLE_ROWS),
        )
        check_shapes(runs.open(made, loaded.model, 1), loaded.model, loaded.calibration)
        built[scheme] = made
    return built[scheme]


def check_shapes(deployed: Deployed, model: nn.Module, inputs: Inputs) -> None:
    """Raises ValueError where an artefact only takes the shapes that it was traced with."""
    wanted = [inputs.sample(EXAMPLE_ROWS + 1)]
    if inputs.lengths is not None:  # of other lengths too: the shortest and the longest
        total = inputs.lengths.sum(1)
        wanted += [inputs.batch(np.array([at])) for at in (total.argmin(), total.argmax())]
    for batch in wanted:
        with torch.no_grad():
            expected = answer(forward(model, batch)).shape
            try:
                found = answer(forward(deployed, batch)).shape
            except Exception as error:  # runtimes raise types of their own
                raise ValueError(f"{FIXED}: {first_line(error)}") from error
        if found != expected:
            raise ValueError(f"{FIXED}: it gives {list(found)} where {list(expected)} is due")


def opened(
    loaded: Loaded, treatments: Treatments, scheme: Scheme, threads: int | None = None
) -> Deployed:
    """The artefact, running."""
    made = artefact(loaded, treatments, scheme)
    return backend(scheme.backend).open(made, loaded.model, threads or loaded.plan.compute.threads)


@contextmanager
def running(loaded: Loaded, treatments: Treatments, scheme: Scheme) -> Iterator[nn.Module]:
    """The model under a scheme, simulated or by its backend."""
    if scheme.deployed:
        yield opened(loaded, treatments, scheme)
    else:
        with treatments.applied(scheme) as model:
            yield model
