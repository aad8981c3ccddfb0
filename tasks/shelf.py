"""The shelf of a store: corrected weights, kept from sweep to sweep, each with where it is from."""

from __future__ import annotations

from collections import Counter

from halfstep.digest import digest_json
from halfstep.weights import QuantizedWeight
from tasks.depot import Depot


class StoreShelf:
    """In the store's own depot. ``taken`` counts what came from which earlier sweep."""

    def __init__(self, depot: Depot, implementation: object, sweep_id: str) -> None:
        """``implementation``: what else moves bits, see `audit.protocol.implementation`."""
        self._depot = depot
        self._implementation = implementation
        self._sweep_id = sweep_id
        self.taken: Counter[str] = Counter()

    def get(self, key: str) -> QuantizedWeight | None:
        made = self._depot.made(self._name(key))
        if made is None:
            return None
        origin, weight = self._depot.unpack(made)
        if origin != self._sweep_id:
            self.taken[origin] += 1
        found: QuantizedWeight = weight
        return found

    def put(self, key: str, weight: QuantizedWeight) -> None:
        self._depot.keep_digest(self._name(key), self._depot.pack((self._sweep_id, weight)))

    def _name(self, key: str) -> str:
        return digest_json({"weight": key, "implementation": self._implementation})
