"""The sabotage tool itself must not be fooled."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import sabotage

ROOT = Path(__file__).parents[1]

QUICK = "tests/unit/protocols/test_errors.py::test_no_code_belongs_to_two_exceptions"


def _new_file(path: str, *lines: str) -> str:
    added = "".join(f"+{line}\n" for line in lines)
    return (
        f"diff --git a/{path} b/{path}\nnew file mode 100644\n--- /dev/null\n+++ b/{path}\n"
        f"@@ -0,0 +1,{len(lines)} @@\n{added}"
    )


HARMLESS = _new_file("harmless.txt", "nothing")
BROKEN_FIXTURE = _new_file(
    "tests/unit/protocols/conftest.py",
    "import pytest",
    "@pytest.fixture(autouse=True)",
    "def broken():",
    "    raise RuntimeError",
)
STALE = "--- a/protocols/errors.py\n+++ b/protocols/errors.py\n@@ -1 +1 @@\n-not there\n+new\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "test", "verdict"),
    [
        (HARMLESS, QUICK, "UNNOTICED"),
        (BROKEN_FIXTURE, QUICK, "broke instead of failing"),
        (STALE, QUICK, "no longer applies"),
        (HARMLESS, QUICK + "_gone", "does not pass"),
    ],
    ids=["harmless", "setup-only", "stale", "no-such-test"],
)
def test_a_fault_that_proves_nothing_is_reported(tmp_path, capsys, patch, test, verdict):
    (tmp_path / "fault.patch").write_text(f"# test: {test}\n# fault: a fault\n{patch}")
    assert sabotage.main(["--folder", str(tmp_path)]) == 1
    assert verdict in capsys.readouterr().out


def test_every_planted_fault_still_fits_the_code():
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    stale = [
        patch.stem
        for patch in sorted((ROOT / "sabotage").glob("*.patch"))
        if subprocess.run(
            ["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, check=False
        ).returncode
    ]
    assert not stale, "adapt each to the code as it is, and see it noticed"


def test_a_patch_without_its_two_lines_is_reported(tmp_path, capsys):
    (tmp_path / "fault.patch").write_text(HARMLESS)
    assert sabotage.main(["--folder", str(tmp_path)]) == 1
    assert "must begin with" in capsys.readouterr().out


def test_a_fault_that_is_not_there_is_a_usage_error(capsys):
    assert sabotage.main(["--only", "nothing_of_this_name"]) == 2
    assert "paid_twice" in capsys.readouterr().out


@pytest.mark.slow
def test_a_planted_fault_is_noticed(capsys):
    assert sabotage.main(["--only", "signature_always_true"]) == 0
    assert "1 of 1 faults noticed" in capsys.readouterr().out
