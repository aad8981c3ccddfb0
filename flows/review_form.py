"""The form of a review in the Prefect UI."""

from __future__ import annotations

from datetime import date
from typing import Literal

from prefect.input import RunInput
from pydantic import Field

from audit.review import Review, read_waivers


class ReviewForm(RunInput):
    """What a reviewer fills in."""

    outcome: Literal["approve", "approve with conditions", "refuse"]
    name: str = Field(description="Who you are. The declared author cannot approve.")
    role: str = Field(description="As what you decide.")
    comment: str = Field(description="Why.")
    conditions: list[str] = Field(default_factory=list, description="Under which it may be used.")
    waivers: list[str] = Field(
        default_factory=list,
        description="'METRIC: REASON' for each criterion that did not pass; 'expiry: REASON'.",
    )
    until: date | None = Field(default=None, description="Last day; by default the decision's.")


def said(form: ReviewForm) -> Review:
    """The form as a review."""
    return Review(
        form.outcome,
        form.name,
        form.role,
        form.comment,
        tuple(form.conditions),
        read_waivers(form.waivers),
        form.until,
    )
