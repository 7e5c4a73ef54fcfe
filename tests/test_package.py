"""What an installed wheel holds and finds, outside of the repository, and what an sdist holds."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "firp_kernels", "python")
PROMPTS = ROOT / "python/firp/tools/prompts.jsonl"
CALLS = """
from firp.cli.main import app
from firp.tools.prompt_files import OWN_PROMPTS, load_prompts
from typer.testing import CliRunner
print(OWN_PROMPTS, len(load_prompts(OWN_PROMPTS)), sep="\\n")
for command in ("bench", "tune"):
    print(CliRunner().invoke(app, [command, "--help"], terminal_width=200).output)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel of this tree, without the extension."""
    tree, site = (tmp_path_factory.mktemp(name) for name in ("tree", "site"))
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=unwanted)
        else:
            shutil.copy(source, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run(command, cwd=tree, check=True, env={**os.environ, "FIRP_BUILD": "none"})
    (wheel,) = tree.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    return site


def run(site, *arguments):
    """Run Python over the unpacked wheel alone; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=site, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_a_wheel_holds_every_module_and_the_data(site):
    tree = {
        name: ROOT / folder / name
        for name, folder in (("firp", "python"), ("firp_vllm", "python"), ("firp_kernels", "."))
    }
    for package, folder in tree.items():
        wanted = {path.relative_to(folder) for path in folder.rglob("*.py")} | {Path("py.typed")}
        assert {path for path in wanted if not (site / package / path).is_file()} == set()
    for path in ROOT.glob("python/firp/predictors/*/*"):
        assert (site / path.relative_to(ROOT / "python")).read_bytes() == path.read_bytes()
    assert (site / "firp/tools/prompts.jsonl").read_bytes() == PROMPTS.read_bytes()


def test_a_wheel_without_the_extension_takes_any_torch(site):
    (metadata,) = site.glob("firp_kernels-*/METADATA")
    assert re.findall(r"^Requires-Dist: (torch\W.*)$", metadata.read_text(), flags=re.MULTILINE) == ["torch>=2.10"]


def test_an_sdist_holds_every_file_of_the_repository(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone: " + listed.stderr)
    wanted = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    for name in wanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('built')"]
    environment = {**os.environ, "FIRP_BUILD": "none"}
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)
    (sdist,) = tmp_path.glob("built/*.tar.gz")
    with tarfile.open(sdist) as packed:
        held = {member.name.partition("/")[2] for member in packed if member.isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("firp_kernels.egg-info/")}
    assert held - made == wanted


def test_the_own_prompts_are_found_and_help_names_no_path_of_the_machine(site):
    found, count, *helped = run(site, "-c", CALLS).splitlines()
    assert Path(found) == site / "firp/tools/prompts.jsonl"
    assert int(count) == len(PROMPTS.read_text().splitlines())
    printed = "\n".join(helped)
    assert printed.count("the project's own") == 2
    assert str(site) not in printed and "prompts.jsonl" not in printed
