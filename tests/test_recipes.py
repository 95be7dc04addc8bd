"""The settings of the experiments, the paper's rows among them, and the flags made from them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import metajax
from experiments import build, cli, combinations, few_shot, overlap
from experiments.processes import Processes
from experiments.recipes import FAMILY, PRESETS, Cost, Judging, Recipe, Training
from experiments.settings import Settings, as_text, option, values_of
from tests.test_experiments import fake_images, trace

ROOT = Path(__file__).resolve().parents[1]
PAPERS = {
  name: recipe for name, recipe in PRESETS.items() if not name.startswith(("glyphs", "family"))
}


@pytest.fixture(scope="module")
def blank():
  """Splits of either image size with classes enough for any preset."""

  def classes(shape, count, size):
    return metajax.data.few_shot.from_arrays(*fake_images(count, size, shape))

  small, large = ((28, 28, 1), 20, 20), ((84, 84, 3), 5, 30)
  return {
    "omniglot": metajax.data.Splits(classes(*small), None, classes(*small)),
    "mini_imagenet": metajax.data.Splits(*[classes(*large)] * 3),
  }


@pytest.mark.parametrize("name", PAPERS)
def test_every_preset_can_be_traced(name, blank, linear_network):
  trace(PRESETS[name], blank[PRESETS[name].dataset])


@pytest.mark.parametrize("name", FAMILY)
def test_every_preset_of_the_family_can_be_traced(name, blank):
  trace(dataclasses.replace(FAMILY[name], filters=2), blank["omniglot"])


@pytest.mark.parametrize("name", PAPERS)
def test_every_preset_has_a_network_for_its_images(name):
  preset = PRESETS[name]
  model = build._model(preset)
  image = (84, 84, 3) if preset.dataset == "mini_imagenet" else (28, 28, 1)
  apply = lambda key, images: model.apply(model.init(key), images)
  logits = jax.eval_shape(apply, jax.random.key(0), np.zeros((2, *image), np.uint8))
  assert logits.shape == (2, preset.ways)


# From the paper's appendix, by hand: inner batch, inner steps, inner rate, training shots,
# meta-iterations, and minibatches when judged.
REPTILE = {
  "omniglot_5way": (10, 5, 1e-3, 10, 100_000, (5,)),
  "omniglot_20way": (20, 10, 5e-4, 10, 200_000, (10,)),
  "mini_imagenet_5way": (10, 8, 1e-3, 15, 100_000, (5, 15)),
}


@pytest.mark.parametrize("name", REPTILE)
def test_reptiles_presets_hold_the_papers_settings(name):
  row = PRESETS[f"{name}_reptile"]
  found = row.inner_batch, row.inner_steps, row.inner_rate, row.train_shots, row.meta_steps
  assert (*found, row.eval_batch) == REPTILE[name]
  assert (row.algorithm, f"{row.dataset}_{row.ways}way") == ("reptile", name)
  assert (row.inner_optimizer, row.loss_reduction, row.inner_state) == ("adam", "sum", "carried")
  assert (row.outer_optimizer, row.outer_rate, row.outer_rate_final) == ("sgd", 1.0, 0.0)
  assert (row.meta_batch, row.tail, row.minibatches) == (5, "shared", "cycling")
  assert (row.network, row.adapt_norm, row.outer_clip) == ("paper", True, None)
  assert (row.eval_shots, row.eval_steps, row.eval_tasks) == ((1, 5), 50, 10_000)


# From Finn et al. (2017) and their code, by hand, by shots: meta-batch, inner rate on N times the
# mean loss, updates in training and in testing, queries of each class in training.
FINN = {
  "omniglot_1shot_5way": (32, 0.4, 1, 3, 1),
  "omniglot_5shot_5way": (32, 0.4, 1, 3, 5),
  "omniglot_1shot_20way": (16, 0.1, 5, 5, 1),
  "omniglot_5shot_20way": (16, 0.1, 5, 5, 5),
  "mini_imagenet_1shot_5way": (4, 0.01, 5, 10, 15),
  "mini_imagenet_5shot_5way": (2, 0.01, 5, 10, 15),
}


@pytest.mark.parametrize("algorithm", ["maml", "fomaml"])
@pytest.mark.parametrize("name", FINN)
def test_presets_of_maml_hold_the_settings_of_finn_et_al(name, algorithm):
  row = PRESETS[f"{name}_{algorithm}"]
  meta_batch, rate, updates, test_updates, queries = FINN[name]
  (shots,) = row.eval_shots
  assert (row.algorithm, f"{row.dataset}_{shots}shot_{row.ways}way") == (algorithm, name)
  assert (row.meta_batch, row.meta_steps, row.eval_tasks) == (meta_batch, 60_000, 600)
  assert row.inner_rate == pytest.approx(rate * row.ways)  # on the mean, which is N times smaller
  assert (row.inner_optimizer, row.loss_reduction) == ("sgd", "mean")
  assert (row.inner_steps, row.eval_steps) == (updates + 1, test_updates)
  assert (row.tail, row.tail_shots, row.train_shots) == ("separate", queries, shots + queries)
  assert row.inner_batch == row.eval_batch[0] == row.ways * shots  # the whole support set
  assert (row.outer_optimizer, row.outer_rate, row.outer_rate_final) == ("adam", 1e-3, 1e-3)
  assert (row.network, row.adapt_norm) == ("finn", False)
  if row.dataset == "omniglot":
    assert row.outer_clip is None
  else:  # to 10, of a loss that is the queries' sum over the shots
    assert row.outer_clip == pytest.approx(10 / (row.ways * queries / shots), rel=1e-5)


def test_there_is_a_preset_for_every_row_of_the_tables():
  cells = [("mini_imagenet", 5), ("omniglot", 5), ("omniglot", 20)]
  expected = {
    f"{dataset}_{shots}shot_{ways}way_{algorithm}"
    for dataset, ways in cells
    for shots in (1, 5)
    for algorithm in ("fomaml", "maml")
    if (dataset, ways) != ("mini_imagenet", 20)
  } | {f"{dataset}_{ways}way_reptile" for dataset, ways in cells}
  assert set(PAPERS) == expected


def parse(*arguments, groups=None, **options):
  return cli.parse(arguments, groups or (Recipe(),), **options)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_its_flags(name):
  """So does a run from its flags.txt."""
  (_, found) = parse(
    f"--recipe={name}", groups=(few_shot.Choice(), Recipe()), implied=few_shot.implied
  )
  assert found == PRESETS[name]


def test_other_flags_change_a_preset():
  arguments = "--meta_steps=7", "--recipe=omniglot_1shot_5way_maml", "--adapt_norm"
  (_, found) = parse(*arguments, groups=(few_shot.Choice(), Recipe()), implied=few_shot.implied)
  assert found == dataclasses.replace(
    PRESETS["omniglot_1shot_5way_maml"], meta_steps=7, adapt_norm=True
  )


def test_flags_have_the_types_of_the_settings():
  arguments = "--eval_shots=1,5", "--weights=0.5,2", "--algorithm=combine", "--inner_steps=2"
  (found,) = parse(*arguments, "--outer_rate=2", "--noadapt_norm", "--curve_splits=test")
  assert found == Recipe(
    eval_shots=(1, 5), weights=(0.5, 2.0), algorithm="combine", inner_steps=2, outer_rate=2.0,
    adapt_norm=False, curve_splits=("test",),
  )  # fmt: skip


def test_flags_are_the_call_s_own():
  """A notebook's flags stay as they are, and two binaries can be parsed in one process."""
  before = set(flags.FLAGS)
  for groups in ((combinations.Curves(), combinations.FIGURE), (overlap.Panels(), overlap.FIGURE)):
    parse("--ways=7", groups=groups)
  assert set(flags.FLAGS) == before


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--inner_rat=1", "Unknown command line flag 'inner_rat'"),
    ("--seed=5", "--seed is set by this experiment and cannot be overridden: remove it"),
    ("--eval_shots=1,x", "--eval_shots=1,x must be whole numbers separated by commas"),
    ("--weights=1,x", "--weights=1,x must be numbers separated by commas"),
    ("ways", "unexpected argument 'ways': flags start with --"),
    ("--ways=many", "flag --ways=many"),
  ],
)
def test_what_is_wrong_with_an_argument_is_one_line(argument, message):
  with pytest.raises(ValueError, match=message) as error:
    parse(argument, leave_out=("seed",))
  assert "\n" not in str(error.value)


