"""The wheel: conf/ and tools/ travel in it, tests do not, and it trains outside a checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import TINY, checkout_files, copy_checkout
from tests.forked import ROOT


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(clean_copy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", clean_copy, "--no-build-isolation", "--wheel-dir", folder)
    return next(folder.glob("pretrain-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--no-index", "--target", folder)
    return folder


def test_wheel_holds_the_package_conf_and_tools_only(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"pretrain/{file.relative_to(ROOT)}" for file in (ROOT / "conf").rglob("*.yaml")}
    expected |= {f"pretrain/tools/{file.name}" for file in (ROOT / "tools").glob("*.py")}
    expected |= {str(file.relative_to(ROOT)) for file in (ROOT / "pretrain").rglob("*.py")}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == expected
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_build_leaves_nothing_that_git_sees(clean_copy, wheel):
    """Where the copy was built, everything that is new is ignored."""
    subprocess.run(["git", "init", "--quiet"], cwd=clean_copy, check=True)
    status = ["git", "ls-files", "--others", "--exclude-standard"]
    seen = subprocess.run(status, cwd=clean_copy, check=True, capture_output=True, text=True).stdout.splitlines()
    assert (clean_copy / "build").exists(), "the build did not run here"
    assert set(seen) == set(checkout_files())


def test_installed_wheel_trains_outside_a_checkout(installed, shards, tmp_path, environment):
    """From another folder, with the wheel alone on the path: its own conf and its own tools."""
    env = {**environment, "PYTHONPATH": str(installed)}
    small = [*TINY, "train.steps=2", "run.name=outside", f"data.train={shards}"]
    command = [sys.executable, "-m", "pretrain.train", *small]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "runs" / "outside" / "metrics.jsonl").read_text().splitlines()) == 2
    where = (
        "import pretrain.tools; from pretrain.config import compose\n"
        "print(compose.conf_folder(), *pretrain.tools.__path__, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(installed / "pretrain" / "conf"), str(installed / "pretrain" / "tools")]


def test_installed_tools_run(installed, tmp_path, environment):
    """As `python -m pretrain.tools.NAME --help`, one after the other in a process that imports torch once."""
    program = (
        "import runpy, sys\n"
        "for tool in sys.argv[1:]:\n"
        "    sys.argv = [tool, '--help']\n"
        "    try: runpy.run_module(f'pretrain.tools.{tool}', run_name='__main__')\n"
        "    except SystemExit as ended: print('ended', tool, ended.code)\n"
    )
    programs = (file for file in (ROOT / "tools").glob("*.py") if '__name__ == "__main__"' in file.read_text())
    tools = sorted(file.stem for file in programs)
    env, command = {**environment, "PYTHONPATH": str(installed)}, [sys.executable, "-c", program, *tools]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == [f"ended {tool} 0" for tool in tools], done.stderr
    assert done.stdout.count("usage:") == len(tools) >= 15


def test_every_requirement_is_pinned():
    """constraints.txt pins each requirement of setup.py inside its range, once for every supported Python."""
    setup = (ROOT / "setup.py").read_text()
    ranges = setup.partition("install_requires=[")[2].partition("]")[0].split()
    wanted = [Requirement(text.strip('",')) for text in ranges]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    for python in ("3.10", "3.11", "3.13"):
        active = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
        names = [pin.name.lower() for pin in active]
        assert len(names) == len(set(names))
        versions = {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in active}
        for requirement in wanted:
            assert requirement.specifier.contains(versions[requirement.name.lower()]), requirement
    assert not any("+" in line for line in lines), "a local version is not to be had everywhere"
