"""What --help says is all of what was written: an option's text is markup, in which [words] in brackets vanish unless escaped."""

from __future__ import annotations

import re

import pytest
import typer
from rich.text import Text

import kvpool.cli
import kvpool.daemon
import kvtransport.bench.cli


def texts(command, path=()):
    for name, below in getattr(command, "commands", {}).items():
        yield from texts(below, (*path, name))
    for parameter in command.params:
        yield (*path, parameter.name), getattr(parameter, "help", None) or ""


@pytest.mark.parametrize(
    "app", [kvpool.cli.app, kvpool.daemon.app, kvtransport.bench.cli.app], ids=["kvpool", "kvpoold", "kvbench"]
)
def test_nothing_of_an_options_text_is_taken_for_markup(app):
    found = dict(texts(typer.main.get_command(app)))
    assert any(found.values())
    for where, text in found.items():
        assert Text.from_markup(text).plain == re.sub(r"\\(?=\[)", "", text), where
