from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "experiments" / "notebooks"


@pytest.mark.parametrize("name", ["sine", "few_shot"])
def test_a_notebook_runs_from_top_to_bottom(name):
  notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
  folder = {"metadata": {"path": str(NOTEBOOKS)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
  assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
