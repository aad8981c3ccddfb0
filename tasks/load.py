"""Load: subject, splits, folding, sites and coverage, all checked before anything is written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from audit.protocol import implementation, key, protocol
from audit.registry import fetch
from audit.store import Store
from backends import backend
from halfstep.batches import first
from halfstep.coverage import Place, places
from halfstep.digest import digest_json
from halfstep.errors import UserError, allowed, first_line
from halfstep.examples import Examples, Inputs
from halfstep.fold import Folding, fold_batch_norm
from halfstep.operators import SUM
from halfstep.scheme import Scheme
from halfstep.sites import Sites, discover, matches
from halfstep.subject import Subject, check_weights
from sources import Context
from tasks.choices import check_budgets
from tasks.data import Data, TaskData, read_data
from tasks.plan import Compute, Plan, Task

CACHE = "cache"


@dataclass(frozen=True, eq=False)
class Loaded:
    """Everything the later steps work on."""

    plan: Plan
    subject: Subject
    folding: Folding
    sites: Sites
    places: tuple[Place, ...]
    data: Data
    protocol: Mapping[str, object]
    protocol_digest: str
    task_protocols: Mapping[str, str]
    """Digest of what must be equal before two results on one task may be compared."""
    implementation: Mapping[str, object]
    training_seconds: float

    @property
    def model(self) -> nn.Module:
        """The folded copy that is quantized."""
        return self.folding.model

    @property
    def calibration(self) -> Inputs:
        return self.data.calibration

    def task(self, name: str) -> Task:
        return self.data.tasks[name].task

    def split(self, task: str, name: str) -> Examples:
        return self.data.tasks[task].splits[name]

    def key(self, task: str | None = None, **parts: object) -> str:
        """Digest of a piece of work on this subject by this code, under the protocol of one task,
        or of the whole sweep."""
        return key(
            subject=self.subject.digest,
            protocol=self.protocol_digest if task is None else self.task_protocols[task],
            implementation=self.implementation,
            **parts,
        )

    @property
    def sweep_key(self) -> str:
        return self.key(
            kind="sweep",
            # Under another name it is recorded in another experiment, by itself.
            name=self.plan.name,
            schemes=[scheme.to_json() for scheme in self.plan.schemes],
            mixed=self.plan.mixed.to_json() if self.plan.mixed else None,
            sensitivity=self.plan.sensitivity,
            objective=self.plan.objective,
            deployment=self.plan.deployment.to_json() if self.plan.deployment else None,
        )

    @property
    def notes(self) -> list[str]:
        """What a reader must know of subject and data."""
        return [*self.subject.notes, *self.data.notes]


def load(plan: Plan, store: Store, registry: Store | None = None) -> Loaded:
    """Loads data and subject and prepares what every cell shares.

    Args:
        store: where trained subjects and prepared data are kept.
        registry: the tracking store that ``models:/`` and ``runs:/`` name; the same by default.

    Raises:
        UserError: the data or the model cannot be used; nothing has been recorded then.
    """
    set_up(plan.compute)
    context = Context(store.path / CACHE, lambda address: fetch(registry or store, address))
    data = read_data(plan, context)
    before = time.perf_counter()
    subject = plan.subject.load(data.pools, context)
    training_seconds = time.perf_counter() - before
    check_weights(subject.model)
    rehearse(plan, subject.model, data)
    calibration = (digest_json(data.calibration.digests.astype(str).tolist()),
                   len(data.calibration))  # fmt: skip
    rules = {
        name: protocol(
            name,
            found.task.evaluated_by.to_json("name"),
            {n: (e.digest, len(e)) for n, e in found.splits.items() if n != "calibration"},
            calibration,
            [criterion.to_json() for criterion in found.task.criteria],
            {
                "cluster": found.task.cluster,
                "max_unscored": found.task.max_unscored,
                "stops_early": plan.stops_early(found.task),
            },
            {"threads": plan.compute.threads, "batch_size": plan.compute.batch_size},
        )
        for name, found in data.tasks.items()
    }
    folding, sites, places = prepare(plan, subject.model, data.calibration)
    whole = next(iter(rules.values())) if len(rules) == 1 else {"tasks": list(rules.values())}
    return Loaded(
        plan=plan,
        subject=subject,
        folding=folding,
        sites=sites,
        places=places,
        data=data,
        protocol=whole,
        protocol_digest=digest_json(whole),
        task_protocols={name: digest_json(rule) for name, rule in rules.items()},
        implementation=implementation(plan.plugins),
        training_seconds=training_seconds,
    )


def set_up(compute: Compute) -> None:
    """Torch's settings for every forward pass of a sweep."""
    torch.set_num_threads(compute.threads)
    # The reference and every cell shall run the same operators: torch's fused path for transformer
    # layers switches itself off where a forward pass is looked into.
    torch.backends.mha.set_fastpath_enabled(False)


