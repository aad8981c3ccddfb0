"""Coverage and certificates as the tables and summaries that are recorded."""

from __future__ import annotations

from halfstep.certificate import Certificate
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
            "place": p.name,
            "kind": p.kind,
            "weights": str(scheme.weights or "fp32") if p.quantized else "fp32",
            "activations": str(scheme.activations or "fp32") if p.quantized else "fp32",
            "parameters": p.parameters,
            "parameter_share": p.parameters / parameters,
            "macs": p.macs,
            "mac_share": p.macs / macs,
            "quantized": p.quantized,
            "reason": p.reason,
        }
        for p in loaded.places
    ]


def coverage_summary(loaded: Loaded, scheme: Scheme) -> dict[str, float]:
    """Shares of parameters stored, and of multiply-accumulates run, at low precision."""
    parameters = sum(p.parameters for p in loaded.places) or 1
    macs = sum(p.macs for p in loaded.places) or 1
    covered = sum(site.weight(loaded.model).numel() for site in loaded.sites)
    return {
        "parameters": covered / parameters if scheme.weights else 0.0,
        "macs": sum(p.macs for p in loaded.places if p.quantized) / macs,
    }