def test_a_setting_of_the_wrong_type_is_refused():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Some(Settings):
    count: int | None = option(None, "")
    rate: float = option(1.0, "", above=0)
    on: bool = option(True, "")
    names: tuple[str, ...] = option(("a",), "")

  assert Some(rate=2).rate == 2 and Some(count=3).count == 3
  for bad, message in [
    ({"count": 1.5}, "--count=1.5 must be a whole number"),
    ({"count": True}, "--count=True must be a whole number"),
    ({"rate": "1"}, "--rate=1 must be a number"),
    ({"rate": None}, "--rate=None must be a number"),
    ({"on": 1}, "--on=1 must be true or false"),
    ({"names": ["a"]}, "must be names separated by commas"),
    ({"names": (1,)}, "--names=1 must be names separated by commas"),
  ]:
    with pytest.raises(ValueError, match=message):
      Some(**bad)


def test_every_setting_belongs_to_one_group():
  names = [one.name for group in (Training, Judging, Cost) for one in dataclasses.fields(group)]
  assert len(names) == len(set(names)) == len(dataclasses.fields(Recipe))
  assert as_text((1, 2)) == "1,2" and "weights" not in values_of(Recipe(), Training)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_processes": 2}, "go together"),
    ({"distributed": True, "process_id": 0}, "go together"),
    ({"coordinator_address": "host", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
    ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, "must be from 0 to"),
  ],
)
def test_processes_are_named_by_all_three_flags(changes, message):
  with pytest.raises(ValueError, match=message):
    Processes(**changes)


def test_a_split_that_is_not_there_is_refused(blank):
  recipe = dataclasses.replace(PRESETS["omniglot_5way_reptile"], curve_splits=("validation",))
  with pytest.raises(
    ValueError,
    match="omniglot is too small: it has no validation classes: take them out of --curve_splits",
  ):
    build.build(recipe, blank["omniglot"], metajax.task_mesh())


def test_the_presets_of_mini_imagenet_choose_the_best_on_validation(blank):
  for name, recipe in PAPERS.items():
    assert ("validation" in recipe.curve_splits) == name.startswith("mini_imagenet")


def test_help_lists_every_flag_and_preset():
  command = [sys.executable, "-m", "experiments.few_shot", "--help"]
  ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert ended.returncode == 0 and ended.stderr == ""
  for group in (few_shot.Choice, Recipe, cli.Run, Processes):
    for setting in dataclasses.fields(group):
      assert f"--{setting.name}" in ended.stdout or f"--[no]{setting.name}" in ended.stdout
  assert all(name in ended.stdout for name in PRESETS)
  assert max(map(len, ended.stdout.splitlines())) <= 100
  assert np.all([line == line.rstrip() for line in ended.stdout.splitlines()])
