"""The local page: in a browser without a network, a photograph goes in and labels come out; nobody else is answered."""

import asyncio
import html
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import composed
from test_predict import SIDE, Known, scene

import fer.demo
from fer.errors import UserError
from fer.recognizer import Recognizer

web = pytest.importorskip("aiohttp.web", reason="the page needs aiohttp: pip install 'fer-bench[demo]'")
PHOTO = (700, 300, (30, 40), (420, 60))  # width, height, and where the two faces are

# Beside the page, in the same place: puts a photograph in as a person would, and waits for the answer.
DRIVER = """<!DOCTYPE html><iframe id="f" src="/" width="1200" height="900"></iframe><pre id="out"></pre>
<script>
const wait = async (ready) => { while (!ready()) await new Promise((go) => setTimeout(go, 50)); };
const put = async (page, name) => {
  const bytes = await (await fetch(name)).blob();
  const files = new page.defaultView.DataTransfer();
  files.items.add(new page.defaultView.File([bytes], name));
  page.getElementById("pick").files = files.files;
  page.getElementById("pick").dispatchEvent(new Event("change"));
  await wait(() => !/^$|Looking/.test(page.getElementById("state").textContent));
  return page.getElementById("state").textContent;
};
document.getElementById("f").onload = async () => {
  const page = document.getElementById("f").contentDocument;
  const seen = { text: await put(page, "/text.jpg"), empty: await put(page, "/empty.png") };
  seen.state = await put(page, "/photo.png");
  await wait(() => [...page.images].every((image) => image.hidden || image.complete));
  seen.titles = [...page.querySelectorAll("#faces h2")].map((node) => node.textContent);
  seen.bars = [...page.querySelectorAll("#faces li:first-child .bar")].map((node) => node.firstChild.textContent);
  seen.pictures = [...page.images].map((image) => image.naturalWidth);
  seen.captions = [...page.querySelectorAll("figcaption")].map((node) => node.textContent);
  await wait(() => page.getElementById("about").textContent);
  seen.about = page.getElementById("about").textContent;
  const loaded = page.defaultView.performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.elsewhere = loaded.filter((name) => !name.startsWith(location.origin) && !name.startsWith("data:"));
  document.getElementById("out").textContent = JSON.stringify(seen);
};
</script>"""


@pytest.fixture(scope="module")
def page(whole: Path) -> Iterator[str]:
    """The address of a running page, with files of the test beside it."""
    from fer.prediction.server import HOST, make_app

    known = Known()
    files = {"/photo.png": known.add(*PHOTO), "/empty.png": known.add(200, 150)}
    app = make_app(Recognizer.load(whole, detector=known, device="cpu"))
    contents = {name: cv2.imencode(".png", image[..., ::-1])[1].tobytes() for name, image in files.items()}
    contents |= {"/text.jpg": b"no picture", "/driver": DRIVER.encode()}

    async def extra(request: Any) -> Any:
        return web.Response(body=contents[request.path], content_type="text/html")

    app.add_routes([web.get(path, extra) for path in contents])
    loop, started = asyncio.new_event_loop(), threading.Event()
    address = []

    async def start() -> None:
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        address.append("http://{}:{}".format(*runner.addresses[0]))
        started.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.create_task(start())
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(30)
    yield address[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON and headers of an answer."""
    names = {key.replace("_", "-"): value for key, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, names), timeout=120) as reply:
            return reply.status, json.load(reply), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def test_a_photograph_goes_in_and_labels_come_out_in_a_browser(page: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    pytest.importorskip("pytorch_grad_cam", reason="attention maps need grad-cam: pip install 'fer-bench[explain]'")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=120000", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    shown = subprocess.run(
        [chromium, *words, f"{page}/driver"], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    found = re.search(r'<pre id="out">(.+?)</pre>', shown, re.S)
    assert found, shown[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert "content is not JPEG" in seen["text"]
    assert seen["empty"] == "No face was found."
    assert seen["state"] == "2 faces."
    names = ["anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"]
    assert len(seen["titles"]) == 2
    assert all(re.fullmatch(rf"({'|'.join(names)}) \d+ %", title) for title in seen["titles"])
    assert sorted(seen["bars"]) == names
    assert seen["pictures"][0] >= PHOTO[0]
    assert len(seen["pictures"]) == 5  # the photograph, and of each face the crop and what speaks for its label
    assert all(width > 0 for width in seen["pictures"])
    assert seen["captions"][1] == f"what speaks for {seen['titles'][0].split()[0]}"
    assert "synthetic-cbam_resnet" in seen["about"]
    assert "not calibrated" in seen["about"]
    assert seen["elsewhere"] == []


def test_the_same_answer_from_a_program(page: str) -> None:
    image, faces = scene(*PHOTO)
    content = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    status, answer, headers = ask(f"{page}/predict", content, Content_Type="application/octet-stream")
    assert status == 200
    assert [face["box"] for face in answer["faces"]] == [np.round(face.box, 2).tolist() for face in faces]
    assert "default-src 'self'" in headers["Content-Security-Policy"]


def test_nobody_else_is_answered_and_no_other_body(page: str) -> None:
    assert ask(f"{page}/about", Host="evil.example")[0] == 403
    assert ask(f"{page}/about", Host="localhost:1")[0] == 200
    # What a form of another site could send without asking.
    status, answer, _ = ask(f"{page}/predict", b"x", Content_Type="text/plain")
    assert (status, "expected the bytes of an image file" in answer["error"]) == (415, True)
    status, answer, _ = ask(f"{page}/predict", b"x" * SIDE, Content_Type="application/octet-stream")
    assert (status, "content is not JPEG" in answer["error"]) == (422, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [([], "run is missing"), (["run=nowhere", "port=80"], "port=80: expected a number"), (["run=x"], "x: .*missing")],
)
def test_mistakes_are_told_in_a_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        fer.demo.run(composed(*words, "detector=haar", command="demo"))


def test_a_port_that_is_taken(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fer.prediction.server import serve

    class Nobody:
        class_names = ()

    with pytest.raises(UserError, match=r"port=\d+ cannot be used"):
        serve(Nobody(), int(page.rpartition(":")[2]))
