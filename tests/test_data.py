import functools
import gzip
import http.server
import io
import tarfile
import threading
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import metajax
from metajax.data import DataError, few_shot, files, glyphs, mini_imagenet, omniglot, sine

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


@pytest.mark.parametrize(
  ("inputs", "labels", "message"),
  [
    (np.ones((3, 2)), np.zeros(2, int), "must be"),
    (np.ones((0, 2)), np.zeros(0, int), "m >= 1"),
    (np.ones((2, 2)), np.zeros(2), "integers, not float64"),
    (np.array([1.0, np.nan]), np.zeros(2, int), "finite"),
  ],
)
def test_from_arrays_refuses(inputs, labels, message):
  with pytest.raises(ValueError, match=message):
    few_shot.from_arrays(inputs, labels)


@pytest.mark.parametrize(
  ("numbers", "message"),
  [
    ({"ways": 6, "train_shots": 1, "test_shots": 1}, "6 ways need 6 classes, and there are 5"),
    ({"ways": 5, "train_shots": 4, "test_shots": 3}, "needs 7 examples of each class, and class 2"),
    ({"ways": 5, "train_shots": 0, "test_shots": 3}, "train_shots must be at least 1"),
  ],
)
def test_tasks_that_cannot_be_drawn_are_refused(numbers, message):
  with pytest.raises(ValueError, match=message):
    few_shot.sample_task(numbered_classes([9, 8, 6, 30, 9]), **numbers)


# Sine waves


def test_sine_waves():
  tasks = jax.jit(jax.vmap(sine.sample_task()))(jax.random.split(KEY, 400))
  assert tasks.train.inputs.shape == (400, 10, 1) and tasks.test.targets.shape == (400, 50, 1)
  np.testing.assert_allclose(tasks.test.inputs[0, :, 0], np.linspace(-5, 5, 50), rtol=1e-5)
  # a sin(x + b) = p sin x + q cos x, exactly, with the train points on the same wave
  basis = lambda x: np.stack([np.sin(x), np.cos(x)], axis=-1)
  amplitudes = []
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
    amplitudes.append(np.hypot(*wave))
  assert min(amplitudes) >= 0.1 and max(amplitudes) <= 5.0
  assert tasks.train.inputs.min() >= -5 and tasks.train.inputs.max() <= 5


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


def test_glyphs_refuse_none():
  with pytest.raises(ValueError, match="at least 1"):
    glyphs.load(train_classes=0)


# Omniglot, from archives made here

CHARACTERS = {"train": ("images_background.zip", 4), "test": ("images_evaluation.zip", 3)}


def png(rng, size=(105, 105)):
  file = io.BytesIO()
  ink = Image.fromarray((rng.random(size[::-1]) < 0.8).astype(np.uint8) * 255)
  ink.convert("1").save(file, "PNG")
  return file.getvalue()


def write_omniglot(folder, characters=CHARACTERS, drawings=20, change=None):
  """Both zips in the official layout; `change(split, name, content)` may spoil a file."""
  folder.mkdir(exist_ok=True)
  rng, label = np.random.default_rng(0), 0
  for split, (archive, count) in characters.items():
    with zipfile.ZipFile(folder / archive, "w") as file:
      file.writestr(f"images_{split}/", b"")
      file.writestr("__MACOSX/images/._0001_01.png", b"junk")
      for character in range(count):
        label += 1
        for drawing in range(drawings):
          where = f"images_{split}/Alphabet_{label % 2}/character{character:02d}"
          name = f"{where}/{label:04d}_{drawing + 1:02d}.png"
          content = png(rng)
          if change is not None:
            name, content = change(split, name, content)
          file.writestr(name, content)
  return folder


@pytest.fixture
def small_omniglot(monkeypatch):
  monkeypatch.setattr(omniglot, "ARCHIVES", CHARACTERS)
  monkeypatch.setattr(omniglot, "_TRAIN_CHARACTERS", 5)


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


def rename(target):
  return lambda split, name, content: (
    (target, content) if name.endswith("0001_01.png") else (name, content)
  )


