"""The house: imports go one way, and modules stay small enough to be read."""

from __future__ import annotations

import ast
import itertools
from graphlib import TopologicalSorter
from pathlib import Path

import dynskip

PACKAGE = Path(dynskip.__file__).parent
# From the ground up. A module imports only from floors below its own, and from those beside it without a circle.
FLOORS = (
    ("errors", "lazy"),
    ("_modes", "_check", "_targets", "activation"),
    ("backbone",),
    ("inner", "consensus"),
    ("gates", "terminate"),
    ("flops", "rules"),
    ("output",),
    ("features", "scan", "_tables", "order"),
    ("engine", "summary"),
    ("_fit",),
    ("runtime", "metrics", "losses", "_card", "_config"),
    ("_rebuild",),
    ("_pretrained", "plot"),
    ("wrapper", "hub", "calibrate"),
    ("early_exit", "evaluation"),
    ("sofnet", "report"),
    ("video",),
)
ROOT = Path(__file__).resolve().parents[1]


def modules() -> dict[str, Path]:
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("dynskip", *file.relative_to(PACKAGE).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imported(file: Path) -> set[str]:
    """Name all that a module imports, inside functions as well, but for what only type checkers read."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_make_no_circle() -> None:
    files = modules()
    # `import dynskip`, for its version and public names, is no edge.
    graph = {
        name: {other for other in imported(file) if other in files and other not in (name, "dynskip")}
        for name, file in files.items()
    }
    assert sum(map(len, graph.values())) > 100
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_imports_go_down() -> None:
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    wrong = []
    for name, file in modules().items():
        room = name.split(".")[1] if "." in name else None
        if room is None:
            continue
        for other in imported(file):
            target = other.split(".")[1] if other.startswith("dynskip.") else room
            if target in floor_of and target != room and floor_of[target] >= floor_of[room]:
                wrong.append(f"{name} -> {other}")
    assert wrong == []
    rooms = {name.split(".")[1] for name in modules() if "." in name}
    assert rooms == set(itertools.chain.from_iterable(FLOORS))


def test_modules_are_at_most_400_lines() -> None:
    long = {name: lines for name, file in modules().items() if (lines := len(file.read_text().splitlines())) > 400}
    assert long == {}


def test_nothing_imports_an_example() -> None:
    recipes = {file.stem for file in (ROOT / "examples").glob("*.py")} | {"examples"}
    files = [file for name in ("dynskip", "examples", "benchmarks", "tests") for file in (ROOT / name).rglob("*.py")]
    assert len(files) > 100
    wrong = [f"{file}: {name}" for file in files for name in imported(file) if name.split(".")[0] in recipes]
    assert wrong == []


def test_recipes_are_at_most_400_lines() -> None:
    lines = {file.name: len(file.read_text().splitlines()) for file in (ROOT / "examples").glob("*.py")}
    long = ("sofnet_activitynet.py", "stream_video.py")
    assert {name: n for name, n in lines.items() if n > (400 if name in long else 300)} == {}
