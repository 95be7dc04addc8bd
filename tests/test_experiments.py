import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import metajax
from experiments import combinations, common, expansions, few_shot, folders, overlap, sine, training
from tests.problems import TINY

ROOT = Path(__file__).resolve().parents[1]
FLAG_FILES = sorted((ROOT / "experiments" / "flags").glob("*.flags"))


def settings(**changes):
  return few_shot.defaults(**{**TINY, **changes})


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def glyphs(monkeypatch, splits, programs):
  """Runs on a few glyphs, each program compiled once however many runs need it."""
  monkeypatch.setattr(few_shot, "load", lambda settings: splits)
  jax.config.update("jax_compilation_cache_dir", programs)
  yield
  jax.config.update("jax_compilation_cache_dir", None)


def execute(tiny):
  return few_shot.run(tiny, *few_shot.prepare(tiny))


CELLS = {"1-shot transductive", "1-shot inductive"}


def fake_images(classes, size=20, shape=(28, 28, 1)):
  return np.zeros((classes * size, *shape), np.uint8), np.repeat(np.arange(classes), size)


def test_a_run_leaves_its_files_and_goes_on_where_it_was_killed(
  tmp_path, glyphs, splits, monkeypatch
):
  whole = execute(settings(out=str(tmp_path / "whole")))

  killed = settings(out=str(tmp_path / "killed"))
  append = folders.RunFolder.append

  def die_at_the_end(folder, record):
    append(folder, record)
    if record["step"] == 4:  # after the record is written, before the state is saved
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(folders.RunFolder, "append", die_at_the_end)
    with pytest.raises(KeyboardInterrupt):
      execute(killed)
  with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "sec')  # and a line torn by the kill
  resumed = execute(killed)

  shutil.rmtree(tmp_path / "whole" / "checkpoints")
  assert few_shot.run_all([("again", settings(out=str(tmp_path / "whole")))]) == [whole]
  (tmp_path / "whole" / "checkpoints").mkdir()

  assert timeless(resumed) == timeless(whole)
  for folder in ("whole", "killed"):
    files = {path.name for path in (tmp_path / folder).iterdir()}
    assert files == {
      "flags.txt",
      "metrics.jsonl",
      "result.json",
      "test_tasks.jsonl",
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
  assert set(lines["whole"][0]["test"]) == set(lines["whole"][0]["train"]) == CELLS

  result = json.loads((tmp_path / "whole" / "result.json").read_text())
  assert set(result["cells"]) == CELLS
  assert all(cell["tasks"] == 4 and 0 <= cell["accuracy"] <= 1 for cell in result["cells"].values())
  assert result["meta_steps"] == 4 and result["meta_steps_per_second"] > 0
  assert result["parameters"] == 2 * (9 + 3) + 3 * (36 + 6) + 8 * 3 + 3
  assert {"jax", "metajax", "python"} <= set(result["versions"])

  with pytest.raises(ValueError, match=r"then --inner_rate=0.001; now --inner_rate=0.002"):
    few_shot.prepare(settings(out=str(tmp_path / "whole"), inner_rate=0.002))
  fewer = splits._replace(test=metajax.data.few_shot.from_arrays(*fake_images(classes=4)))
  monkeypatch.setattr(few_shot, "load", lambda settings: fewer)
  with pytest.raises(ValueError, match=r"then # train.*now # train: .*test: 4 classes"):
    few_shot.prepare(settings(out=str(tmp_path / "whole")))


def timeless(record):
  return {name: value for name, value in record.items() if "second" not in name}


def left_behind(out):
  """The lines and the result of a run, without times."""
  files = [folders.read_records(out, name) for name in ("metrics.jsonl", "test_tasks.jsonl")]
  return [timeless(one) for lines in files for one in lines], timeless(folders.finished(out))


def test_a_run_that_is_asked_to_stop_goes_on_where_it_stopped(tmp_path, glyphs, monkeypatch):
  long = {"eval_tasks": 60, "eval_every": 3, "steps_per_call": 1}
  execute(settings(out=str(tmp_path / "whole"), **long))
  out, asked = tmp_path / "stopped", iter([])
  monkeypatch.setattr(training, "stopping", lambda: next(asked, False))
  for calls_before, where in ((2, "stopped at meta-step 2 of"), (4, "at 1-shot test task 50 of")):
    asked = iter([*[False] * calls_before, True])
    with pytest.raises(training.StoppedError, match=where):
      execute(settings(out=str(out), **long))
  execute(settings(out=str(out), **long))
  assert left_behind(out) == left_behind(tmp_path / "whole")
  assert (out / "checkpoints" / "4").exists()  # the last one, though 3 may be the best


def test_logged_losses_are_those_of_all_meta_steps_since_the_last_record(tmp_path, glyphs):
  """Three calls of one meta-step to a record, and a run with a record after every meta-step."""
  runs = {}
  for every in (3, 1):
    tiny = settings(
      out=str(tmp_path / str(every)), eval_every=every, steps_per_call=1, meta_steps=3
    )
    execute(tiny)
    runs[every] = [record["losses"] for record in folders.logged(tiny.out)[1:]]
  assert len(runs[3]) == 1 and len(runs[1]) == 3
  np.testing.assert_allclose(runs[3][0], np.mean(runs[1], axis=0), rtol=1e-6)
  assert np.ptp(runs[1], axis=0).min() > 1e-3  # so that the last alone would not do


@pytest.mark.parametrize(
  ("bad", "step"), [({}, 4), ({(2, 1): np.nan}, 3), ({(2, 0): np.inf}, 2), ({(0, 0): np.nan}, 1)]
)
def test_the_meta_step_that_diverged_is_the_one_before_a_bad_start(bad, step):
  losses = np.ones((4, 2))
  for where, value in bad.items():
    losses[where[0], where[1] :] = value
    losses[where[0] + 1 :] = np.nan
  assert training._diverging_step(losses) == step


def test_a_run_that_diverges_ends_and_keeps_what_was_finite(tmp_path, glyphs, monkeypatch):
  tiny = settings(out=str(tmp_path), eval_every=1, steps_per_call=1)
  build = few_shot.build

  def fails_at_step_3(*arguments):
    """Its second outer step is infinite."""
    experiment = build(*arguments)

    def step(state, episodes):
      after, info = experiment.learner.step(state, episodes)
      factor = jax.numpy.where(state.step == 2, np.inf, 1.0)
      return after._replace(params=jax.tree.map(lambda leaf: leaf * factor, after.params)), info

    return experiment._replace(learner=experiment.learner._replace(step=step))

  monkeypatch.setattr(few_shot, "build", fails_at_step_3)
  with pytest.raises(
    training.DivergedError, match=r"at meta-step 3, .*lower .*meta-step 2 is saved"
  ):
    execute(tiny)
  assert [record["step"] for record in folders.logged(tmp_path)] == [0, 1, 2]
  assert "2" in {path.name for path in (tmp_path / "checkpoints").iterdir()}
  (guessed,) = few_shot.run_all([("it", tiny)], diverging_guesses=True)
  assert {cell["accuracy"] for cell in guessed["cells"].values()} == {1 / 3}
  assert set(guessed["cells"]) == CELLS and "diverged at meta-step 3" in guessed["diverged"]


def test_two_processes_do_not_write_in_one_folder(tmp_path):
  """Locks are of open files, so that a second opening stands for a second process."""
  with folders.alone(tmp_path):
    second = folders.alone(tmp_path)
    with pytest.raises(folders.InUseError, match="another process is writing in"), second:
      pass
    with pytest.raises(folders.InUseError):
      folders.set_aside(tmp_path)
  with folders.alone(tmp_path):
    pass


def test_starting_over_renames_what_was_there(tmp_path, capsys):
  out = tmp_path / "run"
  begun = common.defaults((), out=str(out), fresh=True)

  def prepare(settings):
    if settings.meta_steps == 0:
      raise ValueError("no steps")
    out.mkdir()
    (out / "file").write_text("new")
    return lambda: None

  out.mkdir()
  (out / "file").write_text("old")
  with pytest.raises(ValueError, match="no steps"):
    common._checked("it", common.changed(begun, meta_steps=0), prepare)
  assert (out / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
  for number in (1, 2):
    common._checked("it", begun, prepare)
    assert f"the earlier run is in {out}.old{number}" in capsys.readouterr().out
  assert (tmp_path / "run.old1" / "file").read_text() == "old"
  assert (out / "file").read_text() == "new"


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  folder = folders.RunFolder(tmp_path, {})
  folder.append({"step": 0})

  def full(descriptor):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(folders.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device\): make room, and"):
      folder.append({"step": 1})
  folder.append({"step": 2})
  assert [record["step"] for record in folder.records()] == [0, 2]
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "sec')  # cut off by a power failure
  assert folder.keep(lambda record: record["step"] > 0) == [{"step": 2}]
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n'


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
    common.join(common.defaults((), **changes))


VARIANTS = [
  {"algorithm": "reptile", "execution": "sharded", "inner_state": "fresh"},
  {"algorithm": "reptile", "execution": "serial"},
  {"algorithm": "reptile", "minibatches": "replacement", "inner_state": "fresh"},
  {"algorithm": "joint", "loss_reduction": "mean", "inner_optimizer": "sgd"},
  {"algorithm": "fomaml", "tail": "separate", "outer_optimizer": "adam", "outer_rate_final": 0.1},
  {"algorithm": "fomaml", "execution": "chunked", "chunk": 2, "outer_clip": 10.0},
  {"algorithm": "maml", "inner_optimizer": "sgd", "convolution": "xla", "network": "finn"},
  {"algorithm": "fomaml", "adapt_norm": False, "execution": "serial"},
  {"algorithm": "maml", "inner_eps_root": 1e-8, "execution": "serial", "inner_state": "fresh"},
  {"algorithm": "combine", "weights": ["0.5", "2"], "eval_shots": ["1", "2"]},
]


def trace(tiny, splits):
  """One meta-step and one evaluation, traced without compiling."""
  experiment = few_shot.build(tiny, splits, metajax.task_mesh())
  key = jax.random.key(0)
  params = jax.eval_shape(experiment.model.init, key)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
  state = experiment.learner.init(zeros)
  run = metajax.run(experiment.learner, experiment.sample_task, experiment.make_episode, 1)
  after, info = jax.eval_shape(run, state, key)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  k = 1 if tiny.algorithm == "joint" else tiny.inner_steps
  assert info.losses.shape == (1, k)
  assert list(experiment.judges["test"]) == [f"{shots}-shot" for shots in tiny.eval_shots]
  for judge in experiment.judges["test"].values():
    found = jax.eval_shape(judge, state, key, np.int32(0))
    assert set(found) == {"transductive", "inductive"}


@pytest.mark.parametrize(
  "variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values()))
)
def test_every_choice_composes(variant, splits):
  tiny = settings(**variant)
  few_shot.check(tiny)
  trace(tiny, splits)


def test_inner_steps_leave_normalization_alone(splits):
  """phi - U^k(phi) is what Reptile's outer step of 1 subtracts: where U^k moves nothing it is 0."""
  tiny = settings(adapt_norm=False, network="finn", outer_rate=1.0, outer_rate_final=1.0)
  experiment = few_shot.build(tiny, splits, metajax.task_mesh())
  init_key, episode_key = jax.random.split(jax.random.key(0))
  before = jax.tree.map(lambda leaf: leaf + 1.0, jax.jit(experiment.model.init)(init_key))
  run = metajax.run(experiment.learner, experiment.sample_task, experiment.make_episode, 1)
  after, _ = jax.jit(run)(experiment.learner.init(before), episode_key)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after.params)
  for layer, of_parameters in moved.items():
    if layer.startswith("BatchStatsNorm"):
      assert of_parameters == {"bias": False}
    else:
      assert of_parameters["kernel"], layer


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


def parsed(path):
  """The settings of a flag file, as the binary would have them."""
  lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
  given = dict(line.removeprefix("--").split("=") for line in lines if "=" in line)
  values = {name: flags.FLAGS[name].parser.parse(value) for name, value in given.items()}
  return few_shot.defaults(**values, adapt_norm="--noadapt_norm" not in lines)


@pytest.mark.parametrize("path", FLAG_FILES, ids=lambda path: path.stem)
def test_every_flag_file_can_be_traced(path, blank):
  row = parsed(path)
  few_shot.check(row)
  trace(row, blank[row.dataset])


# From the paper's appendix, by hand: inner batch, inner steps, inner rate, training shots,
# meta-iterations, and minibatches when judged.
REPTILE = {
  "omniglot_5way": (10, 5, 1e-3, 10, 100_000, ["5"]),
  "omniglot_20way": (20, 10, 5e-4, 10, 200_000, ["10"]),
  "mini_imagenet_5way": (10, 8, 1e-3, 15, 100_000, ["5", "15"]),
}


@pytest.mark.parametrize("name", REPTILE)
def test_reptiles_flag_files_hold_the_papers_settings(name):
  row = parsed(ROOT / "experiments" / "flags" / f"{name}_reptile.flags")
  found = row.inner_batch, row.inner_steps, row.inner_rate, row.train_shots, row.meta_steps
  assert (*found, row.eval_batch) == REPTILE[name]
  assert (row.algorithm, f"{row.dataset}_{row.ways}way") == ("reptile", name)
  assert (row.inner_optimizer, row.loss_reduction, row.inner_state) == ("adam", "sum", "carried")
  assert (row.outer_optimizer, row.outer_rate, row.outer_rate_final) == ("sgd", 1.0, 0.0)
  assert (row.meta_batch, row.tail, row.minibatches) == (5, "shared", "cycling")
  assert (row.network, row.adapt_norm, row.outer_clip) == ("paper", True, None)
  assert (row.eval_shots, row.eval_steps, row.eval_tasks) == (["1", "5"], 50, 10_000)


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
def test_flag_files_of_maml_hold_the_settings_of_finn_et_al(name, algorithm):
  row = parsed(ROOT / "experiments" / "flags" / f"{name}_{algorithm}.flags")
  meta_batch, rate, updates, test_updates, queries = FINN[name]
  (shots,) = map(int, row.eval_shots)
  assert (row.algorithm, f"{row.dataset}_{shots}shot_{row.ways}way") == (algorithm, name)
  assert (row.meta_batch, row.meta_steps, row.eval_tasks) == (meta_batch, 60_000, 600)
  assert row.inner_rate == pytest.approx(rate * row.ways)  # on the mean, which is N times smaller
  assert (row.inner_optimizer, row.loss_reduction) == ("sgd", "mean")
  assert (row.inner_steps, row.eval_steps) == (updates + 1, test_updates)
  assert (row.tail, row.tail_shots, row.train_shots) == ("separate", queries, shots + queries)
  assert row.inner_batch == int(row.eval_batch[0]) == row.ways * shots  # the whole support set
  assert (row.outer_optimizer, row.outer_rate, row.outer_rate_final) == ("adam", 1e-3, 1e-3)
  assert (row.network, row.adapt_norm) == ("finn", False)
  if row.dataset == "omniglot":
    assert row.outer_clip is None
  else:  # to 10, of a loss that is the queries' sum over the shots
    assert row.outer_clip == pytest.approx(10 / (row.ways * queries / shots), rel=1e-5)


def test_there_is_a_flag_file_for_every_row_of_the_tables():
  cells = [("mini_imagenet", 5), ("omniglot", 5), ("omniglot", 20)]
  expected = {
    f"{dataset}_{shots}shot_{ways}way_{algorithm}"
    for dataset, ways in cells
    for shots in (1, 5)
    for algorithm in ("fomaml", "maml")
  } | {f"{dataset}_{ways}way_reptile" for dataset, ways in cells}
  assert {path.stem for path in FLAG_FILES} == expected


def test_defaults_refuse_an_unknown_flag():
  with pytest.raises(ValueError, match="no flag --inner_rat"):
    few_shot.defaults(inner_rat=1.0)


def test_seeds_are_runs_of_their_own(tmp_path, glyphs):
  """Side by side on devices of their own, each as if it were alone; drawn again from the logs."""
  out = tmp_path / "both"
  short = {"execution": "vmap", "curve_splits": ["test"], "meta_steps": 2}
  few_shot.program(settings(out=str(out), seeds=2, seed=3, **short))()
  alone = execute(settings(out=str(tmp_path / "alone"), seed=4, **short))
  found = [json.loads((out / f"seed{seed}" / "result.json").read_text()) for seed in (3, 4)]
  assert found[1]["cells"] == alone["cells"]
  result = json.loads((out / "result.json").read_text())
  values = [one["cells"]["1-shot inductive"]["accuracy"] for one in found]
  cell = result["cells"]["1-shot inductive"]
  assert cell["accuracy"] == pytest.approx(np.mean(values), abs=1e-6)
  assert cell["deviation_between_seeds"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
  assert cell["seeds"] == 2

  picture = out / "learning_curve.png"
  picture.unlink()
  few_shot.program(settings(out=str(out), plot_only=True))()
  assert picture.exists()
  with pytest.raises(ValueError, match="holds no run to draw"):
    few_shot.program(settings(out=str(tmp_path / "nothing"), plot_only=True))
  (out / "seed4" / "metrics.jsonl").write_text("")  # of a run that has not been judged yet
  (log,) = few_shot.program(settings(out=str(out), plot_only=True)).args[0]
  assert len(log) > 1


def test_only_runs_that_spread_their_tasks_take_all_devices():
  sizes = {name: few_shot._mesh(settings(execution=name)).size for name in ("serial", "sharded")}
  assert sizes == {"serial": 1, "sharded": len(jax.devices())} and len(jax.devices()) > 1


def test_what_a_program_closes_over_is_an_argument_of_it():
  data = jnp.asarray(np.random.default_rng(0).normal(size=50_000))
  look_up = lambda state, rows: (state + 1, jax.lax.map(lambda row: data[row], rows))
  state, rows = training.on_mesh((jnp.zeros(3), jnp.array([7, 1])), metajax.task_mesh())
  program = training.compiled(look_up, metajax.task_mesh(), state, rows, donate_argnums=0)
  assert program.func.memory_analysis().argument_size_in_bytes >= data.nbytes
  assert len(program.func.as_text()) < data.nbytes / 10  # XLA prints constants, if there are any
  after, found = program(state, rows)
  assert state.is_deleted() and (after == 1).all()
  assert (found == data[jnp.array([7, 1])]).all()


def test_an_exception_in_one_of_several_runs_ends_all():
  def fail(mesh):
    raise ZeroDivisionError

  def go_on(mesh):
    assert training._STOPPING.wait(timeout=60)
    raise RuntimeError("stopped")

  with pytest.raises(ZeroDivisionError):  # and not what it did to the others
    training.side_by_side([go_on, fail, go_on, go_on, go_on, go_on])
  assert training.side_by_side([lambda mesh: mesh.size, lambda mesh: 2]) == [1, 2]


FIGURE = {
  "dataset": "glyphs", "ways": 3, "filters": 2, "inner_batch": 3, "meta_steps": 2,
  "eval_shots": ["1"], "eval_batch": ["3"], "eval_steps": 2, "eval_tasks": 4, "eval_every": 1,
  "curve_tasks": 2,
}  # fmt: skip


def test_combinations_draw_figure_3(tmp_path, glyphs):
  tiny = {**FIGURE, "curves": ["g1", "last2"], "out": str(tmp_path)}
  result = combinations.program(combinations.defaults(**tiny, seeds=2, seed=7))()
  assert list(result["curves"]) == ["g1", "last2"]
  for name in result["curves"]:
    assert [len(log) for log in folders.logs_of_seeds(tmp_path / name)] == [3, 3]
  weights = (tmp_path / "last2" / "seed7" / "flags.txt").read_text()
  assert "--weights=0.0,1.0" in weights and "--train_shots=2" in weights
  for suffix in ("png", "svg"):
    (tmp_path / f"figure3.{suffix}").unlink()
  drawn = combinations.program(combinations.defaults(out=str(tmp_path), plot_only=True))
  assert {name: len(logs) for name, logs in drawn.args[0].items()} == {"g1": 2, "last2": 2}
  drawn()  # all that is there, though neither seeds nor curves are given again
  with pytest.raises(ValueError, match="then --ways=3; now --ways=4"):
    combinations.program(combinations.defaults(**tiny | {"ways": 4}, seed=7))
  assert (tmp_path / "figure3.png").exists() and (tmp_path / "figure3.svg").exists()


def test_the_ten_curves_of_figure_3():
  everything = combinations.runs(combinations.defaults(out="nowhere"))
  found = {name: list(runs[0].weights) for name, runs in everything.items()}
  assert found == {
    "g1": [1],
    "mean2": [1 / 2, 1 / 2], "sum2": [1, 1], "last2": [0, 1],
    "mean3": [1 / 3] * 3, "sum3": [1] * 3, "last3": [0, 0, 1],
    "mean4": [1 / 4] * 4, "sum4": [1] * 4, "last4": [0, 0, 0, 1],
  }  # fmt: skip
  for runs in everything.values():
    one = runs[0]
    assert one.train_shots * one.ways == one.inner_steps * one.inner_batch  # no overlap
    assert (one.inner_rate, one.outer_rate, one.meta_steps) == (0.003, 0.25, 40_000)


def test_overlap_draws_figure_4(tmp_path, glyphs, monkeypatch):
  """From results made up: that a run is trained as its settings say is shown above."""

  def made_up(many, *, diverging_guesses):
    assert diverging_guesses
    asked.extend(label for label, _ in many)
    cell = lambda one: {"accuracy": 1 / one.inner_steps, "interval95": 0.01, "tasks": 4}
    return [{"cells": {"1-shot transductive": cell(one)}} for _, one in many]

  asked = []
  monkeypatch.setattr(few_shot, "run_all", made_up)
  tiny = {"dataset": "glyphs", "ways": 3, "train_shots": 10, "tail_shots": 1}
  tiny |= {"eval_shots": ["1"], "panels": ["a", "c"], "out": str(tmp_path)}
  monkeypatch.setitem(overlap.PANELS, "a", ("inner_steps", (2, 4)))
  monkeypatch.setitem(overlap.PANELS, "b", ("inner_batch", (10, 30)))
  result = overlap.program(overlap.defaults(**tiny))()
  assert len(result["points"]) == 2 * 4 + 4 and len(asked) == len(set(asked)) == 2 * 4 + 4
  accuracies = {p["x"]: p["cells"]["1-shot transductive"]["accuracy"] for p in result["points"]}
  assert (accuracies[2], accuracies[4]) == (1 / 2, 1 / 4)
  asked.clear()
  overlap.program(overlap.defaults(**tiny | {"panels": ["b"]}))()
  both = json.loads((tmp_path / "result.json").read_text())["points"]
  assert [point["panel"] for point in both] == ["a"] * 8 + ["b"] * 8 + ["c"] * 4  # added to
  (tmp_path / "figure4.png").unlink()
  overlap.program(overlap.defaults(**tiny, plot_only=True))()
  assert (tmp_path / "figure4.png").exists() and (tmp_path / "figure4.svg").exists()


# (a shared or separate tail, cycling or replacement) of every curve, from the paper's legend
FIGURE_4 = {
  "Reptile (cycling)": ("shared", "cycling"),
  "FOMAML (separate tail, cycling)": ("separate", "cycling"),
  "FOMAML (shared tail, replacement)": ("shared", "replacement"),
  "FOMAML (shared tail, cycling)": ("shared", "cycling"),
}


def test_the_points_of_figure_4():
  found = overlap.points(overlap.defaults(out="nowhere"))
  assert len({(point.panel, point.curve) for point in found}) == 4 + 4 + 1
  # (a) and (b) share four runs, (b) and (c) one
  assert len({one.out for point in found for one in point.runs}) == len(found) - 5
  for panel, curve, x, (one,) in found:
    last = [0] * (one.inner_steps - 1) + [1]
    assert one.weights == ([1] * one.inner_steps if curve.startswith("Reptile") else last)
    assert (one.tail, one.minibatches) == FIGURE_4[curve]
    assert one.ways * one.train_shots == 100 and one.inner_rate == 0.003
    assert one.ways * one.tail_shots == 25
    varied = {"a": (x, 25, 0.25), "b": (4, x, 0.25), "c": (4, 100, x)}[panel]
    assert (one.inner_steps, one.inner_batch, one.outer_rate) == varied
  assert {curve for panel, curve, *_ in found if panel == "c"} == {"FOMAML (shared tail, cycling)"}
  assert max(x for panel, _, x, _ in found if panel == "c") == 32


def test_expansions_leave_their_tables_and_figures(tmp_path, monkeypatch):
  monkeypatch.setattr(expansions, "KS", (2, expansions.SHOWN_K))
  tiny = expansions.defaults(waves=2, points=3, meta_steps=150, out=str(tmp_path))
  result = expansions.program(tiny)()
  for row in result["coefficients"]:
    for term in ("avg_grad", "avg_grad_inner_over_alpha"):
      assert row[term]["measured"] == pytest.approx(row[term]["predicted"], rel=0.02)
  assert all(1.9 < slope < 2.1 for slope in result["slopes"].values())
  assert result["order_holds_to_alpha"] > 1e-3
  found = result["manifolds"]
  least = found["least_half_mean_squared_distance"]
  assert least < found["half_mean_squared_distance"][-1] < 1.1 * least
  assert found["largest_difference_of_gradients"] < 1e-12
  names = {path.name for path in tmp_path.iterdir()}
  pictures = {f"{name}.{suffix}" for name in ("expansions", "figure2") for suffix in ("png", "svg")}
  assert names == {"flags.txt", "result.json"} | pictures


def test_expansions_stop_when_asked(tmp_path, monkeypatch):
  monkeypatch.setattr(training, "stopping", lambda: True)
  with pytest.raises(training.StoppedError, match="the same command starts over"):
    expansions.program(expansions.defaults(waves=2, points=3, out=str(tmp_path)))()
  assert not (tmp_path / "result.json").exists()


def test_sine_leaves_its_table_and_figure(tmp_path):
  tiny = common.defaults((), meta_steps=3, eval_tasks=4, out=str(tmp_path))
  result = sine.program(tiny)()
  trained = {"reptile", "fomaml", "maml", "joint"}
  figures = {"figure1.png", "figure1.svg"}
  assert {path.name for path in tmp_path.iterdir()} == trained | figures | {
    "flags.txt",
    "result.json",
  }
  assert set(result["methods"]) == trained | {"random"}
  for found in result["methods"].values():
    assert len(found["loss"]) == len(found["interval95"]) == sine.GRADIENT_STEPS + 1
    assert np.all(np.isfinite(found["loss"]))
  assert [record["step"] for record in folders.logged(tmp_path / "maml")] == [0, 1, 2, 3]
  (tmp_path / "figure1.svg").unlink()
  sine.program(common.changed(tiny, plot_only=True))()
  assert (tmp_path / "figure1.svg").exists()


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
