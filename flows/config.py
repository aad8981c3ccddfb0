"""A config file, parsed once into a `Plan`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluators import EVALUATORS
from evaluators.contrast import ALONE
from evaluators.criterion import (
    FEWEST_IN_A_SLICE,
    FOR_HIGHER,
    FOR_LOWER,
    FOR_RESOURCES,
    KINDS,
    LIMITS,
    MEASURED,
    PRESETS,
    RESOURCES,
    Criterion,
)
from flows import parse
from flows.deployment import read_deployment
from flows.matrix import read_overrides, schemes
from flows.stages import read_mixed, read_sensitivity
from halfstep.errors import UserError, allowed
from halfstep.formats import FORMATS
from halfstep.scheme import Scheme, Spec, skipping
from sources import DATASETS, SUBJECTS
from sources.tabular import Tabular
from sources.transforms import Language
from tasks.plan import EVALUATIONS, SPLITS, Compute, Named, Plan, SplitSpec, Task

KEYS = ("name", "subject", "tasks", "matrix", "sites", "objective", "evaluation", "sensitivity",
        "mixed_precision", "deployment", "decision", "compute")  # fmt: skip
FEWEST_CALIBRATION_SAMPLES = 16
"""Below this a range says more about the luck of the draw than about the data."""
TASK_NAME = re.compile(r"[\w .-]+", re.ASCII)


def read_plan(path: Path) -> Plan:
    """Reads and checks a config; touches no data and no model.

    Raises:
        UserError: names the key, the value, what is allowed and the nearest match.
    """
    config = parse.mapping(parse.read_yaml(path), f"config {path}", KEYS)
    name = parse.typed_value(str, config.get("name", path.stem), "name")
    if not name or "/" in name or ":" in name:
        raise UserError(
            f"name: {name!r} is not allowed: it names an MLflow experiment and model, "
            "so it is not empty and holds no '/' or ':'"
        )
    sites = parse.mapping(config.get("sites", {}), "sites", ["skip", "overrides"])
    skip = tuple(parse.typed_value(list[str], sites.get("skip", []), "sites.skip"))
    overrides = read_overrides(sites.get("overrides", []))
    matrix = parse.required(config, "matrix", f"config {path}")
    kept, duplicates = schemes(matrix, (*overrides, *skipping(skip)))
    objective = config.get("objective", "weight_bytes")
    compute = parse.build(Compute, config.get("compute", {}), "compute")
    for key in ("threads", "batch_size"):
        parse.whole(getattr(compute, key), f"compute.{key}", 1)
    subject = _source(SUBJECTS, parse.required(config, "subject", f"config {path}"), "subject")
    tasks = _tasks(parse.required(config, "tasks", f"config {path}"), subject)
    mixed = read_mixed(
        config.get("mixed_precision"), tasks[0].evaluated_by, (*overrides, *skipping(skip))
    )
    deployment = read_deployment(config.get("deployment"), kept)
    _check_measured(tasks, objective, deployment is not None)
    return Plan(
        name=name,
        taken_from=subject,
        tasks=tasks,
        schemes=kept,
        folded_duplicates=duplicates,
        skip=skip,
        overrides=overrides,
        objective=parse.one_of(objective, RESOURCES, "objective", "resource"),
        compute=compute,
        evaluation=parse.one_of(
            config.get("evaluation", "full"), EVALUATIONS, "evaluation", "way to evaluate"
        ),
        mixed=mixed,
        expires_after_days=_expiry(config.get("decision", {})),
        sensitivity=read_sensitivity(config.get("sensitivity")),
        plugins=_plugins(subject, tasks, (*kept, *(mixed.uniform if mixed else ()))),
        deployment=deployment,
    )


def _check_measured(tasks: Sequence[Task], objective: object, deployed: bool) -> None:
    """Raises UserError where something measured is asked for, and nothing is deployed."""
    asked = [
        (f"tasks[{i}].criteria[{j}].metric", rule.metric)
        for i, task in enumerate(tasks)
        for j, rule in enumerate(task.criteria)
        if rule.measured
    ]
    asked += [("objective", str(objective))] if objective in MEASURED else []
    if asked and not deployed:
        where, name = asked[0]
        raise UserError(
            f"{where}: {name} is measured on deployed cells, and no cell names a backend; give "
            "matrix.backend, such as [onnxruntime]"
        )


def _expiry(value: object) -> int:
    given = parse.mapping(value, "decision", ["expires_after_days"])
    days = given.get("expires_after_days", Plan.expires_after_days)
    return parse.whole(days, "decision.expires_after_days", 1)


def _source(kinds: Mapping[str, Any], value: object, where: str) -> Named:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a mapping with a source, got {value!r}")
    source = parse.one_of(parse.required(value, "source", where), kinds, where, "source")
    settings = {k: v for k, v in value.items() if k != "source"}
    return Named(source, parse.build(kinds[source], settings, where))


def _tasks(value: object, subject: Named) -> tuple[Task, ...]:
    if not isinstance(value, list) or not value:
        raise UserError("tasks: a list of at least one task is needed")
    tasks = tuple(_task(task, f"tasks[{i}]", subject) for i, task in enumerate(value))
    for i, task in enumerate(tasks):
        if task.name in [other.name for other in tasks[:i]]:
            raise UserError(f"tasks[{i}].name: {task.name!r} stands twice")
    if not any(task.calibration for task in tasks):
        raise UserError("tasks[0].splits: key 'calibration' is missing")
    return tasks


def _task(value: object, where: str, subject: Named) -> Task:
    keys = ("name", "evaluator", "data", "splits", "criteria", "cluster", "max_unscored")
    task = parse.mapping(value, where, keys)
    name = parse.typed_value(str, parse.required(task, "name", where), f"{where}.name")
    if not TASK_NAME.fullmatch(name):
        raise UserError(
            f"{where}.name: {name!r} is not allowed: it names MLflow params and tags, so it is of "
            "letters, digits, spaces and the signs _ - ."
        )
    evaluator = read_evaluator(parse.required(task, "evaluator", where), f"{where}.evaluator")
    rules = parse.required(task, "criteria", where)
    if not isinstance(rules, list) or not rules:
        raise UserError(
            f"{where}.criteria: a list of at least one criterion is needed: a verdict "
            "without a declared criterion is an opinion"
        )
    criteria = tuple(
        _criterion(rule, f"{where}.criteria[{i}]", evaluator) for i, rule in enumerate(rules)
    )
    for i, criterion in enumerate(criteria):
        if criterion.label in [other.label for other in criteria[:i]]:
            raise UserError(f"{where}.criteria[{i}]: {criterion.label} is limited twice")
    cluster = task.get("cluster")
    if cluster is not None:
        parse.typed_value(str, cluster, f"{where}.cluster")
    unscored = task.get("max_unscored", 0.0)
    if unscored != 0:
        unscored = parse.number(unscored, f"{where}.max_unscored", 0.0, 1.0)
    data = _source(DATASETS, parse.required(task, "data", where), f"{where}.data")
    data, cluster = _fitted(data, subject, criteria, cluster)
    splits = parse.mapping(parse.required(task, "splits", where), f"{where}.splits", SPLITS)
    given = {name: _split(name, splits[name], where) for name in SPLITS if name in splits}
    for split in ("selection", "confirmation"):
        parse.required(splits, split, f"{where}.splits")
        for i, criterion in enumerate(criteria):
            if criterion.preset and given[split].samples is not None:
                raise UserError(
                    f"{where}.criteria[{i}].preset: {criterion.preset} demands full sets, but "
                    f"splits.{split} takes {given[split].samples} samples"
                )
    return Task(
        name=name,
        evaluated_by=evaluator,
        taken_from=data,
        calibration=given.get("calibration"),
        selection=given["selection"],
        confirmation=given["confirmation"],
        criteria=criteria,
        cluster=cluster,
        max_unscored=float(unscored),
    )


def read_evaluator(value: object, where: str) -> Named:
    """A name, or a mapping of a name with options."""
    settings: Mapping[str, Any] = {"name": value} if isinstance(value, str) else {}
    if isinstance(value, Mapping):
        settings = value
    elif not settings:
        raise UserError(f"{where}: expected a name or a mapping with a name, got {value!r}")
    name = parse.one_of(parse.required(settings, "name", where), EVALUATORS, where, "evaluator")
    options = {k: v for k, v in settings.items() if k != "name"}
    return Named(name, parse.build(EVALUATORS[name], options, where))


def _fitted(
    data: Named, subject: Named, criteria: Sequence[Criterion], cluster: str | None
) -> tuple[Named, str | None]:
    """The data with the subject's own tokenizer where none is named, and with the columns kept
    that clusters and slices go by; and the cluster, which for documents goes without saying."""
    source = data.value
    if not isinstance(source, Tabular):
        return data, cluster
    source = source.for_subject(getattr(subject.value, "processor", None))
    wanted = [c.slice for c in criteria if c.slice is not None]
    if cluster is not None:
        wanted.append(cluster)
    elif source.language is not None:
        cluster = Language.CLUSTER
    source = source.keeping([name for name in wanted if name not in source.made])
    return Named(data.name, source), cluster


def _split(name: str, value: object, task: str) -> SplitSpec:
    where = f"{task}.splits.{name}"
    split = parse.mapping(value, where, ["from", "samples", "seed", "targets"])
    samples = split.get("samples")
    if samples is not None:
        fewest = FEWEST_CALIBRATION_SAMPLES if name == "calibration" else 1
        parse.whole(samples, f"{where}.samples", fewest)
    targets = split.get("targets")
    if targets is not None:
        targets = tuple(parse.typed_value(list[int], targets, f"{where}.targets"))
    return SplitSpec(
        pool=parse.typed_value(str, parse.required(split, "from", where), f"{where}.from"),
        samples=samples,
        seed=parse.whole(split.get("seed", 0), f"{where}.seed", 0),
        targets=targets,
    )


def _criterion(value: object, where: str, evaluator: Named) -> Criterion:
    keys = ["metric", "confidence", "slice", "min_examples", "preset", *LIMITS]
    rule = dict(parse.mapping(value, where, keys))
    metrics = evaluator.value.metrics
    if "preset" in rule:
        rule = _from_preset(rule, where, evaluator)
    tested = [name for name, metric in metrics.items() if metric.test is not None]
    name = parse.required(rule, "metric", where)
    if name in metrics and name not in tested:
        raise UserError(
            f"{where}.metric: {name} is reported, not tested; "
            f"{allowed(name, [*tested, *RESOURCES])}"
        )
    parse.one_of(name, [*tested, *RESOURCES], f"{where}.metric", "metric")
    given = [limit for limit in LIMITS if limit in rule]
    if name in RESOURCES:
        wanted: tuple[str, ...] = FOR_RESOURCES
    else:
        wanted = FOR_HIGHER if metrics[name].higher_is_better else FOR_LOWER
    if len(given) != 1 or given[0] not in wanted:
        raise UserError(
            f"{where}: {name} takes one of {', '.join(wanted)}, but "
            f"{' and '.join(given) or 'none'} given"
        )
    limit = given[0]
    if name in RESOURCES:
        for key in ("confidence", "slice", "min_examples"):
            if key in rule:
                raise UserError(f"{where}: {name} is counted, not sampled; {key} has no meaning")
        return Criterion(name, limit, parse.number(rule[limit], f"{where}.{limit}", 0.0, 1e18))
    lowest = -1e9 if KINDS[limit] == ALONE else 0.0
    margin = parse.number(rule[limit], f"{where}.{limit}", lowest, 1e9)
    confidence = parse.number(rule.get("confidence", 0.95), f"{where}.confidence", 0.5, 0.9999)
    if metrics[name].share and not 0 < margin < 1:
        raise UserError(f"{where}.{limit}: {margin:g} is not allowed: {name} lies between 0 and 1")
    if limit == "max_relative_drop" and margin >= 1:
        raise UserError(f"{where}.{limit}: {margin:g} is not allowed: below 1, a share")
    column = rule.get("slice")
    if column is None and "min_examples" in rule:
        raise UserError(f"{where}: min_examples is of slices, and no slice is given")
    if column is not None:
        parse.typed_value(str, column, f"{where}.slice")
    fewest = parse.whole(rule.get("min_examples", FEWEST_IN_A_SLICE), f"{where}.min_examples", 2)
    return Criterion(name, limit, margin, confidence, column, fewest, rule.get("preset"))


def _from_preset(rule: dict[str, Any], where: str, evaluator: Named) -> dict[str, Any]:
    """The rule that a preset stands for, on the evaluator's headline metric if none is named."""
    preset = parse.one_of(rule["preset"], PRESETS, f"{where}.preset", "preset")
    given = [limit for limit in LIMITS if limit in rule]
    if given:
        raise UserError(f"{where}: {preset} is a limit by itself, but {given[0]} is given too")
    name = rule.get("metric", evaluator.value.headline)
    metric = evaluator.value.metrics.get(name)
    if metric is None:
        known = [n for n, m in evaluator.value.metrics.items() if m.test is not None]
        raise UserError(f"{where}.metric: unknown metric {name!r}; {allowed(name, known)}")
    limit = "max_relative_drop" if metric.higher_is_better else "max_relative_increase"
    return rule | {"metric": name, limit: PRESETS[preset]}


def _plugins(subject: Named, tasks: Sequence[Task], cells: Sequence[Scheme]) -> tuple[str, ...]:
    """Where what other packages add comes from."""
    used = [(SUBJECTS, subject.name)]
    used += [(EVALUATORS, task.evaluated_by.name) for task in tasks]
    used += [(DATASETS, task.taken_from.name) for task in tasks]
    specs = [s for c in cells for s in (c.weights, c.activations, c.sums) if s is not None]
    sides = [side for c in cells for o in c.overrides for side in (o.weights, o.activations)]
    specs += [side for side in sides if isinstance(side, Spec)]
    used += [(FORMATS, spec.format.name) for spec in specs]
    found = [known.origin(name) for known, name in used]
    return tuple(sorted({origin for origin in found if origin is not None}))
