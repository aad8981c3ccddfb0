"""Subjects that lie in an MLflow store: registered models, and artifacts of runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from halfstep.errors import UserError
from halfstep.subject import Subject
from sources.context import Context, Pools
from sources.exported import read_program
from sources.huggingface import HuggingFace
from sources.model_factory import ModelFactory, fill


@dataclass(frozen=True)
class MlflowModel:
    """``uri``: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``models:/m-…`` or
    ``runs:/RUN/PATH``. What lies there may be

    - a model that MLflow's transformers flavour saved (say its ``architecture``),
    - one that its pytorch flavour saved as an exported program (``.pt2``, its default),
    - weights, as safetensors or a weights-only checkpoint (say the ``target`` that makes the
      model).

    Pickled modules are refused: loading one runs whatever code it holds.
    """

    uri: str
    architecture: str | None = None
    target: str | None = None
    arguments: dict[str, object] = field(default_factory=dict)
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if not self.uri.startswith(("models:/", "runs:/")):
            raise UserError(
                f"subject.uri: {self.uri!r} is not allowed: it starts with models:/ or runs:/"
            )

    def structure(self, pools: Pools, context: Context) -> nn.Module:
        return self.load(pools, context).model

    def load(self, pools: Pools, context: Context) -> Subject:
        """The model, fetched from the store; its digest is that of its weights."""
        with context.fetch(self.uri) as place:
            found = self._found(place, pools, context)
        return replace(found, origin={**found.origin, "source": "mlflow", "uri": self.uri})

    def _found(self, place: Path, pools: Pools, context: Context) -> Subject:
        if self.target is not None:
            model = ModelFactory(self.target, arguments=self.arguments).structure(pools, context)
            weights = _only(place, (".safetensors", ".pth", ".pt", ".bin"))
            if weights is None:
                raise UserError(f"{self.uri} holds no weights file for {self.target}")
            fill(model, weights, self.target)
            return Subject(model, {"target": self.target})
        flavors = _flavors(place)
        if "transformers" in flavors:
            if self.architecture is None:
                raise UserError(
                    f"{self.uri} holds a transformers model; say what it is used as: "
                    "architecture: sequence_classification (or another)"
                )
            folder = place / flavors["transformers"].get("model_binary", "model")
            return HuggingFace(str(folder), self.architecture, pooling=self.pooling).load(
                pools, context
            )
        program = _only(place, (".pt2",))
        if program is not None:
            return Subject(read_program(program), {})
        raise UserError(
            f"{self.uri} holds {', '.join(flavors) or 'no model'}, and nothing that loads without "
            "running code from it. Log it as an exported program (mlflow.pytorch.log_model with "
            "serialization_format='pt2' and an input_example), with the transformers flavour, or "
            "as safetensors with subject.target naming the function that makes the model"
        )


def _flavors(place: Path) -> dict[str, Any]:
    path = place / "MLmodel"
    if not path.is_file():
        return {}
    return dict((yaml.safe_load(path.read_text()) or {}).get("flavors") or {})


def _only(place: Path, endings: tuple[str, ...]) -> Path | None:
    """The file with the first of these endings that any file has."""
    if place.is_file():
        return place if place.suffix in endings else None
    for ending in endings:
        found = sorted(place.rglob(f"*{ending}"))
        if found:
            return found[0]
    return None
