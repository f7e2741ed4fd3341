"""The house rules: imports run one way, and every heavy library has one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("protocol", "optimizer", "executor", "profiler")
# The composition root of the optimizer: the two modules that may know the profiler.
JOINT = {"optimizer/cli.py", "optimizer/commands.py"}
ALLOWED = {
    "protocol": {"protocol"},
    "optimizer": {"protocol", "optimizer"},
    "executor": {"protocol", "executor"},
    "profiler": {"protocol", "profiler"},
}
HOMES = {
    "ortools": ("optimizer/policies/",),
    "numba": ("optimizer/policies/timeline_kernels.py",),
    "torch": ("executor/learning/", "executor/worker", "executor/preload.py"),
    "torchvision": ("executor/learning/", "executor/worker", "executor/preload.py"),
    "torchmetrics": ("executor/learning/", "executor/preload.py"),
    "pycocotools": ("executor/learning/",),
    "safetensors": ("executor/learning/",),
    "pynvml": ("executor/shares/",),
    "av": ("executor/streams/",),
    "scipy": ("profiler/curves.py", "profiler/intervals.py"),
    "zmq": ("protocol/", "optimizer/service.py", "executor/service.py"),
    "msgpack": ("protocol/",),
    "matplotlib": ("optimizer/", "executor/streams/preview.py"),
    "pickle": (),
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


MODULES = dict(modules())


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 40


@pytest.mark.parametrize("name", MODULES)
def test_packages_import_only_what_they_may(name: str) -> None:
    allowed = ALLOWED[name.partition("/")[0]] | ({"profiler"} if name in JOINT else set())
    foreign = {found for found in imports(MODULES[name]) if found in PACKAGES} - allowed
    assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_stay_at_home(name: str) -> None:
    for library in set(imports(MODULES[name])) & set(HOMES):
        assert name.startswith(HOMES[library]), f"{name} imports {library}, which lives in {HOMES[library]}"


def test_no_module_has_the_name_of_one_of_the_standard_library() -> None:
    import sys

    shadows = [name for name in MODULES if Path(name).stem in sys.stdlib_module_names]
    assert not shadows
