"""One page about one or more few-shot runs, to look at and to send: a single HTML file.

  python -m experiments.report RUN...
  python -m experiments.report --data_dir=DIR --out=report.html RUN RUN

It shows what was run and how the runs differ, their learning curves and results beside those of the
untrained networks, and, for runs whose learner file and data are here, example tasks with their
images and predictions, and which classes are taken for which. RUN is the folder of a run, which may
still be training.
"""

import base64
import collections
import html
import io
import string
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

import metajax
from experiments import build, cli, folders, plots
from experiments.recipes import Recipe
from experiments.runs import LEARNER
from experiments.settings import Settings, option

_EXAMPLES = 3  # tasks that are shown with their images
_CONFUSED = 12  # pairs of classes that are shown


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Report(Settings):
  """Where the page is written, and what is computed for it."""

  out: str = option("report.html", "The page.")
  tasks: int = option(50,
    "Test tasks to predict for example tasks and confusions; 0 leaves them out.", at_least=0)
  data_dir: str | None = option(None,
    "Folder with the archives or the images of the data set, as for few_shot.")
  cache_dir: str | None = option(None, "Where prepared data is kept.")
# fmt: on


class Run(NamedTuple):
  """What a run's folder holds."""

  path: Path
  name: str
  flags: dict[str, str]
  lines: list[folders.Line]
  result: folders.Line | None  # None while it is training


class Predicted(NamedTuple):
  """A test task and what is predicted of it."""

  classes: list[str]  # the names of the classes 0 ... ways - 1
  support: np.ndarray  # [n, height, width, channels]
  labels: np.ndarray  # [n]
  queries: np.ndarray  # [m, height, width, channels]
  truth: np.ndarray  # [m]
  predictions: np.ndarray  # [m]


def read_run(folder: str) -> Run:
  """Reads the folder of a run.

  Raises:
    ValueError: if it holds none.
  """
  path = Path(folder).expanduser()
  flags = path / "flags.txt"
  lines = folders.read_lines(path)
  if not flags.is_file() or not any(split in line for line in lines for split in plots.SPLITS):
    seeds = [one.name for one in folders.seeds_in(path) if (one / "flags.txt").is_file()]
    advice = f"give the runs in it, such as {folder}/{seeds[0]}" if seeds else "give its --out"
    raise ValueError(f"{folder} holds no few-shot run with a learning curve: {advice}")
  pairs = [line[2:].split("=", 1) for line in flags.read_text().splitlines() if line[:2] == "--"]
  result = folders.finished(path) if (path / "result.json").exists() else None
  return Run(path, path.resolve().name, {name: value for name, value in pairs}, lines, result)


def page(runs: Sequence[Run], report: Report) -> str:
  """The page as HTML."""
  parts = [
    f"<h1>{_text(', '.join(run.name for run in runs))}</h1>",
    "<h2>Results</h2>",
    "".join(_results(runs)),
    "<h2>Learning curves</h2>",
    _picture(partial(_draw_accuracy, runs), "accuracy against meta-steps"),
    _picture(partial(_draw_losses, runs), "losses against meta-steps"),
    "<h2>Settings</h2>",
    "".join(_settings(runs)),
    "<h2>Time and memory</h2>",
    _costs(runs),
  ]
  for run in runs if report.tasks else ():
    parts.append(f"<h2>Predictions of {_text(run.name)}</h2>")
    try:
      parts += _predictions(predict_tasks(run, report))
    except (ValueError, OSError) as error:
      parts.append(f"<p>There are none to show: {_text(error)}.</p>")
      print(f"{run.path}: no example tasks: {error}", file=sys.stderr)
  title = _text(", ".join(run.name for run in runs))
  return string.Template(_PAGE).substitute(title=title, body="\n".join(parts))


def _results(runs: Sequence[Run]) -> Iterator[str]:
  rows = []
  for run in runs:
    first = run.lines[0]
    untrained = first.get("test", {}) if first["step"] == 0 else {}
    last = run.result["cells"] if run.result else run.lines[-1].get("test", {})
    step = (run.result or {}).get("meta_steps", run.lines[-1]["step"])
    state = "" if run.result else ", still training"
    state = ", diverged" if run.result and "diverged" in run.result else state
    for cell, value in last.items():
      before = plots.percent(untrained[cell]) if cell in untrained else ""
      row = [run.name, cell, plots.percent(value), value.get("tasks", ""), before, f"{step}{state}"]
      rows.append(row)
    if not last:
      rows.append([run.name, "not judged yet", "", "", "", f"{step}{state}"])
  yield _table(["run", "test tasks", "accuracy", "tasks", "untrained", "meta-steps"], rows)
  ways = sorted({run.flags.get("ways", "") for run in runs})
  guess = ", ".join(f"{100 / int(way):.0f} % at {way} ways" for way in ways if way)
  yield (
    f"<p>+- is a 95 % interval over tasks. Guessing reaches {guess}. The untrained networks are "
    "adapted in the same way, on fewer tasks.</p>"
  )