def replace(new):
  return lambda split, name, content: (name, new if name.endswith("0001_01.png") else content)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (rename("../../escape.png"), "unsafe name"),
    (rename("/absolute.png"), "unsafe name"),
    (rename("images_train/loose.png"), "not SET/ALPHABET"),
    (replace(b"this is no image"), "not a readable image"),
    (replace(png(np.random.default_rng(1), (28, 28))), "28x28 pixels, not 105x105"),
    (replace(png(np.random.default_rng(1))[:60]), "not a readable image"),
    (rename("images_train/A/character99/9999_01.png"), "5 characters, not 4"),
    (rename("images_train/A/character00/.hidden.png"), "19 drawings of character 0001, not 20"),
    (rename("images_train/A/character00/0001_02.png"), "0001_02.png twice"),
  ],
)
def test_broken_omniglot_archives(tmp_path, small_omniglot, change, message):
  folder = write_omniglot(tmp_path / "zips", change=change)
  with pytest.raises(DataError, match=message) as error:
    omniglot.load(folder, cache_dir=tmp_path / "cache")
  assert "\n" not in str(error.value)
  assert not list((tmp_path / "cache").rglob("dataset_info.json"))  # no partial set is left


def test_a_truncated_zip(tmp_path, small_omniglot):
  folder = write_omniglot(tmp_path / "zips")
  whole = (folder / "images_background.zip").read_bytes()
  (folder / "images_background.zip").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(DataError, match="truncated or damaged"):
    omniglot.load(folder, cache_dir=tmp_path / "cache")


def test_a_flipped_bit_in_a_zip(tmp_path, small_omniglot):
  folder = write_omniglot(tmp_path / "zips")
  content = bytearray((folder / "images_background.zip").read_bytes())
  content[len(content) // 3] ^= 16
  (folder / "images_background.zip").write_bytes(content)
  with pytest.raises(DataError):
    omniglot.load(folder, cache_dir=tmp_path / "cache")


def test_omniglot_says_which_archive_is_missing(tmp_path, small_omniglot):
  folder = write_omniglot(tmp_path / "zips")
  (folder / "images_evaluation.zip").unlink()
  with pytest.raises(DataError, match=r"has no images_evaluation.zip: download from https"):
    omniglot.load(folder, cache_dir=tmp_path / "cache")
  with pytest.raises(DataError, match="is not a folder"):
    omniglot.load(tmp_path / "nowhere", cache_dir=tmp_path / "cache")
  with pytest.raises(ValueError, match="'pooled' or 'alphabets'"):
    omniglot.load(folder, protocol="vinyals")


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


def test_the_real_omniglot(shared, tmp_path):
  folder = shared("data/omniglot")
  splits = omniglot.load(folder, cache_dir=tmp_path)
  assert splits.train.inputs.shape == (4800 * 20, 28, 28, 1)
  assert splits.test.inputs.shape == (423 * 20, 28, 28, 1)
  assert np.all(np.asarray(splits.train.sizes) == 20)
  assert 0.9 < np.mean(np.asarray(splits.test.inputs) == 255) < 0.94
  alphabets = omniglot.load(folder, protocol="alphabets", cache_dir=tmp_path)
  assert len(alphabets.train.starts) == 4 * 964 and len(alphabets.test.starts) == 659


# mini-ImageNet, from archives made here


def jpeg(rng, size=(84, 84)):
  file = io.BytesIO()
  Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(file, "JPEG")
  return file.getvalue()


def write_tar(path, members):
  with tarfile.open(path, "w:gz") as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))


def members(split, classes, seed=0, first=0):
  rng = np.random.default_rng(seed)
  return {
    f"{split}/{name}/{name}{first + i:08d}.jpg": jpeg(rng)
    for name, count in classes.items()
    for i in range(count)
  }


@pytest.fixture
def mini(tmp_path):
  folder = tmp_path / "mini"
  folder.mkdir()
  write_tar(folder / "train.tar.gz", members("train", {"n01": 3, "n02": 2}))
  write_tar(folder / "train_rest.tar.gz", members("train", {"n02": 2}, seed=1, first=50))
  write_tar(folder / "test.tar.gz", members("test", {"n09": 2}))
  return folder


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
    patch.setattr(mini_imagenet, "decode_image", fail)
    again = mini_imagenet.load(mini, cache_dir=cache)
  np.testing.assert_array_equal(again.train.inputs, splits.train.inputs)
  write_tar(mini / "val.tar.gz", members("val", {"n05": 2}))
  assert mini_imagenet.load(mini, cache_dir=cache).validation.inputs.shape == (2, 84, 84, 3)


