"""Load: subject, splits, folding, sites and coverage, all checked before anything is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from audit.protocol import implementation, key, protocol
from evaluators import EVALUATORS
from halfstep.coverage import Place, places
from halfstep.digest import digest_json
from halfstep.errors import UserError, allowed
from halfstep.fold import Folding, fold_batch_norm
from halfstep.sites import Sites, discover, matches
from halfstep.subject import Examples, Subject, check_weights
from tasks.plan import Compute, Plan, SplitSpec

CACHE = "cache"


@dataclass(frozen=True, eq=False)
class Loaded:
    """Everything the later steps work on."""

    plan: Plan
    subject: Subject
    folding: Folding
    sites: Sites
    places: tuple[Place, ...]
    splits: Mapping[str, Examples]
    protocol: dict[str, object]
    protocol_digest: str
    implementation: dict[str, str]
    training_seconds: float

    @property
    def model(self) -> nn.Module:
        """The folded copy that is quantized."""
        return self.folding.model

    def key(self, **parts: object) -> str:
        """Digest of a piece of work on this subject under this protocol by this code."""
        return key(
            subject=self.subject.digest,
            protocol=self.protocol_digest,
            implementation=self.implementation,
            **parts,
        )

    @property
    def sweep_key(self) -> str:
        return self.key(
            kind="sweep",
            schemes=[scheme.to_json() for scheme in self.plan.schemes],
            objective=self.plan.objective,
        )


def load(plan: Plan, store: Path) -> Loaded:
    """Loads data and subject and prepares what every cell shares.

    Raises:
        UserError: the data or the model cannot be used; nothing has been written then.
    """
    set_up(plan.compute)
    pools, splits = read_data(plan)
    before = time.perf_counter()
    subject = plan.subject.load(pools, store / CACHE / "subjects")
    training_seconds = time.perf_counter() - before
    check_weights(subject.model)
    rules = protocol(
        plan.task.name,
        plan.task.evaluator,
        {name: (examples.digest, len(examples)) for name, examples in splits.items()},
        [criterion.to_json() for criterion in plan.task.criteria],
        {"threads": plan.compute.threads, "batch_size": plan.compute.batch_size},
    )
    folding, sites, places = prepare(plan, subject.model, splits["calibration"])
    return Loaded(
        plan=plan,
        subject=subject,
        folding=folding,
        sites=sites,
        places=places,
        splits=splits,
        protocol=rules,
        protocol_digest=digest_json(rules),
        implementation=implementation(),
        training_seconds=training_seconds,
    )


def set_up(compute: Compute) -> None:
    """Torch's settings for every forward pass of a sweep."""
    torch.set_num_threads(compute.threads)
    # The reference and every cell shall run the same operators: torch's fused path for transformer
    # layers switches itself off where a forward pass is looked into.
    torch.backends.mha.set_fastpath_enabled(False)


def read_data(plan: Plan) -> tuple[Mapping[str, Examples], dict[str, Examples]]:
    """The data's pools and the task's splits, both checked."""
    pools = plan.task.data.load()
    for name, examples in pools.items():
        EVALUATORS[plan.task.evaluator].check(f"pool {name!r}", examples)
    splits = {name: take(name, spec, pools) for name, spec in plan.task.splits().items()}
    check_disjoint(splits)
    return pools, splits


def prepare(
    plan: Plan, model: nn.Module, calibration: Examples
) -> tuple[Folding, Sites, tuple[Place, ...]]:
    """Folds batch norm and finds the sites; needs the model's structure, not its training."""
    folding = fold_batch_norm(model, calibration.inputs[: plan.compute.batch_size])
    sites = discover(folding.model, calibration.inputs[:1])
    for pattern in plan.skip:
        _check_pattern("sites.skip", pattern, sites)
    for i, override in enumerate(plan.overrides):
        for pattern in override.names:
            _check_pattern(f"sites.overrides[{i}].names", pattern, sites)
        kinds = sorted({site.kind for site in (*sites.weights, *sites.activations)})
        for kind in override.kinds:
            if kind not in kinds:
                raise UserError(
                    f"sites.overrides[{i}].kinds: no site is of kind {kind!r}; "
                    f"{allowed(kind, kinds)}"
                )
    if not sites.names:
        raise UserError("no site to quantize: the model multiplies nothing that halfstep knows")
    for scheme in plan.schemes:
        quantized = [scheme.weight_spec(w, sites) for w in sites.weights]
        quantized += [scheme.activation_spec(a, sites) for a in sites.activations]
        if not any(quantized):
            raise UserError(
                f"no site is left to quantize under {scheme.name!r}: every one is skipped, "
                "overridden or of the other side"
            )
    return folding, sites, places(folding.model, sites, folding.folded)


def _check_pattern(where: str, pattern: str, sites: Sites) -> None:
    if not any(matches(name, pattern) for name in sites.names):
        raise UserError(f"{where}: {pattern!r} matches no site; {allowed(pattern, sites.names)}")


def take(name: str, spec: SplitSpec, pools: Mapping[str, Examples]) -> Examples:
    """The examples of one split."""
    if spec.pool not in pools:
        raise UserError(f"splits.{name}.from: no pool {spec.pool!r}; {allowed(spec.pool, pools)}")
    pool = pools[spec.pool]
    if spec.targets is not None:
        wanted = torch.isin(pool.targets, torch.tensor(spec.targets))
        if not bool(wanted.any()):
            raise UserError(
                f"splits.{name}.targets: no example of pool {spec.pool!r} has one of "
                f"{list(spec.targets)}"
            )
        pool = pool.take(wanted.nonzero().flatten())
    if spec.samples is None:
        return pool
    if spec.samples > len(pool):
        raise UserError(
            f"splits.{name}.samples: {spec.samples} asked for, but pool {spec.pool!r} holds "
            f"{len(pool)}" + (" with these targets" if spec.targets is not None else "")
        )
    generator = torch.Generator().manual_seed(spec.seed)
    chosen = torch.randperm(len(pool), generator=generator)[: spec.samples]
    return pool.take(chosen.sort().values)


def check_disjoint(splits: Mapping[str, Examples]) -> None:
    """Raises UserError where two splits share an example, found by content, not by index."""
    names = list(splits)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = set(splits[one].row_digests) & set(splits[other].row_digests)
            if shared:
                row = next(i for i, d in enumerate(splits[other].row_digests) if d in shared)
                raise UserError(
                    f"splits {one!r} and {other!r} share {len(shared)} example(s) with equal "
                    f"content (the first is row {row} of {other!r}); a verdict needs disjoint "
                    "splits: take them from different pools"
                )
