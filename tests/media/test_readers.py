"""A reader that is left open does not hold up the end of Python."""

import subprocess
import sys

LEFT_OPEN = """
from wanloom.media.readers import read_ahead
left = read_ahead([1, 2], lambda job: iter(range(10)), 2)
print(next(left), flush=True)
"""


def test_python_ends_though_a_reader_is_neither_read_nor_closed():
    result = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "(1, 0)\n"
