"""Small weight files that ask for much memory or time are refused in a sentence; the files are in `bombs`."""

import json
import subprocess
import sys
from pathlib import Path

import bombs
import pytest

pytestmark = pytest.mark.check


def test_small_files_take_little_memory_and_time(tmp_path):
    command = [sys.executable, bombs.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"status {done.returncode} after {told[-1:]}\n{done.stderr[-2000:]}"
    assert len(told) == len({one["name"] for one in told}) == 29
    for one in told:
        assert one["message"].startswith(f"{tmp_path}/bomb "), one  # and so not read
        assert len(one["message"]) < 400 and "\n" not in one["message"], one
        assert one["seconds"] < 15 and one["more_mb"] < 400, one
    tiny = told[0]
    assert tiny["bytes"] == 11 and "6442450944 bytes are announced, and fewer are left" in tiny["message"]
