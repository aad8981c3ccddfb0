"""Subjects from a Python function, with weights from safetensors or a weights-only checkpoint."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from halfstep.errors import UserError
from halfstep.subject import Subject
from sources.context import Context, Pools
from sources.targets import resolve


@dataclass(frozen=True)
class ModelFactory:
    """``target`` names ``module:function``, which returns an ``nn.Module``."""

    target: str
    weights: str | None = None
    """A .safetensors file, or a checkpoint that torch loads with ``weights_only=True``."""
    arguments: dict[str, object] = field(default_factory=dict)

    def structure(self, pools: Pools, context: Context) -> nn.Module:
        """The model as the factory makes it, without the weights file."""
        model = resolve(self.target)(**self.arguments)
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model factory {self.target!r} returned {type(model).__name__}, not a torch module"
            )
        return model.float().eval()

    def load(self, pools: Pools, context: Context) -> Subject:
        """The model with its weights; nothing in the weights file is ever executed."""
        model = self.structure(pools, context)
        if self.weights is not None:
            fill(model, Path(self.weights).expanduser(), self.target)
        return Subject(model, {"source": "factory", "target": self.target, "weights": self.weights})


def fill(model: nn.Module, weights: Path, target: str) -> None:
    """Loads a weights file into the model that ``target`` made.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    try:
        model.load_state_dict(read_weights(weights))
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{weights} does not fit {target}: {detail}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads weights without ever running code from the file.

    Raises:
        UserError: the file is missing, damaged, or a pickle that needs more than tensors.
    """
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a valid safetensors file ({error})") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old pickles; ours is the clearer word
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused: it is a pickle that holds more than tensors and could run code. "
            "Save the state dict as safetensors instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as weights ({error})") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds {type(loaded).__name__}, not a state dict")
    return loaded
