"""Corrections: algorithms that change weights or scales to lower the output error at the same
format.

They come in four stages, applied in this order:

- *rewrite*: another model with the same outputs at full precision (`cle`, `smoothquant`);
- *scale*: columns of a weight scaled before rounding, and back after it (`awq`);
- *rounding*: which grid point each weight goes to (`gptq`, `adaround`);
- *bias*: what rounding shifts on average, taken out of the bias (`bias_correction`).
"""

from __future__ import annotations

import re
from dataclasses import fields

from halfstep.corrections.adaround import AdaRound
from halfstep.corrections.awq import Awq
from halfstep.corrections.bias import BiasCorrection
from halfstep.corrections.cle import CrossLayerEqualization
from halfstep.corrections.gptq import Gptq
from halfstep.corrections.smoothquant import SmoothQuant
from halfstep.errors import UserError, allowed

Correction = CrossLayerEqualization | SmoothQuant | Awq | Gptq | AdaRound | BiasCorrection

CORRECTIONS: dict[str, type[Correction]] = {
    "cle": CrossLayerEqualization,
    "smoothquant": SmoothQuant,
    "awq": Awq,
    "gptq": Gptq,
    "adaround": AdaRound,
    "bias_correction": BiasCorrection,
}
"""Every correction by the name that configs use."""

__all__ = [
    "CORRECTIONS", "STAGES", "AdaRound", "Awq", "BiasCorrection", "Correction",
    "CrossLayerEqualization", "Gptq", "SmoothQuant", "parse_corrections",
]  # fmt: skip

STAGES = ("rewrite", "scale", "rounding", "bias")


def parse_corrections(text: str) -> tuple[Correction, ...]:
    """Reads ``none``, ``gptq`` or ``smoothquant(alpha=0.7) + gptq``.

    Raises:
        UserError: an unknown name or parameter, or an order that makes no sense.
    """
    if text.strip() == "none":
        return ()
    found = tuple(_parse_one(part.strip()) for part in text.split("+"))
    stages = [STAGES.index(correction.stage) for correction in found]
    if stages != sorted(stages):
        order = " before ".join(STAGES)
        raise UserError(f"corrections {text!r}: they are applied in order, and {order}")
    for stage in ("scale", "rounding", "bias"):
        if sum(correction.stage == stage for correction in found) > 1:
            raise UserError(f"corrections {text!r}: only one of stage {stage!r} can be applied")
    return found


def _parse_one(text: str) -> Correction:
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    name = match[1] if match else text
    if match is None or name not in CORRECTIONS:
        raise UserError(f"unknown correction {text!r}; {allowed(name, [*CORRECTIONS, 'none'])}")
    cls = CORRECTIONS[name]
    known = {f.name: f for f in fields(cls)}
    given: dict[str, float | int] = {}
    for part in filter(None, (match[2] or "").split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise UserError(
                f"correction {text!r}: unknown parameter {key!r}; {allowed(key, known)}"
            )
        kind = int if known[key].type == "int" else float
        try:
            given[key] = kind(value)
        except ValueError:
            raise UserError(f"correction {text!r}: {key} is not a number: {value!r}") from None
    made = cls(**given)  # type: ignore[arg-type]
    try:
        made.check()
    except ValueError as error:
        raise UserError(f"correction {text!r}: {error}") from None
    return made
