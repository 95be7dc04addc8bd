"""Makes the tables of results in the documentation from the files in experiments/results.

  python -m experiments.tables

A table stands between two comments of a page, `<!-- table: NAME -->` and `<!-- end -->`, and is
replaced there.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import metajax
from benchmarks import cases
from experiments import combinations, family, folders, plots
from experiments.recipes import PRESETS
from experiments.runs import TEST_TASKS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
_MEASURED = HERE.parent / "benchmarks" / "results"
PAGES = (
  HERE / "README.md", HERE.parent / "README.md", HERE.parent / "docs" / "normalization.md"
)  # fmt: skip
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# The paper's Tables 1 and 2 in percent. The +- of MAML and FOMAML is a 95 % interval over 600
# tasks; that of Reptile is the deviation between 3 seeds.
ONE, FIVE = "1-shot transductive", "5-shot transductive"
PAPER: dict[str, dict[str, tuple[float, float]]] = {
  "mini_imagenet_1shot_5way_maml": {ONE: (48.70, 1.84)},
  "mini_imagenet_5shot_5way_maml": {FIVE: (63.11, 0.92)},
  "mini_imagenet_1shot_5way_fomaml": {ONE: (48.07, 1.75)},
  "mini_imagenet_5shot_5way_fomaml": {FIVE: (63.15, 0.91)},
  "mini_imagenet_5way_reptile": {
    "1-shot inductive": (47.07, 0.26),
    ONE: (49.97, 0.32),
    "5-shot inductive": (62.74, 0.37),
    FIVE: (65.99, 0.58),
  },
  "omniglot_1shot_5way_maml": {ONE: (98.7, 0.4)},
  "omniglot_5shot_5way_maml": {FIVE: (99.9, 0.1)},
  "omniglot_1shot_5way_fomaml": {ONE: (98.3, 0.5)},
  "omniglot_5shot_5way_fomaml": {FIVE: (99.2, 0.2)},
  "omniglot_5way_reptile": {
    "1-shot inductive": (95.39, 0.09),
    ONE: (97.68, 0.04),
    "5-shot inductive": (98.90, 0.10),
    FIVE: (99.48, 0.06),
  },
  "omniglot_1shot_20way_maml": {ONE: (95.8, 0.3)},
  "omniglot_5shot_20way_maml": {FIVE: (98.9, 0.2)},
  "omniglot_1shot_20way_fomaml": {ONE: (89.4, 0.5)},
  "omniglot_5shot_20way_fomaml": {FIVE: (97.9, 0.1)},
  "omniglot_20way_reptile": {
    "1-shot inductive": (88.14, 0.15),
    ONE: (89.43, 0.14),
    "5-shot inductive": (96.65, 0.33),
    FIVE: (97.12, 0.32),
  },
  "glyphs_5way_reptile": {},
}


def few_shot() -> Iterator[str]:
  """The rows of Tables 1 and 2, from the longest run of each recipe."""
  yield (
    "| recipe | cell | untrained | ours | tasks | the paper | ours - paper | meta-steps | "
    "minutes | machine |"
  )
  for recipe, of_paper in PAPER.items():
    result = longest(recipe) or {"cells": {}, "meta_steps": 0}
    before = untrained(recipe)
    about = f"{result['meta_steps']:,} of {PRESETS[recipe].meta_steps:,} |"
    if "train_seconds" in result:
      minutes = result["train_seconds"] / 60
      about += f" {minutes:.{0 if minutes >= 10 else 1}f} | {folders.where(result['versions'])}"
    else:
      about += " |"
    for number, cell in enumerate({**result["cells"], **of_paper}):
      ours, tasks, paper, apart = "", "", "", ""
      if cell in of_paper:
        paper = _of_paper(of_paper[cell])
      if cell in result["cells"]:
        found = result["cells"][cell]
        ours = _percent(found)
        tasks = f"{found['tasks']:,}"
        apart = f"{100 * found['accuracy'] - of_paper[cell][0]:+.1f}" if paper else ""
      shown = [recipe if number == 0 else "", cell, before.get(cell, "")]
      shown += [ours, tasks, paper, apart]
      yield f"| {' | '.join(shown)} | {about if number == 0 else ' | |'} |"


def _percent(cell: folders.Line) -> str:
  """The accuracy of a cell and its interval over tasks, in percent."""
  return f"{100 * cell['accuracy']:.2f} +- {100 * plots.interval_of(cell):.2f}"


def _of_paper(cell: tuple[float, float]) -> str:
  """A cell of the paper's tables."""
  mean, spread = cell
  return f"{mean:.2f} +- {spread:.2f}"


