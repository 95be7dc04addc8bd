import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import metajax
from experiments import common, few_shot, sine

ROOT = Path(__file__).resolve().parents[1]
FLAG_FILES = sorted((ROOT / "experiments" / "flags").glob("*.flags"))
TINY = {
  "ways": 3, "shots": 1, "train_shots": 3, "filters": 2, "inner_batch": 3, "inner_steps": 2,
  "meta_batch": 2, "meta_steps": 4, "eval_batch": 3, "eval_steps": 2, "eval_tasks": 4,
  "eval_every": 2, "curve_tasks": 2,
}  # fmt: skip


def settings(**changes):
  return few_shot.defaults(**{**TINY, **changes})


@pytest.fixture(scope="module")
def splits():
  return metajax.data.glyphs.load(train_classes=20, test_classes=5)


@pytest.fixture
def glyphs(monkeypatch, splits, tmp_path):
  """Runs on a few glyphs, each program compiled once however many runs need it."""
  monkeypatch.setattr(few_shot, "load", lambda settings: splits)
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
  yield
  jax.config.update("jax_compilation_cache_dir", None)


def execute(tiny):
  return few_shot.run(tiny, *few_shot.prepare(tiny))


def fake_images(classes, size=20, shape=(28, 28, 1)):
  return np.zeros((classes * size, *shape), np.uint8), np.repeat(np.arange(classes), size)


def test_a_run_leaves_its_files_and_goes_on_where_it_was_killed(
  tmp_path, glyphs, splits, monkeypatch
):
  whole = execute(settings(out=str(tmp_path / "whole")))

  killed = settings(out=str(tmp_path / "killed"))
  append = common.RunFolder.append

  def die_at_the_end(folder, record):
    append(folder, record)
    if record["step"] == 4:  # after the record is written, before the state is saved
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(common.RunFolder, "append", die_at_the_end)
    with pytest.raises(KeyboardInterrupt):
      execute(killed)
  with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "sec')  # and a line torn by the kill
  resumed = execute(killed)

  timeless = lambda result: {k: v for k, v in result.items() if "second" not in k}
  assert timeless(resumed) == timeless(whole)
  for folder in ("whole", "killed"):
    files = {path.name for path in (tmp_path / folder).iterdir()}
    assert files == {
      "flags.txt",
      "metrics.jsonl",
      "result.json",
      "learning_curve.png",
      "checkpoints",
    }
  lines = {
    folder: [
      timeless(json.loads(line))
      for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
    ]
    for folder in ("whole", "killed")
  }
  assert lines["killed"] == lines["whole"]
  assert [line["step"] for line in lines["whole"]] == [0, 2, 4]
  assert set(lines["whole"][0]["test"]) == set(lines["whole"][0]["train"]) == set(common.PROTOCOLS)

  result = json.loads((tmp_path / "whole" / "result.json").read_text())
  assert result["transductive"]["tasks"] == 4 and 0 <= result["inductive"]["accuracy"] <= 1
  assert result["meta_steps"] == 4 and result["meta_steps_per_second"] > 0
  assert result["parameters"] == 2 * (9 + 3) + 3 * (36 + 6) + 8 * 3 + 3
  assert {"jax", "metajax", "python"} <= set(result["versions"])

  with pytest.raises(ValueError, match=r"then --inner_rate=0.001; now --inner_rate=0.002"):
    few_shot.prepare(settings(out=str(tmp_path / "whole"), inner_rate=0.002))
  fewer = splits._replace(test=metajax.data.few_shot.from_arrays(*fake_images(classes=4)))
  monkeypatch.setattr(few_shot, "load", lambda settings: fewer)
  with pytest.raises(ValueError, match=r"then # train.*now # train: .*test: 4 classes"):
    few_shot.prepare(settings(out=str(tmp_path / "whole")))


VARIANTS = [
  {"algorithm": "reptile", "execution": "serial"},
  {"algorithm": "reptile", "minibatches": "replacement", "inner_state": "fresh"},
  {"algorithm": "joint", "loss_reduction": "mean", "inner_optimizer": "sgd"},
  {"algorithm": "fomaml", "tail": "separate", "outer_optimizer": "adam", "outer_rate_final": 0.1},
  {"algorithm": "fomaml", "execution": "chunked", "chunk": 2, "outer_clip": 10.0},
  {"algorithm": "maml", "inner_optimizer": "sgd", "convolution": "xla", "head": "mean"},
  {"algorithm": "maml", "inner_eps_root": 1e-8, "execution": "serial", "inner_state": "fresh"},
]


