"""Makes the tables of experiments/README.md from the files in experiments/results.

  python -m experiments.tables

A table stands between two comments of the README, `<!-- table: NAME -->` and `<!-- end -->`, and is
replaced there. `--check` only says whether a table is not up to date.
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments import family, folders
from experiments.recipes import PRESETS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# The paper's Tables 1 and 2 in percent. The +- of MAML and FOMAML, which are from Finn et al.
# (2017), is a 95 % interval over 600 tasks; that of Reptile is the deviation between 3 seeds.
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
    "| recipe | cell | ours | tasks | the paper | ours - paper | meta-steps | minutes | machine |"
  )
  yield "|---|---|---|---|---|---|---|---|---|"
  for recipe, of_paper in PAPER.items():
    result = longest(recipe) or {"cells": {}, "meta_steps": 0}
    about = f"{result['meta_steps']:,} of {PRESETS[recipe].meta_steps:,} |"
    if "train_seconds" in result:
      about += f" {result['train_seconds'] / 60:.0f} | {result['versions']['machine']}"
    else:
      about += " |"
    for number, cell in enumerate({**result["cells"], **of_paper}):
      ours, tasks, paper, apart = "", "", "", ""
      if cell in of_paper:
        mean, spread = of_paper[cell]
        paper = f"{mean:.2f} +- {spread:.2f}"
      if cell in result["cells"]:
        found = result["cells"][cell]
        ours = f"{100 * found['accuracy']:.2f} +- {100 * found['interval95']:.2f}"
        tasks = f"{found['tasks']:,}"
        apart = f"{100 * found['accuracy'] - mean:+.1f}" if paper else ""
      shown = [recipe if number == 0 else "", cell, ours, tasks, paper, apart]
      yield f"| {' | '.join(shown)} | {about if number == 0 else ' | |'} |"


def longest(recipe: str) -> folders.Line | None:
  """The result of a recipe's run with the most meta-steps, or None if there is none."""
  found = [
    folders.finished(path)
    for path in RESULTS.glob(f"{recipe}*")
    if re.fullmatch(rf"{recipe}(_\d+)?", path.name)
  ]
  return max(found, key=lambda result: result["meta_steps"], default=None)


def of_family() -> Iterator[str]:
  """The algorithms of `experiments.family` in the order of their accuracy."""
  result = folders.finished(RESULTS / "family")
  steps = result["steps"]
  yield (
    "| algorithm | Omniglot | transductive | seconds | waves, "
    + " | ".join(f"{step} steps" for step in steps[1:])
    + " | seconds |"
  )
  yield "|---" * (5 + len(steps)) + "|"
  accuracy = lambda row: row["cells"][ONE]["accuracy"]
  for name, row in sorted(result["methods"].items(), key=lambda one: -accuracy(one[1])):
    cells = [row["cells"][cell] for cell in ("1-shot inductive", ONE)]
    shown = [f"{100 * cell['accuracy']:.2f} +- {100 * cell['interval95']:.2f}" for cell in cells]
    shown.append(f"{row['train_seconds']:.0f}" if name != "scratch" else "")
    waves = row.get("waves")
    if waves is None:
      shown += [""] * len(steps)
    else:
      pairs = list(zip(waves["loss"], waves["interval95"], strict=True))
      shown += [f"{loss:.3f} +- {interval:.3f}" for loss, interval in pairs[1:]]
      shown.append(f"{waves['train_seconds']:.0f}" if name != "scratch" else "")
    yield f"| {family.TITLES[name]} | {' | '.join(shown)} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {"few_shot": few_shot, "family": of_family}


def filled(text: str) -> str:
  """The text with its tables made anew."""
  return _TABLE.sub(lambda found: found[1] + "\n".join(TABLES[found[2]]()) + "\n" + found[3], text)


def main() -> None:
  path = HERE / "README.md"
  before = path.read_text()
  after = filled(before)
  if "--check" in sys.argv[1:]:
    sys.exit("a table is not up to date: python -m experiments.tables" if after != before else 0)
  folders.replace_file(path, after)


if __name__ == "__main__":
  main()
