from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "experiments" / "notebooks"


# What is replaced in the cells: nearly all the time of the notebooks themselves is these numbers.
SMALLER = {
  "sine": {"META_STEPS = 30_000": "META_STEPS = 2_000"},
  "few_shot": {
    "META_STEPS = 150": "META_STEPS = 4",
    "metajax.models.omniglot(ways=5)": "metajax.Model("
    "lambda key: jax.random.normal(key, (784, 5)), "
    "lambda weights, images: (images / 255 - 0.5).reshape(-1, 784) @ weights)",
    "report_every=50": "report_every=2",
    "glyphs.load()": "glyphs.load(train_classes=20, test_classes=10)",
    "cycling(50, 5)": "cycling(5, 5)",
  },
}


@pytest.mark.parametrize("name", SMALLER)
def test_a_notebook_runs_from_top_to_bottom(name):
  notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
  for full, smaller in SMALLER[name].items():
    (cell,) = (cell for cell in notebook.cells if full in cell.source)
    cell.source = cell.source.replace(full, smaller)
  folder = {"metadata": {"path": str(NOTEBOOKS)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
  assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
