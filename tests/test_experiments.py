import json
import re
import shutil
import signal
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import metajax
from experiments import (
  algorithms,
  build,
  cli,
  few_shot,
  folders,
  jobs,
  plots,
  runs,
)
from experiments.recipes import PRESETS, Recipe
from metajax import variants
from metajax.types import leaf_name
from tests.problems import TINY

ROOT = Path(__file__).resolve().parents[1]


def tiny(**changes):
  return Recipe(**{**TINY, **changes})


def few_shots(recipe, judge=None, **options):
  """What the binary does."""
  return few_shot.program(cli.Run(**options), few_shot.Choice(judge=judge), recipe)()


def execute(recipe, out):
  return runs.run(recipe, *runs.prepare(recipe, out))


CELLS = {"1-shot transductive", "1-shot inductive"}


def fake_images(classes, size=20, shape=(28, 28, 1)):
  return np.zeros((classes * size, *shape), np.uint8), np.repeat(np.arange(classes), size)


def test_a_run_leaves_its_files_and_goes_on_where_it_was_killed(
  tmp_path, glyphs, one_device, splits, monkeypatch
):
  whole = execute(tiny(), tmp_path / "whole")
  append = folders.RunFolder.append

  def die_at_the_end(folder, line):
    append(folder, line)
    if line["step"] == 4:  # after the line is written, before the state is saved
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(folders.RunFolder, "append", die_at_the_end)
    with pytest.raises(KeyboardInterrupt):
      execute(tiny(), tmp_path / "killed")
  with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "sec')  # and a line torn by the kill
  resumed = execute(tiny(), tmp_path / "killed")

  shutil.rmtree(tmp_path / "whole" / "checkpoints")
  assert runs.run_all([runs.Job("again", tiny(), tmp_path / "whole")]) == {
    tmp_path / "whole": whole
  }
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
      "learner.safetensors",
      "best_learner.safetensors",
    }
  for name in ("learner.safetensors", "best_learner.safetensors"):
    ours, expected = ((tmp_path / folder / name).read_bytes() for folder in ("killed", "whole"))
    assert ours == expected
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
  assert result["parameters"] == 28 * 28 * 3
  assert {"commit", "jax", "metajax", "python"} <= set(result["versions"])

  with pytest.raises(ValueError, match=r"then --inner_rate=0.001; now --inner_rate=0.002"):
    runs.prepare(tiny(inner_rate=0.002), tmp_path / "whole")
  fewer = splits._replace(test=metajax.data.few_shot.from_arrays(*fake_images(classes=4)))
  monkeypatch.setattr(build, "load", lambda recipe: fewer)
  with pytest.raises(ValueError, match=r"then # train.*now # train: .*test: 4 classes"):
    runs.prepare(tiny(), tmp_path / "whole")


def timeless(record):
  """Without times, and without the process's peak memory, which is that of earlier runs too."""
  left_out = lambda name: "second" in name or name == "peak_memory_mb"
  return {name: value for name, value in record.items() if not left_out(name)}


def left_behind(out):
  """The lines and the result of a run, without times."""
  files = [folders.read_lines(out, name) for name in ("metrics.jsonl", "test_tasks.jsonl")]
  return [timeless(one) for lines in files for one in lines], timeless(folders.finished(out))


def test_a_run_that_is_asked_to_stop_goes_on_where_it_stopped(
  tmp_path, glyphs, one_device, monkeypatch
):
  long = {"eval_tasks": 60, "eval_every": 3, "steps_per_call": 1}
  execute(tiny(**long), tmp_path / "whole")
  out, asked = tmp_path / "stopped", iter([])
  monkeypatch.setattr(jobs, "stopping", lambda: next(asked, False))
  places = (
    (4, "at meta-step 2, which is saved in"),  # the report at the start asks twice
    (2, "at meta-step 3, which is saved in"),  # in the middle of its report
    (7, "at 1-shot test task 50 of"),
  )
  for calls_before, where in places:
    asked = iter([*[False] * calls_before, True])
    with pytest.raises(jobs.StoppedError, match=where):
      execute(tiny(**long), out)
  execute(tiny(**long), out)
  assert left_behind(out) == left_behind(tmp_path / "whole")
  assert (out / "checkpoints" / "4").exists()  # the last one, though 3 may be the best


