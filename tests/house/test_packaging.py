"""What pyproject.toml says against what is on disk, and what a built wheel holds and does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("protocol", "dht", "compute", "node", "simnet")
NOT_CARRIED = (
    ".git",
    ".venv",
    ".hypothesis",
    "node_modules",
    "build",
    "dist",
    "__pycache__",
    "*_cache",
    "*.egg-info",
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def packages_on_disk() -> dict[str, str]:
    """Import name -> folder of every package, found by its __init__.py."""
    found = {}
    for top in ("src/mycel", *ROOMS):
        for folder, _, names in os.walk(ROOT / top):
            if "__init__.py" in names:
                path = Path(folder).relative_to(ROOT).as_posix()
                inner = path.removeprefix("src/")
                found[(inner if inner.startswith("mycel") else f"mycel/{inner}").replace("/", ".")] = path
    return found


def modules_on_disk() -> list[str]:
    """Every module as its path inside the wheel."""
    return sorted(
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in packages_on_disk().items()
        for path in (ROOT / folder).glob("*.py")
    )


def test_every_package_on_disk_is_listed_with_its_folder() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_on_disk())
    assert SETUPTOOLS["package-dir"] == packages_on_disk()


def test_every_python_file_is_in_a_package() -> None:
    lost = [
        (Path(folder) / name).relative_to(ROOT).as_posix()
        for room in ROOMS
        for folder, _, names in os.walk(ROOT / room)
        for name in names
        if name.endswith(".py") and "__init__.py" not in names
    ]
    assert lost == []


@pytest.mark.parametrize("room", ROOMS)
def test_static_tools_find_every_room_by_a_relative_link(room: str) -> None:
    link = ROOT / "src" / "mycel" / room
    assert os.readlink(link) == f"../../{room}"
    assert link.resolve() == ROOT / room


def test_every_dependency_is_pinned_for_tests_and_demo() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    wanted = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["test"]
    names = [re.split(r"[<>=\[; ]", text)[0].lower().replace("_", "-") for text in wanted]
    assert [name for name in names if name not in pins] == []
    assert all(re.fullmatch(r"[0-9][\w.]*", version) for version in pins.values())


def test_readme_and_licence_are_where_the_metadata_says() -> None:
    project = PYPROJECT["project"]
    assert (ROOT / project["readme"]).is_file()
    assert "Apache License" in (ROOT / project["license-files"][0]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built from a copy without what make made."""
    copy = tmp_path_factory.mktemp("build") / "mycel"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_CARRIED))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist")]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


@pytest.mark.slow
def test_wheel_holds_every_module_and_no_other_top_level_name(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sorted(name for name in names if name.endswith(".py")) == modules_on_disk()
    assert "mycel/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert [top for top in sorted(tops) if not top.endswith(".dist-info")] == ["mycel"]


@pytest.mark.slow
def test_source_distribution_holds_what_the_wheel_is_made_of(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    for folder in packages_on_disk().values():
        for path in (ROOT / folder).glob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= set(names)


@pytest.mark.slow
def test_wheel_runs_from_its_own_files(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import sys, mycel, mycel.cli; print(mycel.__file__); sys.argv[1:] = ['--help']; mycel.cli.main()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "join" in done.stdout
