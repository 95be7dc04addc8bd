"""Imports point down, and a large library is known to one module."""

import ast
import graphlib
from pathlib import Path

import pytest

import metajax

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
  "types": 0,
  "devices": 0,
  "programs": 0,
  "checks": 1,
  "learner_file": 1,
  "losses": 2,
  "spread": 2,
  "inner": 2,
  "episodes": 2,
  "models": 2,
  "data": 1,
  "gradients": 3,
  "execution": 4,
  "meta": 5,
  "theory": 4,
  "variants": 6,
  "evaluation": 6,
  "checkpoint": 6,
  "learned": 7,
  "training": 7,
  "__init__": 8,
}
MODULES = {
  ".".join(path.relative_to(ROOT).with_suffix("").parts): path
  for path in sorted((ROOT / "metajax").rglob("*.py"))
}


def imports(path):
  """Everything a file imports, at its top or inside a function, as dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full in MODULES or f"{full}.__init__" in MODULES else node.module


def attributes(path):
  """What a file takes from the library by its name, such as `metajax.train`."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "metajax":
      yield f"metajax.{node.attr}"


def floor(module):
  return FLOORS[module.split(".")[1]]


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
  for imported in imports(MODULES[module]):
    if imported.startswith("metajax."):
      same_package = module.split(".")[1] == imported.split(".")[1] in ("data", "models")
      assert same_package or floor(imported) < floor(module), f"{module} imports {imported}"


def test_there_is_no_cycle():
  names = {name: name.removesuffix(".__init__") for name in MODULES}
  graph = {
    names[module]: {found for found in imports(path) if found in names.values()}
    for module, path in MODULES.items()
  }
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
  ("library", "homes"),
  [
    ("orbax", {"metajax.checkpoint"}),
    ("flax", {"metajax.models.adapters", "metajax.models.networks", "metajax.models.nnx"}),
    ("equinox", {"metajax.models.adapters", "metajax.models.equinox"}),
    ("safetensors", {"metajax.learner_file"}),
    ("tensorflow_datasets", {"metajax.data.hub", "metajax.data.omniglot_builder"}),
    ("PIL", {"metajax.data.files", "metajax.data.hub"}),
    ("grain", {"metajax.data.host"}),
    ("datasets", {"metajax.data.hub"}),
    ("matplotlib", set()),
    ("absl", set()),
    ("chex", {"metajax.checks"}),
    ("tqdm", {"metajax.training"}),
  ],
)
def test_a_library_has_one_home(library, homes):
  found = {
    m for m, path in MODULES.items() if any(i.split(".")[0] == library for i in imports(path))
  }
  assert found == homes


def test_experiments_and_benchmarks_use_the_public_api():
  public = {
    "metajax",
    "metajax.__version__",
    "metajax.checkpoint",
    "metajax.types",
    *(f"metajax.{name}" for name in metajax.__all__),
  }
  for folder in ("experiments", "benchmarks"):
    for path in (ROOT / folder).rglob("*.py"):
      imported = {name for name in imports(path) if name.split(".")[0] == "metajax"}
      found = imported | set(attributes(path))
      assert found <= public, f"{path.name} uses {sorted(found - public)}"


def test_public_names_exist_and_are_documented():
  for name in metajax.__all__:
    documentation = (getattr(metajax, name).__doc__ or "").strip()
    assert documentation and not documentation.startswith(f"{name}("), name  # NamedTuple's own
