"""A config file, parsed once into a `Plan`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluators import EVALUATORS
from evaluators.acceptance import LIMITS, RESOURCES, Criterion
from flows import parse
from flows.matrix import read_overrides, schemes
from halfstep.errors import UserError
from halfstep.scheme import skipping
from sources import DATASETS, SUBJECTS
from tasks.plan import SPLITS, Compute, Plan, SplitSpec, Task

KEYS = ("name", "subject", "tasks", "matrix", "sites", "objective", "compute")
FEWEST_CALIBRATION_SAMPLES = 16
"""Below this a range says more about the luck of the draw than about the data."""


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
    tasks = parse.required(config, "tasks", f"config {path}")
    if not isinstance(tasks, list) or len(tasks) != 1:
        raise UserError("tasks: a list of exactly one task is supported by this version")
    sites = parse.mapping(config.get("sites", {}), "sites", ["skip", "overrides"])
    skip = tuple(parse.typed_value(list[str], sites.get("skip", []), "sites.skip"))
    overrides = read_overrides(sites.get("overrides", []))
    matrix = parse.required(config, "matrix", f"config {path}")
    kept, duplicates = schemes(matrix, (*overrides, *skipping(skip)))
    objective = config.get("objective", "weight_bytes")
    compute = parse.build(Compute, config.get("compute", {}), "compute")
    for key in ("threads", "batch_size"):
        parse.whole(getattr(compute, key), f"compute.{key}", 1)
    return Plan(
        name=name,
        subject=_source(SUBJECTS, parse.required(config, "subject", f"config {path}"), "subject"),
        task=_task(tasks[0]),
        schemes=kept,
        folded_duplicates=duplicates,
        skip=skip,
        overrides=overrides,
        objective=parse.one_of(objective, RESOURCES, "objective", "resource"),
        compute=compute,
    )


def _source(kinds: Mapping[str, Any], value: object, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a mapping with a source, got {value!r}")
    source = parse.one_of(parse.required(value, "source", where), kinds, where, "source")
    return parse.build(kinds[source], {k: v for k, v in value.items() if k != "source"}, where)


def _task(value: object) -> Task:
    keys = ("name", "evaluator", "data", "splits", "criteria")
    task = parse.mapping(value, "tasks[0]", keys)
    evaluator = parse.one_of(
        parse.required(task, "evaluator", "tasks[0]"), EVALUATORS, "tasks[0].evaluator", "evaluator"
    )
    splits = parse.mapping(parse.required(task, "splits", "tasks[0]"), "splits", SPLITS)
    parsed = {name: _split(name, parse.required(splits, name, "splits")) for name in SPLITS}
    rules = parse.required(task, "criteria", "tasks[0]")
    if not isinstance(rules, list) or not rules:
        raise UserError(
            "tasks[0].criteria: a list of at least one criterion is needed: a verdict "
            "without a declared criterion is an opinion"
        )
    return Task(
        name=parse.typed_value(str, parse.required(task, "name", "tasks[0]"), "tasks[0].name"),
        evaluator=evaluator,
        data=_source(DATASETS, parse.required(task, "data", "tasks[0]"), "tasks[0].data"),
        **parsed,
        criteria=tuple(_criterion(r, f"criteria[{i}]", evaluator) for i, r in enumerate(rules)),
    )


def _split(name: str, value: object) -> SplitSpec:
    where = f"splits.{name}"
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


def _criterion(value: object, where: str, evaluator: str) -> Criterion:
    rule = parse.mapping(value, where, ["metric", "confidence", *LIMITS])
    metrics = EVALUATORS[evaluator].metrics
    tested = [name for name, metric in metrics.items() if metric.test is not None]
    name = parse.required(rule, "metric", where)
    parse.one_of(name, [*tested, *RESOURCES], f"{where}.metric", "metric")
    given = [limit for limit in LIMITS if limit in rule]
    if name in RESOURCES:
        wanted = "max_ratio"
    else:
        wanted = "max_drop" if metrics[name].higher_is_better else "max_increase"
    if given != [wanted]:
        raise UserError(
            f"{where}: {name} takes {wanted} and no other limit, but {given or 'none'} given"
        )
    margin = parse.number(rule[wanted], f"{where}.{wanted}", 0.0, 1e9)
    if wanted == "max_ratio":
        if "confidence" in rule:
            raise UserError(f"{where}: {name} is counted, not sampled; confidence has no meaning")
        return Criterion(name, wanted, margin)
    confidence = parse.number(rule.get("confidence", 0.95), f"{where}.confidence", 0.5, 0.9999)
    if wanted == "max_drop" and margin >= 1:
        raise UserError(f"{where}.max_drop: {margin:g} is not allowed: {name} lies between 0 and 1")
    return Criterion(name, wanted, margin, confidence)
