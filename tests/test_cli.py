"""What commands print: errors in one line, and nothing in them that a terminal obeys."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.check

ROOT = Path(__file__).parents[1]


def run(lines, encoding="utf-8"):
    """(status, output, errors), bytes, of a command whose body is `lines`."""
    body = "".join(f"    {line}\n" for line in lines)
    imports = "import logging\nfrom retinanet_keras import errors\nfrom retinanet_keras.cli import process\n"
    code = f"{imports}def main():\n{body}process.run_command(main)"
    environment = {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def test_names_in_errors_and_warnings_are_text():
    name = r"'\x1b[31m\udcff\u202e'"
    status, _, errors = run([f"logging.warning('ignored %s\\n- one', {name})", f"raise errors.UserError({name})"])
    shown = rb"\x1b[31m\xff\u202e"
    assert status == 2 and errors == b"WARNING: ignored " + shown + b"\n- one\nerror: " + shown + b"\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_letters_that_a_terminal_has_not_do_not_end_a_command(encoding):
    status, output, errors = run([r"print('gr\xf6\xdfe \udcff')", "return 0"], encoding)
    expected = r"gr\xf6\xdfe" if encoding == "ascii" else "größe"
    assert (status, errors) == (0, b"") and output.decode() == expected + " \\udcff\n"


def test_what_is_not_foreseen_keeps_its_traceback():
    status, _, errors = run(["raise ValueError('x')"])
    assert status == 1 and b"Traceback" in errors
