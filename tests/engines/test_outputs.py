"""Prefill in one engine, decode in another: the outputs of one engine alone, bit by bit. One request at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import LENGTHS, Setup, start_setup
from .models import MODELS
from .report import Report


@pytest.fixture(scope="module", params=sorted(MODELS))
def setup(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    if request.param == "qwen3_next":
        yield request.getfixturevalue("hybrid")
        return
    yield from start_setup(request.param, models, tmp_path_factory.mktemp(request.param))


def test_tokens_and_logprobs_are_those_of_one_engine(setup: Setup, report: Report) -> None:
    moved = 0
    for tokens in LENGTHS:
        request = f"same-{tokens}"
        transfer = setup.pair.submit(request, setup.prompt(tokens))
        setup.pair.prefill.result(request)
        result = setup.pair.decode.result(request)
        assert len(result.tokens) == 16
        assert all(len(position) >= 5 for position in result.logprobs)
        assert result.tokens == setup.expected[tokens].tokens
        assert result.logprobs == setup.expected[tokens].logprobs
        # Equal outputs prove nothing when decode computed the prompt itself: the transfer must have been sealed.
        setup.pair.free_blocks()
        received = setup.pair.transfer("consumer", transfer)
        assert received["end"] == "sealed", received
        assert received["bytes"] > 0
        moved += received["bytes"]
    # A model that says the same whatever it read would pass too.
    assert len({tuple(result.tokens) for result in setup.expected.values()}) == len(LENGTHS)
    report.row(
        f"{setup.name}: {MODELS[setup.name].caches}",
        f"tokens and top-5 logprobs bitwise equal, {len(LENGTHS)} prompts up to {max(LENGTHS)} tokens, {moved / 1e6:.1f} MB moved",
    )


def test_a_state_dropped_on_arrival_changes_the_output(hybrid: Setup, report: Report) -> None:
    """The control: without the recurrent state the output must differ, or the comparison above sees nothing."""
    tokens = LENGTHS[1]
    with hybrid.pair.with_decode(debug_drop_state=True) as forgetful:
        result = forgetful.run("forgetful", hybrid.prompt(tokens)).decode
    expected = hybrid.expected[tokens]
    differing = sum(a != b for a, b in zip(result.tokens, expected.tokens, strict=True))
    assert differing > 0
    report.row("control: recurrent state zeroed on arrival", f"output differs, {differing} of 16 tokens")