def test_a_run_that_diverges_ends_and_keeps_what_was_finite(tmp_path, glyphs, monkeypatch, capsys):
  recipe = tiny(eval_every=1, steps_per_call=1)
  build_it = build.build

  def fails_at_step_3(*arguments):
    """Its second outer step is infinite."""
    experiment = build_it(*arguments)

    def step(state, episodes):
      after, info = experiment.learner.step(state, episodes)
      factor = jax.numpy.where(state.step == 2, np.inf, 1.0)
      return after._replace(params=jax.tree.map(lambda leaf: leaf * factor, after.params)), info

    return experiment._replace(learner=experiment.learner._replace(step=step))

  monkeypatch.setattr(build, "build", fails_at_step_3)
  with pytest.raises(jobs.DivergedError, match=r"at meta-step 3, .*lower .*meta-step 2 is saved"):
    execute(recipe, tmp_path)
  assert [record["step"] for record in folders.logged(tmp_path)] == [0, 1, 2]
  assert "2" in {path.name for path in (tmp_path / "checkpoints").iterdir()}
  guessed = runs.run_all([runs.Job("it", recipe, tmp_path)], diverging_guesses=True)[tmp_path]
  assert {cell["accuracy"] for cell in guessed["cells"].values()} == {1 / 3}
  assert set(guessed["cells"]) == CELLS and "diverged at meta-step 3" in guessed["diverged"]
  few_shot.report(recipe, guessed, tmp_path)
  assert "diverged at meta-step 3" in capsys.readouterr().out.splitlines()[-1]


def test_without_a_terminal_progress_is_a_line_every_half_minute(monkeypatch, capsys):
  clock = [100.0]
  monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
  mesh = metajax.task_mesh(jax.devices()[:1])
  with jobs.progress(total=4, unit="task", desc="judging", mesh=mesh) as bar:
    for _ in range(4):
      clock[0] += 20
      bar.update()
      bar.refresh()
  lines = capsys.readouterr().err.splitlines()
  assert [line.split("[")[0].strip() for line in lines] == [
    "judging:  50% 2/4",
    "judging: 100% 4/4",
  ]


def test_a_run_is_judged_again_without_training(tmp_path, glyphs, one_device, monkeypatch, capsys):
  """A complete one or one under way; more tasks are added to those that are there."""
  recipe, out = tiny(eval_tasks=25, eval_every=1, curve_splits=("train", "test")), tmp_path / "run"
  execute(recipe, out)
  before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
  of_the_run = folders.read_lines(out, "test_tasks.jsonl")
  monkeypatch.setattr(metajax, "train", None)  # nothing is trained
  many = replace(recipe, eval_tasks=60)
  with pytest.raises(ValueError, match=r"judged on 25 tasks: to judge it on 60, .*--judge=newest"):
    few_shots(many, out=str(out))
  few_shots(many, judge="newest", out=str(out))
  judged = out / "judged" / "step4"
  lines = folders.read_lines(judged, "test_tasks.jsonl")
  assert [line["first"] for line in lines] == [0, 25, 50] and lines[:1] == of_the_run
  cells = folders.finished(judged)["cells"]
  assert {cell["tasks"] for cell in cells.values()} == {60} and set(cells) == CELLS
  assert "accuracy over 60 test tasks" in capsys.readouterr().out
  few_shots(replace(many, eval_tasks=100), judge="newest", out=str(out))
  assert folders.read_lines(judged, "test_tasks.jsonl")[:3] == lines

  other = replace(recipe, eval_shots=(2,), eval_queries=2, eval_steps=1)
  few_shots(other, judge="newest", out=str(out))
  assert set(folders.finished(judged)["cells"]) == {"2-shot transductive", "2-shot inductive"}
  assert folders.finished(out / "judged" / "step4.old1")["cells"].keys() == CELLS
  assert before == {path: path.read_bytes() for path in before}

  # The best on training tasks, of all lines of the curve.
  scores = {
    line["step"]: np.mean([cell["accuracy"] for cell in line["train"].values()])
    for line in folders.logged(out)[1:]
  }
  shutil.rmtree(out / "judged")
  few_shots(recipe, judge="best", out=str(out))
  (best,) = (out / "judged").iterdir()
  assert scores[int(best.name.removeprefix("step"))] == max(scores.values())

  with pytest.raises(ValueError, match=r"then --inner_rate=0.001; now --inner_rate=0.1"):
    few_shots(replace(recipe, inner_rate=0.1), judge="newest", out=str(out))
  with pytest.raises(ValueError, match="holds no checkpoints to judge"):
    few_shots(recipe, judge="newest", out=str(tmp_path / "nothing"))


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_a_run_is_judged_on_another_number_of_devices(inner, tmp_path, glyphs, monkeypatch):
  """Three tasks on four devices carry four states of Adam, on one device three."""
  recipe = tiny(meta_batch=3, inner_optimizer=inner, curve_splits=("test",))
  trained = execute(recipe, tmp_path)
  one = metajax.task_mesh(jax.devices()[:1])
  monkeypatch.setattr(build, "mesh_of", lambda recipe: one)
  few_shots(recipe, judge="newest", out=str(tmp_path))
  assert folders.finished(tmp_path / "judged" / "step4")["cells"] == trained["cells"]
  runs.prepare(recipe, tmp_path)  # nor does going on refuse them