def highlights() -> Iterator[str]:
  """A few of the cells, transductive, beside the paper's."""
  yield "| experiment | untrained | ours | the paper |"
  for recipe, cell, title, result in _chosen():
    of = f"{result['meta_steps']:,} of {PRESETS[recipe].meta_steps:,} meta-steps"
    ours, paper = _percent(result["cells"][cell]), _of_paper(PAPER[recipe][cell])
    before = untrained(recipe).get(cell, "")
    yield f"| {title}, transductive, {of} | {before} | {ours} % | {paper} % |"


def transduction() -> Iterator[str]:
  """The same cells without and with transduction."""
  yield "| run | inductive | transductive |"
  for _, cell, title, result in _chosen():
    both = cell.replace("transductive", "inductive"), cell
    cells = " | ".join(f"{_percent(result['cells'][one])} %" for one in both)
    yield f"| {title}, {result['meta_steps']:,} meta-steps | {cells} |"


def _chosen() -> Iterator[tuple[str, str, str, folders.Line]]:
  """Recipe, cell, its title, and the result of the longest run, for a few cells of Omniglot."""
  for recipe, cell in (
    ("omniglot_5way_reptile", FIVE),
    ("omniglot_5way_reptile", ONE),
    ("omniglot_1shot_5way_maml", ONE),
  ):
    result, algorithm = longest(recipe), family.TITLES[PRESETS[recipe].algorithm]
    assert result is not None
    yield recipe, cell, f"Omniglot 5-way {cell.split()[0]}, {algorithm}", result


def longest(recipe: str) -> folders.Line | None:
  """The result of a recipe's run with the most meta-steps, or None if there is none."""
  paths = _by_length(recipe)
  return folders.finished(paths[-1]) if paths else None


def untrained(recipe: str) -> dict[str, str]:
  """By cell, the accuracy in percent of the network from which a recipe's longest run began."""
  paths = _by_length(recipe)
  first = [line for path in paths[-1:] for line in folders.read_lines(path)[:1]]
  cells = first[0].get("test", {}) if first and first[0]["step"] == 0 else {}
  shown = lambda cell: f"{100 * cell['accuracy']:.1f} +- {100 * cell['interval95']:.1f}"
  return {name: shown(cell) for name, cell in cells.items()}


def _by_length(recipe: str) -> list[Path]:
  """The folders of a recipe's complete runs, the shortest first."""
  paths = [
    path.parent
    for path in RESULTS.glob(f"{recipe}*/result.json")
    if re.fullmatch(rf"{recipe}(_\d+)?", path.parent.name)
  ]
  return sorted(paths, key=lambda path: folders.finished(path)["meta_steps"])


def extrapolations() -> Iterator[str]:
  """What the learning curves of shorter runs say of the full length, and what was found there."""
  yield (
    "| recipe | cell | measured (after meta-steps) | full length, extrapolated | "
    "full length, measured | the paper | hours at that pace |"
  )
  for recipe, of_paper in PAPER.items():
    length = PRESETS[recipe].meta_steps
    results = [(path, folders.finished(path)) for path in _by_length(recipe)]
    shorter = [one for one in results if one[1]["meta_steps"] < length]
    if not shorter:
      continue
    path, result = shorter[-1]
    full = results[-1][1]["cells"] if len(shorter) < len(results) else {}
    hours = f"{length / result['meta_steps_per_second'] / 3600:.1f}"
    for cell, in_paper in of_paper.items():
      found = extrapolated(folders.read_lines(path), cell, length, result["cells"][cell])
      if found is None:
        continue
      ours = f"{100 * result['cells'][cell]['accuracy']:.2f} ({result['meta_steps']:,})"
      there = _percent(full[cell]) if cell in full else ""
      at_length = f"{found.accuracy:.1f} ({found.low:.1f} to {found.high:.1f})"
      if found.misfit > _WORST:
        at_length = "not of this form"
      yield f"| {' | '.join([recipe, cell, ours, at_length, there, _of_paper(in_paper), hours])} |"


