import subprocess
import sys

import pytest

import cvmatch


def test_names_of_a_notebook_are_those_of_their_modules():
    assert set(cvmatch.__all__) <= set(dir(cvmatch))
    for name in cvmatch.__all__:
        assert getattr(cvmatch, name).__name__ == name


def test_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = cvmatch.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_import_of_the_package_imports_nothing_heavy():
    code = "import sys, cvmatch; print(*sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert not {"torch", "ray", "numpy", "pandas", "yaml", "tyro"} & set(printed.stdout.split())