def test_a_chunk_bounds_the_memory_of_judging_too(splits, linear_network, monkeypatch, tmp_path):
  chunks = []
  monkeypatch.setattr(metajax, "judge", lambda *_, chunk, **__: chunks.append(chunk))
  for recipe in (tiny(chunk=2), tiny()):
    experiment = build.build(recipe, splits, metajax.task_mesh())
    runs.judge_of(experiment, runs.open_folder(recipe, tmp_path), "")
  assert set(chunks[:2]) == {2} and chunks[-1] is None


def test_the_runs_of_all_seeds_are_judged_again(tmp_path, glyphs, one_device, capsys):
  recipe = tiny(curve_splits=("test",), meta_steps=2, seed=3)
  few_shots(recipe, out=str(tmp_path), seeds=2)
  with pytest.raises(ValueError, match="has no best checkpoint, which is never chosen on test"):
    few_shots(recipe, judge="best", out=str(tmp_path))
  few_shots(replace(recipe, eval_tasks=9), judge="newest", out=str(tmp_path))
  printed = capsys.readouterr().out
  assert "accuracy over 9 test tasks" in printed and f"see {tmp_path}/seed*/judged" in printed
  for seed in (3, 4):
    judged = folders.finished(tmp_path / f"seed{seed}" / "judged" / "step2")
    assert {cell["tasks"] for cell in judged["cells"].values()} == {9}


def test_a_run_may_be_resumed_at_another_cost(tmp_path, glyphs):
  """By other calls, chunks, and ways to convolve; what is trained may not change."""
  recipe = tiny(execution="chunked", meta_batch=3)
  assert execute(recipe, tmp_path)["meta_steps"] == 4
  cheaper = replace(recipe, chunk=2, convolution="xla", steps_per_call=2, cache_dir="elsewhere")
  runs.prepare(cheaper, tmp_path)
  assert "--convolution=xla" in (tmp_path / "flags.txt").read_text()
  with pytest.raises(ValueError, match="then --execution=chunked; now --execution=vmap"):
    runs.prepare(replace(recipe, execution="vmap"), tmp_path)


def test_the_best_is_chosen_on_validation_or_training_tasks_never_on_test():
  cell = lambda accuracy: {"5-shot": {"accuracy": accuracy}, "1-shot": {"accuracy": 0.0}}
  line = {"step": 1, "train": cell(0.8), "validation": cell(0.6), "test": cell(0.4)}
  assert plots.learning_curve_score(line) == 0.3
  del line["validation"]
  assert plots.learning_curve_score(line) == 0.4
  assert plots.learning_curve_score({"step": 1, "test": cell(0.4)}) is None
  line["train"]["5-shot"]["failed"] = 49  # and the accuracy is that of the other task
  assert plots.learning_curve_score(line) is None


def test_flags_decide_whether_a_run_is_the_same(tmp_path, monkeypatch):
  """They may change how it is computed, of which `metajax.train` warns."""
  warn = lambda: warnings.warn("a meta-step computes something else than ...", stacklevel=1)
  monkeypatch.setattr("sys.argv", ["program.py", f"--out={tmp_path / 'run'}"])
  monkeypatch.setattr(metajax, "cores_as_devices", lambda: None)  # the tests' backend is there
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    cli.main(lambda *settings: warn)
  finally:
    jax.config.update("jax_default_matmul_precision", None)
    for number, handler in before.items():
      signal.signal(number, handler)


