"""Coverage and certificates as the tables and summaries that are recorded."""

from __future__ import annotations

from halfstep.apply import Treatment
from halfstep.certificate import Certificate
from halfstep.coverage import covered
from halfstep.scheme import Scheme
from tasks.load import Loaded


def certificate_row(certificate: Certificate) -> dict[str, object]:
    row = certificate.to_json()
    return {**row, "notes": "; ".join(certificate.notes)}


def certificate_summary(certificates: tuple[Certificate, ...]) -> dict[str, object]:
    """Over all sites: does every bound hold, how close did it get, how much was clipped."""
    elements = sum(c.elements for c in certificates)
    return {
        "holds": all(c.holds for c in certificates),
        "sites": len(certificates),
        "elements": elements,
        "error_over_bound": max(c.error_over_bound for c in certificates),
        "clipped_share": sum(c.clipped for c in certificates) / elements,
        "clips_by_design": any(c.clips_by_design for c in certificates),
        "bound_in_gaps": max(c.bound_in_gaps for c in certificates),
        "of": sorted({c.of for c in certificates}),
        "worst_sqnr_db": min(
            (c.sqnr_db for c in certificates if c.sqnr_db is not None), default=None
        ),
    }


def coverage_rows(loaded: Loaded, scheme: Scheme) -> list[dict[str, object]]:
    """The ledger of places under one scheme, with their shares."""
    parameters = sum(p.parameters for p in loaded.places) or 1
    macs = sum(p.macs for p in loaded.places) or 1
    return [
        {
            "place": row.place.name,
            "kind": row.place.kind,
            "weights": row.weights,
            "activations": row.activations,
            "parameters": row.place.parameters,
            "parameter_share": row.place.parameters / parameters,
            "macs": row.place.macs,
            "mac_share": row.place.macs / macs,
            "quantized": row.quantized,
            "reason": row.reason,
        }
        for row in covered(loaded.places, scheme, loaded.sites, loaded.plan.skip)
    ]


def coverage_summary(loaded: Loaded, scheme: Scheme) -> dict[str, float]:
    """Shares of parameters stored, and of multiply-accumulates run, at low precision."""
    rows = covered(loaded.places, scheme, loaded.sites, loaded.plan.skip)
    parameters = sum(p.parameters for p in loaded.places) or 1
    macs = sum(p.macs for p in loaded.places) or 1
    stored = sum(r.place.parameters for r in rows if r.weights not in ("", "fp32"))
    return {
        "parameters": stored / parameters,
        "macs": sum(r.place.macs for r in rows if r.quantized) / macs,
    }


def correction_rows(treatment: Treatment) -> list[dict[str, object]]:
    """What corrections did to the output error of each weight, over the calibration data."""
    return [
        {
            "site": name,
            "relative_output_error_nearest": weight.output_error[0],
            "relative_output_error_corrected": weight.output_error[1],
        }
        for name, weight in treatment.weights.items()
        if weight.output_error is not None
    ]