def lengths() -> Iterator[str]:
  """The work of each row at its full length, and how long that takes.

  The work is counted as in `benchmarks.cases`. A meta-step of Reptile with the same data and the
  paper's network, as the benchmarks measured it, gives the rate of two CPU cores.
  """
  yield "| recipe | meta-steps | 10^15 operations | hours on two cores |"
  rates = {
    row["model"]: row["flops_per_second"]
    for name in ("reptile", "mini_imagenet")
    for row in map(json.loads, (_MEASURED / f"{name}.jsonl").read_text().splitlines())
    if (row["meta_batch"], row["execution"], row["convolution"]) == (5, "sharded", "cpu")
  }
  for name in PAPER:
    recipe = PRESETS[name]
    if recipe.dataset not in rates:
      continue
    tail = recipe.ways * recipe.tail_shots if recipe.tail == "separate" else recipe.inner_batch
    case = cases.Case(
      recipe.algorithm, recipe.dataset, recipe.inner_steps, recipe.meta_batch, recipe.execution,
      "cpu", recipe.inner_batch, tail, recipe.inner_optimizer, 1,
    )  # fmt: skip
    forward = cases.network(recipe.dataset, None).flops
    work = recipe.meta_steps * cases.step_flops(case, forward)
    hours = work / rates[recipe.dataset] / 3600
    yield f"| {name} | {recipe.meta_steps:,} | {work / 1e15:.2f} | {hours:.1f} |"


_FEWEST = 6  # points of a curve to which three numbers are fitted
_WORST = 1.5  # the largest misfit with which a curve is taken to have the form


class Extrapolation(NamedTuple):
  """The accuracy in percent that a learning curve leads to: see `extrapolated`.

  Attributes:
    accuracy: the median of the fits.
    low, high: their 95 % interval.
    misfit: how far the points are from the fitted curve, as a multiple of their noise; both are
      root mean squares.
  """

  accuracy: float
  low: float
  high: float
  misfit: float


def extrapolated(
  lines: Sequence[folders.Line], cell: str, length: int, at_end: folders.Line
) -> Extrapolation | None:
  """Extrapolates a learning curve to more meta-steps.

  The error rate on test tasks is fitted by a + b t^-c, with a and b not negative and c from 0.1 to
  2, by least squares. All points of a curve are of the same few tasks, which may be easier or
  harder than others: the curve is shifted so that it ends at the accuracy on all test tasks. The
  interval is of 1,000 fits to curves with noise like that of the points. It says how well the
  points determine the curve, and not whether the curve keeps this form.

  Args:
    lines: of the learning curve.
    cell: the name of the accuracy in them.
    length: the meta-steps at which the accuracy is wanted.
    at_end: the accuracy on all test tasks after the last of the lines, and its interval.

  Returns:
    The extrapolation, or None if there are fewer than six points.
  """
  points = [(line["step"], line["test"][cell]) for line in lines if line["step"] > 0]
  if len(points) < _FEWEST:
    return None
  steps = np.array([step for step, _ in points]) / length
  errors = np.array([1 - found["accuracy"] for _, found in points])
  noise = np.array([found["interval95"] / 1.96 for _, found in points])
  noise = np.maximum(noise, np.median(noise))  # points with no error at all are not without noise
  rng = np.random.default_rng(0)
  drawn, shift = rng.normal(size=(1_001, len(points))), rng.normal(size=(1_001, 1))
  drawn[0] = shift[0] = 0  # the first curve is that of the points
  curves = errors + noise * drawn
  last = 1 - at_end["accuracy"] + at_end["interval95"] / 1.96 * shift
  curves = np.maximum(curves - curves[:, -1:] + last, 0)
  best, ends = np.full(len(curves), np.inf), np.zeros(len(curves))
  for c in np.linspace(0.1, 2.0, 39):
    power = steps**-c
    spread = power - power.mean()
    b = np.maximum(curves @ spread / (spread @ spread), 0)
    a = curves.mean(axis=1) - b * power.mean()
    through_zero = np.maximum(curves @ power / (power @ power), 0)
    a, b = np.where(a < 0, 0, a), np.where(a < 0, through_zero, b)
    residual = np.sum((curves - a[:, None] - b[:, None] * power) ** 2, axis=1)
    better = residual < best
    best, ends = np.where(better, residual, best), np.where(better, a + b, ends)  # t = length
  misfit = np.sqrt(best[0] / np.sum(noise**2))
  low, middle, high = 100 * (1 - np.quantile(ends[1:], [0.975, 0.5, 0.025]))
  return Extrapolation(float(middle), float(low), float(high), float(misfit))