def trace(tiny, splits):
  """One meta-step and one evaluation, traced without compiling."""
  experiment = few_shot.build(tiny, splits)
  key = jax.random.key(0)
  params = jax.eval_shape(experiment.model.init, key)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
  state = experiment.learner.init(zeros)
  episodes = jax.eval_shape(experiment.sample_episodes, key)
  after, info = jax.eval_shape(experiment.learner.step, state, episodes)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  k = 1 if tiny.algorithm == "joint" else tiny.inner_steps
  assert info.losses.shape == (k,)
  accuracies = jax.eval_shape(
    experiment.judges["test"], state.params, experiment.inner_state(state), key, np.int32(0)
  )
  assert set(accuracies) == set(common.PROTOCOLS)


@pytest.mark.parametrize(
  "variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values()))
)
def test_every_choice_composes(variant, splits):
  tiny = settings(**variant)
  few_shot.check(tiny)
  trace(tiny, splits)


@pytest.fixture(scope="module")
def blank():
  """Splits of either image size with classes enough for any flag file."""

  def classes(shape, count, size):
    return metajax.data.few_shot.from_arrays(*fake_images(count, size, shape))

  small, large = ((28, 28, 1), 20, 20), ((84, 84, 3), 5, 30)
  return {
    "omniglot": metajax.data.Splits(classes(*small), None, classes(*small)),
    "mini_imagenet": metajax.data.Splits(classes(*large), None, classes(*large)),
  }


@pytest.mark.parametrize("path", FLAG_FILES, ids=lambda path: path.stem)
def test_every_flag_file_runs(path, blank):
  lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
  given = dict(line.removeprefix("--").split("=") for line in lines)
  parsed = {name: flags.FLAGS[name].parser.parse(value) for name, value in given.items()}
  row = few_shot.defaults(**parsed)
  few_shot.check(row)
  dataset, shots, ways, algorithm = path.stem.rsplit("_", 3)
  assert (row.dataset, f"{row.shots}shot", f"{row.ways}way", row.algorithm) == (
    dataset, shots, ways, algorithm
  )  # fmt: skip
  trace(row, blank[row.dataset])


