"""Identity: is this the very tensor that was seen before, unchanged?"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Identity:
    """A tensor as it stood. One that was freed, or changed in place since, is another one.

    Tensors made in inference mode have no version counter, and cannot be known again.
    """

    tensor: weakref.ref[Tensor]
    version: int

    @staticmethod
    def of(x: Tensor) -> Identity:
        return Identity(weakref.ref(x), x._version)

    def still(self, x: Tensor) -> bool:
        """True where ``x`` is that tensor, unchanged."""
        return self.tensor() is x and self.version == x._version