def _draw_accuracy(runs: Sequence[Run], path: Path) -> None:
  """One run with the curves of all splits, or several with those of test tasks."""
  styles = {"test": "-", "validation": "-.", "train": "--"}
  one = len(runs) == 1
  judged = lambda run, split: [line for line in run.lines if split in line]
  shown = lambda run: [split for split in styles if judged(run, split)][: None if one else 1]
  curves = [
    (run, split, cell, f"C{number}")
    for split in styles
    for number, (run, cell) in enumerate(
      (run, cell) for run in runs if split in shown(run) for cell in judged(run, split)[0][split]
    )
  ]
  with plots.drawing(path, figsize=(8.5, 4.2)) as figure:
    axes = figure.subplots()
    for run, split, cell, color in curves:
      steps, mean, band = plots.curve([judged(run, split)], split, cell)
      name = "" if one else f"{_no_formula(run.name)}, "
      label = f"{name}{split} tasks, {cell}"
      axes.plot(steps, mean, styles[split], color=color, marker=".", label=label)
      if split == "test":
        axes.fill_between(steps, mean - band, mean + band, color=color, alpha=0.2, lw=0)
    for ways in sorted({int(run.flags["ways"]) for run in runs if "ways" in run.flags}):
      axes.axhline(100 / ways, color="gray", ls=":", label=f"guessing, {ways} ways")
    axes.set(xlabel="meta-steps", ylabel="accuracy after adaptation (%)", ylim=(0, 100))
    _finish(figure, axes, title=plots.band_title(1))


def _no_formula(name: str) -> str:
  """A name that matplotlib does not take for a formula."""
  return name.replace("$", r"\$")


def _finish(figure: Any, axes: Any, **legend: Any) -> None:
  axes.set_xlim(0, None)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.grid(alpha=0.3)
  figure.legend(fontsize=8, title_fontsize=8, loc="outside right center", **legend)


def _draw_losses(runs: Sequence[Run], path: Path) -> None:
  with plots.drawing(path, figsize=(8.5, 3.4)) as figure:
    axes = figure.subplots()
    for number, run in enumerate(runs):
      lines = [line for line in run.lines if "losses" in line]
      steps = [line["step"] for line in lines]
      for place, style in ((0, "--"), (-1, "-")):
        what = "first loss" if place == 0 else "last loss"
        values = [line["losses"][place] for line in lines]
        label = f"{_no_formula(run.name)}, {what}"
        axes.plot(steps, values, style, color=f"C{number}", marker=".", label=label)
    axes.set(xlabel="meta-steps", ylabel="loss of training tasks", ylim=(0, None))
    _finish(figure, axes)


def _settings(runs: Sequence[Run]) -> Iterator[str]:
  names = sorted({name for run in runs for name in run.flags})
  values = {name: [run.flags.get(name, "") for run in runs] for name in names}
  differ = [name for name in names if len(set(values[name])) > 1]
  if len(runs) > 1:
    yield "<p>The runs differ in:</p>"
    head = ["setting", *(run.name for run in runs)]
    yield _table(head, [[f"--{name}", *values[name]] for name in differ])
    yield "<p>They have in common:</p>"
  same = " ".join(f"--{name}={values[name][0]}" for name in names if name not in differ)
  yield f"<pre>{_text(same)}</pre>"


def _costs(runs: Sequence[Run]) -> str:
  rows = []
  for run in runs:
    result = run.result or {}
    versions = result.get("versions", {})
    rows.append(
      [
        run.name,
        f"{run.lines[-1]['seconds']:.0f}",
        result.get("meta_steps_per_second", ""),
        result.get("peak_memory_mb", ""),
        result.get("parameters", ""),
        folders.where(versions),
        f"Python {versions['python']}, jax {versions['jax']}" if versions else "",
      ]
    )
  head = ["run", "training (s)", "meta-steps/s", "peak memory (MB)", "parameters", "machine", ""]
  return _table(head, rows)


def predict_tasks(run: Run, report: Report) -> list[Predicted]:
  """Adapts the run's learner to test tasks, and predicts each of their test examples alone.

  Raises:
    ValueError: if there is no learner file, or the data is not here.
  """
  (recipe,) = cli.parse([f"--{name}={value}" for name, value in run.flags.items()], (Recipe(),))
  learned = metajax.load(run.path / LEARNER)
  data_dir = report.data_dir if recipe.dataset != "glyphs" else None
  splits = build.load(replace(recipe, data_dir=data_dir, cache_dir=report.cache_dir))
  if f"# {folders.describe(splits)}" not in (run.path / "flags.txt").read_text().splitlines():
    raise ValueError("the data are not those that the run was trained on: give their --data_dir")
  shots, _ = max(recipe.shots_and_batches)  # as the learner file
  sample_task = metajax.data.few_shot.sample_task(
    splits.test, ways=recipe.ways, train_shots=shots, test_shots=recipe.eval_queries
  )
  predict = metajax.inductive(learned.model.apply)

  @jax.jit
  def one(key: jax.Array) -> tuple[metajax.Task, jax.Array]:
    task_key, batch_key = jax.random.split(key)
    task = sample_task(task_key)
    params = learned.adapt_params(task.train, batch_key)
    return task, predict(params, task).argmax(axis=-1)

  found = []
  # No other key of the run.
  key = jax.random.fold_in(jax.random.key(recipe.seed_of_data), 0x7265706F)
  for number in range(report.tasks):
    task, predictions = jax.device_get(one(jax.random.fold_in(key, number)))
    classes = [str(splits.test.names[number]) for number in task.classes]
    support, queries = task.train, task.test
    found.append(
      Predicted(
        classes, support.inputs, support.targets, queries.inputs, queries.targets, predictions
      )
    )
  return found


