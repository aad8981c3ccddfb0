"""A small real sweep, for tests of what happens to it afterwards."""

import yaml
from tests_config import TINY

from audit.issuer import NOBODY
from flows.conduct import conduct
from flows.config import read_plan


def small_config(folder, change=None):
    """Two cells, int8 and int2, int8 activations; changed as asked."""
    config = yaml.safe_load(yaml.safe_dump(TINY))
    config["matrix"] = {
        "weights": {"format": ["int8", "int2"], "granularity": "per_channel"},
        "activations": {"format": "int8"},
    }
    if change is not None:
        change(config)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def small_sweep(folder, store, change=None, *, fresh=False, issuer=NOBODY):
    """Runs it; returns its result."""
    path = small_config(folder, change)
    return conduct(read_plan(path), path.read_text(), store, fresh=fresh, issuer=issuer)
