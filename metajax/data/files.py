"""Reads archives and image folders without unpacking to disk, and reports damaged data clearly."""

import gzip
import hashlib
import io
import lzma
import os
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePath, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

# The largest size of a file in an archive: far above any few-shot image, far below a decompression
# bomb. A user's own files may be photographs and scans; Pillow limits their pixels.
_MAX_FILE_BYTES = 16 * 2**20
_MAX_OWN_BYTES = 2**30
# The largest ratio of unpacked to packed size. Images are already compressed, so the real archives
# unpack to less than twice their size.
_MAX_RATIO = 100
_MAX_NAME = 255  # characters, the limit of file systems
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
_DAMAGE = (
  EOFError,
  OSError,
  RuntimeError,
  ValueError,
  struct.error,
  zlib.error,
  lzma.LZMAError,
  tarfile.TarError,
  zipfile.BadZipFile,
)


class DataError(ValueError):
  """Unusable data. The message is one line: what is wrong, where, and what to do about it."""


def cache_directory(cache_dir: str | os.PathLike | None = None) -> Path:
  """The folder of prepared data.

  It is `cache_dir` if given, else `$METAJAX_CACHE`, else `metajax` in `$XDG_CACHE_HOME` or
  `~/.cache`.
  """
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  chosen = cache_dir or os.environ.get("METAJAX_CACHE") or Path(base) / "metajax"
  return Path(chosen).expanduser().absolute()


def existing_directory(data_dir: str | os.PathLike) -> Path:
  """Returns the folder `data_dir`; raises `DataError` if it is not a folder."""
  folder = Path(data_dir).expanduser()
  if not folder.is_dir():
    raise DataError(f"{folder.absolute()} is not a folder: give the folder that holds the data")
  return folder


def unwritable(folder: Path, error: OSError) -> DataError:
  """The error to raise when the cache cannot be written."""
  return DataError(
    f"the cache {folder} cannot be written ({error.strerror or error}): give another cache_dir"
  )


def fingerprint(folder: Path, paths: Iterable[Path]) -> str:
  """A hash of where a folder is and of its files' names, sizes and modification times.

  It has 16 hexadecimal digits, and changes when a file is replaced or moved. Of folders, and of
  what cannot be read, as a link to nowhere, only the name counts.
  """
  digest = hashlib.sha256(os.fsencode(f"{folder.resolve().as_posix()}\0"))
  for path in sorted(paths):
    about = ""
    with suppress(OSError):
      status = path.stat()
      if not stat.S_ISDIR(status.st_mode):
        about = f"{status.st_size}\0{status.st_mtime_ns}"
    digest.update(os.fsencode(f"{path.relative_to(folder).as_posix()}\0{about}\0"))
  return digest.hexdigest()[:16]


def read_archive(
  path: Path, suffixes: tuple[str, ...], *, largest: int = _MAX_FILE_BYTES
) -> Iterator[tuple[PurePosixPath, bytes]]:
  """Yields the files of a zip or tar archive that have one of the suffixes, in archive order.

  Args:
    path: a `.zip`, a `.tar`, or a `.tar.gz`.
    suffixes: lower case, such as `(".png",)`; hidden files are skipped.
    largest: the size in bytes that a file may have when unpacked.

  Yields:
    The name inside the archive and the content. Reading verifies the archive's checksums.

  Raises:
    DataError: if the archive is missing, truncated or damaged, a name is unsafe (such as one that
      leads out of the archive), or a file or the whole archive is too large when unpacked.
  """
  if not path.is_file():
    raise DataError(f"{path} does not exist: download it, or correct the folder")
  members = _zip_members if path.suffix == ".zip" else _tar_members
  try:
    for name, file in members(path, largest):
      inside = PurePosixPath(name)
      odd = "\\" in name or not name.isprintable() or len(name) > _MAX_NAME
      if odd or inside.is_absolute() or ".." in inside.parts:
        raise DataError(
          f"{path} holds the unsafe name {name!r:.100}: get the archive from a source you trust"
        )
      hidden = any(is_hidden(PurePosixPath(part)) for part in inside.parts)
      if hidden or inside.suffix.lower() not in suffixes:
        continue
      content = file.read(largest + 1)
      if len(content) > largest:
        raise DataError(f"{path} holds {name}, over {largest >> 20} MiB: that is no few-shot data")
      yield inside, content
  except DataError:
    raise
  except PermissionError as error:
    raise DataError(f"{path} cannot be read ({error.strerror}): change its permissions") from error
  except _DAMAGE as error:
    reason = " ".join(str(error).split())[:100]
    raise DataError(f"{path} is truncated or damaged ({reason}): download it again") from error


def _refuse_bomb(path: Path, unpacked: int) -> None:
  """Raises `DataError` if the declared sizes, which readers never exceed, are too large."""
  if unpacked > max(2 * _MAX_FILE_BYTES, _MAX_RATIO * path.stat().st_size):
    raise DataError(
      f"{path} would unpack to over {_MAX_RATIO} times its size: get the archive from a source you "
      "trust"
    )


def _zip_members(path: Path, largest: int) -> Iterator[tuple[str, IO[bytes]]]:
  with zipfile.ZipFile(path) as archive:
    _refuse_bomb(path, sum(info.file_size for info in archive.infolist()))
    for info in archive.infolist():
      if info.flag_bits & 1:
        raise DataError(f"{path} is encrypted: download the original")
      if not info.is_dir():
        with archive.open(info) as file:
          yield info.filename, file


