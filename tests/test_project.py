"""The project's own shape: what imports what, that the README's map is true, that examples load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evolve.search_file import SearchFile
from merge_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("merge_core", "evolve")
# Each heavy dependency has an address.
ADDRESSES = {
    "optuna": (
        "evolve/samplers/",
        "evolve/study/",
        "evolve/space/",
        "evolve/loop.py",
        "evolve/candidates.py",
        "evolve/report.py",
        "evolve/rehearsal.py",
        "evolve/dashboard.py",
    ),
    "cma": ("evolve/samplers/",),
    "ray": ("evolve/workers/ray.py",),
    "vllm": ("evolve/engines/vllm",),
    "lm_eval": ("evolve/engines/", "evolve/tasks/"),
}
LATE = ("transformers", "huggingface_hub")


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def test_merge_core_knows_nothing_of_evolve() -> None:
    for path in (ROOT / "merge_core").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "evolve"], path


@pytest.mark.parametrize("package", ADDRESSES)
def test_heavy_dependencies_keep_to_their_address(package: str) -> None:
    for path in modules():
        where = path.relative_to(ROOT).as_posix()
        runtime = imports(path, top_level_only=True)
        if not where.startswith(ADDRESSES[package]):
            assert package not in [name.split(".")[0] for name in runtime], where


def test_transformers_and_the_hub_are_imported_late_outside_the_engines() -> None:
    for path in modules():
        where = path.relative_to(ROOT).as_posix()
        if not where.startswith("evolve/engines/"):
            top = [name.split(".")[0] for name in imports(path, top_level_only=True)]
            assert not set(LATE) & set(top), where


def test_no_module_imports_in_a_circle() -> None:
    graph = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = [n for n in imports(path, top_level_only=True) if n.split(".")[0] in PACKAGES]
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_torch_before_a_model_is_opened() -> None:
    """It takes a second and 120 MB; commands that only read a record need none."""
    code = "import sys, evolve.loop, evolve.workers.ray; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_readmes_map_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.split("## Map of the code")[1].split("```")[1]
    named = set()
    folders: list[str] = []
    for line in block.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        entry = line.split()[0]
        folders = [*folders[:depth], entry]
        named.add("".join(folders))
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    wanted = {
        f for f in files if f.endswith(".py") and f.startswith(PACKAGES) and not f.endswith("__init__.py")
    }
    mapped = {f for f in named if f.endswith(".py") and f.startswith(PACKAGES)}
    assert mapped == wanted
    for entry in named:
        assert (ROOT / entry).exists(), entry


@pytest.mark.parametrize("folder", [".", "configs", "merge_core", "evolve"])
def test_a_pages_links_lead_somewhere(folder: str) -> None:
    """Those into a page lead to a heading of it."""
    page = ROOT / folder / "README.md"
    for target, heading in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), target
        if heading:
            headings = re.findall(r"(?m)^#+ (.*)$", found.read_text())
            anchors = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
            assert heading in anchors, heading


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yml")), ids=lambda path: path.name)
def test_every_example_is_a_good_search_file_or_recipe(path: Path) -> None:
    file = SearchFile.load(path)
    if not file.tasks:
        Recipe.load(path)
        return
    space = file.space(lambda model: 12)
    assert space.values(space.recipe(space.starts())) == space.active(space.starts())


def test_the_quickstarts_models_are_small() -> None:
    models = ROOT / "configs/quickstart/models"
    assert sum(path.stat().st_size for path in models.rglob("*") if path.is_file()) <= 8_000_000
