"""The house: imports flow one way, rooms stand in one order, and an op has one name everywhere."""

import ast
import doctest
import re
from pathlib import Path

import pytest

import firp_kernels
from firp_kernels import ops, registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/firp"
# A room imports from those before it.
ROOMS = (
    "tools", "decoder", "drafting", "engine", "sampling", "generation", "train", "tune", "bench", "integrations", "cli",
)  # fmt: skip


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_kernels_know_nothing_of_models():
    for path in (ROOT / "firp_kernels").rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in ("firp", "transformers", "huggingface_hub"), (path, name)


def test_the_model_side_holds_no_kernels():
    for path in (ROOT / "python/firp").rglob("*.py"):
        assert "triton" not in {name.split(".")[0] for name in imported(path)}, path


def module(path):
    """Name of a file of `firp`, with `__init__` for a folder's own."""
    return ".".join(("firp", *path.relative_to(PACKAGE).with_suffix("").parts))


def imported_files(path):
    """The files of `firp` that a file imports: anywhere in it, also in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, (path, "imports by a relative name")
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "firp":
                place = PACKAGE.joinpath(*name.split(".")[1:])
                found = [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
                yield from (file for file in found if file != path)


def circle(arrows):
    """Names along a circle of a graph {name: names it points to}, or None."""
    done, trail = set(), []

    def walk(name):
        if name in trail:
            return trail[trail.index(name) :]
        if name in done:
            return None
        trail.append(name)
        found = next(filter(None, map(walk, sorted(arrows.get(name, ())))), None)
        trail.pop()
        done.add(name)
        return found

    return next(filter(None, map(walk, sorted(arrows))), None)


def test_rooms_import_only_from_rooms_before_them():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    for path in PACKAGE.glob("*/*.py"):
        room = ROOMS.index(path.parent.name)
        for file in imported_files(path):
            assert file.parent != PACKAGE, f"{module(path)} imports {module(file)}, expected the room of the name"
            assert ROOMS.index(file.parent.name) <= room, f"{module(path)} imports {module(file)}"


def test_no_import_circle():
    assert circle({module(path): set(map(module, imported_files(path))) for path in PACKAGE.rglob("*.py")}) is None


def test_a_circle_would_be_found():
    assert circle({"a": {"b", "d"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) is None


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_in_one_sentence_what_it_holds(room):
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Expr]
    assert re.fullmatch(r"[^\n.?]+(\.[a-z][^\n.?]*)*[.?]", ast.get_docstring(tree))


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_an_op_has_one_name_everywhere(name):
    """`ops/x.py`, a kernel in `triton/x.py` or `csrc/**/x.*`, `tests/kernels/test_x.py`, `benchmarks/x.py`."""
    assert {name, "fake", "check", "reference"} <= functions(ROOT / f"firp_kernels/ops/{name}.py")
    kernel = ROOT / f"firp_kernels/triton/{name}.py"
    assert kernel.is_file() == (name in registry.TRITON_OPS)
    assert not kernel.is_file() or name in functions(kernel)
    assert kernel.is_file() or [path for path in (ROOT / "csrc").rglob(f"{name}.*") if path.parent.name != "tests"]
    assert f'on_devices("{name}")' in (ROOT / f"tests/kernels/test_{name}.py").read_text()
    assert "cases" in functions(ROOT / f"benchmarks/{name}.py")


def test_every_op_of_the_kernels_is_defined():
    assert {path.stem for path in (ROOT / "firp_kernels/ops").glob("*.py")} - {"__init__"} == ops.SCHEMAS.keys()
    listed = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line[0] != "#"]
    assert {op for _, op, _ in listed} | set(registry.TRITON_OPS) == ops.SCHEMAS.keys()
    assert [f"csrc/{device}/{op}{Path(source).suffix}" for device, op, source in listed] == [line[2] for line in listed]


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_a_contract_ends_with_an_example_that_runs(name):
    contract = getattr(firp_kernels, name)
    assert "Args:" in contract.__doc__ and "Raises:" in contract.__doc__
    (example,) = doctest.DocTestFinder().find(contract, name, globs={})
    assert 2 <= len(example.examples) <= 6 and not doctest.DocTestRunner().run(example).failed


def test_files_can_be_read_in_one_sitting():
    sources = [
        *ROOT.glob("firp_kernels/**/*.py"),
        *ROOT.glob("python/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("csrc/**/*.*"),
    ]
    assert not [
        (path, len(lines))
        for path in sources
        if len(lines := path.read_text().splitlines()) > 300 and path.suffix != ".so"
    ]


def test_each_load_of_a_kernel_says_its_shape():
    for path in (ROOT / "firp_kernels/triton").glob("*.py"):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                assert any("# [" in line for line in lines[node.lineno - 1 : node.end_lineno]), (path, node.lineno)


# Words of a private dialect, and the words of the field.
GLOSSARY = {
    "dearer": "costs more", "told apart": "identified", "anew": "again", "whatever": "for any", "turned": "rotated",
    "behind": "after", "served by": "run by",
}  # fmt: skip


def test_prose_uses_the_words_of_the_field():
    places = [*PACKAGE.rglob("*.py"), *(ROOT / "firp_kernels").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    places += [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "benchmarks").rglob("*.py")]
    places += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*"), ROOT / "README.md"]
    for path in places:
        if path.resolve() != Path(__file__).resolve():
            text = path.read_text()
            for word, field in GLOSSARY.items():
                found = re.search(rf"\b{word}\b", text)
                assert found is None, f"{path}: {word!r} -> {field!r}: ...{text[found.start() - 40 : found.end() + 20]}"
