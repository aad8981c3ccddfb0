"""Subjects from programs that ``torch.export`` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from halfstep.errors import UserError, first_line
from halfstep.subject import Subject
from sources.context import Context, Pools


@dataclass(frozen=True)
class Exported:
    """``path``: a ``.pt2`` file, exported in evaluation mode with a batch axis that may vary."""

    path: str

    def structure(self, pools: Pools, context: Context) -> nn.Module:
        return self.load(pools, context).model

    def load(self, pools: Pools, context: Context) -> Subject:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"exported program {self.path} does not exist")
        return Subject(read_program(path), {"source": "exported", "path": self.path})


def read_program(path: Path) -> nn.Module:
    """The module of an exported program.

    Raises:
        UserError: the file holds none, or its batch size is fixed.
    """
    try:
        program = torch.export.load(path)
    except Exception as error:  # zip, JSON, schema and pickle errors, each of its own type
        raise UserError(
            f"{path} cannot be read as an exported program ({first_line(error)})"
        ) from error
    if not program.range_constraints:
        raise UserError(
            f"{path} was exported for one batch size; export it with a batch axis that varies: "
            "torch.export.export(model, example, dynamic_shapes=[{0: torch.export.Dim.AUTO}])"
        )
    module = program.module()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module