def of_family() -> Iterator[str]:
  """The algorithms of `experiments.family` in the order of their accuracy."""
  result = folders.finished(RESULTS / "family")
  steps = result["steps"]
  yield (
    "| algorithm | Omniglot, inductive | transductive | ms a meta-step | waves, "
    + " | ".join(f"{step} {'step' if step == 1 else 'steps'}" for step in steps[1:])
    + " | ms a meta-step |"
  )
  accuracy = lambda row: row["cells"][ONE]["accuracy"]
  for name, row in sorted(result["methods"].items(), key=lambda one: -accuracy(one[1])):
    cells = [row["cells"][cell] for cell in ("1-shot inductive", ONE)]
    shown = [_percent(cell) for cell in cells]
    shown.append(f"{row['step_ms']['omniglot']:.0f}" if name != "scratch" else "")
    waves = row.get("waves")
    if waves is None:
      shown += [""] * len(steps)
    else:
      pairs = list(zip(waves["loss"], waves["interval95"], strict=True))
      shown += [f"{loss:.3f} +- {interval:.3f}" for loss, interval in pairs[1:]]
      shown.append(f"{row['step_ms']['waves']:.1f}" if name != "scratch" else "")
    yield f"| {family.TITLES[name]} | {' | '.join(shown)} |"


def sine() -> Iterator[str]:
  """The errors of Figure 1's methods."""
  shown = (0, 1, 5, 10, 32)
  names = {"random": "random", "reptile": "Reptile", "fomaml": "FOMAML", "maml": "MAML"}
  yield "| initialization | n = " + " | ".join(map(str, shown)) + " |"
  for name, row in folders.finished(RESULTS / "sine")["methods"].items():
    columns = zip(row["loss"], row["interval95"], row["deviation_between_seeds"], strict=True)
    cells = [f"{loss:.3f} +- {interval:.3f} ({apart:.3f})" for loss, interval, apart in columns]
    yield f"| {names.get(name, 'joint training')} | {' | '.join(cells[n] for n in shown)} |"


def expansions() -> Iterator[str]:
  """The coefficients of Section 5, measured and predicted."""
  rows: dict[int, list[str]] = {}
  for found in folders.finished(RESULTS / "expansions")["coefficients"]:
    of_grad, of_inner = found["avg_grad"], found["avg_grad_inner_over_alpha"]
    rows.setdefault(found["k"], []).extend(
      [
        f"{of_grad['measured']:.5f} ({of_grad['predicted']:.0f})",
        f"{of_inner['measured']:.3f} ({of_inner['predicted']:.0f})",
      ]
    )
  yield "| | MAML, a | b / alpha | FOMAML, a | b / alpha | Reptile, a | b / alpha |"
  for k, cells in rows.items():
    yield f"| k = {k} | {' | '.join(cells)} |"


_BOTH = ("5-shot inductive", "5-shot transductive")


def of_combinations() -> Iterator[str]:
  """The accuracies of Figure 3's curves over seeds, at full length and at a quarter of it."""
  columns = [
    f"{steps} steps, {cell}"
    for steps in ("40,000", "10,000")
    for cell in ("inductive", "transductive")
  ]
  yield f"| | {' | '.join(columns)} |"
  for name, (label, _) in combinations.CURVES.items():
    folders_of_seeds = [RESULTS / one / name for one in ("combinations", "combinations_10000")]
    cells = [_over_seeds(folder, cell) for folder in folders_of_seeds for cell in _BOTH]
    yield f"| {label} | {' | '.join(cells)} |"


def differences() -> Iterator[str]:
  """Differences between curves of Figure 3 on the same test tasks."""
  pairs = {
    "four - three (sums)": ("sum4", "sum3"),
    "three - two (sums)": ("sum3", "sum2"),
    "g4 - g3": ("last4", "last3"),
    "g3 - g2": ("last3", "last2"),
    "g2 - (g1 + g2)": ("last2", "sum2"),
  }
  yield "| after 40,000 steps | inductive | transductive |"
  for label, names in pairs.items():
    shown = [_difference(RESULTS / "combinations", *names, cell) for cell in _BOTH]
    yield f"| {label} | {' | '.join(shown)} |"