@pytest.mark.parametrize("main", [cli.main, cli.main_without_folder])
def test_matrix_products_are_as_precise_as_float32_on_all_devices(main, tmp_path, monkeypatch):
  products = []

  def program(*settings):
    return lambda: products.append(jax.jit(jax.numpy.matmul).lower(ones, ones).as_text())

  ones = np.ones((2, 2), np.float32)
  arguments = [f"--out={tmp_path / 'run'}"] if main is cli.main else []
  monkeypatch.setattr("sys.argv", ["program.py", *arguments])
  monkeypatch.setattr(metajax, "cores_as_devices", lambda: None)  # the tests' backend is there
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    with jax.default_matmul_precision(None):
      assert "HIGHEST" not in jax.jit(jax.numpy.matmul).lower(ones, ones).as_text()
    main(program)
  finally:
    jax.config.update("jax_default_matmul_precision", None)
    for number, handler in before.items():
      signal.signal(number, handler)
  assert "HIGHEST" in products[0]


def test_two_processes_do_not_write_in_one_folder(tmp_path):
  """Locks are of open files, so that a second opening stands for a second process."""
  with folders.alone(tmp_path):
    second = folders.alone(tmp_path)
    with pytest.raises(folders.InUseError, match="another process is writing in"), second:
      pass
    with pytest.raises(folders.InUseError):
      folders.set_aside(tmp_path)
  inside = tmp_path / "seed0"
  runs.open_folder(tiny(), inside).begin()
  with folders.alone(inside), pytest.raises(folders.InUseError, match=r"writing in .*seed0"):
    folders.set_aside(tmp_path)
  assert folders.set_aside(inside).name == "seed0.old1"


@pytest.mark.parametrize("execution", ["sharded", "vmap"])
def test_each_of_several_runs_has_its_folder_alone(execution, tmp_path, glyphs, monkeypatch):
  def trained(recipe, experiment, folder, label):
    with pytest.raises(folders.InUseError), folders.alone(folder.path):
      pass
    return label

  monkeypatch.setattr(runs, "run", trained)
  many = runs.of_each_seed("", tiny(execution=execution), tmp_path, 2)
  assert runs.run_all(many) == {tmp_path / f"seed{seed}": f"seed {seed}" for seed in (0, 1)}


