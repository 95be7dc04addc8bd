import re
from pathlib import Path

import numpy as np

from experiments import tables

README = Path(__file__).resolve().parents[1] / "README.md"
SMALLER = {
  "metajax.models.omniglot(ways=5)": "metajax.models.omniglot(ways=5, filters=32)",
  "glyphs.load()": "glyphs.load(train_classes=40, test_classes=10)",
  "metajax.cycling(50, 5)": "metajax.cycling(5, 5)",
  "jax.random.key(3), 600)": "jax.random.key(3), 100)",
}


def test_the_examples_run(tmp_path, monkeypatch):
  """The README's Python blocks, from the first to the last, in one namespace."""
  monkeypatch.chdir(tmp_path)
  text = README.read_text()
  for full, smaller in SMALLER.items():
    assert text.count(full) == 1
    text = text.replace(full, smaller)
  blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  assert len(blocks) >= 2
  namespace = {}
  exec(compile(blocks[0], README.name, "exec"), namespace)
  assert abs(float(namespace["state"].params["w"][0]) - 2) < 0.5  # MAML found the mean slope
  for block in blocks[1:]:
    exec(compile(block, README.name, "exec"), namespace)
  first, last = namespace["info"].losses[:, 0], namespace["info"].losses[:, -1]
  assert last[-5:].mean() < 0.8 * first[-5:].mean()  # inner loops learn
  assert int(namespace["found"].state.step) in (100, 200)
  assert len(namespace["accuracies"]) == 100 and 0.5 < namespace["mean"] <= 1.0
  expected = np.repeat(["ash", "elm", "fir", "oak", "yew"], 19)
  assert np.mean(namespace["predictions"].labels == expected) > 0.5


def test_the_tables_of_the_experiments_are_those_of_their_files():
  text = (tables.HERE / "README.md").read_text()
  names = re.findall(r"<!-- table: (\w+) -->", text)
  assert set(names) == set(tables.TABLES)
  assert tables.filled(text) == text, "python -m experiments.tables makes them anew"
  assert tables.filled(text.replace("2^-7.5", "2^-7")) == text


def test_the_paper_has_24_cells():
  assert sum(len(cells) for cells in tables.PAPER.values()) == 24