# What distinguishes the runs of g2 and g1 + g2, and where they are.
TWO_STEPS = {
  "40,000 steps, outer learning rate 0.25 to 0": "combinations",
  "10,000 steps, 0.25 to 0": "two_steps_10000",
  "10,000 steps, 0.25 throughout": "two_steps_constant",
}


def two_steps() -> Iterator[str]:
  """Two-step first-order MAML and Reptile on the same test tasks, and their difference by seed."""
  yield "| runs | g2 | g1 + g2 | g2 - (g1 + g2) | g2 - (g1 + g2), inductive |"
  for label, folder in TWO_STEPS.items():
    pair = [_by_seed(RESULTS / folder / name, FIVE) for name in ("last2", "sum2")]
    shown = [f"{np.mean(list(by_seed.values())):.2f}" for by_seed in pair]
    shown += [_difference(RESULTS / folder, "last2", "sum2", cell) for cell in reversed(_BOTH)]
    yield f"| {label} | {' | '.join(shown)} |"


def _over_seeds(folder: Path, cell: str) -> str:
  """The mean over the seeds of a curve and, if there are several, the deviation between them."""
  found = np.array(list(_by_seed(folder, cell).values()))
  apart = f" ({found.std(ddof=1):.2f})" if len(found) > 1 else ""
  return f"{found.mean():.2f}{apart}"


def _difference(folder: Path, name: str, other: str, cell: str) -> str:
  """The mean difference between two curves over the seeds that both have, and that of each seed."""
  one, two = (_by_seed(folder / curve, cell) for curve in (name, other))
  apart = np.array([one[seed] - two[seed] for seed in one if seed in two])
  return f"{apart.mean():+.2f} ({', '.join(f'{each:+.2f}' for each in apart)})"


def _by_seed(folder: Path, cell: str) -> dict[str, float]:
  """The accuracy of the run of each seed, in percent, by the name of its folder."""
  return {
    path.name: 100 * folders.finished(path)["cells"][cell]["accuracy"]
    for path in folders.seeds_in(folder)
  }


# Pairs of runs on Omniglot, before and since the network of their recipes inverts images.
INVERSION = {
  "FOMAML, 5-way, 2,000": ("inversion/5way_fomaml_upright", "inversion/5way_fomaml_inverted"),
  "FOMAML, 20-way, 5,000": ("inversion/20way_fomaml_upright", "omniglot_1shot_20way_fomaml_5000"),
  "FOMAML, 20-way, 1,000": (
    "inversion/20way_5shot_fomaml_upright",
    "omniglot_5shot_20way_fomaml_1000",
  ),
  "MAML, 5-way, 10,000": ("inversion/5way_maml_upright", "omniglot_1shot_5way_maml_10000"),
}
# Runs of MAML, Omniglot 1-shot, on a CPU and on a GPU, and meta-steps at which both were judged.
ON_GPU = {
  "5-way": ("omniglot_1shot_5way_maml_10000", "omniglot_1shot_5way_maml", (4_000, 8_000)),
  "20-way": ("omniglot_1shot_20way_maml_500", "omniglot_1shot_20way_maml_5000", (500,)),
}
# Runs of Omniglot 5-way Reptile that show what 1-shot accuracy depends on.
ONE_SHOT = {
  "20,000 steps, a state for each of the five tasks": "omniglot_5way_reptile_20000",
  "20,000 steps, a state handed on, as in the paper's code": "omniglot_5way_reptile_serial_20000",
  "100,000 steps, a state for each of the five tasks": "omniglot_5way_reptile",
}


def one_shot() -> Iterator[str]:
  """Reptile with one inner state for each task or one for all, and at two lengths."""
  cells = list(PAPER["omniglot_5way_reptile"])
  yield f"| run | tasks | {' | '.join(cells)} |"
  for label, folder in ONE_SHOT.items():
    found = folders.finished(RESULTS / folder)["cells"]
    tasks = found[cells[0]]["tasks"]
    yield f"| {label} | {tasks:,} | {' | '.join(_percent(found[cell]) for cell in cells)} |"
  paper = map(_of_paper, PAPER["omniglot_5way_reptile"].values())
  yield f"| the paper, 100,000 steps | 10,000 | {' | '.join(paper)} |"


