"""Optional packages: imported late, missed early, and in the same words."""

import subprocess
import sys

import pytest

from zeropoint.core.errors import MissingExtraError
from zeropoint.core.extras import import_extra, require_extra

EACH = pytest.mark.parametrize("function", [import_extra, require_extra])


@EACH
def test_a_missing_package_says_what_to_install(function):
    words = r"absent_package\.part: the package 'absent_package' is not installed\. "
    with pytest.raises(MissingExtraError, match=words + r"Install it with: pip install 'zeropoint\[absent\]'\."):
        function("absent_package.part", "absent")


@EACH
def test_a_missing_part_of_a_package(function):
    with pytest.raises(MissingExtraError, match="the package 'json' is not installed"):
        function("json.absent_part", "absent")


def test_requiring_imports_nothing():
    code = """
import sys
from zeropoint.core.extras import require_extra
require_extra("executorch.exir", "executorch")
sys.exit(any(name.startswith("executorch.") for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
