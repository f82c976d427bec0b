from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import dynskip

CORE = ["torch", "torchvision", "timm", "einops", "typing_extensions"]
OPTIONAL = [
    "matplotlib",
    "av",
    "pandas",
    "tensorboard",
    "onnx",
    "onnxruntime",
    "ray",
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


def test_every_error_is_one_family() -> None:
    assert issubclass(dynskip.DynskipError, ValueError)