def inversion() -> Iterator[str]:
  """MAML and FOMAML with images as they are, and with inverted ones."""
  yield "| run, meta-steps | | images as they are | inverted images | difference |"
  for label, pair in INVERSION.items():
    paths = [RESULTS / folder for folder in pair]
    before_and_since = [folders.finished(path)["cells"] for path in paths]
    for cell in sorted(before_and_since[0]):
      upright, inverted = (cells[cell] for cells in before_and_since)
      mean = inverted["accuracy"] - upright["accuracy"]
      interval = np.hypot(upright["interval95"], inverted["interval95"])
      if all((path / TEST_TASKS).is_file() for path in paths):  # the same tasks
        before, since = (_of_tasks(path)[cell.split()[1]] for path in paths)
        mean, interval = metajax.mean_and_interval(since - before)
      shown = [label, cell, _percent(upright), _percent(inverted)]
      yield f"| {' | '.join(shown)} | {100 * mean:+.2f} +- {100 * interval:.2f} |"


def matrix_products() -> Iterator[str]:
  """Points of the learning curves of MAML in float32 on a CPU, and in TF32 on a GPU."""
  yield "| MAML, 1-shot | meta-steps | | CPU, float32 | GPU, TF32 |"
  for label, (*pair, steps) in ON_GPU.items():
    by_step = [
      {line["step"]: line["test"] for line in folders.read_lines(RESULTS / folder)}
      for folder in pair
    ]
    for step, cell in itertools.product(steps, ("1-shot inductive", ONE)):
      shown = [_percent(curve[step][cell]) for curve in by_step]
      yield f"| {label} | {step:,} | {cell} | {' | '.join(shown)} |"


def _of_tasks(run: Path) -> dict[str, np.ndarray]:
  """The accuracy on each test task, by protocol."""
  lines = folders.read_lines(run, TEST_TASKS)
  return {
    protocol: np.array([value for line in lines for value in line["accuracy"][protocol]])
    for protocol in lines[0]["accuracy"]
  }


def _panel(
  folder: str, panel: str, head: str, name: Callable[[float], str] = "{:g}".format
) -> Iterator[str]:
  """A panel of Figure 4: accuracy of each curve against x."""
  points = [p for p in folders.finished(RESULTS / folder)["points"] if p["panel"] == panel]
  places = sorted({point["x"] for point in points})
  yield f"| ({panel}) {head} | {' | '.join(map(name, places))} |"
  curves: dict[str, dict[float, str]] = {}
  for point in points:
    accuracy = point["cells"]["5-shot transductive"]["accuracy"]
    curves.setdefault(point["curve"], {})[point["x"]] = f"{100 * accuracy:.1f}"
  for curve, cells in curves.items():
    yield f"| {curve} | {' | '.join(cells[place] for place in places)} |"


# The lines of each table: its head, and then its rows.
TABLES: dict[str, Callable[[], Iterator[str]]] = {
  "few_shot": few_shot,
  "highlights": highlights,
  "transduction": transduction,
  "extrapolations": extrapolations,
  "lengths": lengths,
  "family": of_family,
  "sine": sine,
  "expansions": expansions,
  "combinations": of_combinations,
  "differences": differences,
  "two_steps": two_steps,
  "one_shot": one_shot,
  "inversion": inversion,
  "matrix_products": matrix_products,
  "overlap_a": lambda: _panel("overlap_20000", "a", "inner iterations, 20,000 meta-steps"),
  "overlap_a_shorter": lambda: _panel("overlap", "a", "inner iterations, 5,000 meta-steps"),
  "overlap_b": lambda: _panel("overlap", "b", "inner batch, 4 iterations, 5,000 meta-steps"),
  "overlap_c": lambda: _panel(
    "overlap",
    "c",
    "initial outer learning rate, full batches of 100, 5,000 meta-steps",
    lambda step: f"2^{np.log2(step):g}",
  ),
}


def filled(text: str) -> str:
  """The text with its tables made anew."""

  def made(found: re.Match[str]) -> str:
    head, *rows = TABLES[found[2]]()
    lines = [head, "|---" * (head.count("|") - 1) + "|", *rows]
    return found[1] + "\n".join(lines) + "\n" + found[3]

  return _TABLE.sub(made, text)


def main() -> None:
  for path in PAGES:
    folders.replace_file(path, filled(path.read_text()))


if __name__ == "__main__":
  main()
