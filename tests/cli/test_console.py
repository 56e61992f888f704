"""Nobody has to listen: a pipe or terminal that is gone ends no run, and no character is one too many."""

import os
import subprocess
import sys

import pytest

TALK = """
import sys
from satchel.cli.console import forgive_encodings, out
forgive_encodings()
for i in range(3000):
    out.print(f"line {i} \u00fc \U0001f600")
sys.stderr.write("done")
"""


def talk(stdout, **environment):
    environment = os.environ | environment
    return subprocess.run([sys.executable, "-c", TALK], stdout=stdout, stderr=subprocess.PIPE, env=environment)


def test_a_closed_pipe_is_outlived():
    read, write = os.pipe()
    os.close(read)
    done = talk(write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"done")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_narrow_encoding_costs_a_character_not_the_run(encoding):
    done = talk(subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stdout.startswith(b"line 0 ") and b"?" in done.stdout
