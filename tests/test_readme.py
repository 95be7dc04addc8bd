"""What the README and the pages of the documentation show runs, and their tables are right."""

import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import metajax
from experiments import folders, tables

ROOT = Path(__file__).resolve().parents[1]
# The same with fewer examples, smaller networks or fewer steps.
SMALLER = {
  "README.md": {
    "metajax.models.omniglot(ways=5)": "metajax.models.omniglot(ways=5, filters=32)",
    "glyphs.load()": "glyphs.load(train_classes=40, test_classes=10)",
    "metajax.cycling(50, 5)": "metajax.cycling(5, 5)",
  },
  "docs/quickstart.md": {
    "metajax.models.conv4(28, ways=5)": "metajax.models.conv4(28, ways=5, filters=4)",
    "metajax.cycling(50, 5)": "metajax.cycling(3, 5)",
    "num_steps=600": "num_steps=4",
    "report_every=200": "report_every=2",
  },
  "docs/networks.md": {"jax.random.key(3), 600)": "jax.random.key(3), 100)"},
  "docs/recipes.md": {
    'metajax.models.conv4(28, ways=5, filters=8, downsample="stride")': "small_network()",
    'metajax.models.conv4(28, ways=64, filters=8, downsample="stride")': "small_network()",
  },
  "docs/normalization.md": {"filters=8": "filters=2"},
}
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text())


def run(page, folder, monkeypatch):
  """Runs the Python blocks of a page, from the first to the last, in one namespace."""
  monkeypatch.chdir(folder)
  text = page.read_text()
  for full, smaller in SMALLER.get(str(page.relative_to(ROOT)), {}).items():
    assert text.count(full) == 1
    text = text.replace(full, smaller)
  namespace = {"small_network": small_network}
  for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
    exec(compile(block, page.name, "exec"), namespace)
  return namespace


def small_network():
  """One convolution and a dense layer, which compile faster than `conv4`."""

  class Small(nn.Module):
    @nn.compact
    def __call__(self, images):
      hidden = nn.relu(nn.Conv(2, (4, 4), strides=4, padding="VALID")(images / 255))
      return nn.Dense(5)(hidden.reshape(len(images), -1))

  return metajax.models.from_linen(Small(), np.zeros((1, 28, 28, 1), np.float32))


def test_the_readme_runs(tmp_path, monkeypatch):
  found = run(ROOT / "README.md", tmp_path, monkeypatch)
  first, last = found["info"].losses[:, 0], found["info"].losses[:, -1]
  assert last[-5:].mean() < 0.8 * first[-5:].mean()  # inner loops learn
  assert 0.2 < found["mean"] <= 1.0


def test_the_readme_s_first_example_finds_the_mean_slope(tmp_path, monkeypatch):
  block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
  namespace = {}
  exec(compile(block, "README.md", "exec"), namespace)
  assert abs(float(namespace["state"].params["w"][0]) - 2) < 0.5


def write_pictures(folder):
  """Folders of drawn characters: classes to train on, some labelled images, and others."""
  drawn = metajax.data.glyphs.load(train_classes=17, test_classes=5, drawings=12)
  for number, image in enumerate(np.asarray(drawn.train.inputs)):
    write_image(image, folder / "pictures" / f"{number // 12}" / f"{number % 12}.png")
  for number, image in enumerate(np.asarray(drawn.test.inputs)):
    part = f"few/{number // 12}" if number % 12 < 2 else "others"
    write_image(image, folder / part / f"{number}.png")


def write_image(image, path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image[..., 0]).save(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
  monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / "cache"))
  if page.stem == "quickstart":
    write_pictures(tmp_path)
    monkeypatch.setattr(metajax.data, "from_folder", with_more_test_classes)
  found = run(page, tmp_path, monkeypatch)
  if page.stem == "networks":
    best, last = int(found["found"].state.step), 200 + 20 * (len(found["scores"]) - 1)
    assert 0 < best <= last <= 400 and best % 20 == 0
    assert last == 400 or found["scores"][-4] >= max(found["scores"][-3:])
    assert len(found["accuracies"]) == 100 and 0.5 < found["mean"] <= 1.0
    expected = np.repeat(["ash", "elm", "fir", "oak", "yew"], 19)
    assert np.mean(found["predictions"].labels == expected) > 0.5
  if page.stem == "quickstart":
    assert found["predictions"].probabilities.shape == (50, 5)
    assert set(found["predictions"].labels) <= {"0", "1", "2", "3", "4"}


def with_more_test_classes(path, **options):
  return metajax.data.class_folders.from_folder(path, **options, validation=0.1, test=0.4)


def test_every_page_is_in_the_navigation_and_links_to_pages_that_are_there():
  navigation = (ROOT / "mkdocs.yml").read_text()
  for page in (ROOT / "docs").glob("*.md"):
    assert f": {page.name}\n" in navigation
    for link in re.findall(r"\]\(([\w./]+\.md)(?:#[\w-]+)?\)", page.read_text()):
      assert (page.parent / link).is_file(), f"{page.name} links to {link}"
  for readme in (ROOT / "README.md", ROOT / "experiments" / "README.md"):
    for link in re.findall(r"\]\((?!http)([\w./-]+)\)", readme.read_text()):
      assert (readme.parent / link).exists(), f"{readme.name} links to {link}"


