"""Learning curves that are sent elsewhere as well."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import runs, trackers
from tests.test_experiments import tiny


class Writer:
  """Stands in for a TensorBoard writer, and keeps what it is given."""

  def __init__(self, folder):
    self.folder, self.scalars, self.pictures, self.closed = folder, [], [], False
    WRITERS.append(self)

  def add_text(self, name, text):
    self.settings = text

  def add_scalar(self, name, value, step):
    self.scalars.append((step, name, value))

  def add_images(self, name, images, step, dataformats):
    self.pictures.append((name, images.shape, images.dtype, dataformats))

  def flush(self):
    pass

  def close(self):
    self.closed = True


WRITERS = []


def test_numbers_have_names():
  line = {"step": 3, "losses": [2.0, 1.0], "test": {"1-shot": {"accuracy": 0.5, "failed": 1}}}
  assert trackers.numbers_of(line) == {
    "losses/1": 2.0, "losses/2": 1.0, "test/1-shot/accuracy": 0.5, "test/1-shot/failed": 1.0,
  }  # fmt: skip


def test_a_run_is_sent_to_tensorboard(tmp_path, glyphs, one_device, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
  recipe = tiny(track=("tensorboard",), meta_steps=2, eval_every=1)
  runs.run(recipe, *runs.prepare(recipe, tmp_path))
  (writer,) = WRITERS
  assert writer.folder == str(tmp_path / "tensorboard") and writer.closed
  assert "--algorithm=reptile" in writer.settings
  assert writer.pictures == [("a training task", (9, 28, 28, 1), np.uint8, "NHWC")]
  named = {(step, name) for step, name, _ in writer.scalars}
  assert {(0, "test/1-shot inductive/accuracy"), (2, "losses/1"), (2, "seconds")} <= named
  assert "--track" not in (tmp_path / "flags.txt").read_text()


def test_a_run_is_sent_to_wandb(tmp_path, monkeypatch):
  sent = []
  run = SimpleNamespace(log=lambda values, step: sent.append((step, values)), finish=lambda: None)
  init = lambda **options: sent.append(options) or run
  monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda image: image))
  tracker = trackers.opened("wandb", tmp_path / "A" / "run", {"ways": 5})
  tracker.images(0, "a task", np.zeros((2, 4, 4, 1), np.uint8))
  tracker.numbers(3, {"x": 1.0})
  assert sent[0]["name"] == "A/run" and sent[0]["config"] == {"ways": 5}
  assert sent[1][0] == 0 and sent[1][1]["a task"][0].shape == (4, 4) and sent[2] == (3, {"x": 1.0})


def test_a_folder_is_one_run_of_wandb_and_another_folder_is_another(tmp_path, monkeypatch):
  opened = []
  init = lambda **options: opened.append(options) or SimpleNamespace(finish=None)
  monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
  for out in ("A/seed0", "A/seed0", "B/seed0", "A/seed1"):
    trackers.opened("wandb", tmp_path / out, {})
  first, again, *others = (options["id"] for options in opened)
  assert first == again and len({first, *others}) == 3
  assert all(options["resume"] == "allow" for options in opened)
  assert all(options["reinit"] == "create_new" for options in opened)


def test_a_tracker_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
  def refuse(folder, settings):
    raise RuntimeError("no login\nsecond line")

  monkeypatch.setattr(trackers, "_wandb", refuse)
  with pytest.raises(ValueError, match=r"--track=wandb cannot be opened \(no login second line\)"):
    trackers.opened("wandb", tmp_path, {})


def test_trackers_that_are_not_here_are_refused_beforehand(tmp_path, glyphs, monkeypatch):
  with pytest.raises(ValueError, match="--track=visdom must be any of tensorboard, wandb, sep"):
    tiny(track=("visdom",))
  monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
  recipe, out = tiny(track=("wandb",)), tmp_path / "run"
  for prepare in (runs.prepare, lambda *run: runs.check_all([runs.Job("", *run)])):
    with pytest.raises(ValueError, match=r"--track=wandb needs a package .*: pip install wandb"):
      prepare(recipe, out)
  assert not (tmp_path / "run").exists()
