"""The page to draw on: what it is sent, what it refuses, and a real browser that draws."""

import http.client
import json
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import metajax
from experiments import demo


class Learned:
  """Counts adaptations; what is drawn is like the example that shares most ink with it."""

  def __init__(self):
    self.adaptations = 0

  def adapt(self, examples, labels):
    self.adaptations += 1
    assert list(labels) == [0, 1, 2] and examples.shape == (3, 28, 28, 1)

    def predict(drawings):
      shared = np.array([np.sum((one == 0) & (drawings[0] == 0)) for one in examples])
      return SimpleNamespace(probabilities=[(shared + 1) / np.sum(shared + 1)])

    return predict


@pytest.fixture
def server():
  with demo.Server(0, demo.Recognizer(Learned())) as one:
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()


def ask(server, method, path, body=None, **headers):
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
  connection.request(method, path, body, {"Content-Type": "application/json", **headers})
  answer = connection.getresponse()
  content = answer.read().decode()
  connection.close()
  return answer.status, json.loads(content) if content.startswith("{") else content


def drawings(*rows):
  """A drawing for each row number: a line there."""
  images = np.zeros((len(rows), 28, 28))
  for image, row in zip(images, rows, strict=True):
    image[row : row + 2] = 1
  return images.reshape(len(rows), -1).tolist()


def request(*rows):
  *examples, drawing = drawings(*rows)
  return json.dumps({"examples": examples, "drawing": drawing})


def test_it_adapts_once_to_examples_and_predicts(server):
  status, found = ask(server, "POST", "/predict", request(3, 10, 20, 10))
  assert status == 200 and np.argmax(found["probabilities"]) == 1
  status, found = ask(server, "POST", "/predict", request(3, 10, 20, 20))
  assert np.argmax(found["probabilities"]) == 2
  assert server.recognize._learned.adaptations == 1
  status, found = ask(server, "POST", "/predict", request(20, 10, 3, 20))
  assert np.argmax(found["probabilities"]) == 0 and server.recognize._learned.adaptations == 2


def test_ink_is_black_on_white_as_learners_know_it():
  examples, drawing = demo.drawings_of(request(3, 10, 20, 5).encode())
  assert drawing.dtype == np.uint8 and set(np.unique(examples)) == {0, 255}
  assert np.all(drawing[5:7] == 0) and np.all(drawing[7:] == 255)


def test_only_the_page_and_only_for_this_machine(server):
  assert server.server_address[0] == "127.0.0.1"
  status, page = ask(server, "GET", "/")
  assert status == 200 and "<canvas" in page
  assert ask(server, "GET", "/etc/passwd")[0] == 404
  assert ask(server, "GET", "/", Host="example.com")[0] == 403
  status, found = ask(server, "POST", "/predict", request(1, 2, 3, 4), Host="example.com:80")
  assert status == 403 and "open it as 127.0.0.1" in found["error"]
  assert (
    ask(server, "POST", "/predict", request(1, 5, 9, 4), **{"Content-Type": "text/plain"})[0] == 415
  )


@pytest.mark.parametrize(
  "body",
  [
    "",
    "[]",
    "{}",
    '{"examples": 1, "drawing": []}',
    json.dumps({"examples": drawings(1, 2), "drawing": drawings(3)[0]}),
    json.dumps({"examples": drawings(1, 2, 3), "drawing": [2.0] * 784}),
    json.dumps({"examples": drawings(1, 2, 3), "drawing": [float("nan")] * 784}),
    json.dumps({"examples": drawings(1, 2, 3), "drawing": ["x"] * 784}),
    json.dumps({"examples": drawings(1, 2, 3), "drawing": [10**400] * 784})[:30_000],
    json.dumps({"examples": [[0] * 784] * 3, "drawing": [10**400] + [0] * 783}),
    "[" * 30_000,
  ],
)
def test_other_requests_are_refused(server, body):
  status, found = ask(server, "POST", "/predict", body)
  assert status == 400 and "\n" not in found["error"]


def test_an_idle_connection_does_not_hold_up_others(server):
  with socket.create_connection(("127.0.0.1", server.server_port)):
    start = time.perf_counter()
    assert ask(server, "GET", "/")[0] == 200
    assert time.perf_counter() - start < 2


def test_size_and_rate_are_bounded(server):
  assert ask(server, "POST", "/predict", None, **{"Content-Length": "\u00b2"})[0] == 404
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
  connection.putrequest("POST", "/predict")
  connection.putheader("Content-Length", str(demo.LARGEST + 1))
  connection.endheaders()  # it is refused before anything of it is read
  assert connection.getresponse().status == 413
  connection.close()
  answers = [ask(server, "POST", "/predict", "{}")[0] for _ in range(demo.PER_SECOND + 10)]
  assert answers.count(400) < len(answers) and answers[-1] in (400, 429)
  assert 429 in answers
  assert not server.allowed()


def test_what_cannot_be_served_is_refused(server, monkeypatch):
  with pytest.raises(ValueError, match=rf"--port={server.server_port} cannot be opened"):
    demo.program(demo.Demo(port=server.server_port))
  with pytest.raises(ValueError, match="--port=65536 must be below 65536"):
    demo.program(demo.Demo(port=65536))
  of_vectors = SimpleNamespace(inputs={"": {"shape": [30], "dtype": "float32"}})
  monkeypatch.setattr(metajax, "load", lambda name: SimpleNamespace(recipe=of_vectors))
  with pytest.raises(ValueError, match="is not of gray images of 28 x 28 pixels"):
    demo.program(demo.Demo(learner="vectors.safetensors"))


def test_a_browser_draws(server):
  """Three lines, and a fourth that is near the second of them."""
  playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to draw")
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  if chromium is None:
    pytest.skip("no Chromium to draw with")
  with playwright.sync_playwright() as started:
    browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    for pad, height in zip(page.locator("canvas").all(), (20, 80, 140, 82), strict=True):
      pad.scroll_into_view_if_needed()
      box = pad.bounding_box()
      page.mouse.move(box["x"] + 15, box["y"] + height)
      page.mouse.down()
      page.mouse.move(box["x"] + 150, box["y"] + height, steps=4)
      page.mouse.up()
    page.wait_for_function("document.getElementById('state').textContent.includes('redicted')")
    page.wait_for_timeout(300)  # the last stroke's answer
    shares = [text.removesuffix(" %") for text in page.locator("output").all_inner_texts()]
    assert max(range(3), key=lambda i: float(shares[i])) == 1
    widths = [fill.bounding_box()["width"] for fill in page.locator(".fill").all()]
    assert max(range(3), key=lambda i: widths[i]) == 1 and widths[1] > 50
    page.locator("button").last.click()
    assert page.locator("#state").inner_text() == "Now draw one of them once more."
    browser.close()
