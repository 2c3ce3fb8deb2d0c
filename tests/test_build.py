"""What a build ships, even from a clone whose links are missing (git on Windows)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.house import FOLDERS, ROOT, python_files, tracked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files without the links."""
    target = tmp_path_factory.mktemp("clone")
    for path in tracked():
        if not (ROOT / path).is_symlink():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, target / path)
    return target


def _run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(out)]
    _run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=clone)
    (path,) = out.glob("aivillage-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def _shipped() -> set[str]:
    """Every module and schema, under the name that it has in the package."""
    data = {path for path in tracked() if path.suffix == ".sql" and path.parts[0] in FOLDERS}
    inside = {f"aivillage/{path}" for path in {*python_files(*FOLDERS), *data}}
    return inside | {str(path) for path in python_files("aivillage")} | {"aivillage/py.typed"}


def test_the_wheel_holds_every_module_and_schema_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == _shipped()


def test_the_wheel_brings_the_command(wheel):
    (entry_points,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    text = wheel.read(entry_points).decode()
    assert "[console_scripts]\naivillage-node = aivillage.cli.main:main" in text


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site')\n"
        "import aivillage.protocols.codec as codec\n"
        "assert 'site' in codec.__file__, codec.__file__\n"
    )
    _run(sys.executable, "-P", "-c", code, cwd=tmp_path)


def test_the_source_distribution_holds_each_file_once(clone, tmp_path):
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    _run(sys.executable, "-c", code, cwd=clone)
    (path,) = tmp_path.glob("aivillage-*.tar.gz")
    with tarfile.open(path) as archive:
        names = [n.partition("/")[2] for n in archive.getnames() if n.endswith((".py", ".sql"))]
    wanted = {name.removeprefix("aivillage/") for name in _shipped() if not name.endswith("typed")}
    wanted |= {str(path) for path in python_files("aivillage")}
    assert len(names) == len(set(names))
    assert wanted - {"__init__.py", "__main__.py"} <= set(names)
