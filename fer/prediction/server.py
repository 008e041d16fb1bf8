"""The local page's server: a photograph goes in, faces, probabilities and attention maps come out.

It answers this machine alone: it listens on 127.0.0.1, refuses any other host name (a page elsewhere could otherwise
reach it under a name of its own), and keeps nothing. The page fetches nothing from elsewhere.
"""

import asyncio
import base64
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from aiohttp import web

from fer.data.images import BadImage, Pixels, read_image
from fer.errors import UserError
from fer.prediction.drawing import annotate
from fer.recognizer import Face, Recognizer

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
MOST_BYTES = 64 << 20  # of a photograph
SHOWN = 1600  # px, longer side of the annotated picture on the page
FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
BODY = "application/octet-stream"  # no form of another site can send this without asking first
log = logging.getLogger(__name__)


def make_app(recognizer: Recognizer) -> web.Application:
    """The page's routes: its files, ``/about`` (the run) and ``/predict`` (POST of an image file's bytes)."""
    one_at_a_time = asyncio.Lock()

    async def file(request: web.Request) -> web.Response:
        name, kind = FILES[request.path]
        text = (Path(__file__).parent / name).read_text()
        return web.Response(text=text, content_type=kind, headers=HEADERS)

    async def about(request: web.Request) -> web.Response:
        return web.json_response(_about(recognizer), headers=HEADERS)

    async def predict(request: web.Request) -> web.Response:
        if request.content_type != BODY:
            return _refused(415, f"expected the bytes of an image file as {BODY}")
        try:
            content = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return _refused(413, f"the file is larger than {MOST_BYTES >> 20} MB")
        async with one_at_a_time:
            try:
                answer = await asyncio.to_thread(look, recognizer, content)
            except BadImage as error:
                return _refused(422, f"not a picture that can be read: {error.reason}")
        return web.json_response(answer, headers=HEADERS)

    app = web.Application(client_max_size=MOST_BYTES, middlewares=[_this_machine_only])
    app.add_routes([*(web.get(path, file) for path in FILES), web.get("/about", about), web.post("/predict", predict)])
    return app


def serve(recognizer: Recognizer, port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the port is taken.
    """
    try:
        web.run_app(
            make_app(recognizer),
            host=HOST,
            port=port,
            access_log=None,
            print=lambda *_: print(f"http://{HOST}:{port} (Ctrl-C ends it)"),
        )
    except OSError as error:
        raise UserError(f"port={port} cannot be used ({error.strerror}): choose another") from None


def look(recognizer: Recognizer, content: bytes) -> dict[str, Any]:
    """What the page shows of an image file's bytes.

    Raises:
        BadImage: it cannot be read.
    """
    with tempfile.NamedTemporaryFile(prefix="fer-") as file:
        file.write(content)
        file.flush()
        image = read_image(Path(file.name))
    faces = recognizer.predict(image)
    picture = annotate(image, faces, recognizer.class_names)
    shrink = min(1.0, SHOWN / max(picture.shape[:2]))
    small = cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    maps, note = _maps(recognizer, faces)
    return {
        "picture": _url(np.asarray(small, dtype=np.uint8), ".jpg"),
        "faces": [
            {**face.as_json(), "crop": _url(face.crop, ".png"), "map": None if one is None else _url(one, ".png")}
            for face, one in zip(faces, maps, strict=True)
        ],
        "note": note,
    }


def _maps(recognizer: Recognizer, faces: Sequence[Face]) -> tuple[Sequence[Pixels | None], str]:
    """(H, W, 3) the attention laid over each face, and why there is none."""
    if not faces:
        return [], ""
    try:
        seen, heat = recognizer.attention([face.crop for face in faces], [face.expression for face in faces])
    except UserError as error:
        return [None] * len(faces), f"no attention maps: {error}"
    colours = [cv2.applyColorMap(np.rint(one * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1] for one in heat]
    return [np.rint(0.5 * a + 0.5 * b).astype(np.uint8) for a, b in zip(seen, colours, strict=True)], ""


def _about(recognizer: Recognizer) -> dict[str, Any]:
    results = recognizer.run.results
    return {
        "name": results["name"],
        "test": f"{results['metrics']['test']['acc']:.1%} of {results['n']['test']:,} test images right",
        "classes": recognizer.class_names,
        "calibrated": recognizer.calibrated,
        "stamps": results["stamps"],
    }


@web.middleware
async def _this_machine_only(request: web.Request, handler: Any) -> web.StreamResponse:
    if request.url.host not in NAMES:
        return _refused(403, "this page answers under 127.0.0.1 and localhost only")
    answer: web.StreamResponse = await handler(request)
    return answer


def _refused(status: int, why: str) -> web.Response:
    return web.json_response({"error": why}, status=status, headers=HEADERS)


def _url(image: Pixels, kind: str) -> str:
    """An image as a data URL."""
    _, content = cv2.imencode(kind, image if image.ndim == 2 or image.shape[2] == 1 else image[..., ::-1])
    return f"data:image/{'jpeg' if kind == '.jpg' else 'png'};base64,{base64.b64encode(content.tobytes()).decode()}"
