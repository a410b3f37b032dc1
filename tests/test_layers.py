"""The layers of the house: who may import whom, and what an import may load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pycdgkd

PACKAGE = Path(pycdgkd.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Modules that the public losses may load, and nothing else of this package.
CORE = {
    "_C",
    "_cuda",
    "bank",
    "checks",
    "distributed",
    "errors",
    "lazy",
    "losses",
    "ops",
    "sampling",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, dotted, without the package's name."""
    package = ["pycdgkd", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    skipped = {
        id(n)
        for s in ast.walk(tree)
        if isinstance(s, ast.If) and type_checking(s)
        for n in ast.walk(s)
    }
    names: list[str] = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{stem}.{alias.name}" for alias in node.names]
    inside = {n.removeprefix("pycdgkd.") for n in names if n.startswith("pycdgkd.")}
    return {n for n in inside if n}


IMPORTS = {module_of(path): imports_of(path) for path in SOURCES}


def layer(module: str) -> str:
    return module.split(".")[0]


def users_of(target: str) -> set[str]:
    """Top-level modules that import `target` or something in it."""
    return {
        layer(module)
        for module, imported in IMPORTS.items()
        if any(name == target or name.startswith(f"{target}.") for name in imported)
    } - {target}


def test_the_walk_sees_imports() -> None:
    """A test that could not fail would be worse than none."""
    assert {"losses", "ops", "reference", "models", "data"} <= {layer(m) for m in IMPORTS}
    assert "ops" in {layer(name) for name in IMPORTS["losses"]}
    assert "losses" in {layer(name) for name in IMPORTS["bank"]}


@pytest.mark.parametrize("one", ["losses", "models", "data"])
def test_losses_models_and_data_never_import_one_another(one: str) -> None:
    others = {"losses", "models", "data"} - {one}
    higher = {"training", "bench", "report", "cli", "predict", "doctor", "experiments"}
    for module, imported in IMPORTS.items():
        if layer(module) == one:
            assert not {layer(name) for name in imported} & (others | higher), module


def test_the_core_imports_nothing_above_it() -> None:
    for module, imported in IMPORTS.items():
        if layer(module) in CORE:
            assert {layer(name) for name in imported} <= CORE, module


def test_only_ops_knows_the_compiled_module() -> None:
    assert users_of("_C") <= {"ops", "doctor", "bench"}
    assert users_of("_cuda") <= {"ops", "doctor"}


def test_the_reference_stays_out_of_the_fast_path() -> None:
    assert users_of("reference") <= {"doctor", "bench"}


def test_one_module_of_the_benchmarks_knows_our_ops_and_kernels() -> None:
    inside = {name for name, imported in IMPORTS.items() if {"_C", "ops"} & imported}
    assert {name for name in inside if layer(name) == "bench"} == {"bench.layers"}


@pytest.mark.parametrize("layers", [("training", "cli"), ("training", "report")])
def test_training_does_not_know_who_shows_it(layers: tuple[str, str]) -> None:
    below, above = layers
    assert below not in users_of(above)


LOADED = """
import json, sys, sysconfig
before = set(sys.modules)
import torch, numpy  # with whatever they load themselves
allowed = set(sys.modules)
import pycdgkd
{statement}
loaded = set(sys.modules) - before
print(json.dumps(sorted(loaded - allowed)))
"""


def loaded_by(statement: str) -> set[str]:
    return set(json.loads(printed_by(LOADED.format(statement=statement))))


def test_public_losses_load_torch_numpy_and_the_core_alone() -> None:
    loaded = loaded_by(
        "import pycdgkd.distributed\n"
        "for name in ('teacher_loss', 'PrototypeBank', 'sample_sources'): getattr(pycdgkd, name)\n"
        "pycdgkd.sample_sources(2)"
    )
    own = {name for name in loaded if name.split(".")[0] == "pycdgkd"}
    assert {layer(name.removeprefix("pycdgkd.")) for name in own} - {"pycdgkd"} <= CORE
    outside = {name.split(".")[0] for name in loaded - own}
    assert outside <= {"torch", "numpy"} | set(sys.stdlib_module_names)


def printed_by(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    script = "import sys, pycdgkd; print(*sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert printed_by(script) == ""


@pytest.mark.parametrize("imports", ["torch, pycdgkd", "pycdgkd.ops, torch"])
def test_importing_the_package_registers_the_ops(imports: str) -> None:
    script = f"import {imports}; print(torch.ops.pycdgkd.modality_weights(torch.ones(2)).tolist())"
    assert printed_by(script) == "[0.0, 0.0]"
