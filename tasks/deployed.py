"""Deployed: a scheme's artefact, built once, and opened for whoever runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from backends import Artefact, Deployed, backend
from halfstep.scheme import Scheme
from halfstep.treatments import Treatments
from tasks.load import Loaded

EXAMPLE_ROWS = 2
_BUILT: WeakKeyDictionary[Treatments, dict[Scheme, Artefact]] = WeakKeyDictionary()


def artefact(loaded: Loaded, treatments: Treatments, scheme: Scheme) -> Artefact:
    """What a deployment of a scheme consists of.

    Raises:
        ValueError: the backend's format cannot express the model under the scheme.
    """
    built = _BUILT.setdefault(treatments, {})
    if scheme not in built:
        built[scheme] = backend(scheme.backend).build(
            loaded.model,
            loaded.sites,
            scheme,
            treatments.for_scheme(scheme),
            loaded.calibration.sample(EXAMPLE_ROWS),
        )
    return built[scheme]


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
