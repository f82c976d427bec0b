from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import dynskip

ROOT = Path(__file__).parents[1]

CORE = ["torch", "torchvision", "timm", "typing_extensions"]
OPTIONAL = [
    "matplotlib",
    "av",
    "pandas",
    "tensorboard",
    "onnx",
    "onnxruntime",
    "ray",
    "prometheus_client",
    "dynskip.hub",
    "tqdm.auto",
    "torchcodec",
    "hypothesis",
]


def test_import_brings_nothing_beyond_the_core_dependencies() -> None:
    # What the core dependencies import on their own account is theirs; the rest would be ours.
    code = f"""
import importlib, json, sys
for name in {CORE!r}:
    importlib.import_module(name)
before = {{name.split(".")[0] for name in sys.modules}}
loaded_by_core = set(sys.modules)
import dynskip
added = {{name.split(".")[0] for name in sys.modules}} - before - set(sys.stdlib_module_names) - {{"dynskip"}}
optional = [name for name in {OPTIONAL!r} if name in sys.modules and name not in loaded_by_core]
print(json.dumps([sorted(added), optional]))
"""
    root = Path(dynskip.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    added, optional = json.loads(done.stdout)
    assert optional == []
    # Parts of torch that only load when asked for may bring torch's own requirements with them.
    allowed = {
        (requirement.split(";")[0].split()[0]).split(">")[0].split("=")[0]
        for requirement in metadata.requires("torch") or []
    }
    assert set(added) <= allowed | {"torchgen", "mpmath"}


def test_public_names() -> None:
    assert len(set(dynskip.__all__)) == len(dynskip.__all__)
    for name in dynskip.__all__:
        assert getattr(dynskip, name) is not None
    public = {
        name for name, value in vars(dynskip).items() if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert public == set(dynskip.__all__)
    assert all(getattr(dynskip, name).__doc__ for name in dynskip.__all__ if name != "UNSEEN")


def test_package_is_typed_and_versioned() -> None:
    assert (Path(dynskip.__file__).parent / "py.typed").is_file()
    assert len(dynskip.__version__.split(".")) >= 3


def test_versions_are_the_same_everywhere() -> None:
    project, docs, readme = ((ROOT / name).read_text() for name in ("pyproject.toml", "docs/index.md", "README.md"))
    lowest = dict(re.findall(r'^    "(torch|torchvision|timm)>=(.+)",$', project, re.MULTILINE))
    assert len(lowest) == 3
    lowest["Python"], *_, last = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert f'requires-python = ">={lowest["Python"]}"' in project
    assert f'python_version = "{lowest["Python"]}"' in project
    assert f'target-version = "py{lowest["Python"].replace(".", "")}"' in project
    table = dict(re.findall(r"^\| (torch|torchvision|timm|Python) \| (\S+) \|", docs, re.MULTILINE))
    assert table == lowest
    said = " ".join(readme.split())
    assert f"Python {lowest.pop('Python')} to {last}" in said
    assert all(f"{name} {version}" in said for name, version in lowest.items())


def test_every_error_is_one_family() -> None:
    assert issubclass(dynskip.DynskipError, ValueError)


# ------------------------------------------------------------------------------------------------ what is distributed


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it, with the environment's own build backend (nothing is downloaded)."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"dynskip-{dynskip.__version__}-py3-none-any.whl"
    files = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dynskip").rglob("*.py")}
    about = {name for name in files if ".dist-info/" in name}
    assert files - about == package | {"dynskip/py.typed", "dynskip_onnx.py"}
    assert {name.split(".dist-info/")[1] for name in about} == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}


def test_the_sdist_holds_what_builds_and_tests_it(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "dynskip/py.typed", "tests/helpers.py"} <= files
    foreign = [
        f for f in files if re.search(r"__pycache__|\.(pyc|pt|pth|safetensors|mp4|avi|egg-info)$|^(runs|\.git)/", f)
    ]
    assert foreign == []
    folders = {"dynskip", "tests", "examples", "benchmarks", "docs"}
    assert {f.split("/")[0] for f in files if "/" in f} <= folders
    assert sdist.stat().st_size < 2_000_000


def test_the_wheel_alone_runs_the_quickstart(dist: Path, tmp_path: Path) -> None:
    # An environment of its own that shares the dependencies, not the checkout: a folder named in a .pth file is
    # searched, but the .pth files in it (that of an editable install) are not read.
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run([str(python), *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = json.loads(run("-c", "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"))
    (Path(where) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    show = "import dynskip, importlib.util as u\nprint(dynskip.__file__)\nprint(u.find_spec('dynskip_onnx').origin)"
    for page in ("README.md", "docs/quickstart.md"):
        blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
        assert blocks
        (tmp_path / "quickstart.py").write_text("\n".join(["import torch\ntorch.set_num_threads(1)", *blocks, show]))
        *_, package, module = run("quickstart.py").splitlines()
        assert Path(package).parent == Path(where) / "dynskip"
        assert Path(module).parent == Path(where)
