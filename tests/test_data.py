import errno
import functools
import http.server
import io
import itertools
import os
import shutil
import sys
import tarfile
import threading
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from archives import members, write_omniglot, write_tar
from PIL import Image

import metajax
from metajax.data import (
  DataError,
  cifar,
  class_folders,
  few_shot,
  files,
  glyphs,
  hub,
  mini_imagenet,
  omniglot,
  omniglot_builder,
  sine,
)

KEY = jax.random.key(0)


# N-way K-shot


def numbered_classes(sizes):
  """Inputs that name themselves: 1000 * class + example."""
  labels = np.repeat(np.arange(len(sizes)), sizes)
  inputs = np.concatenate([1000 * c + np.arange(size) for c, size in enumerate(sizes)])
  return few_shot.from_arrays(inputs[:, None], labels)


@pytest.mark.parametrize("sizes", [[6] * 8, [5, 9, 7, 30, 6]], ids=["equal", "unequal"])
def test_a_task_is_sound(sizes):
  sample = jax.jit(
    few_shot.sample_task(numbered_classes(sizes), ways=3, train_shots=3, test_shots=2)
  )
  seen = set()
  for i in range(60):
    task = sample(jax.random.fold_in(KEY, i))
    classes = np.asarray(task.train.inputs[:, 0]).reshape(3, 3) // 1000
    assert np.all(classes == classes[:, :1]) and len(set(classes[:, 0])) == 3
    assert np.array_equal(np.asarray(task.test.inputs[:, 0]).reshape(3, 2) // 1000, classes[:, :2])
    np.testing.assert_array_equal(task.train.targets, np.repeat(np.arange(3), 3))
    np.testing.assert_array_equal(task.test.targets, np.repeat(np.arange(3), 2))
    drawn = [*np.asarray(task.train.inputs[:, 0]), *np.asarray(task.test.inputs[:, 0])]
    assert len(set(drawn)) == 15
    seen |= set(drawn)
  everything = {1000 * c + e for c, size in enumerate(sizes) for e in range(size)}
  assert seen <= everything and len(seen) > 0.8 * len(everything)


def test_inputs_may_be_an_argument_of_the_program():
  classes, sizes = numbered_classes([6] * 8), {"ways": 3, "train_shots": 2, "test_shots": 0}
  of_inputs = lambda inputs: few_shot.sample_task(classes._replace(inputs=inputs), **sizes)
  found = jax.jit(lambda inputs, key: of_inputs(inputs)(key))(classes.inputs, KEY)
  expected = few_shot.sample_task(classes, **sizes)(KEY)
  np.testing.assert_array_equal(found.train.inputs, expected.train.inputs)


def test_classes_and_labels_are_drawn_evenly():
  classes = numbered_classes([4] * 6)
  sample = few_shot.sample_task(classes, ways=2, train_shots=1, test_shots=0)
  tasks = jax.jit(jax.vmap(sample))(jax.random.split(KEY, 3000))
  first = np.asarray(tasks.train.inputs[:, 0, 0])
  counts = np.bincount(first // 1000, minlength=6)
  assert np.all(np.abs(counts - 500) < 5 * np.sqrt(500))
  assert np.all(np.abs(np.bincount(first % 1000, minlength=4) - 750) < 5 * np.sqrt(750))


def test_from_arrays_sorts_by_label():
  classes = few_shot.from_arrays(np.array([5.0, 6.0, 7.0, 8.0]), np.array([9, -2, 9, 4]))
  np.testing.assert_array_equal(classes.inputs, [6.0, 8.0, 5.0, 7.0])
  np.testing.assert_array_equal(classes.sizes, [1, 1, 2])


def test_trees_and_names():
  tokens = np.arange(12).reshape(6, 2)
  inputs = {"tokens": tokens, "mask": tokens > 4}
  classes = few_shot.from_arrays(inputs, ["dog", "cat", "dog", "bee", "cat", "cat"])
  assert classes.names == ("bee", "cat", "dog")
  np.testing.assert_array_equal(classes.inputs["tokens"][:, 0], [6, 2, 8, 10, 0, 4])
  task = jax.jit(few_shot.sample_task(classes, ways=2, train_shots=1, test_shots=0))(KEY)
  labels = ["dog", "cat", "dog", "bee", "cat", "cat"]
  for tokens, mask, label in zip(*task.train.inputs.values(), task.train.targets, strict=True):
    tokens, mask = (tokens, mask) if tokens.dtype != bool else (mask, tokens)
    assert classes.names[task.classes[label]] == labels[int(tokens[0]) // 2]
    np.testing.assert_array_equal(mask, tokens > 4)


def test_labels_of_mixed_types_are_refused():
  """NumPy would make strings of them: NaN a class, and of 1 and "1" the same one."""
  for labels, odd in ((["cat", float("nan"), "dog"], "nan"), ([1, "1", 2], "1")):
    with pytest.raises(ValueError, match=f"strings, and {odd} is among strings: give each"):
      few_shot.from_arrays(np.zeros((3, 2)), labels)


def test_small_classes_are_left_out_by_name():
  with pytest.warns(UserWarning, match="fewer than 2 examples are left out: 'bee' has 1"):
    classes = few_shot.from_arrays(
      np.arange(5), np.array(["dog", "cat", "dog", "bee", "cat"], object), min_examples=2
    )
  assert classes.names == ("cat", "dog") and classes.sizes.tolist() == [2, 2]
  np.testing.assert_array_equal(classes.inputs, [1, 4, 0, 2])
  np.testing.assert_array_equal(classes.starts, [0, 2])


def test_a_mask_selects_no_classes():
  with pytest.raises(ValueError, match=r"not a mask: give np\.flatnonzero"):
    few_shot.select(numbered_classes([2, 2]), [True, False])


def test_classes_are_divided():
  sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
  parts = few_shot.split(numbered_classes(sizes), validation=2, test=0.3, seed=1)
  assert [len(part.starts) for part in parts] == [5, 2, 3]
  names = [name for part in parts for name in part.names]
  assert sorted(names) == list(range(10))
  for part in parts:
    for name, start, size in zip(part.names, part.starts, part.sizes, strict=True):
      found = np.asarray(part.inputs[start : start + size, 0])
      np.testing.assert_array_equal(found, 1000 * name + np.arange(sizes[name]))
  again = few_shot.split(numbered_classes(sizes), validation=0, test=3, seed=1)
  assert again.validation is None and len(again.train.starts) == 7
  other = few_shot.split(numbered_classes(sizes), validation=0, test=3, seed=2)
  assert set(other.test.names) != set(again.test.names)
  with pytest.raises(ValueError, match=r"validation=1.5 must be a number of classes, or a fract"):
    few_shot.split(numbered_classes(sizes), validation=1.5, test=3)


# Sine waves


def test_sine_waves():
  tasks = jax.jit(jax.vmap(sine.sample_task()))(jax.random.split(KEY, 400))
  assert tasks.train.inputs.shape == (400, 10, 1) and tasks.test.targets.shape == (400, 50, 1)
  np.testing.assert_allclose(tasks.test.inputs[0, :, 0], np.linspace(-5, 5, 50), rtol=1e-5)
  # a sin(x + b) = p sin x + q cos x, exactly, with the train points on the same wave
  basis = lambda x: np.stack([np.sin(x), np.cos(x)], axis=-1)
  for row in range(20):
    grid, targets = (
      np.asarray(tasks.test.inputs[row, :, 0]),
      np.asarray(tasks.test.targets[row, :, 0]),
    )
    wave, *_ = np.linalg.lstsq(basis(grid), targets, rcond=None)
    np.testing.assert_allclose(
      basis(np.asarray(tasks.train.inputs[row, :, 0])) @ wave,
      tasks.train.targets[row, :, 0],
      atol=1e-4,
    )
  waves, *_ = np.linalg.lstsq(
    basis(np.linspace(-5, 5, 50)), np.asarray(tasks.test.targets[..., 0]).T, rcond=None
  )
  amplitudes, phases = np.hypot(*waves), np.arctan2(waves[1], waves[0]) % (2 * np.pi)
  uniform = lambda values, low, high: scipy.stats.kstest(values, "uniform", (low, high - low))
  assert uniform(amplitudes, 0.1, 5.0).pvalue > 1e-4
  assert uniform(phases, 0, 2 * np.pi).pvalue > 1e-4
  assert uniform(np.ravel(tasks.train.inputs), -5, 5).pvalue > 1e-4
  assert abs(np.corrcoef(amplitudes, phases)[0, 1]) < 0.15


# Glyphs


def test_glyphs_are_drawn_from_the_seed():
  splits = glyphs.load(3, train_classes=4, test_classes=3, drawings=5)
  again = glyphs.load(3, train_classes=4, test_classes=3, drawings=5)
  other = glyphs.load(4, train_classes=4, test_classes=3, drawings=5)
  np.testing.assert_array_equal(splits.train.inputs, again.train.inputs)
  assert not np.array_equal(splits.train.inputs, other.train.inputs)
  assert splits.train.inputs.shape == (20, 28, 28, 1) and splits.train.inputs.dtype == jnp.uint8
  assert splits.test.inputs.shape == (15, 28, 28, 1) and splits.validation is None
  assert set(np.unique(splits.train.inputs)) == {0, 255}
  ink = np.mean(np.asarray(splits.train.inputs) == 0, axis=(1, 2, 3))
  assert ink.min() > 0.02 and ink.max() < 0.4
  images = np.asarray(splits.train.inputs).reshape(4, 5, -1) / 255
  means = images.mean(axis=1)
  within = np.abs(images - means[:, None]).mean()
  between = np.abs(means[:, None] - means[None]).sum() / (4 * 3 * 784)
  assert 0 < within < between  # drawings of a class differ, and classes differ more


# Omniglot, from archives made here


def test_omniglot_is_prepared_once(tmp_path, small_omniglot, monkeypatch):
  folder, cache = write_omniglot(tmp_path / "zips"), tmp_path / "cache"
  splits = omniglot.load(folder, protocol="alphabets", cache_dir=cache)
  assert splits.train.inputs.shape == (4 * 4 * 20, 28, 28, 1) and len(splits.train.starts) == 16
  assert splits.test.inputs.shape == (3 * 20, 28, 28, 1) and len(splits.test.starts) == 3
  assert list(cache.rglob("*.array_record*"))

  with zipfile.ZipFile(folder / "images_evaluation.zip") as file:
    name = sorted(name for name in file.namelist() if name.endswith("0006_07.png"))[0]
    original = np.asarray(Image.open(io.BytesIO(file.read(name))))
  nearest = [int((i + 0.5) * 3.75) for i in range(28)]
  expected = np.where(original[np.ix_(nearest, nearest)], 255, 0)
  found = np.asarray(splits.test.inputs[20:40, ..., 0])
  assert any(np.array_equal(image, expected) for image in found)
  # rotations are classes of their own: those of the first character are 0, 4, 8 and 12
  upright, turned = (np.asarray(splits.train.inputs[20 * c : 20 * c + 20, ..., 0]) for c in (0, 4))
  np.testing.assert_array_equal(turned, np.rot90(upright, axes=(1, 2)))

  def fail(*_):
    raise AssertionError("read the archives again")

  monkeypatch.setattr(omniglot, "read_archive", fail)
  again = omniglot.load(folder, protocol="alphabets", cache_dir=cache)
  np.testing.assert_array_equal(again.train.inputs, splits.train.inputs)
  pooled = omniglot.load(folder, seed=1, cache_dir=cache)
  assert len(pooled.train.starts) == 20 and len(pooled.test.starts) == 2
  upright = np.asarray(pooled.train.inputs[: 5 * 20])
  together = np.concatenate([upright, np.asarray(pooled.test.inputs)]).reshape(7 * 20, -1)
  assert len(np.unique(together, axis=0)) == 7 * 20  # every character once, on one side only


def test_another_process_may_prepare_omniglot_meanwhile(tmp_path, small_omniglot, monkeypatch):
  folder, cache = write_omniglot(tmp_path / "zips"), tmp_path / "cache"
  prepare = omniglot_builder.MetajaxOmniglot.download_and_prepare

  def beaten(builder):
    monkeypatch.setattr(omniglot_builder.MetajaxOmniglot, "download_and_prepare", prepare)
    omniglot.load(folder, cache_dir=cache)
    raise OSError("there is such a folder already")

  monkeypatch.setattr(omniglot_builder.MetajaxOmniglot, "download_and_prepare", beaten)
  splits = omniglot.load(folder, cache_dir=cache)
  assert len(splits.train.starts) == 20 and len(splits.test.starts) == 2


@pytest.fixture
def web_server(tmp_path):
  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
      pass

  handler = functools.partial(Quiet, directory=tmp_path / "zips")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_omniglot_is_downloaded(tmp_path, small_omniglot, monkeypatch, web_server):
  write_omniglot(tmp_path / "zips")
  monkeypatch.setattr(omniglot, "URL", web_server)
  splits = omniglot.load(protocol="alphabets", cache_dir=tmp_path / "cache")
  assert len(splits.test.starts) == 3


def test_a_failed_download_says_what_to_do(tmp_path, small_omniglot, monkeypatch, web_server):
  (tmp_path / "zips").mkdir()
  monkeypatch.setattr(omniglot, "URL", web_server)
  with pytest.raises(
    DataError, match=r"could not be downloaded .*give their folder as data_dir"
  ) as error:
    omniglot.load(cache_dir=tmp_path / "cache")
  assert "\n" not in str(error.value)


def test_the_real_omniglot(shared, tmp_path, monkeypatch):
  folder = shared("data/omniglot")
  drawings = omniglot._drawings(folder, tmp_path)  # once, for both protocols
  monkeypatch.setattr(omniglot, "_drawings", lambda *_: drawings)
  splits = omniglot.load(folder, cache_dir=tmp_path)
  assert splits.train.inputs.shape == (4800 * 20, 28, 28, 1)
  assert splits.test.inputs.shape == (423 * 20, 28, 28, 1)
  assert np.all(np.asarray(splits.train.sizes) == 20)
  assert 0.9 < np.mean(np.asarray(splits.test.inputs) == 255) < 0.94
  alphabets = omniglot.load(folder, protocol="alphabets", cache_dir=tmp_path)
  assert len(alphabets.train.starts) == 4 * 964 and len(alphabets.test.starts) == 659


# mini-ImageNet, from archives made here


def test_mini_imagenet_reads_every_archive_once(mini, tmp_path, monkeypatch):
  cache = tmp_path / "cache"
  splits = mini_imagenet.load(mini, cache_dir=cache)
  np.testing.assert_array_equal(splits.train.sizes, [3, 4])
  assert splits.validation is None and splits.test.inputs.shape == (2, 84, 84, 3)
  content = members("train", {"n01": 3, "n02": 2})["train/n01/n0100000001.jpg"]
  np.testing.assert_array_equal(splits.train.inputs[1], np.asarray(Image.open(io.BytesIO(content))))

  def fail(*_):
    raise AssertionError("decoded again")

  with monkeypatch.context() as patch:
    patch.setattr(class_folders, "decode_image", fail)
    again = mini_imagenet.load(mini, cache_dir=cache)
  np.testing.assert_array_equal(again.train.inputs, splits.train.inputs)
  write_tar(mini / "val.tar.gz", members("val", {"n05": 2}))
  assert mini_imagenet.load(mini, cache_dir=cache).validation.inputs.shape == (2, 84, 84, 3)


def test_images_of_the_right_size_are_opaque_and_have_8_bits():
  """As those that are fitted to a size."""

  def decoded(mode, color, **options):
    content = io.BytesIO()
    Image.new(mode, (4, 4), color).save(content, "png")
    return files.decode_image(content.getvalue(), "x.png", size=(4, 4), mode="L", **options)

  for options in ({}, {"fit": True}):
    assert (decoded("RGBA", (0, 0, 0, 0), **options) == 255).all()
    with pytest.raises(DataError, match=r"x.png has more than 8 bits a channel"):
      decoded("I;16", 30_000, **options)


def test_two_programs_may_prepare_the_same_data_at_once(tmp_path, monkeypatch):
  for name in "abc":
    write_image(tmp_path / "images" / name / "0.bmp", ord(name), (4, 4), mode="L")
  both_have_written, write = threading.Barrier(2, timeout=60), np.savez

  def savez(*args, **arrays):
    write(*args, **arrays)
    both_have_written.wait()

  monkeypatch.setattr(np, "savez", savez)
  read = lambda _: metajax.data.from_folder(
    tmp_path / "images",
    size=(4, 4),
    mode="L",
    test=1,
    validation=0,
    cache_dir=tmp_path / "cache",
  )
  with ThreadPoolExecutor(2) as pool:
    one, other = pool.map(read, range(2))
  np.testing.assert_array_equal(one.train.inputs, other.train.inputs)


def test_two_folders_that_look_alike_are_read_apart(tmp_path):
  found = []
  for shade in (10, 200):
    folder = tmp_path / str(shade) / "images"
    for name in "abc":
      for i in range(2):
        shown = shade + 2 * "abc".index(name) + i
        write_image(folder / name / f"{i}.bmp", shown, (4, 4), mode="L")
    for path in folder.rglob("*"):
      os.utime(path, (0, 0))
    splits = metajax.data.from_folder(
      folder, size=(4, 4), mode="L", test=1, validation=0, cache_dir=tmp_path / "cache"
    )
    found.append(int(np.max(splits.train.inputs)) // 100)
  assert found == [0, 2]


def test_mini_imagenet_from_class_folders(mini, tmp_path):
  from_archives = mini_imagenet.load(mini, cache_dir=tmp_path / "a")
  folders = tmp_path / "folders"
  for archive in mini.glob("*.tar.gz"):
    with tarfile.open(archive) as file:
      for member in filter(tarfile.TarInfo.isfile, file):
        path = folders / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.extractfile(member).read())
  from_folders = mini_imagenet.load(folders, cache_dir=tmp_path / "b")
  np.testing.assert_array_equal(from_folders.train.inputs, from_archives.train.inputs)
  np.testing.assert_array_equal(from_folders.train.sizes, from_archives.train.sizes)


def test_a_class_moved_to_another_split_is_noticed(tmp_path):
  """The same files with the same names and times, in the same order."""
  for split, classes in (("train", ("n01", "n02")), ("test", ("n03",))):
    for name, content in members(split, dict.fromkeys(classes, 2)).items():
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).write_bytes(content)
  before = mini_imagenet.load(tmp_path, cache_dir=tmp_path / "cache")
  (tmp_path / "val").mkdir()
  (tmp_path / "train" / "n02").rename(tmp_path / "val" / "n02")
  after = mini_imagenet.load(tmp_path, cache_dir=tmp_path / "cache")
  assert (len(before.train.starts), before.validation) == (2, None)
  assert (len(after.train.starts), len(after.validation.starts)) == (1, 1)


# Folders of images


def write_image(path, color, size, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  mode = options.pop("mode", "RGB")
  Image.new(mode, size, color).save(path, **options)


@pytest.fixture
def messy(tmp_path):
  """Gray and RGB, several sizes and types, uneven counts, a corrupt file, and a text."""
  folder = tmp_path / "messy"
  for name, count in zip("abcdef", (5, 4, 3, 4, 3, 1), strict=True):
    for i in range(count):
      write_image(folder / name / f"{i}.png", (200, 100 + i, ord(name)), (30 + i, 20))
  write_image(folder / "a" / "gray.jpg", 128, (64, 64), mode="L")
  write_image(folder / "b" / "clear.PNG", (0, 0, 0, 0), (8, 8), mode="RGBA")
  (folder / "c" / "broken.png").write_bytes(b"no image")
  write_image(folder / "d" / "deep.png", 40_000, (8, 8), mode="I;16")
  (folder / "c" / "notes.txt").write_text("my images")
  (folder / ".thumbnails").mkdir()
  return folder


def test_a_messy_folder(messy, tmp_path):
  options = {"size": (10, 12), "test": 2, "validation": 0, "cache_dir": tmp_path / "cache"}
  both = r"c/broken.png .* not a readable image.*; d/deep.png .* more than 8 bits .*, or skip such"
  with pytest.raises(DataError, match=both):
    metajax.data.from_folder(messy, **options)
  assert not list(tmp_path.glob("cache/*"))
  for _ in range(2):  # decoded, and from the cache
    with pytest.warns(UserWarning) as warned:
      splits = metajax.data.from_folder(messy, **options, unreadable="skip", min_examples=3)
    said = [str(one.message) for one in warned]
    assert "images are skipped" in said[0] and "'f' has 1" in said[1] and len(said) == 2
    assert sorted((*splits.train.names, *splits.test.names)) == list("abcde")
    assert splits.train.inputs.shape[1:] == (10, 12, 3) and splits.train.inputs.dtype == jnp.uint8
    assert sum(len(part.inputs) for part in (splits.train, splits.test)) == 21
  assert len(list(tmp_path.glob("cache/*"))) == 1
  (messy / "c" / "gone.png").symlink_to(tmp_path / "nowhere")
  (messy / "c" / "gone.txt").symlink_to(tmp_path / "nowhere")
  with pytest.raises(DataError, match=r"c/gone\.png cannot be read"):
    metajax.data.from_folder(messy, **options)
  with pytest.warns(UserWarning, match=r"c/gone\.png cannot be read"):
    metajax.data.from_folder(messy, **options, unreadable="skip")
  (messy / "c" / "large.png").touch()
  os.truncate(messy / "c" / "large.png", files._MAX_OWN_BYTES + 1)
  with pytest.raises(DataError, match=r"c/large\.png is over 1024 MiB"):
    metajax.data.from_folder(messy, **options)
  with pytest.warns(UserWarning, match=r"c/large\.png is over 1024 MiB"):
    metajax.data.from_folder(messy, **options, unreadable="skip")
  for path in messy.glob("[a-z]/*.*"):
    path.write_bytes(b"no image")
  with pytest.raises(DataError, match="is not a readable image"):
    metajax.data.from_folder(messy, **options, unreadable="skip")
  everything = {
    name: np.asarray(part.inputs[start : start + size])
    for part in (splits.train, splits.test)
    for name, start, size in zip(part.names, part.starts, part.sizes, strict=True)
  }
  assert np.all(everything["b"][-1] == 255)  # what is transparent is white
  assert np.all(everything["a"][-1] == 128)
  assert np.all(everything["c"][..., 0] == 200) and np.all(everything["c"][..., 2] == ord("c"))


def test_names_need_not_be_unicode(tmp_path):
  """As old archives leave them, whose names were in Latin-1."""
  name = os.fsdecode(b"caf\xe9")
  for label in (name, "b"):
    write_image(tmp_path / "images" / label / "0.png", len(label), (4, 4), mode="L")
  options = {"size": 4, "mode": "L", "test": 1, "validation": 0, "cache_dir": tmp_path / "cache"}
  for _ in range(2):  # decoded, and from the cache
    splits = metajax.data.from_folder(tmp_path / "images", **options)
    assert {*splits.train.names, *splits.test.names} == {name, "b"}


def test_images_are_cropped_around_their_centre_and_turned_upright(tmp_path):
  wide = np.zeros((20, 60), np.uint8)
  wide[:, 20:40] = 255
  tag = Image.Exif()
  tag[0x0112] = 6  # the camera was turned by a quarter
  (tmp_path / "a").mkdir()
  Image.fromarray(wide).save(tmp_path / "a" / "plain.png")
  turned = np.zeros((40, 40), np.uint8)
  turned[:20] = 255
  Image.fromarray(turned).save(tmp_path / "a" / "turned.png", exif=tag)
  write_image(tmp_path / "b" / "x.png", 7, (4, 4), mode="L")
  splits = metajax.data.from_folder(
    tmp_path, size=20, mode="L", test=1, validation=0, cache_dir=tmp_path / "cache"
  )
  (part,) = (part for part in (splits.train, splits.test) if part.names == ("a",))
  plain, upright = np.asarray(part.inputs)[..., 0]
  assert np.all(plain == 255)
  assert np.all(upright[:, 12:] == 255) and np.all(upright[:, :8] == 0)


def test_links_to_folders_are_followed_and_end(tmp_path):
  """A subset of classes is often a folder of links."""
  for number, name in enumerate("abcd"):
    for image in range(2):
      write_image(tmp_path / "all" / name / f"{image}.png", 40 * number + image, (6, 6), mode="L")
  pick = tmp_path / "pick"
  pick.mkdir()
  for name in "bcd":
    (pick / name).symlink_to(tmp_path / "all" / name)
  (tmp_path / "all" / "d" / "round").symlink_to(tmp_path / "all" / "d")
  options = {"size": 6, "mode": "L", "validation": 0, "cache_dir": tmp_path / "cache"}
  splits = metajax.data.from_folder(pick, test=1, **options)
  assert sorted((*splits.train.names, *splits.test.names)) == ["b", "c", "d"]
  assert sum(len(part.inputs) for part in (splits.train, splits.test)) == 6
  assert len(metajax.data.read_images(pick, size=6, mode="L").names) == 6
  write_image(tmp_path / "all" / "b" / "2.png", 200, (6, 6), mode="L")  # not hidden by the cache
  splits = metajax.data.from_folder(pick, test=1, **options)
  assert sum(len(part.inputs) for part in (splits.train, splits.test)) == 7


def test_folders_that_are_divided_already(tmp_path):
  for name in ("train/a", "train/b", "test/c", "val/d"):
    write_image(tmp_path / "data" / name / "x.png", ord(name[-1]), (4, 4), mode="L")
  load = lambda: metajax.data.from_folder(
    tmp_path / "data", size=4, mode="L", cache_dir=tmp_path / "cache"
  )
  splits = load()
  assert [part.names for part in splits] == [("a", "b"), ("d",), ("c",)]
  (tmp_path / "data" / "val").rename(tmp_path / "data" / "validation")
  assert load().validation.names == ("d",)
  (tmp_path / "data" / "more").mkdir()
  with pytest.raises(DataError, match="holds more beside train and test: it should hold"):
    load()
  (tmp_path / "data" / "more").rmdir()
  write_image(tmp_path / "data" / "test" / "a" / "y.png", 7, (4, 4), mode="L")
  with pytest.raises(DataError, match=r"class a is in train and in test: .* merge them into one"):
    load()


def test_what_is_wrong_with_a_folder_is_said_before_images_are_decoded(tmp_path, monkeypatch):
  for name in ("train/a", "test/b"):
    write_image(tmp_path / "data" / name / "x.png", ord(name[-1]), (4, 4), mode="L")
  load = lambda **options: metajax.data.from_folder(
    tmp_path / "data", size=4, mode="L", cache_dir=tmp_path / "cache", **options
  )
  monkeypatch.setattr(class_folders, "decode_image", lambda *_, **__: pytest.fail("it decodes"))
  (tmp_path / "data" / "train" / "b").mkdir()
  with pytest.raises(DataError, match="train/b has no image"):
    load()
  (tmp_path / "data" / "train" / "b").rmdir()
  write_image(tmp_path / "data" / "test" / "a" / "y.png", 7, (4, 4), mode="L")
  with pytest.raises(DataError, match="class a is in train and in test"):
    load()
  shutil.rmtree(tmp_path / "data" / "test" / "a")
  (tmp_path / "cache").write_text("no folder")
  with pytest.raises(DataError, match=r"cache .* cannot be written"):
    load()
  (tmp_path / "cache").unlink()
  (tmp_path / "data" / "val").mkdir()
  with pytest.raises(DataError, match="val: there is no image inside: it should hold"):
    load()
  (tmp_path / "data" / "val").rmdir()
  (tmp_path / "data" / "test").rename(tmp_path / "data" / "testing")
  with pytest.raises(DataError, match=r"not CLASS/IMAGE: .* they are train, test and, if you like"):
    load()


def test_a_full_disk_loses_no_decoded_images(tmp_path, monkeypatch):
  for name in "ab":
    write_image(tmp_path / "data" / name / "x.png", ord(name), (4, 4), mode="L")

  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(np, "savez", full)
  options = {"size": 4, "mode": "L", "test": 1, "validation": 0, "cache_dir": tmp_path / "cache"}
  with pytest.warns(UserWarning, match="No space left .*; the images are decoded again next time"):
    splits = metajax.data.from_folder(tmp_path / "data", **options)
  assert {*splits.train.names, *splits.test.names} == {"a", "b"}


def test_files_that_are_no_images_leave_the_cache_as_it_is(tmp_path):
  folder = tmp_path / "data"
  for name in "ab":
    write_image(folder / name / "x.jfif", ord(name), (4, 4), mode="L", format="JPEG")
  options = {"size": 4, "mode": "L", "test": 1, "validation": 0, "cache_dir": tmp_path / "cache"}
  metajax.data.from_folder(folder, **options)
  (folder / "a" / ".DS_Store").write_text("of the system")
  (folder / "notes.txt").write_text("of the user")
  (folder / "__MACOSX" / "a").mkdir(parents=True)
  metajax.data.from_folder(folder, **options)
  assert len(list((tmp_path / "cache").iterdir())) == 1
  (folder / "a" / "phone.heic").write_bytes(b"of a phone")
  of_a_phone = r"\(1 of types that are not read, .heic: convert them\)"
  with pytest.warns(UserWarning, match=f"passed over {of_a_phone}"):
    metajax.data.from_folder(folder, **options)
  (folder / "c").mkdir()
  (folder / "a" / "phone.heic").rename(folder / "c" / "phone.heic")
  with pytest.raises(DataError, match=f"c has no image {of_a_phone}: add the images"):
    metajax.data.from_folder(folder, **options)
  with pytest.raises(DataError, match=f"there is no image below .*c {of_a_phone}"):
    metajax.data.read_images(folder / "c", size=4)
  (folder / "c" / "photo.png").write_bytes(b"no image")
  with pytest.raises(DataError, match=r"no image below .*c can be read: photo.png .* is not a"):
    metajax.data.read_images(folder / "c", size=4, unreadable="skip")


def test_images_that_occur_twice_are_left_out_or_warned_of(tmp_path):
  folder = tmp_path / "data"
  for name, color in (("a/0", 1), ("a/1", 2), ("a/1 (copy)", 2), ("b/0", 3), ("c/0", 3)):
    write_image(folder / f"{name}.png", color, (4, 4), mode="L")
  options = {"size": 4, "mode": "L", "test": 1, "validation": 0, "cache_dir": tmp_path / "cache"}
  with pytest.warns(UserWarning) as warned:
    splits = metajax.data.from_folder(folder, **options)
  said = " ".join(str(one.message) for one in warned)
  assert "1 images are left out, since their class has the same" in said
  assert "some images (1) are in several classes, as in b and c" in said
  assert sum(len(part.inputs) for part in (splits.train, splits.test)) == 4


def test_an_image_with_damaged_metadata_is_read_as_it_is(tmp_path, monkeypatch):
  def damaged(image):
    raise SyntaxError("not a TIFF file")

  write_image(tmp_path / "a.png", 7, (4, 4), mode="L")
  monkeypatch.setattr(files.ImageOps, "exif_transpose", damaged)
  assert np.all(metajax.data.read_images(tmp_path, size=4, mode="L").images == 7)


# Data on the host


@pytest.mark.parametrize("execution", [metajax.vmapped(3), metajax.sharded(3)], ids=["one", "many"])
def test_episodes_from_the_host_are_those_of_the_device(execution, tmp_path):
  pytest.importorskip("grain", reason="the grain extra is not installed")
  inputs = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
  np.save(tmp_path / "inputs.npy", inputs)
  on_disk = np.load(tmp_path / "inputs.npy", mmap_mode="r")
  labels = np.arange(40) % 8
  loss = metajax.losses.cross_entropy(lambda w, x: x @ w, reduction="sum")
  gradient = metajax.fomaml(loss, metajax.carried(optax.adam(0.01, b1=0.0)))
  learner = metajax.meta_learner(gradient, optax.sgd(0.1), execution)
  make_episode = metajax.separate_tail(metajax.cycling(3, 4))
  sampler = lambda inputs: few_shot.sample_task(
    metajax.data.from_arrays(inputs, labels), ways=2, train_shots=3, test_shots=2
  )
  start = learner.init(jnp.zeros((5, 2)))
  whole, infos = jax.jit(metajax.run(learner, sampler(inputs), make_episode, 5))(start, KEY)

  step, state, losses = jax.jit(learner.step), start, []
  sample = learner.execution.sample(sampler(np.arange(40)), make_episode)
  for first in (0, 2):  # stopped after two meta-steps, and resumed
    number = jnp.int32(first)  # as of a state
    episodes = metajax.data.host_episodes(sample, on_disk.__getitem__, KEY, first=number)
    number.delete()  # the state was donated
    for batch in itertools.islice(episodes, 2 if first == 0 else 3):
      state, info = step(state, batch)
      losses.append(info.losses)
  assert state.step == 5
  np.testing.assert_allclose(losses, infos.losses, rtol=1e-6)
  np.testing.assert_allclose(state.params, whole.params, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("execution", [metajax.vmapped(3), metajax.sharded(3)], ids=["one", "many"])
def test_tasks_from_the_host_train_and_judge_as_those_of_the_device_do(execution):
  stored = np.random.default_rng(0).normal(size=(40, 5))  # float64, as NumPy makes it
  labels, model = np.arange(40) % 8, metajax.models.mlp(5, 2)
  sampler = lambda inputs: few_shot.sample_task(
    metajax.data.from_arrays(inputs, labels), ways=2, train_shots=3, test_shots=2
  )
  on_device = sampler(stored)
  on_host = metajax.data.host_tasks(sampler(np.arange(40)), stored.__getitem__)
  loss = metajax.losses.cross_entropy(model.apply, reduction="mean")
  learner = metajax.meta_learner(metajax.fomaml(loss, optax.sgd(0.1)), optax.adam(0.01), execution)
  make_episode = metajax.separate_tail(metajax.cycling(3, 4))
  start = learner.init(model.init(KEY))
  one, other = (
    metajax.train(learner, sample, make_episode, start, KEY, num_steps=4, steps_per_call=2)
    for sample in (on_device, on_host)
  )
  chex.assert_trees_all_equal(one.state.params, other.state.params)
  assert one.losses == other.losses
  evaluate = metajax.evaluate(learner, metajax.cycling(2, 6), metajax.transductive(model.apply))
  one, other = (
    metajax.judge(evaluate, sample, metajax.losses.accuracy)(start, KEY, 5)
    for sample in (on_device, on_host)
  )
  np.testing.assert_array_equal(one, other)


def test_what_is_fetched_on_the_host_may_be_a_pytree_with_axes_of_its_own():
  stored = {"image": np.arange(48, dtype=np.uint8).reshape(12, 2, 2), "on": np.arange(12) % 2 == 0}
  rows = metajax.data.from_arrays(np.arange(12), np.arange(12) % 3)
  sample_rows = few_shot.sample_task(rows, ways=3, train_shots=2, test_shots=1)
  fetched = []

  def fetch(rows):
    fetched.append(rows.shape)
    return {name: leaf[rows] for name, leaf in stored.items()}

  sample_task = metajax.data.host_tasks(sample_rows, fetch)
  assert fetched == [(1, 2)]  # for the shapes
  keys = jax.random.split(KEY, 4)
  tasks, of_rows = jax.jit(jax.vmap(sample_task))(keys), jax.vmap(sample_rows)(keys)
  jax.block_until_ready(tasks)
  assert sorted(fetched[1:]) == [(4, 3), (4, 6)]  # all tasks in one call
  chex.assert_trees_all_equal(tasks.train.inputs, fetch(np.asarray(of_rows.train.inputs)))
  chex.assert_trees_all_equal(tasks.test.inputs, fetch(np.asarray(of_rows.test.inputs)))
  chex.assert_trees_all_equal_dtypes(tasks.train.inputs, stored)
  without_test = few_shot.sample_task(rows, ways=3, train_shots=2, test_shots=0)
  task = jax.jit(metajax.data.host_tasks(without_test, fetch))(KEY)
  assert task.test.inputs["image"].shape == (0, 2, 2)
  for wrong, message in (
    (lambda rows: stored["on"][rows.reshape(-1)], r"for rows \[1, 2\] it returns \(2,\)"),
    (lambda rows: rows.astype(np.int64) + 2**40, "inputs must fit int32"),
    (lambda rows: rows / 0.0, "inputs must be finite float32"),
  ):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
      metajax.data.host_tasks(sample_rows, wrong)
  with jax.enable_x64(True):  # the rows are int64 then
    rows = metajax.data.from_arrays(np.arange(12), np.arange(12) % 3)
    sample_rows = few_shot.sample_task(rows, ways=3, train_shots=2, test_shots=1)
    assert metajax.data.host_tasks(sample_rows, fetch)(KEY).train.inputs["on"].shape == (6,)
  with pytest.raises(ValueError, match=r"must have row numbers as inputs, integers \[n\]"):
    metajax.data.host_tasks(sample_task, fetch)(KEY)


# CIFAR-100, from an archive made here


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch):
  """The official layout with 2 + 1 images of each class; pixels name the class and the image."""
  monkeypatch.setattr(cifar, "_PARTS", {"train.bin": 2, "test.bin": 1})
  real = sorted({*cifar._VALIDATION, *cifar._TEST, *(f"other{i:02d}" for i in range(64))})
  above = sorted({*cifar._VALIDATION_SUPERCLASSES, *cifar._TEST_SUPERCLASSES, *"abcdefghijkl"})

  def records(each, first):
    found = []
    for image in range(each):
      for label in range(100):
        pixels = np.zeros((3, 32, 32), np.uint8)
        pixels[0, 0, 1], pixels[1], pixels[2, 5, 7] = label, first + image, 9
        found.append(bytes([label // 5, label]) + pixels.tobytes())
    return b"".join(found)

  contents = {
    "train.bin": records(2, 0),
    "test.bin": records(1, 2),
    "fine_label_names.txt": "\n".join(real).encode() + b"\n",
    "coarse_label_names.txt": "\n".join(above).encode() + b"\n",
  }

  def write(**changes):
    inside = {f"cifar-100-binary/{name}": c for name, c in (contents | changes).items()}
    write_tar(tmp_path / "cifar-100-binary.tar.gz", inside)
    return tmp_path

  return write, real, above


def test_cifar_fs_and_fc100(cifar_archive):
  write, real, above = cifar_archive
  folder = write()
  splits = metajax.data.cifar_fs(folder)
  assert [len(part.sizes) for part in splits] == [64, 16, 20]
  assert set(splits.validation.names) == set(cifar._VALIDATION)
  assert set(splits.test.names) == set(cifar._TEST)
  images = np.asarray(splits.test.inputs)
  assert images.shape == (60, 32, 32, 3) and images.dtype == np.uint8
  for name, start in zip(splits.test.names, splits.test.starts, strict=True):
    assert images[start : start + 3, 0, 1, 0].tolist() == [real.index(name)] * 3
    assert images[start : start + 3, 9, 9, 1].tolist() == [0, 1, 2]
    assert images[start, 5, 7, 2] == 9
  splits = metajax.data.fc100(folder)
  assert [len(part.sizes) for part in splits] == [60, 20, 20]
  expected = {
    real[5 * above.index(name) + i] for name in cifar._TEST_SUPERCLASSES for i in range(5)
  }
  assert set(splits.test.names) == expected


@pytest.mark.parametrize(
  "changes",
  [
    {"test.bin": b"short"},
    {"fine_label_names.txt": b""},
    {"coarse_label_names.txt": b"one\n"},
    {"train.bin": bytes(200 * 3074)},
  ],
)
def test_an_incomplete_cifar_archive_is_refused(cifar_archive, changes):
  with pytest.raises(DataError, match=r"lacks .* download https"):
    metajax.data.fc100(cifar_archive[0](**changes))


def test_cifar_lists_agree_with_the_published_ones(shared):
  folder = shared("data/splits/cifar_fs")
  assert sorted((folder / "val.txt").read_text().split()) == sorted(cifar._VALIDATION)
  assert sorted((folder / "test.txt").read_text().split()) == sorted(cifar._TEST)
  with pytest.raises(DataError, match=r"has no cifar-100-binary.tar.gz: download https"):
    metajax.data.cifar_fs(folder)


# Hubs

SMALL_GRAY = class_folders.format_of(4, "L")


def test_from_tfds(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")

  class Small(tfds.core.GeneratorBasedBuilder):
    """Gray images of four classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Tensor(shape=(5, 6, 1), dtype=np.uint8),
        "label": tfds.features.ClassLabel(names=["ant", "bee", "cow", "dog"]),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
      return {"train": self._generate_examples(0, 8), "test": self._generate_examples(8, 12)}

    def _generate_examples(self, start, stop):
      for i in range(start, stop):
        yield i, {"image": np.full((5, 6, 1), 10 * (i % 4) + i // 4, np.uint8), "label": i % 4}

  builder = Small(data_dir=tmp_path, file_format="array_record")
  splits = metajax.data.from_tfds(builder, size=3, mode="L", validation=1, test=1, seed=2)
  assert [len(part.sizes) for part in splits] == [2, 1, 1]
  for part in splits:
    assert part.inputs.shape[1:] == (3, 3, 1)
    for name, start in zip(part.names, part.starts, strict=True):
      found = np.asarray(part.inputs[start : start + 3])
      assert np.all(found // 10 == ["ant", "bee", "cow", "dog"].index(name))


def labelled(pairs, names):
  return (hub._Labelled(image, label, names) for image, label in pairs)


def sizes_of(splits):
  return {
    name: int(size)
    for part in (splits.train, splits.test)
    for name, size in zip(part.names, part.sizes, strict=True)
  }


@pytest.mark.parametrize(
  ("image", "pattern"),
  [
    (np.full((4, 4), 0.5), r"image 0 is float64 \(4, 4\), not uint8"),
    (np.full((4, 4), 30_000, np.uint16), r"image 0 is uint16 \(4, 4\), not uint8"),
    (Image.new("I;16", (4, 4), 30_000), "image 0 has more than 8 bits a channel"),
    (["a", "b"], "image 0 is <U1"),
  ],
)
def test_images_of_a_hub_that_are_no_bytes_are_refused(image, pattern):
  pairs = [(image, 0), (image, 1)]
  with pytest.raises(DataError, match=pattern):
    hub._splits(labelled(pairs, ["a", "b"]), SMALL_GRAY, 1, 0, 1, 0)


@pytest.mark.parametrize(
  ("label", "names", "pattern"),
  [
    ([0, 1], None, r"the label \[0, 1\]: give one whole number or name"),
    (0.5, None, r"the label 0.5: give one whole number or name"),
    (2, ["a", "b"], "the label 2, and the data set has 2 names of classes: correct"),
  ],
)
def test_labels_of_a_hub_are_single_and_have_names(label, names, pattern):
  pairs = [(np.zeros((4, 4), np.uint8), label)]
  with pytest.raises(DataError, match="image 0 has " + pattern):
    hub._splits(labelled(pairs, names), SMALL_GRAY, 1, 0, 1, 0)


def test_each_split_of_a_hub_has_its_own_names():
  image = lambda number: np.full((4, 4), number, np.uint8)
  cats = labelled([(image(0), 0), (image(1), 1)], ["cat", "dog"])
  owls = labelled([(image(2), 0), (image(3), 1)], ["owl", "cat"])
  splits = hub._splits(itertools.chain(cats, owls), SMALL_GRAY, 1, 0, 1, 0)
  assert sizes_of(splits) == {"cat": 2, "dog": 1, "owl": 1}


@pytest.mark.parametrize("size", [28.5, None, (28, 28, 3)])
def test_a_size_is_one_number_or_two(size):
  with pytest.raises(ValueError, match="size must be one whole number or two, not"):
    class_folders.format_of(size, "L")
  with pytest.raises(ValueError, match="height must be a whole number"):
    metajax.models.conv4(size, ways=5)
  assert metajax.models.conv4(np.int64(28), ways=5).spec == metajax.models.conv4(28, ways=5).spec


def test_a_mode_is_checked_before_a_hub_is_asked():
  with pytest.raises(ValueError, match="mode must be 'L' or 'RGB'"):
    metajax.data.from_tfds("no_such_data", size=4, mode="rgb")


def test_a_name_that_tfds_does_not_know_is_one_line():
  pytest.importorskip("tensorflow_datasets")
  with pytest.raises(DataError, match=r"no data set 'cifer100': did you mean cifar100 or [^\n]*$"):
    metajax.data.from_tfds("cifer100", size=4)
  with pytest.raises(DataError, match=r"no data set 'xyzzy': see tfds.list_builders\(\)$"):
    metajax.data.from_tfds("xyzzy", size=4)


def test_data_of_tfds_that_cannot_be_downloaded_is_one_line():
  pytest.importorskip("tensorflow_datasets")
  info = types.SimpleNamespace(features={"image": None, "label": None})

  def refused():
    raise Exception("no route to host\nand more")

  builder = types.SimpleNamespace(name="far", info=info, download_and_prepare=refused)
  with pytest.raises(DataError, match=r"far cannot be downloaded or prepared: no route to host$"):
    metajax.data.from_tfds(builder, size=4)


def test_an_image_that_the_library_of_a_hub_cannot_read_is_named():
  def records():
    yield np.zeros((4, 4), np.uint8), 0
    raise OSError("broken data stream")

  with pytest.raises(DataError, match=r"image 1 cannot be read \(broken data stream\): leave it"):
    hub._splits(labelled(records(), ["a", "b"]), SMALL_GRAY, 1, 0, 1, 0)


def test_images_of_a_hub_without_a_label_are_left_out():
  labels = (0, 1, 2, -1, None, 1)
  pairs = [(np.full((4, 4), number, np.uint8), label) for number, label in enumerate(labels)]
  with pytest.warns(UserWarning, match="2 images without a label are left out"):
    splits = hub._splits(labelled(pairs, ["a", "b", "c"]), SMALL_GRAY, 1, 0, 1, 0)
  assert sizes_of(splits) == {"a": 1, "b": 2, "c": 1}


def test_images_that_a_hub_has_twice_are_there_once():
  """Its splits may overlap, and then a task would be tested by examples that it adapted to."""
  image = lambda number: np.full((4, 4), number, np.uint8)
  pairs = [(image(number), label) for number, label in ((0, 0), (1, 0), (0, 1), (0, 0), (1, 0))]
  with pytest.warns(UserWarning) as warned:
    splits = hub._splits(labelled(pairs, ["a", "b"]), SMALL_GRAY, 1, 0, 1, 0)
  said = [str(one.message) for one in warned]
  assert said[0].startswith("2 images are left out, since their class has the same")
  assert "some images (1) are in several classes, as in a and b" in said[1] and len(said) == 2
  found = {part.names[0]: np.asarray(part.inputs) for part in (splits.train, splits.test)}
  assert found["a"][:, 0, 0, 0].tolist() == [0, 1] and found["b"][:, 0, 0, 0].tolist() == [0]


def test_from_huggingface():
  datasets = pytest.importorskip("datasets", reason="the huggingface extra is not installed")
  images = [Image.new("RGB", (6, 5), (10 * (i % 3), i, 0)) for i in range(9)]
  features = datasets.Features(
    {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
  )
  columns = {"picture": images, "kind": [i % 3 for i in range(9)]}
  found = datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features=features)})
  options = {"size": (4, 3), "validation": 0, "test": 1, "image": "picture"}
  splits = metajax.data.from_huggingface(found, **options, label="kind")
  assert sorted((*splits.train.names, *splits.test.names)) == ["a", "b", "c"]
  for part in (splits.train, splits.test):
    for name, start in zip(part.names, part.starts, strict=True):
      assert np.all(np.asarray(part.inputs[start : start + 3])[..., 0] == 10 * "abc".index(name))
  with pytest.raises(DataError, match="has columns picture, kind, not picture and label: name"):
    metajax.data.from_huggingface(found, **options)


def test_hugging_face_without_its_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ImportError, match="needs a library: pip install datasets"):
    metajax.data.from_huggingface("uoft-cs/cifar100", size=32)


@pytest.mark.parametrize("opener", ["tarfile.open", "zipfile.ZipFile"])
def test_an_archive_that_may_not_be_read_is_named(opener, tmp_path, monkeypatch):
  def forbidden(*_, **__):
    raise PermissionError(13, "Permission denied")

  archive = tmp_path / ("it.tar" if opener.startswith("tar") else "it.zip")
  archive.touch()
  monkeypatch.setattr(opener, forbidden)
  with pytest.raises(DataError, match=r"it\.(tar|zip) cannot be read \(Permission denied\)"):
    list(files.read_archive(archive, (".png",)))


def test_the_cache_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / "here"))
  assert files.cache_directory() == tmp_path / "here"
  assert files.cache_directory(tmp_path / "there") == tmp_path / "there"
  monkeypatch.delenv("METAJAX_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert files.cache_directory() == tmp_path / "metajax"