def _predictions(tasks: Sequence[Predicted]) -> Iterator[str]:
  right = sum(int(np.sum(task.truth == task.predictions)) for task in tasks)
  total = sum(len(task.truth) for task in tasks)
  yield (
    f"<p>The learner adapted to {len(tasks)} test tasks, and predicted {right} of {total} examples "
    "rightly, each alone. Examples to adapt to stand on the left, predicted ones on the right; "
    "wrong predictions are marked, with the class that was predicted.</p>"
  )
  for task in tasks[:_EXAMPLES]:
    rows = []
    for label, name in enumerate(task.classes):
      support = "".join(_image(image) for image in task.support[task.labels == label])
      queries = ""
      for image, said in zip(
        task.queries[task.truth == label], task.predictions[task.truth == label], strict=True
      ):
        wrong = said != label
        note = f"<figcaption>{_text(task.classes[said])}</figcaption>" if wrong else ""
        queries += f'<figure class="{"wrong" if wrong else "right"}">{_image(image)}{note}</figure>'
      rows.append([_text(name), support, queries])
    yield _table(["class", "examples", "predicted"], rows, escape=False)
  confused: collections.Counter[tuple[str, str]] = collections.Counter()
  shown: dict[tuple[str, str], tuple[str, str]] = {}
  for task in tasks:
    for image, truth, said in zip(task.queries, task.truth, task.predictions, strict=True):
      if truth != said:
        pair = task.classes[truth], task.classes[said]
        confused[pair] += 1
        shown[pair] = _image(image), _image(task.support[task.labels == said][0])
  yield "<h3>What is taken for what</h3>"
  if not confused:
    yield "<p>Nothing.</p>"
    return
  rows = [
    [_text(truth), shown[truth, said][0], _text(said), shown[truth, said][1], str(count)]
    for (truth, said), count in confused.most_common(_CONFUSED)
  ]
  yield _table(["class", "example", "predicted", "its example", "times"], rows, escape=False)


def _image(image: np.ndarray) -> str:
  """An image as an HTML element that holds it."""
  if image.dtype != np.uint8:
    raise ValueError(f"images are {image.dtype}, and not uint8")
  pixels = image[..., 0] if image.shape[-1] == 1 else image
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, "png")
  return f'<img class="example" src="{_embedded("image/png", content.getvalue())}" alt="">'


def _picture(draw: Callable[[Path], None], title: str) -> str:
  with tempfile.TemporaryDirectory() as scratch:
    path = Path(scratch, "picture.svg")
    draw(path)
    source = _embedded("image/svg+xml", path.read_bytes())
  return f'<img class="plot" src="{source}" alt="{title}">'


def _embedded(kind: str, content: bytes) -> str:
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, escape: bool = True) -> str:
  shown = _text if escape else str
  line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
  body = "\n".join(line("td", map(shown, row)) for row in rows)
  return f"<table>\n{line('th', map(_text, head))}\n{body}\n</table>"


def _text(value: Any) -> str:
  return html.escape(str(value))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem;
    max-width: 60rem; }
  table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
  th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #ddd; }
  pre { white-space: pre-wrap; background: #f4f4f4; padding: .7rem; }
  .plot { max-width: 100%; display: block; }
  .example { width: 42px; image-rendering: pixelated; border: 1px solid #ccc; margin: 1px; }
  figure { display: inline-block; margin: 1px; vertical-align: top; text-align: center; }
  figcaption { font-size: .75rem; color: #b00020; max-width: 6rem; }
  .wrong .example { border: 2px solid #b00020; }
</style>
</head>
<body>
$body
</body>
</html>
"""


def program(report: Report, names: Sequence[str]) -> Callable[[], None]:
  """Checks what the binary is asked to do, and returns what to run."""
  if not names:
    raise ValueError("give the folders of one or more runs")
  out = Path(report.out).expanduser()
  if out.suffix != ".html" or not out.parent.is_dir():
    raise ValueError(f"--out={out} must end in .html, in a folder that exists")
  runs = [read_run(name) for name in names]

  def write() -> None:
    folders.replace_file(out, page(runs, report))
    print(f"{out}, {out.stat().st_size / 1e6:.1f} MB")

  return write


if __name__ == "__main__":
  cli.main_without_folder(program, Report(), positional=True)
