"""The page about runs, whose numbers are read back from it."""

import html.parser
import json
import shutil
from collections import namedtuple

import jax
import numpy as np
import pytest

import metajax
from experiments import cli, folders, report
from experiments.report import Predicted, Report


class Tables(html.parser.HTMLParser):
  """The rows of all tables of a page."""

  def __init__(self, page):
    super().__init__()
    self.tables, self._cell = [], None
    self.feed(page)

  def handle_starttag(self, tag, attributes):
    if tag == "table":
      self.tables.append([])
    if tag == "tr":
      self.tables[-1].append([])
    if tag in ("td", "th"):
      self._cell = ""

  def handle_data(self, data):
    if self._cell is not None:
      self._cell += data

  def handle_endtag(self, tag):
    if tag in ("td", "th"):
      self.tables[-1][-1].append(self._cell)
      self._cell = None


def cell(accuracy, interval=0.01):
  return {"accuracy": accuracy, "interval95": interval}


def write_run(folder, steps, *, complete=True, **flags):
  """A run whose accuracy grows from 0.2 to 0.7."""
  folder.mkdir()
  flags = {"ways": 5, "dataset": "glyphs", "meta_steps": steps, **flags}
  (folder / "flags.txt").write_text("".join(f"--{k}={v}\n" for k, v in flags.items()) + "# data\n")
  lines = [
    {
      "step": step,
      "seconds": step / 10,
      "test": {"1-shot inductive": cell(0.2 + 0.5 * step / steps)},
      **({"losses": [2.0, 1.0]} if step else {}),
    }
    for step in (0, steps // 2, steps)
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  if complete:
    result = {
      "cells": {"1-shot inductive": {**cell(0.7123, 0.0123), "tasks": 400}},
      "meta_steps": steps,
      "meta_steps_per_second": 10.0,
      "peak_memory_mb": 321,
      "parameters": 1234,
      "versions": {"python": "3.11", "jax": "0.10.2", "machine": "a <fast> one"},
    }
    (folder / "result.json").write_text(json.dumps(result))
  return str(folder)


def written(tmp_path, *runs, **options):
  out = tmp_path / "page.html"
  report.program(Report(out=str(out), **options), list(runs))()
  return out


def test_numbers_come_back_from_the_page(tmp_path):
  first = write_run(tmp_path / "first", 100, inner_rate=0.1)
  second = write_run(tmp_path / "se<co>nd", 200, inner_rate=0.2, complete=False)
  page = written(tmp_path, first, second, tasks=0).read_text()
  results, differences, costs = Tables(page).tables
  assert results[1] == [
    "first", "1-shot inductive", "71.23 +- 1.23 %", "400", "20.00 +- 1.00 %", "100",
  ]  # fmt: skip
  assert results[2][0] == "se<co>nd" and results[2][-1] == "200, still training"
  assert results[2][2] == "70.00 +- 1.00 %"
  assert differences[1:] == [["--inner_rate", "0.1", "0.2"], ["--meta_steps", "100", "200"]]
  assert costs[1][:5] == ["first", "10", "10.0", "321", "1234"] and costs[1][5] == "a <fast> one"
  assert page.count("data:image/svg+xml") == 2 and "http" not in page.replace("http-equiv", "")
  assert "--dataset=glyphs" in page and "Guessing reaches 20 % at 5 ways" in page


def task(truth, predictions):
  image = np.zeros((2, 4, 4, 1), np.uint8)
  two = np.arange(2)
  return Predicted(["ash", "<elm>"], image, two, image, np.array(truth), np.array(predictions))


def test_predictions_and_confusions():
  tasks = [task([0, 1], [0, 0]), task([0, 1], [0, 1]), task([0, 1], [1, 0])]
  page = "".join(report._predictions(tasks))
  assert "predicted 3 of 6 examples rightly" in page
  *examples, confused = Tables(page).tables
  assert len(examples) == 3 and page.count('class="wrong"') == 3
  assert [(row[0], row[2], row[4]) for row in confused[1:]] == [
    ("<elm>", "ash", "2"), ("ash", "<elm>", "1"),
  ]  # fmt: skip
  assert "Nothing" in "".join(report._predictions(tasks[1:2]))


def test_the_learner_is_asked(tmp_path, monkeypatch, splits):
  """A learner that knows each class by its brightness, of which the second is told wrongly."""
  Learned = namedtuple("Learned", ["model", "adapt_params"])
  model = metajax.Model(None, lambda params, inputs: jax.nn.one_hot(params[len(inputs) - 3 :], 3))
  adapt = lambda train, key: jax.numpy.array([0, 2, 2])
  monkeypatch.setattr(metajax, "load", lambda path: Learned(model, adapt))
  monkeypatch.setattr(
    metajax, "inductive", lambda apply: lambda params, task: apply(params, task.test.inputs)
  )
  monkeypatch.setattr(report.build, "load", lambda recipe: splits)
  path = write_run(tmp_path / "run", 4, ways=3, eval_shots="2,1", eval_batch=3)
  run = report.read_run(path)
  with pytest.raises(ValueError, match="not those that the run was trained on"):
    report.predict_tasks(run, Report(tasks=2))
  with (tmp_path / "run" / "flags.txt").open("a") as file:
    file.write(f"# {folders.describe(splits)}\n")
  # The folder is of the other runs on the page: glyphs have none.
  first, second = report.predict_tasks(run, Report(tasks=2, data_dir=str(tmp_path)))
  assert first.predictions.tolist() == [0, 2, 2] and first.truth.tolist() == [0, 1, 2]
  assert first.support.shape == (6, 28, 28, 1) and len(set(first.classes)) == 3
  assert first.classes != second.classes


def test_runs_of_other_kinds(tmp_path):
  """One that diverged, one judged on training tasks only, and names that mean something else."""
  diverged = write_run(tmp_path / "diverged", 4)
  guess = {"1-shot inductive": {**cell(0.2), "tasks": 4}}
  content = json.dumps({"cells": guess, "diverged": "at meta-step 3"})
  (tmp_path / "diverged" / "result.json").write_text(content)
  other = write_run(tmp_path / "a$x_{$BODY", 4, complete=False)
  lines = (tmp_path / "a$x_{$BODY" / "metrics.jsonl").read_text()
  (tmp_path / "a$x_{$BODY" / "metrics.jsonl").write_text(lines.replace('"test"', '"train"'))
  page = written(tmp_path, diverged, other, tasks=0).read_text()
  results = Tables(page).tables[0]
  assert results[1][-1] == "4, diverged" and results[1][2] == "20.00 +- 1.00 %"
  assert results[2][:2] == ["a$x_{$BODY", "not judged yet"]
  assert "<title>diverged, a$x_{$BODY</title>" in page


def test_flags_may_stand_anywhere(tmp_path):
  run, out = write_run(tmp_path / "run", 4), str(tmp_path / "page.html")
  rest = []
  (found,) = cli.parse(["--tasks", "0", run, f"--out={out}"], (Report(),), rest=rest)
  assert found == Report(tasks=0, out=out) and rest == [run]
  with pytest.raises(ValueError, match="unexpected argument"):
    cli.parse([run], (Report(),))


def test_what_cannot_be_shown_is_said(tmp_path):
  run = write_run(tmp_path / "run", 4)
  page = written(tmp_path, run, tasks=2).read_text()
  assert "There are none to show" in page and "learner.safetensors" in page
  with pytest.raises(ValueError, match="give the folders of one or more runs"):
    report.program(Report(), [])
  with pytest.raises(ValueError, match="holds no few-shot run with a learning curve"):
    report.program(Report(), [str(tmp_path)])
  (tmp_path / "both").mkdir()
  for seed in range(2):
    write_run(tmp_path / "both" / f"seed{seed}", 4)
  with pytest.raises(ValueError, match=r"give the runs in it, such as .*both/seed0"):
    report.program(Report(), [str(tmp_path / "both")])
  log = tmp_path / "run" / "metrics.jsonl"
  log.write_text(log.read_text().replace('"test"', '"validation"'))
  assert report.read_run(run).lines[0]["validation"]
  with pytest.raises(ValueError, match=r"must end in \.html"):
    report.program(Report(out="page.pdf"), [run])


def test_a_browser_shows_the_page(tmp_path):
  playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to look")
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  if chromium is None:
    pytest.skip("no Chromium to look with")
  page_file = written(tmp_path, write_run(tmp_path / "run", 100), tasks=0)
  with playwright.sync_playwright() as started:
    browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 420, "height": 800})
    page.goto(page_file.as_uri())
    assert "71.23 +- 1.23 %" in page.locator("table").first.inner_text()
    for picture in page.locator("img.plot").all():
      natural, shown = picture.evaluate("image => [image.naturalWidth, image.width]")
      assert natural > 0 and shown <= 420
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    browser.close()
