"""The direction of imports, so that the house stays as it is drawn."""

import ast
from functools import cache
from pathlib import Path

import fer

ROOT = Path(fer.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))


@cache
def imports(path: Path) -> set[str]:
    """Every module a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def importers(*prefixes: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for name in imports(path)
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
    }


def test_data_and_models_do_not_know_each_other() -> None:
    assert len(MODULES) > 30
    assert not [name for name in importers("fer.models", "fer.layers") if name.startswith("data/")]
    assert not [name for name in importers("fer.data") if name.startswith(("models/", "layers/"))]


def test_layers_and_labels_stand_below_everything() -> None:
    assert not [name for name in importers("fer.models", "fer.data") if name.startswith("layers/")]
    below = imports(ROOT / "labels.py") | imports(ROOT / "metrics.py") | imports(ROOT / "errors.py")
    assert {name for name in below if name.startswith("fer")} <= {"fer.errors"}


def test_reporting_reads_files_only() -> None:
    assert not [name for name in importers("fer.models", "fer.data", "torch") if name.startswith("reporting/")]


def test_each_heavy_library_has_its_place() -> None:
    # experiment.py for nothing but the order of imports.
    assert importers("wandb") <= {"at_test.py", "loggers.py", "dashboard.py", "experiment.py"}
    assert importers("albumentations") <= {"data/per_image.py", "benching/data.py", "benching/augment.py"}
    assert importers("fer.train") == set()
    assert importers("fer.experiment") <= {"train.py", "sweep.py", "benching/jobs.py", "benching/overhead.py"}


def test_nothing_is_instantiated_by_a_central_list() -> None:
    assert not [path for path in MODULES if "__subclasses__" in path.read_text()]