def test_a_run_that_was_put_aside_is_no_other_seed(tmp_path):
  for name in ("seed10", "seed9", "seed9.old1", "seeds"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text(f'{{"of": "{name}"}}\n')
  assert [path.name for path in folders.seeds_in(tmp_path)] == ["seed9", "seed10"]
  assert folders.logs_of_seeds(tmp_path) == [[{"of": "seed9"}], [{"of": "seed10"}]]


def test_a_process_that_is_refused_leaves_the_flags_of_the_other(tmp_path):
  runs.open_folder(tiny(), tmp_path).begin()
  before = (tmp_path / "flags.txt").read_text()
  with folders.alone(tmp_path), pytest.raises(folders.InUseError):
    runs.open_folder(tiny(eval_tasks=99), tmp_path).begin()
  assert (tmp_path / "flags.txt").read_text() == before


def test_a_result_over_seeds_is_not_replaced_by_one_that_says_less(tmp_path):
  folder = folders.RunFolder(tmp_path, {})
  folder.begin()
  folder.check_seeds(1)
  folder.finish({"seeds": 2})
  for seeds, all_of_them in ((1, True), (1, False), (3, False)):
    with pytest.raises(ValueError, match=rf"holds a result of 2 seeds, which one of {seeds} would"):
      folder.check_seeds(seeds, all_of_them=all_of_them)
  for seeds, all_of_them in ((2, True), (2, False), (3, True)):
    folder.check_seeds(seeds, all_of_them=all_of_them)


def test_a_request_to_stop_is_not_forgotten_between_two_rounds_of_runs(monkeypatch):
  monkeypatch.setattr(jobs, "_ASKED", threading.Event())
  jobs.side_by_side([lambda mesh: jobs.stop()])
  assert jobs.stopping()
  with pytest.raises(jobs.StoppedError, match="stopped before a run began"):
    jobs.side_by_side([lambda mesh: mesh.size])


@pytest.mark.parametrize("flag", ["fresh", "plot_only"])
def test_a_run_is_not_put_aside_to_be_judged(flag, tmp_path):
  out = tmp_path / "run"
  runs.open_folder(tiny(), out).begin()
  judge = lambda run: few_shot.program(run, few_shot.Choice(judge="newest"), tiny())
  with pytest.raises(ValueError, match="leave out --fresh and --plot_only"):
    cli._prepared("few_shot", cli.Run(out=str(out), **{flag: True}), judge)
  assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_starting_over_renames_what_was_there(tmp_path, capsys):
  out = tmp_path / "run"
  begun = cli.Run(out=str(out), fresh=True)

  def refuse(run):
    raise ValueError("no steps")

  def prepare(run):
    out.mkdir()
    (out / "file").write_text("new")
    return lambda: None

  out.mkdir()
  (out / "file").write_text("old")
  with pytest.raises(ValueError, match="no steps"):
    cli._prepared("it", begun, refuse)
  assert (out / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
  for number in (1, 2):
    cli._prepared("it", begun, prepare)
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
  assert [record["step"] for record in folder.lines()] == [0, 2]
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "sec')  # cut off by a power failure
  assert folder.keep(lambda line: line["step"] > 0) == [{"step": 2}]
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n'


VARIANTS = [
  {"algorithm": "reptile", "execution": "sharded", "inner_state": "fresh"},
  {"algorithm": "reptile", "execution": "serial"},
  {"algorithm": "reptile", "minibatches": "replacement", "inner_state": "fresh"},
  {"algorithm": "joint", "loss_reduction": "mean", "inner_optimizer": "sgd"},
  {"algorithm": "fomaml", "tail": "separate", "outer_optimizer": "adam", "outer_rate_final": 0.1},
  {"algorithm": "fomaml", "execution": "chunked", "chunk": 2, "outer_clip": 10.0},
  {"algorithm": "maml", "inner_eps_root": 1e-8, "execution": "serial", "inner_state": "fresh"},
  {"algorithm": "combine", "weights": (0.5, 2.0), "eval_shots": (1, 2)},
  {"algorithm": "scratch", "meta_steps": 1, "outer_schedule": "cosine"},
  {"algorithm": "maml", "inner_optimizer": "sgd", "least_steps": 1, "least_shots": 2},
]


NETWORKS = [
  {"algorithm": "maml", "inner_optimizer": "sgd", "convolution": "xla", "network": "finn"},
  {"algorithm": "fomaml", "adapt_norm": False, "execution": "serial"},
]


def trace(recipe, splits):
  """Traces one meta-step and one evaluation, without compiling."""
  experiment = build.build(recipe, splits, metajax.task_mesh(jax.devices()[:1]))
  key = jax.random.key(0)
  params = jax.eval_shape(experiment.model.init, key)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
  state = experiment.learner.init(zeros)
  run = metajax.run(experiment.learner, experiment.sample_task, experiment.make_episode, 1)
  after, info = jax.eval_shape(run, state, key)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  k = 1 if recipe.algorithm == "joint" else recipe.inner_steps
  assert info.losses.shape == (1, 1 if recipe.algorithm == "prototypical" else k)
  assert set(experiment.evaluations) == {"test", *recipe.curve_splits}
  evaluations = experiment.evaluations["test"]
  assert list(evaluations) == [f"{shots}-shot" for shots in recipe.eval_shots]
  for evaluation in evaluations.values():
    judge = metajax.evaluation.judge_part(*evaluation, num_tasks=2)
    found = jax.eval_shape(judge, state, key, np.int32(0))
    assert set(found) == {"transductive", "inductive"}


@pytest.mark.parametrize(
  "variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values()))
)
def test_every_choice_composes(variant, splits, linear_network):
  trace(tiny(**variant), splits)


@pytest.mark.parametrize("variant", NETWORKS, ids=lambda variant: variant["algorithm"])
def test_every_network_composes(variant, splits):
  trace(tiny(**variant), splits)


def test_anil_and_boil_divide_the_network_at_its_last_layer():
  network = metajax.models.resnet12(8, 3, filters=(2, 2))
  body, head = (algorithms.not_adapted(name, network) for name in ("anil", "boil"))
  params = jax.eval_shape(network.init, jax.random.key(0))
  names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  assert head == ("Dense_2/",)  # behind those of the two blocks
  assert set(names) - set(body) == {"Dense_2/kernel", "Dense_2/bias"}


def test_a_context_scales_and_shifts_a_layer():
  network = metajax.models.omniglot(3, filters=2)
  build_it = lambda name: algorithms.build(tiny(algorithm=name, inner_optimizer="sgd"), network)
  model, images = build_it("cavia").model, jax.random.normal(jax.random.key(1), (4, 28, 28, 1))
  params = model.init(jax.random.key(0))
  without = network.apply(params["network"], images)
  apply = lambda context: model.apply(variants.WithContext(params, context), images)
  np.testing.assert_array_equal(apply(np.zeros(100, np.float32)), without)
  np.testing.assert_array_equal(model.apply(params, images), without)
  context = np.random.default_rng(0).normal(size=100).astype(np.float32)
  factor, shift = np.einsum("c,ckn->kn", context, params["film"])
  by_hand = jax.tree.map(lambda leaf: leaf, params["network"])
  layer = by_hand["BatchStatsNorm_2"]
  layer["scale"] = (1 + factor) * layer["scale"]
  layer["bias"] = (1 + factor) * layer["bias"] + shift
  np.testing.assert_allclose(apply(context), network.apply(by_hand, images), rtol=1e-4, atol=1e-5)
  assert np.abs(apply(context) - without).max() > 0.1


def test_prototypes_without_transduction_see_one_test_example(splits, linear_network):
  recipe = tiny(algorithm="prototypical", tail="separate", inner_batch=3)
  network = metajax.models.omniglot(64, filters=2)
  protocols = algorithms.build(recipe, network).protocols
  params = network.init(jax.random.key(0))
  sample = metajax.data.few_shot.sample_task(splits.test, ways=3, train_shots=1, test_shots=2)
  task = sample(jax.random.key(1))
  alone = protocols["inductive"](params, task)
  for row in (0, 5):
    one = task._replace(test=jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], task.test))
    expected = protocols["transductive"](params, one)
    np.testing.assert_allclose(alone[row : row + 1], expected, rtol=1e-4, atol=1e-3)
  assert np.abs(alone - protocols["transductive"](params, task)).max() > 1e-2


