"""docs/paper.md names only what exists: modules, functions, settings with their defaults, configurations, commands."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from retinanet_keras.cli import parser as command_line
from retinanet_keras.config import Config, load_config
from retinanet_keras.experiments import tables

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| the paper")
]
MARKED = [mark for row in ROWS for cell in row for mark in re.findall(r"`([^`]+)`", cell)]
DEFAULTS = Config().to_dict()


def exists(name):
    """Whether a dotted name is a module of the package, or what one has."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["retinanet_keras", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_every_row_names_code_that_exists():
    assert len(ROWS) > 40 and all(len(row) == 4 for row in ROWS)
    for statement, code, _, _ in ROWS:
        names = re.findall(r"`([^`]+)`", code)
        assert names, statement
        for name in names:
            assert exists(name), f"{statement}: there is no {name}"


def test_the_check_itself():
    assert exists("losses") and exists("losses.focal") and exists("model.RetinaNet.compile")
    assert not exists("losses.vocal") and not exists("lozzes") and not exists("model.RetinaNet.nothing")


def test_every_setting_has_the_default_that_is_shown():
    shown = 0
    for _, _, setting, silent in ROWS:
        for mark in re.findall(r"`([^`]+)`", f"{setting} {silent}"):
            key, _, value = mark.partition(" = ")
            section, _, name = key.partition(".")
            if section in DEFAULTS and name:
                default = DEFAULTS[section][name]  # a KeyError where there is no such setting
                if value:
                    assert json.loads(value) == default, key
                    shown += 1
    assert shown > 40


def test_every_configuration_exists():
    files = [mark for mark in MARKED if mark.startswith("configs/")]
    assert len(files) > 8
    for file in files:
        load_config(ROOT / file)


def test_nothing_else_is_marked():
    """All marks are of a kind that a test above or below looks at."""
    for mark in MARKED:
        section = mark.split(".")[0]
        kinds = (exists(mark), section in DEFAULTS, mark.startswith(("configs/", "python -m retinanet_keras ")))
        assert any(kinds), mark


@pytest.mark.parametrize("command", sorted({mark for mark in MARKED if mark.startswith("python -m")}))
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", command.split()[2:])
    monkeypatch.setattr(command_line, "figure", lambda args: str(args.number))
    monkeypatch.setattr(command_line, "experiments", lambda args: args.name)
    assert command_line.main() == command.split()[4]


def test_all_sections_are_there():
    for heading in ("## §3 ", "## §4 ", "## §4.1 ", "## §5 ", "## Appendices"):
        assert heading in PAGE
    for number in range(1, 8):
        assert f"figure {number}" in PAGE
    for table in tables.NAMES:
        assert f"`python -m retinanet_keras experiments {table}`" in PAGE