def rehearse(plan: Plan, model: nn.Module, data: Data) -> None:
    """Runs the few examples of each task that would fail if any does.

    Raises:
        UserError: the model cannot take the inputs, or answers in another shape than the evaluator
            needs.
    """
    for name, found in data.tasks.items():
        where = "" if len(plan.tasks) == 1 else f"tasks.{name}: "
        for split, examples in found.splits.items():
            if split != "calibration":
                _check_tokens(where, split, model, examples.inputs)
                try:
                    _run_few(found, model, examples)
                except UserError as error:
                    raise UserError(f"{where}{error}") from error


def _run_few(found: TaskData, model: nn.Module, examples: Examples) -> None:
    evaluator = found.task.evaluator
    few = evaluator.rehearsal(examples)
    try:
        evaluator.run(model, few, batch_size=2)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise UserError(
            f"the subject cannot take the data's inputs ({examples.inputs.described()}): "
            f"{first_line(error)}. "
            "Check that the data's shapes, columns and tokenizer are those that the model was made "
            "for"
        ) from error


def _check_tokens(where: str, split: str, model: nn.Module, inputs: Inputs) -> None:
    """Raises UserError where a token has no embedding: the tokenizer is another model's."""
    get = getattr(getattr(model, "encoder", model), "get_input_embeddings", None)
    column = inputs.columns.get("input_ids")
    if get is None or column is None:
        return
    table = get()
    known = getattr(table, "num_embeddings", None)
    if known is None:
        return
    largest = max(int(column.row(i).max()) for i in range(len(column)))
    if largest >= known:
        raise UserError(
            f"{where}split {split!r} holds token {largest}, the model knows tokens 0 to "
            f"{known - 1}: the tokenizer does not fit the model"
        )


def prepare(
    plan: Plan, model: nn.Module, calibration: Inputs
) -> tuple[Folding, Sites, tuple[Place, ...]]:
    """Folds batch norm and finds the sites; needs the model's structure, not its training."""
    batch = calibration.sample(plan.compute.batch_size)
    try:
        folding = fold_batch_norm(model, batch)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UserError(
            f"the subject cannot take the calibration data ({calibration.described()}): "
            f"{first_line(error)}"
        ) from error
    sums = any(scheme.sums is not None for scheme in plan.treated)
    sites = discover(folding.model, first(batch, 1), sums=sums)
    if sums and not any(site.kind == SUM for site in sites.activations):
        raise UserError("matrix.sums: the model adds no two activations of one shape")
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
    for scheme in plan.treated:
        quantized = [scheme.weight_spec(w, sites) for w in sites.weights]
        quantized += [scheme.activation_spec(a, sites) for a in sites.activations]
        if not any(quantized):
            raise UserError(
                f"no site is left to quantize under {scheme.name!r}: every one is skipped, "
                "overridden or of the other side"
            )
    check_backends(sites, plan.schemes)
    if plan.mixed is not None:
        check_budgets(folding.model, sites, plan.mixed)
    return folding, sites, places(folding.model, sites, folding.folded)


def check_backends(sites: Sites, schemes: Sequence[Scheme]) -> None:
    """Raises UserError where a backend is not installed, or cannot run a scheme."""
    for scheme in schemes:
        if not scheme.deployed:
            continue
        reason = backend(scheme.backend).refuses(scheme, sites)
        if reason:
            raise UserError(
                f"matrix.backend: {scheme.backend} cannot run {scheme.simulation.name!r}: "
                f"{reason}. Exclude it with matrix.exclude, or leave the site out with sites.skip"
            )


def _check_pattern(where: str, pattern: str, sites: Sites) -> None:
    if not any(matches(name, pattern) for name in sites.names):
        raise UserError(f"{where}: {pattern!r} matches no site; {allowed(pattern, sites.names)}")