def _tar_members(path: Path, largest: int) -> Iterator[tuple[str, IO[bytes]]]:
  opener = gzip.open if path.suffix in (".gz", ".tgz") else open
  with opener(path, "rb") as stream:

    def read(size: int) -> bytes:
      if size > largest + tarfile.BLOCKSIZE:  # a header may declare a name of any length
        raise tarfile.ReadError("a header that is too long")
      return stream.read(size)

    bounded: Any = SimpleNamespace(read=read, seek=stream.seek, tell=stream.tell)
    with tarfile.open(fileobj=bounded, mode="r:") as archive:
      unpacked = 0
      for member in archive:
        if member.size < 0:  # tarfile would seek backwards and loop forever
          raise tarfile.ReadError("a file of negative size")
        unpacked += member.size
        _refuse_bomb(path, unpacked)
        file = archive.extractfile(member) if member.isreg() else None
        if file is not None:
          yield member.name, file
        elif not member.isdir():
          raise DataError(f"{path} holds {member.name!r:.100}, a link: pack plain files only")
    # tarfile takes a damaged header for the end of the archive. The real end is zeros up to the
    # last byte; reading them also makes gzip verify its checksum.
    stream.seek(archive.offset)
    ending = stream.read(_MAX_FILE_BYTES)
    if len(ending) < tarfile.BLOCKSIZE or any(ending) or stream.read(1):
      raise tarfile.ReadError("it ends too early")


def files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[PurePosixPath, Path]]:
  """Yields the files below a folder that have one of the suffixes, sorted, with the name inside."""
  for path in sorted(all_below(folder)):
    file = path.is_file() or not path.exists()  # a link to nowhere will be an error
    if file and path.suffix.lower() in suffixes:
      yield PurePosixPath(path.relative_to(folder).as_posix()), path


def is_hidden(path: PurePath) -> bool:
  """Whether a file or folder is none of the user's data, but of the system."""
  return path.name.startswith(".") or path.name in ("__MACOSX", "@eaDir")


def all_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
  """Yields what is below a folder and not hidden, also behind links to other folders.

  Args:
    folder: where to begin.
    above: the folders that it lies in, without links. One of them is not entered again.

  Raises:
    DataError: if a folder cannot be read.
  """
  here = os.path.realpath(folder)
  if here in above:
    return
  try:
    entries = [entry for entry in folder.iterdir() if not is_hidden(entry)]
  except OSError as error:
    raise DataError(f"{folder} cannot be read ({error.strerror}): allow it") from error
  for entry in entries:
    yield entry
    if entry.is_dir():
      yield from all_below(entry, (*above, here))


def read_file(path: Path) -> bytes:
  """The content of a file; raises `DataError` if it is too large or cannot be read."""
  try:
    if path.stat().st_size > _MAX_OWN_BYTES:
      raise DataError(f"{path} is over {_MAX_OWN_BYTES >> 20} MiB: make a smaller image of it")
    return path.read_bytes()
  except OSError as error:
    raise DataError(f"{path} cannot be read ({error.strerror}): replace it") from error


def decode_image(
  content: bytes, name: object, *, size: tuple[int, int], mode: str, fit: bool = False
) -> np.ndarray:
  """Decodes an image to uint8 `[height, width]` (mode `L`) or `[height, width, 3]` (mode `RGB`).

  Args:
    content: the bytes of the file.
    name: the file's name in error messages.
    size: the required `(width, height)` in pixels.
    mode: the Pillow mode, `L` or `RGB`. What is transparent becomes white.
    fit: whether an image of another size is turned upright as its metadata say, cropped around its
      centre to the aspect ratio, and resized. Otherwise it is refused.

  Raises:
    DataError: if the file is not an image, is damaged, has another size and `fit` is false, or is
      gray with more than 8 bits. Of colors, and of gray with transparency, the first 8 bits count.
  """
  try:
    with warnings.catch_warnings():
      # Pillow refuses decompression bombs, and warns of smaller ones and of odd metadata.
      warnings.simplefilter("ignore")
      with Image.open(io.BytesIO(content), formats=_FORMATS[: None if fit else 2]) as image:
        if image.size != size and not fit:
          raise DataError(
            f"{name} is {image.width}x{image.height} pixels, not {size[0]}x{size[1]}: resize it"
          )
        if fit:
          return np.asarray(fit_image(image, name, size, mode))
        return np.asarray(_opaque(image, name).convert(mode))
  except (DataError, MemoryError):
    raise
  except Exception as error:  # decoders raise many types of error on damaged files
    raise DataError(f"{name} is not a readable image: replace it") from error


def fit_image(image: Image.Image, name: object, size: tuple[int, int], mode: str) -> Image.Image:
  """Turns an image upright as its metadata say, crops it around its centre, and resizes it.

  Args:
    image: to be fitted.
    name: its name in error messages.
    size: `(width, height)` in pixels.
    mode: the Pillow mode, `L` or `RGB`. What is transparent becomes white.

  Raises:
    DataError: if it is gray with more than 8 bits.
  """
  with suppress(SyntaxError, ValueError, KeyError, struct.error):  # metadata may be damaged
    image = ImageOps.exif_transpose(image)
  image = _opaque(image, name).convert(mode)
  return ImageOps.fit(image, size, Image.Resampling.BICUBIC)


def _opaque(image: Image.Image, name: object) -> Image.Image:
  """The image before a white background."""
  if image.mode.startswith(("I", "F")):  # Pillow would clip these to 8 bits
    raise DataError(f"{name} has more than 8 bits a channel: convert it to 8 bits")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image
