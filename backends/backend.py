"""What a backend is: from a treated model to an artefact, and from an artefact to outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from halfstep.apply import Treatment
from halfstep.batches import Batch
from halfstep.scheme import Scheme
from halfstep.sites import Sites


@dataclass(frozen=True, eq=False)
class Artefact:
    """What is deployed: files in the backend's own format."""

    files: Mapping[str, bytes]
    """By name. Equal inputs give equal bytes."""

    @property
    def digest(self) -> str:
        """SHA-256 of the files' names and bytes."""
        total = hashlib.sha256()
        for name in sorted(self.files):
            total.update(f"{name}\0{hashlib.sha256(self.files[name]).hexdigest()}\n".encode())
        return total.hexdigest()

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(map(len, self.files.values()))

    @classmethod
    def read(cls, folder: Path, names: Sequence[str]) -> Artefact:
        """From the files of a folder."""
        return cls({name: (folder / name).read_bytes() for name in names})


@dataclass(frozen=True)
class NodeRun:
    """One kernel that ran, as the backend's own profile tells it."""

    name: str
    kind: str
    """The backend's word for the operation."""
    precision: str
    """Of its arithmetic: ``int8``, or ``fp32``; ``other`` for what only moves or converts."""
    microseconds: float

    def to_json(self) -> dict[str, object]:
        return {
            "node": self.name,
            "kind": self.kind,
            "precision": self.precision,
            "microseconds": round(self.microseconds, 3),
        }


class Deployed(nn.Module):
    """An artefact, opened. It is called as the model was."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        raise NotImplementedError

    def nodes(self, batch: Batch) -> list[NodeRun]:
        """What ran for a batch, by the backend's profile."""
        raise NotImplementedError

    def codes(self, batch: Batch) -> dict[str, Tensor]:
        """The codes (uint8) that entered each quantized site, where the backend shows them."""
        return {}


class Backend(Protocol):
    """One way to run a scheme for real."""

    name: ClassVar[str]
    full_precision: ClassVar[str]
    """Why a product of codes may run at full precision all the same."""

    def version(self) -> str:
        """Of the package that runs it."""
        ...

    def refuses(self, scheme: Scheme, sites: Sites) -> str:
        """Why it cannot run a scheme on a model with these sites; empty where it can."""
        ...

    def build(
        self, model: nn.Module, sites: Sites, scheme: Scheme, treatment: Treatment, example: Batch
    ) -> Artefact:
        """The artefact of a model under a treatment.

        Raises:
            ValueError: the model holds something that the format cannot express.
        """
        ...

    def open(self, artefact: Artefact, model: nn.Module, threads: int) -> Deployed:
        """Loads an artefact. ``model`` gives the structure where the format holds none."""
        ...
