"""Configs of tiny Hugging Face subjects on rows that a test makes."""

import subjects
import yaml


def config_of(folder, *, evaluator="text_classification", architecture="sequence_classification",
              tokenizer=None, **task):  # fmt: skip
    """One task on the rows that `serve` put in place."""
    text = {"columns": ["text"]} | ({"tokenizer": str(tokenizer)} if tokenizer else {})
    base = {
        "name": "task",
        "evaluator": evaluator,
        "data": {"source": "factory", "target": "subjects:rows", "text": text, "label": "label",
                 "carve": {"validation": 20, "test": 20}},
        "splits": {"calibration": {"from": "train", "samples": 16},
                   "selection": {"from": "validation"}, "confirmation": {"from": "test"}},
        "criteria": [{"metric": "accuracy", "max_drop": 0.4}],
    }  # fmt: skip
    return {
        "name": "tiny",
        "subject": {"source": "huggingface", "path": str(folder), "architecture": architecture},
        "tasks": [base | task],
        "matrix": {"weights": {"format": ["int8"]}, "activations": {"format": ["int8"]}},
    }


def serve(rows, pool="train"):
    """Makes ``subjects:rows`` return these."""
    subjects.rows = lambda: {pool: rows} if isinstance(rows, list) else rows


def written(tmp_path, config):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def refused(tmp_path, folder, store, rows, tokenizer, message):
    """A sweep that ends with one message before anything is recorded."""
    import pytest

    from flows.conduct import conduct
    from flows.config import read_plan
    from halfstep.errors import UserError

    serve(rows)
    path = written(tmp_path, config_of(folder, tokenizer=tokenizer))
    with pytest.raises(UserError, match=message):
        conduct(read_plan(path), path.read_text(), store)
    assert not store.database.exists()
    assert not store.spool.exists()