def test_mini_imagenet_from_class_folders(mini, tmp_path):
  from_archives = mini_imagenet.load(mini, cache_dir=tmp_path / "a")
  folders = tmp_path / "folders"
  for archive in mini.glob("*.tar.gz"):
    with tarfile.open(archive) as file:
      file.extractall(folders, filter="data")
  from_folders = mini_imagenet.load(folders, cache_dir=tmp_path / "b")
  np.testing.assert_array_equal(from_folders.train.inputs, from_archives.train.inputs)
  np.testing.assert_array_equal(from_folders.train.sizes, from_archives.train.sizes)


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    ({"train/n01/a.jpg": b"no image"}, "n01/a.jpg in .* is not a readable image"),
    ({"train/n01/a.jpg": jpeg(np.random.default_rng(0), (64, 84))}, "64x84 pixels, not 84x84"),
    ({"../a.jpg": b""}, "unsafe name"),
    ({"train/a.jpg": jpeg(np.random.default_rng(0))}, "not CLASS/IMAGE"),
    ({"train/n02/n0200000000.jpg": jpeg(np.random.default_rng(0))}, "a second time"),
    ({"train/n01/a.jpg": b"0" * (files._MAX_FILE_BYTES + 1)}, "over 16 MiB"),
    ({"train/n09/a.jpg": jpeg(np.random.default_rng(0))}, "class n09 is in train and in test"),
  ],
)
def test_broken_mini_imagenet_archives(mini, tmp_path, spoil, message):
  write_tar(mini / "train_spoilt.tar.gz", spoil)
  with pytest.raises(DataError, match=message) as error:
    mini_imagenet.load(mini, cache_dir=tmp_path / "cache")
  assert "\n" not in str(error.value)
  assert not list((tmp_path / "cache").glob("*"))  # nothing half-made is left


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_tar(mini, tmp_path, keep):
  whole = (mini / "train.tar.gz").read_bytes()
  (mini / "train.tar.gz").write_bytes(whole[: int(keep * len(whole))])
  with pytest.raises(DataError, match=r"train.tar.gz is truncated or damaged"):
    mini_imagenet.load(mini, cache_dir=tmp_path / "cache")


def test_a_flipped_bit_in_a_tar(mini, tmp_path):
  content = bytearray((mini / "train.tar.gz").read_bytes())
  content[-6] ^= 1  # of gzip's checksum, which only the end of the stream tells
  (mini / "train.tar.gz").write_bytes(content)
  with pytest.raises(DataError, match="truncated or damaged"):
    mini_imagenet.load(mini, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("damage", ["cut at a header", "cut in a header", "flipped in a header"])
def test_a_tar_cut_inside_a_sound_gzip(mini, tmp_path, damage):
  content = bytearray(gzip.decompress((mini / "train.tar.gz").read_bytes()))
  with tarfile.open(fileobj=io.BytesIO(content)) as archive:
    header = archive.getmembers()[2].offset
  if damage == "flipped in a header":
    content[header] ^= 1
  else:
    del content[header + (100 if damage == "cut in a header" else 0) :]
  (mini / "train.tar.gz").write_bytes(gzip.compress(content))
  with pytest.raises(DataError, match=r"train\.tar\.gz is truncated or damaged"):
    mini_imagenet.load(mini, cache_dir=tmp_path / "cache")


def test_links_in_a_tar_are_refused(mini, tmp_path):
  with tarfile.open(mini / "val.tar.gz", "w:gz") as archive:
    link = tarfile.TarInfo("val/n05/n0500000000.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(link)
  with pytest.raises(DataError, match="a link: pack plain files only"):
    mini_imagenet.load(mini, cache_dir=tmp_path / "cache")


def test_mini_imagenet_says_how_to_get_it(tmp_path, mini):
  with pytest.raises(DataError, match=r"cannot be downloaded .* ILSVRC-2012"):
    mini_imagenet.load(None)
  with pytest.raises(DataError, match="has no train images: it should hold"):
    mini_imagenet.load(tmp_path)
  (mini / "test.tar.gz").unlink()
  with pytest.raises(DataError, match="has no test images"):
    mini_imagenet.load(mini)


def test_an_empty_archive(mini, tmp_path):
  write_tar(mini / "val.tar.gz", {"val/readme.txt": b"nothing"})
  with pytest.raises(DataError, match="there is no image inside"):
    mini_imagenet.load(mini, cache_dir=tmp_path / "cache")


def test_a_damaged_cache(mini, tmp_path):
  cache = tmp_path / "cache"
  mini_imagenet.load(mini, cache_dir=cache)
  (prepared,) = cache.glob("*.npz")
  whole = prepared.read_bytes()
  middle = len(whole) // 2
  for damaged in (whole[:1000], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
    prepared.write_bytes(damaged)
    with pytest.raises(DataError, match=r"is damaged: delete it"):
      mini_imagenet.load(mini, cache_dir=cache)


def test_the_cache_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / "here"))
  assert files.cache_directory() == tmp_path / "here"
  assert files.cache_directory(tmp_path / "there") == tmp_path / "there"
  monkeypatch.delenv("METAJAX_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert files.cache_directory() == tmp_path / "metajax"


def test_data_errors_are_value_errors():
  assert issubclass(metajax.data.DataError, ValueError)