# From the tables of the paper's appendix and from Finn et al., by hand.
HYPERPARAMETERS = {
  "omniglot_5shot_5way_reptile": (10, 5, 1e-3, 10, 100_000, 5, 50, "sum"),
  "omniglot_1shot_20way_reptile": (20, 10, 5e-4, 10, 200_000, 10, 50, "sum"),
  "mini_imagenet_1shot_5way_reptile": (10, 8, 1e-3, 15, 100_000, 5, 50, "sum"),
  "mini_imagenet_5shot_5way_reptile": (10, 8, 1e-3, 15, 100_000, 15, 50, "sum"),
  "omniglot_1shot_5way_maml": (5, 2, 2.0, 2, 60_000, 5, 3, "mean"),
  "omniglot_5shot_20way_fomaml": (100, 6, 2.0, 10, 60_000, 100, 5, "mean"),
  "mini_imagenet_5shot_5way_maml": (25, 6, 0.05, 20, 60_000, 25, 10, "mean"),
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_flag_files_hold_the_published_settings(name):
  given = (ROOT / "experiments" / "flags" / f"{name}.flags").read_text()
  values = dict(line[2:].split("=") for line in given.splitlines() if line.startswith("--"))
  names = (
    "inner_batch",
    "inner_steps",
    "inner_rate",
    "train_shots",
    "meta_steps",
    "eval_batch",
    "eval_steps",
  )
  *numbers, reduction = HYPERPARAMETERS[name]
  assert [float(values[name]) for name in names] == numbers
  assert values["loss_reduction"] == reduction
  if name.endswith("reptile"):
    assert (values["outer_rate"], values["outer_rate_final"], values["meta_batch"]) == (
      "1.0",
      "0.0",
      "5",
    )


def test_there_is_a_flag_file_for_every_row_of_the_tables():
  cells = [("mini_imagenet", 5), ("omniglot", 5), ("omniglot", 20)]
  expected = {
    f"{dataset}_{shots}shot_{ways}way_{algorithm}"
    for dataset, ways in cells
    for shots in (1, 5)
    for algorithm in ("reptile", "fomaml", "maml")
  }
  assert {path.stem for path in FLAG_FILES} == expected


BAD_FLAGS = [
  ({"ways": 1}, "--ways=1 must be at least 2"),
  ({"shots": 0}, "--shots=0 must be at least 1"),
  ({"meta_steps": 0}, "--meta_steps=0 must be at least 1"),
  ({"inner_batch": -3}, "--inner_batch=-3 must be at least 1"),
  ({"eval_tasks": 1}, "--eval_tasks=1 must be at least 2"),
  ({"inner_rate": 0.0}, "--inner_rate=0.0 must be positive"),
  ({"outer_rate": float("nan")}, "--outer_rate=nan must be positive"),
  ({"outer_clip": -1.0}, "--outer_clip=-1.0 must be positive"),
  ({"outer_rate_final": -0.5}, "--outer_rate_final=-0.5 must not be negative"),
  ({"tail": "separate", "tail_shots": 3}, "--tail_shots=3 leaves none of --train_shots=3"),
  ({"tail": "separate", "inner_steps": 1}, "--inner_steps=2 or more"),
  ({"tail": "separate", "algorithm": "joint"}, "there is only one"),
  ({"minibatches": "replacement", "inner_batch": 10}, "cannot be drawn without duplicates from 9"),
  ({"execution": "chunked", "chunk": 3}, "--chunk=3 must be from 1 to --meta_batch=2"),
  ({"filters": 0}, "filters must be at least 1"),
  ({"ways": 6}, "6 ways need 6 classes, and there are 5"),
  ({"shots": 20}, "needs 21 examples of each class"),
  ({"algorithm": "maml"}, "--inner_eps_root"),
  ({"dataset": "mini_imagenet"}, "cannot be downloaded"),
  ({"dataset": "omniglot", "data_dir": "/nowhere"}, "/nowhere is not a folder"),
  ({"out": "/dev/null/run"}, "cannot be written"),
  ({"seed": -1}, "--seed=-1 must be from 0"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_FLAGS, ids=lambda value: str(value)[:40])
def test_bad_flags_get_one_clear_line(bad, message, tmp_path, splits, monkeypatch):
  if "dataset" not in bad:
    monkeypatch.setattr(few_shot, "load", lambda settings: splits)
  with pytest.raises(ValueError) as error:
    few_shot.prepare(settings(**{"out": str(tmp_path / "run"), **bad}))
  assert message in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def test_the_binary_ends_without_a_traceback():
  bad = subprocess.run(
    [sys.executable, "-m", "experiments.few_shot", "--ways=1"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert bad.returncode == 1
  assert bad.stderr.strip().splitlines() == ["few_shot: --ways=1 must be at least 2"]


def test_defaults_refuse_an_unknown_flag():
  with pytest.raises(ValueError, match="no flag --inner_rat"):
    few_shot.defaults(inner_rat=1.0)


def test_sine_leaves_its_table_and_figure(tmp_path):
  tiny = common.defaults((), meta_steps=3, eval_tasks=4, out=str(tmp_path))
  result = sine.run(tiny, *sine.prepare(tiny))
  assert {path.name for path in tmp_path.iterdir()} == {
    "flags.txt",
    "result.json",
    "figure1.png",
    "figure1.svg",
  }
  for name in ("random", "reptile", "fomaml", "maml", "joint"):
    assert len(result[name]["loss"]) == len(result[name]["interval95"]) == sine.GRADIENT_STEPS + 1
    assert np.all(np.isfinite(result[name]["loss"]))


def test_sine_adapts_by_gradient_steps_on_the_samples():
  task = metajax.data.sine.sample_task()(jax.random.key(0))
  params = sine.MODEL.init(jax.random.key(1))
  adapted, losses = jax.jit(sine.adapt)(params, task)
  step = jax.jit(
    lambda phi: jax.tree.map(lambda p, g: p - 0.02 * g, phi, jax.grad(sine.LOSS)(phi, task.train))
  )
  for n in range(sine.GRADIENT_STEPS + 1):
    np.testing.assert_allclose(losses[n], sine.LOSS(params, task.test), rtol=1e-3)
    if n < sine.GRADIENT_STEPS:
      params = step(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), adapted, params)
