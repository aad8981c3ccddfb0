"""Review as a Prefect flow: it suspends until somebody fills in the form in the Prefect UI.

Deploy it as ``flows.review.review``, or serve it with ``halfstep review --serve``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.runtime import deployment

from audit.note import sweep_note
from audit.review import open_case
from audit.review import review as enter
from audit.signing import signer
from audit.store import Store
from flows.review_form import ReviewForm, said
from halfstep.errors import UserError

MOST_TRIES = 5
ONE_DAY = 24 * 3600


@flow(
    name="halfstep review",
    flow_run_name="review {sweep}",
    persist_result=False,
    validate_parameters=False,
)
def review(sweep: str, store: str = "mlruns", key: str | None = None) -> dict[str, Any]:
    """Asks for sign-off on one sweep's decision, and enters it. What breaks a rule is asked again,
    with the reason.

    Args:
        sweep: sweep id, its start, or its run.
        store: folder of the embedded store, where this flow runs.
        key: file of the reviewer's private key, where this flow runs.
    """
    where = Store(Path(store))
    case = open_case(where, sweep)
    note = sweep_note(case.result, case.signed_off)
    create_markdown_artifact(note, key="halfstep-review")
    refused = ""
    for number in range(1, MOST_TRIES + 1):
        form = _ask(f"review-{number}", f"{refused}{note}")
        try:
            with where.writing(f"review of {sweep}"):
                entry = enter(where, sweep, said(form), signer(Path(key) if key else None))
        except UserError as error:
            get_run_logger().warning("%s", error)
            refused = f"**Not entered: {error}**\n\n"
        else:
            return {"number": entry.number, "digest": entry.digest, "outcome": form.outcome}
    raise UserError(f"review: not entered after {MOST_TRIES} tries; {refused}")


def _ask(key: str, text: str) -> ReviewForm:
    """The form, filled in. A deployed run stops until then and is started again by its worker; any
    other waits."""
    form = ReviewForm.with_initial_data(description=text)
    if deployment.id:
        return suspend_flow_run(wait_for_input=form, key=key)
    return pause_flow_run(wait_for_input=form, key=key, timeout=ONE_DAY, poll_interval=1)


def serve_reviews(store: Store) -> None:
    """Serves the flow as deployment ``review`` until it is stopped."""
    review.serve(name="review", parameters={"store": str(store.path.absolute())})