def test_the_tables_of_results_are_those_of_their_files():
  pages = [page.read_text() for page in tables.PAGES]
  names = re.findall(r"<!-- table: (\w+) -->", "".join(pages))
  assert sorted(names) == sorted(tables.TABLES)
  for text in pages:
    assert tables.filled(text) == text, "python -m experiments.tables makes them anew"
    empty = re.sub(r"(<!-- table: \w+ -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL)
    assert len(empty) < len(text) and tables.filled(empty) == text


def test_a_difference_is_between_runs_of_the_same_seed(tmp_path):
  accuracies = {"one/seed0": 0.5, "one/seed2": 0.75, "two/seed1": 0.1, "two/seed2": 0.7}
  for name, accuracy in accuracies.items():
    (tmp_path / name).mkdir(parents=True)
    content = {"cells": {"5-shot": {"accuracy": accuracy}}}
    (tmp_path / name / "result.json").write_text(json.dumps(content))
  assert tables._difference(tmp_path, "one", "two", "5-shot") == "+5.00 (+5.00)"
  assert tables._over_seeds(tmp_path / "one", "5-shot") == "62.50 (17.68)"


def test_the_work_of_a_full_length():
  """5.3156 MFLOP forward an image of Omniglot; a gradient is three forward passes."""
  rows = [row.split(" | ") for row in tables.lengths()]
  work = {row[0].removeprefix("| "): float(row[2]) for row in rows[1:]}
  reptile = 100_000 * 5 * 5 * 10 * 3  # tasks of five minibatches of ten
  maml = 60_000 * 16 * (5 * 20 * 3 * 3 + 20 * 3)  # five steps on twenty, differentiated through
  assert work["omniglot_5way_reptile"] == pytest.approx(reptile * 5.3156e6 / 1e15, abs=0.005)
  assert work["omniglot_1shot_20way_maml"] == pytest.approx(maml * 5.3156e6 / 1e15, abs=0.005)


def test_all_rows_of_a_table_have_as_many_cells():
  """A table whose second line has another number of them is no table."""
  pages = [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]
  texts = "\n".join(page.read_text() for page in pages)
  found = re.findall(r"(?:^\|.*\|\n)+", texts, flags=re.MULTILINE)
  assert len(found) > 40
  for table in found:
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_extrapolations_recover_a_curve_of_this_form():
  steps = np.arange(1_000, 11_000, 1_000)
  rng = np.random.default_rng(0)
  errors = 0.02 + 0.05 * (steps / 60_000) ** -0.5 + 0.004 * rng.normal(size=len(steps))
  cell = lambda error: {"accuracy": 1 - error, "interval95": 1.96 * 0.004}
  lines = [
    {"step": step, "test": {"x": cell(error)}}
    for step, error in zip([0, *steps], [0.8, *errors], strict=True)
  ]
  at_end = cell(0.02 + 0.05 * 6**0.5) | {"interval95": 0.001}
  found = tables.extrapolated(lines, "x", 60_000, at_end)
  assert found.low < 93 < found.high and abs(found.accuracy - 93) < 2.5
  assert found.high - found.low < 12 and found.misfit < 1.1
  assert tables.extrapolated(lines[:6], "x", 60_000, at_end) is None
  flat = [{"step": step, "test": {"x": cell(0.3)}} for step in steps]
  for error in (0.3, 0.4):  # of all test tasks: those of the curve may be easier
    assert np.allclose(
      tables.extrapolated(flat, "x", 60_000, cell(error))[:3], 100 - 100 * error, atol=2.5
    )


def test_a_curve_of_another_form_is_not_extrapolated():
  """One that falls slowly at first, then fast, as that of MAML on 20-way tasks."""
  cell = lambda error: {"accuracy": 1 - error, "interval95": 0.02}
  errors = 0.3 + 0.6 / (1 + np.exp(np.arange(-5, 5)))
  lines = [
    {"step": 500 * (number + 1), "test": {"x": cell(error)}} for number, error in enumerate(errors)
  ]
  assert tables.extrapolated(lines, "x", 60_000, cell(errors[-1])).misfit > 1.5


def test_the_beginning_of_a_long_run_does_not_predict_its_end():
  """The numbers of the text on Reptile's rows."""
  lines = folders.read_lines(tables.RESULTS / "omniglot_5way_reptile")
  begun = [line for line in lines if line["step"] <= 20_000]
  text = (ROOT / "experiments" / "README.md").read_text().replace("\n", " ")
  for cell in ("1-shot inductive", "1-shot transductive"):
    found = tables.extrapolated(begun, cell, 100_000, begun[-1]["test"][cell])
    assert f"{found.accuracy:.1f} ({found.low:.1f} to {found.high:.1f}) for " in text
    measured = tables.longest("omniglot_5way_reptile")["cells"][cell]["accuracy"]
    assert 100 * measured > found.high and f"{100 * measured:.1f} was" in text


def test_the_paper_has_24_cells():
  assert sum(len(cells) for cells in tables.PAPER.values()) == 24


def test_the_version_is_the_same_everywhere():
  version = metadata.version("metajax")
  assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
  assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()
  assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()