def test_inner_steps_leave_normalization_alone(splits):
  """phi - U^k(phi) is what Reptile's outer step of 1 subtracts: where U^k moves nothing it is 0."""
  recipe = tiny(adapt_norm=False, network="finn", outer_rate=1.0, outer_rate_final=1.0)
  experiment = build.build(recipe, splits, metajax.task_mesh())
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


@pytest.mark.parametrize(
  "variant",
  [
    {"inner_optimizer": "adam", "inner_rate": 0.02, "eval_steps": 6},
    {"inner_optimizer": "sgd", "network": "finn", "adapt_norm": False, "inner_rate": 0.5},
  ],
  ids=["adam", "finn"],
)
def test_the_learner_file_adapts_as_the_run_is_judged(variant, splits, tmp_path):
  recipe = tiny(filters=2, eval_shots=(1, 2), eval_batch=(3, 4), **variant)
  experiment = build.build(recipe, splits, metajax.task_mesh())
  state = experiment.learner.init(jax.jit(experiment.model.init)(jax.random.key(0)))
  state = state._replace(inner=jax.tree.map(lambda leaf: leaf + 1, state.inner))
  path = tmp_path / "learner.safetensors"
  cells = {"1-shot inductive": 0.4, "2-shot inductive": 0.5}
  build.ship(recipe, experiment, state, path, {"more": 1, "accuracy": cells})
  learned = metajax.load(path)
  about = learned.recipe.about
  assert about["algorithm"] == recipe.algorithm and about["more"] == 1
  assert about["accuracy"] == {"2-shot inductive": 0.5}  # it does not adapt as with 1 shot
  key = jax.random.key(1)
  train = experiment.evaluations["test"]["2-shot"].sample_task(key).train
  rows = metajax.cycling(recipe.eval_steps, 4)(key, 2 * recipe.ways)
  expected = jax.jit(experiment.learner.adapt)(state, train, rows)
  found = jax.jit(learned.adapt_params)(train, key)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_seeds_are_runs_of_their_own(tmp_path, glyphs, splits, capsys, monkeypatch):
  """Side by side on devices of their own, each as if it were alone; drawn again from the logs."""
  out = tmp_path / "both"
  short = {"execution": "vmap", "curve_splits": ("test",), "meta_steps": 2}
  few_shots(tiny(seed=3, **short), out=str(out), seeds=2)
  assert re.search(r"2 meta-steps, trained in \d+ s each;", capsys.readouterr().out)
  alone = execute(tiny(seed=4, **short), tmp_path / "alone")
  found = [json.loads((out / f"seed{seed}" / "result.json").read_text()) for seed in (3, 4)]
  assert found[1]["cells"] == alone["cells"]
  result = json.loads((out / "result.json").read_text())
  values = [one["cells"]["1-shot inductive"]["accuracy"] for one in found]
  cell = result["cells"]["1-shot inductive"]
  assert cell["accuracy"] == pytest.approx(np.mean(values), abs=1e-6)
  assert cell["deviation_between_seeds"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
  assert cell["seeds"] == 2
  with pytest.raises(ValueError, match="holds a result of 2 seeds, which one of 1 would replace"):
    few_shots(tiny(seed=3, **short), out=str(out), seeds=1)

  flags = (out / "flags.txt").read_text()
  with pytest.raises(ValueError, match=r"seed3 is complete, judged on \d+ tasks"):
    few_shots(tiny(seed=3, **short | {"eval_tasks": 99}), out=str(out), seeds=3)
  assert (out / "flags.txt").read_text() == flags  # what was refused changes nothing
  monkeypatch.setattr(build, "load", lambda recipe: splits._replace(test=splits.train))
  with pytest.raises(ValueError, match=r"seed3 holds another run \(then # train.*; now # train"):
    few_shots(tiny(seed=3, **short), out=str(out), seeds=3)  # one more, with other data

  picture = out / "learning_curve.png"
  picture.unlink()
  few_shots(tiny(), out=str(out), plot_only=True)
  assert picture.exists()
  with pytest.raises(ValueError, match="holds no run to draw"):
    few_shots(tiny(), out=str(tmp_path / "nothing"), plot_only=True)
  (out / "seed4" / "metrics.jsonl").write_text("")  # of a run that has not been judged yet
  drawn = few_shot.program(cli.Run(out=str(out), plot_only=True), few_shot.Choice(), tiny())
  (log,) = drawn.args[0]
  assert len(log) > 1


def test_a_data_seed_fixes_the_data_and_the_tasks_that_learners_are_judged_on(monkeypatch):
  mesh = metajax.task_mesh()
  load = lambda **changes: (
    build.load(replace(PRESETS["glyphs_5way_reptile"], **changes)).test.inputs
  )
  keys = lambda **changes: jax.tree.map(jax.random.key_data, runs.keys_of(tiny(**changes), mesh))
  monkeypatch.setattr(
    metajax.data.glyphs, "load", partial(metajax.data.glyphs.load, train_classes=2, test_classes=2)
  )
  build._load.cache_clear()
  drawn = [load(seed=3), load(seed=7, data_seed=3), load(seed=7)]
  build._load.cache_clear()
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert (drawn[0] != drawn[2]).any()
  three, seven, mixed = keys(seed=3), keys(seed=7), keys(seed=7, data_seed=3)
  for use, source in {"init": seven, "train": seven, "curve": three, "test": three}.items():
    np.testing.assert_array_equal(getattr(mixed, use), getattr(source, use))
    assert (getattr(three, use) != getattr(seven, use)).any()


def test_only_runs_that_spread_their_tasks_take_all_devices():
  sizes = {name: build.mesh_of(tiny(execution=name)).size for name in ("serial", "sharded")}
  assert sizes == {"serial": 1, "sharded": len(jax.devices())} and len(jax.devices()) > 1


def test_an_exception_in_one_of_several_runs_ends_all():
  def fail(mesh):
    raise ZeroDivisionError

  def go_on(mesh):
    assert jobs._FAILED.wait(timeout=60)
    raise RuntimeError("stopped")

  with pytest.raises(ZeroDivisionError):  # and not what it did to the others
    jobs.side_by_side([go_on, fail, go_on, go_on, go_on, go_on])
  assert jobs.side_by_side([lambda mesh: mesh.size, lambda mesh: 2]) == [1, 2]


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
  """Settings that did not exist then have their default values."""
  folder = runs.open_folder(tiny(), tmp_path)
  folder.begin("some data")
  flags = tmp_path / "flags.txt"
  earlier = flags.read_text().replace("--outer_schedule=linear\n", "")
  flags.write_text(earlier)
  runs.open_folder(tiny(), tmp_path).check("some data")
  with pytest.raises(ValueError, match=r"then no such flag; now --outer_schedule=cosine"):
    runs.open_folder(tiny(outer_schedule="cosine"), tmp_path)
  flags.write_text(earlier + "--outer_schedule=cosine\n")
  with pytest.raises(ValueError, match=r"then --outer_schedule=cosine; now .*=linear"):
    runs.open_folder(tiny(), tmp_path)
