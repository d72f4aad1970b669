"""The check of tokens that runs on GPUs finds kernels that are wrong, and no others."""

import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import serve_parts
import serve_rows
from serve_requests import Comparison, requests

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed: make test-serve")


def run(tokens: list[int], logits: list[dict[int, float]]) -> SimpleNamespace:
    """What an engine says of a request."""
    entries = [{t: SimpleNamespace(logprob=v) for t, v in one.items()} for one in logits]
    return SimpleNamespace(token_ids=tokens, logprobs=entries)


FIRST, SECOND = {3: 1.0, 4: 0.5}, {5: 2.0, 6: 1.875}


@pytest.mark.parametrize(
    ("tokens", "last", "change", "unlike"),
    [
        ([3, 5], SECOND, 0.0, 0),
        ([3, 5], {5: 2.0, 6: 1.75}, 0.125, 1),
        ([3, 6], {5: 2.0, 6: 2.25}, 0.375, 1),  # another token
        ([3, 7], {7: 2.5, 5: 2.0}, 0.625, 1),  # one that was below 1.875 before
        ([3, 9], {9: 1.0, 8: 1.0}, float("inf"), 1),
    ],
)
def test_a_change_is_that_of_the_logits(tokens, last, change, unlike):
    found = Comparison()
    found.add("a", 10, run([3, 5], [FIRST, SECOND]), run(tokens, [FIRST, last]))
    assert (found.tokens, found.unlike, max(found.changes)) == (2, unlike, change)
    assert found.shortest == (11 if unlike else None)
    assert len(found.flips) == (tokens[1] != 5)


def test_what_follows_another_token_is_not_compared():
    found = Comparison()
    found.add(
        "a", 10, run([3, 5], [FIRST, SECOND]), run([4, 9], [{4: 1.0, 3: 0.9}, {9: 7.0, 8: 1.0}])
    )
    assert found.tokens == 1


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An engine, and how far quantization moves a logit of its model."""
    folder = tmp_path_factory.mktemp("model")
    options = Namespace(tiny=True, device="cpu", requests=48, compare=16)
    check = serve_parts.Check(options)
    check.save(folder)
    return options, check.engine(folder, enable_prefix_caching=True), check.moved


def last_row_lost(y, x):
    y = y.clone()
    y[-1] = y[-2]
    return y


def first_group_lost(y, x):
    """As a kernel that begins with its second group of 64 columns."""
    return y * (1 - 64 / x.shape[-1])


BUGS = {"none": None, "last row": last_row_lost, "first group": first_group_lost}


@pytest.mark.parametrize("bug", BUGS)
def test_a_kernel_that_is_wrong_for_many_rows_is_found(bug, served, monkeypatch):
    from liquidgemm import ops

    options, llm, bound = served
    linear, wrong = ops.linear, BUGS[bug]

    def planted(x, *args):
        y = linear(x, *args)
        return y if wrong is None or len(x) < 16 else wrong(y, x)

    monkeypatch.setattr(ops, "linear", planted)
    check = serve_parts.Check(options)
    options.deadline = time.monotonic() + 120
    with serve_rows.watched() as seen:
        requests(check, llm, bound)
    assert seen.rows > 50
    assert bool(seen.unlike) == (wrong is not None)
    assert check.facts["tokens_compared"] > 100
    if wrong is None:
        assert not check.failures
    else:
        assert any("no logit moves" in failure for failure in check.failures), check.facts
