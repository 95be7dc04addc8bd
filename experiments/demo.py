"""A page to draw on: three characters, one example of each, and a fourth that is recognized.

  python -m experiments.demo

Opens a small server on this machine, for this machine only, and prints its address. The page sends
the drawings, 28 x 28 pixels each, whenever they change; a trained learner adapts to the three and
predicts the fourth. This is the demonstration of the paper's announcement. Ctrl-C ends it.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

import metajax
from experiments import cli
from experiments.settings import Settings, option

PAGE = Path(__file__).with_name("demo.html")
WAYS, SIZE = 3, 28
LARGEST = 32_768  # bytes of a request; four drawings take about a quarter of it
PER_SECOND = 30  # requests that are answered
_PAPER, _INK = 255, 0  # of the images that learners are trained on
_SECONDS = 5  # to wait for what a client sends


@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
  """Which learner is shown, and where."""

  learner: str = option(
    "omniglot_5way_reptile",
    "A learner file of 28 x 28 gray images, or the name of a learner of metajax.",
  )
  port: int = option(
    8642, "The port of the page's address; 0 chooses one that is free.", at_least=0
  )


class Recognizer:
  """A learner that adapts to the examples when they change."""

  def __init__(self, learned: metajax.Learned) -> None:
    self._learned = learned
    self._adapted: tuple[bytes, Callable[[Any], metajax.Predictions]] | None = None

  def __call__(self, examples: np.ndarray, drawing: np.ndarray) -> dict[str, Any]:
    """The probability of each class, whether it adapted anew, and how long this took.

    Args:
      examples: uint8 `[3, 28, 28, 1]`, one of each class.
      drawing: uint8 `[28, 28, 1]`.
    """
    start = time.perf_counter()
    known = self._adapted is not None and self._adapted[0] == examples.tobytes()
    if self._adapted is None or not known:
      self._adapted = examples.tobytes(), self._learned.adapt(examples, range(WAYS))
    found = self._adapted[1](drawing[None])
    return {
      "probabilities": [round(float(p), 4) for p in found.probabilities[0]],
      "adapted": not known,
      "milliseconds": round(1e3 * (time.perf_counter() - start)),
    }


def drawings_of(body: bytes) -> tuple[np.ndarray, np.ndarray]:
  """The examples and the drawing of a request.

  Raises:
    ValueError: if the request is not four drawings.
  """
  try:
    content = json.loads(body)
    pixels = np.array([*content["examples"], content["drawing"]], np.float32)
  except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
    raise ValueError(
      "send {'examples': three drawings, 'drawing': one}, each a list of numbers"
    ) from error
  if pixels.shape != (WAYS + 1, SIZE * SIZE) or not np.all((pixels >= 0) & (pixels <= 1)):
    raise ValueError(f"a drawing is {SIZE * SIZE} numbers from 0, paper, to 1, ink")
  images = np.where(pixels > 0.3, _INK, _PAPER).astype(np.uint8)
  images = images.reshape(WAYS + 1, SIZE, SIZE, 1)
  return images[:WAYS], images[WAYS]


class Handler(BaseHTTPRequestHandler):
  """Answers GET / with the page, and POST /predict with probabilities."""

  timeout = _SECONDS
  server: "Server"

  def do_GET(self) -> None:
    if not self._addressed():
      return
    if self.path.split("?")[0] != "/":
      return self._answer(404, {"error": "there is one page, /"})
    self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())

  def do_POST(self) -> None:
    if not self._addressed():
      return
    length = self.headers.get("Content-Length", "")
    if self.path != "/predict" or not (length.isascii() and length.isdigit()):
      return self._answer(404, {"error": "send drawings to /predict, with their length"})
    if len(length) > 9 or int(length) > LARGEST:
      return self._answer(413, {"error": f"a request has at most {LARGEST} bytes"})
    if self.headers.get("Content-Type", "").split(";")[0] != "application/json":
      return self._answer(415, {"error": "send application/json"})
    if not self.server.allowed():
      return self._answer(429, {"error": f"at most {PER_SECOND} requests a second are answered"})
    try:
      drawn = drawings_of(self.rfile.read(int(length)))
      with self.server.one_at_a_time:
        found = self.server.recognize(*drawn)
      self._answer(200, found)
    except (TimeoutError, ConnectionError):
      self.close_connection = True
    except ValueError as error:
      self._answer(400, {"error": str(error)})

  def _addressed(self) -> bool:
    """Whether the browser asked for this machine, and not for a name that leads here."""
    host = self.headers.get("Host", "").rsplit(":", 1)[0]
    if host in ("127.0.0.1", "localhost"):
      return True
    self._answer(403, {"error": "this page is for this machine only: open it as 127.0.0.1"})
    return False

  def _answer(self, status: int, content: dict[str, Any]) -> None:
    self._send(status, "application/json", json.dumps(content).encode())

  def _send(self, status: int, kind: str, content: bytes) -> None:
    self.send_response(status)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(content)))
    self.send_header("Cache-Control", "no-store")
    self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'")
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_: Any) -> None:
    """Prints nothing for each request."""


class Server(ThreadingHTTPServer):
  """Predicts for one request at a time, and only for so many in a second.

  Each connection has a thread, so that one that is idle or slow does not hold up the others.
  """

  daemon_threads = True

  def __init__(self, port: int, recognize: Recognizer) -> None:
    super().__init__(("127.0.0.1", port), Handler)
    self.recognize = recognize
    self.one_at_a_time = threading.Lock()
    self._answered: list[float] = []
    self._counting = threading.Lock()

  def allowed(self) -> bool:
    """Whether one more request may be answered in this second; counts it then."""
    with self._counting:
      now = time.monotonic()
      self._answered = [then for then in self._answered if now - then < 1]
      if len(self._answered) >= PER_SECOND:
        return False
      self._answered.append(now)
      return True


def serve(server: Server) -> None:
  """Answers until Ctrl-C."""
  blank = np.full((WAYS + 1, SIZE, SIZE, 1), _PAPER, np.uint8)
  server.recognize(blank[:WAYS], blank[WAYS])  # compiles
  print(f"draw at http://127.0.0.1:{server.server_port} (Ctrl-C ends this)", flush=True)
  try:
    server.serve_forever()
  except KeyboardInterrupt:
    pass
  finally:
    server.server_close()


def program(demo: Demo) -> Callable[[], Any]:
  """Checks the flags, and returns the function that runs the server."""
  learned = metajax.load(demo.learner)
  inputs = learned.recipe.inputs.get("", {"shape": [], "dtype": ""})
  if inputs != {"shape": [SIZE, SIZE, 1], "dtype": "uint8"}:
    raise ValueError(f"--learner={demo.learner} is not of gray images of {SIZE} x {SIZE} pixels")
  if demo.port >= 2**16:
    raise ValueError(f"--port={demo.port} must be below 65536")
  try:
    server = Server(demo.port, Recognizer(learned))
  except OSError as error:
    raise ValueError(
      f"--port={demo.port} cannot be opened ({error.strerror}): give another one, or 0"
    ) from error
  return partial(serve, server)


if __name__ == "__main__":
  cli.main_without_folder(program, Demo())
