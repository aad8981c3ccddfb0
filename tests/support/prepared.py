"""A model made ready for schemes, as a sweep does it, from one batch."""

from halfstep.observe import calibrate
from halfstep.sites import discover
from halfstep.treatments import Calibration, Treatments


def treatments_of(model, x, *, sums=False):
    """The sites of a model and its treatments, calibrated and certified on ``x``."""
    sites = discover(model, x[:1], sums=sums)
    observations = calibrate(model, sites.activations, [x], positions=True)
    return sites, Treatments(model, sites, Calibration(lambda: [x], len(x), observations, True), x)
