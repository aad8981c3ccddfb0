"""The shipped subject: accurate enough, bit-reproducible, trained once."""

from pathlib import Path

import torch

from flows.config import read_plan
from halfstep.digest import digest_tensors
from sources.context import Context
from sources.sklearn_data import Sklearn
from sources.small_cnn import SmallCnn


def test_the_digits_subject_reaches_98_percent(request, tmp_path):
    plan = read_plan(Path(request.config.rootpath) / "configs" / "digits.yaml")
    pools = plan.tasks[0].data.load(Context(tmp_path))
    subject = plan.subject.load(pools, Context(tmp_path))
    evaluator = plan.tasks[0].evaluator
    for pool in ("validation", "test"):
        outcomes = evaluator.run(subject.model, pools[pool], 64)
        assert evaluator.measure(outcomes, outcomes)["accuracy"] >= 0.98


def test_training_twice_gives_the_same_bits_and_a_cached_copy_is_found(tmp_path):
    pools, recipe = Sklearn("digits").load(Context(tmp_path)), SmallCnn(width=4, blocks=1, epochs=2)
    one = recipe.load(pools, Context(tmp_path / "one"))
    torch.randn(7)  # the caller's random state must not matter
    other = recipe.load(pools, Context(tmp_path / "other"))
    cached = recipe.load(pools, Context(tmp_path / "one"))
    assert (one.reused, other.reused, cached.reused) == (False, False, True)
    assert one.digest == other.digest == cached.digest


def test_training_leaves_the_callers_random_state_and_threads_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    SmallCnn(width=4, blocks=1, epochs=1, threads=2).load(
        Sklearn("digits").load(Context(tmp_path)), Context(tmp_path)
    )
    assert torch.equal(torch.randn(3), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_seed_is_another_subject(tmp_path):
    pools = Sklearn("digits").load(Context(tmp_path))
    digests = {
        digest_tensors(
            SmallCnn(width=4, blocks=1, epochs=1, seed=s)
            .load(pools, Context(tmp_path))
            .model.state_dict()
        )
        for s in (0, 1)
    }
    assert len(digests) == 2
