"""What every correction shares: how its parameters are written."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar


class Parameters:
    """Base of the corrections, which are frozen dataclasses of numbers."""

    name: ClassVar[str]
    stage: ClassVar[str]

    def check(self) -> None:
        """Raises ValueError where a parameter is out of range."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    def __str__(self) -> str:
        """As configs write it; parameters at their defaults are not mentioned."""
        default = type(self)()
        told = [
            f"{key}={value:g}"
            for key, value in vars(self).items()
            if value != getattr(default, key)
        ]
        return f"{self.name}({', '.join(told)})" if told else self.name
