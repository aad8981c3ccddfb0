"""What a config says of deployment: the target, how it is measured, what it costs."""

from __future__ import annotations

import os
from collections.abc import Sequence

from backends.cost import Prices
from backends.hardware import TARGETS
from flows import parse
from halfstep.errors import UserError
from halfstep.scheme import Scheme
from tasks.plan import Deployment

KEYS = ("target", "queries", "batch_sizes", "threads", "cpus", "latency_ms", "prices")
PRICES = ("per_hour", "currency", "watts", "per_kwh")
FEWEST_QUERIES = 64
"""Fewer support no percentile but the median."""


def read_deployment(value: object, schemes: Sequence[Scheme]) -> Deployment | None:
    """The settings, or None where no scheme names a backend."""
    deployed = any(scheme.deployed for scheme in schemes)
    if value is None:
        return Deployment() if deployed else None
    given = parse.mapping(value, "deployment", KEYS)
    if not deployed:
        raise UserError("deployment: no cell names a backend; give matrix.backend")
    settings = Deployment()
    sizes = parse.typed_value(
        list[int], given.get("batch_sizes", list(settings.batch_sizes)), "deployment.batch_sizes"
    )
    if not sizes or sizes != sorted(set(sizes)) or sizes[0] != 1:
        raise UserError(
            f"deployment.batch_sizes: {sizes!r} is not allowed: ascending whole numbers, the first "
            "of them 1, which latencies are told of"
        )
    cpus = given.get("cpus")
    if cpus is not None:
        cpus = tuple(parse.typed_value(list[int], cpus, "deployment.cpus"))
        here = sorted(os.sched_getaffinity(0))
        if not cpus or not set(cpus) <= set(here):
            raise UserError(f"deployment.cpus: {list(cpus)} is not allowed: of {here}")
    latency = given.get("latency_ms")
    if latency is not None:
        latency = parse.number(latency, "deployment.latency_ms", 1e-3, 1e6)
    return Deployment(
        target=parse.one_of(
            given.get("target", settings.target), ["here", *TARGETS], "deployment.target", "target"
        ),
        queries=parse.whole(
            given.get("queries", settings.queries), "deployment.queries", FEWEST_QUERIES
        ),
        batch_sizes=tuple(sizes),
        threads=parse.whole(given.get("threads", settings.threads), "deployment.threads", 1),
        cpus=cpus,
        latency_ms=latency,
        prices=_prices(given.get("prices")),
    )


def _prices(value: object) -> Prices | None:
    if value is None:
        return None
    given = parse.mapping(value, "deployment.prices", PRICES)
    hour = parse.required(given, "per_hour", "deployment.prices")
    watts = given.get("watts")
    if watts is not None:
        watts = parse.number(watts, "deployment.prices.watts", 0.0, 1e6)
    return Prices(
        per_hour=parse.number(hour, "deployment.prices.per_hour", 0.0, 1e6),
        currency=parse.typed_value(
            str, given.get("currency", Prices.currency), "deployment.prices.currency"
        ),
        watts=watts,
        per_kwh=parse.number(given["per_kwh"], "deployment.prices.per_kwh", 0.0, 1e4)
        if "per_kwh" in given
        else Prices.per_kwh,
    )
