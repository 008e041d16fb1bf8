"""Every bad input we could think of, and what each must give: see `corpus_images`, `corpus_data` and `corpus_runs`."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from corpus_data import LABELS, LISTS, STORES, TABLES, TREES, Read
from corpus_images import PLACES, READ, REFUSED, Near
from corpus_runs import CHECKPOINTS, COMMANDS, CONFIGS, SCENE, VIDEOS, WEIGHTS, photographs
from fakes import picture
from test_predict import Known, scene
from test_readers import images, manifest

from fer.config import check_command_line, guarded
from fer.data.images import BadImage, read_image
from fer.data.manifest import Manifest
from fer.data.store import Store, open_store
from fer.errors import UserError
from fer.prediction.sources import Source
from fer.recognizer import Recognizer
from fer.trained import open_run
from fer.weights import read_weights

# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_images_that_are_read(tmp_path: Path, name: str) -> None:
    content, expected = READ[name]
    (tmp_path / "a.jpg").write_bytes(content)
    found = read_image(tmp_path / "a.jpg")
    if isinstance(expected, Near):
        assert found.shape == expected.pixels.shape
        assert abs(found.astype(float) - expected.pixels).mean() < expected.off
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_are_refused(tmp_path: Path, name: str) -> None:
    content, reason = REFUSED[name]
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadImage, match=str(reason)) as caught:
        read_image(tmp_path / "a.jpg")
    assert caught.value.path == tmp_path / "a.jpg"


@pytest.mark.parametrize("name", PLACES)
def test_places_that_hold_no_image(tmp_path: Path, name: str) -> None:
    make, reason = PLACES[name]
    make(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match=reason):
        read_image(tmp_path / "a.jpg")


# -- tables, lists, trees ---------------------------------------------------------------------------------------------

DATA = {"tables": TABLES, "labels": LABELS, "lists of files": LISTS, "trees": TREES}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, cases in DATA.items() for name in cases])
def test_data(tmp_path: Path, kind: str, name: str) -> None:
    case = DATA[kind][name]
    root = tmp_path / "data"
    root.mkdir()
    case.write(root)
    if isinstance(case.expected, str):
        with pytest.raises(UserError, match=case.expected):
            manifest(case.reader, root)
        return
    found, pictures = images(case.reader, root)
    good = [i for i, picture in enumerate(pictures) if isinstance(picture, np.ndarray)]
    bad = [(str(found.item[i]), p.reason) for i, p in enumerate(pictures) if isinstance(p, BadImage)]
    if isinstance(case.expected, Read):
        assert len(good) == len(found) == case.expected.images
        assert not [*found.skipped, *bad]
    else:
        listed = [*found.skipped, *bad]
        assert [item for item, why in listed if re.search(case.expected.reason, why)], listed
        assert re.search(case.expected.item, listed[0][0])
        assert good
    if case.reader == "fer2013":
        assert all(np.array_equal(pictures[i], picture(found.label[i], found.label[i])) for i in good)


@pytest.mark.parametrize("name", STORES)
def test_decoded_images_that_are_damaged(tmp_path: Path, name: str) -> None:
    file, damage = STORES[name]
    found = Manifest(
        item=np.array(["a", "b"]), label=np.array([0, 1]), class_names=("x", "y"), split=np.full(2, ""), form="two"
    )

    def read(_: Manifest, rows: np.ndarray) -> Iterator[np.ndarray | BadImage]:
        yield from (picture(0, int(row), 8) for row in rows)

    def opened() -> Store:
        return open_store(tmp_path, "two", {"size": 8, "channels": 1}, lambda: found, read, sequential=False)

    path = opened().path
    damage(path / file)
    with pytest.raises(UserError, match=rf"{path.name} are damaged \(.*remove that folder, it is made anew"):
        opened()
    shutil.rmtree(path)
    assert opened().images.shape == (2, 8, 8, 1)


# -- run folders and weights ------------------------------------------------------------------------------------------


def sentence(capsys: pytest.CaptureFixture[str], command: Callable[[], object], code: int = 2) -> str:
    """What a command says of a mistake, its exit code checked."""
    with pytest.raises(SystemExit) as caught:
        guarded(command)
    assert caught.value.code == code
    return capsys.readouterr().err


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A finished run to be damaged."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "results.json", "status.json", "checkpoints/best.ckpt"):
        shutil.copy(whole / name, tmp_path / "run" / name)
    return tmp_path / "run"


RUNS = {"config.yaml": CONFIGS, "checkpoints/best.ckpt": CHECKPOINTS}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, cases in RUNS.items() for name in cases])
def test_runs(copied: Path, file: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = RUNS[file][name]
    change(copied / file)
    said = sentence(capsys, lambda: open_run(copied))
    assert re.search(expected, said), said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = COMMANDS[name]
    assert expected in sentence(capsys, lambda: check_command_line("train", words), code=1)


@pytest.mark.parametrize("name", WEIGHTS)
def test_files_of_weights(tmp_path: Path, name: str) -> None:
    content, checksum, expected = WEIGHTS[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    if expected is None:
        assert read_weights(f"{path}{checksum}", "model.pretrained", "go on without").tensors["a"].tolist() == [0, 0]
        return
    with pytest.raises(UserError, match=expected):
        read_weights(f"{path}{checksum}", "model.pretrained", "go on without")


# -- photographs and videos -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> Known:
    return Known()


@pytest.fixture(scope="module")
def recognizer(whole: Path, known: Known) -> Recognizer:
    return Recognizer.load(whole, detector=known, device="cpu")


PHOTOGRAPHS = list(photographs(scene(*SCENE)[0]))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_photographs(recognizer: Recognizer, known: Known, tmp_path: Path, name: str) -> None:
    content, expected = photographs(known.add(*SCENE))[name]
    (tmp_path / "photo").write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(BadImage, match=expected):
            recognizer.predict(tmp_path / "photo")
        return
    faces = recognizer.predict(tmp_path / "photo")
    assert len(faces) == expected
    for face in faces:  # the box is that of the upright picture, whatever the file
        np.testing.assert_allclose(face.box, known.faces[SCENE[1], SCENE[0]][0].box, atol=0.01)


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_videos(tmp_path: Path, name: str) -> None:
    file, make, expected = VIDEOS[name]
    (tmp_path / "films").mkdir()
    make(tmp_path / "films" / file)
    path = tmp_path / "films" / file
    if path.is_dir():
        with pytest.raises(UserError, match=str(expected)):
            Source(str(path), every=1, limit=None, leave_out=tmp_path / "out")
        return
    source = Source(str(path), every=1, limit=None, leave_out=tmp_path / "out")
    shapes = [frame.image.shape for frame in source]
    if isinstance(expected, int):
        assert (len(shapes), set(shapes)) == (expected, {(48, 64, 3)} if expected > 1 else {(48, 48)})
        assert not [why for _, why in source.bad if "cut short" not in why]
    else:
        assert len(source.bad) == 1
        assert re.search(expected, source.bad[0][1]), source.bad
        assert len(shapes) < 12


# -- how many ---------------------------------------------------------------------------------------------------------


def counts() -> dict[str, int]:
    """Cases by kind."""
    images = len(READ) + len(REFUSED) + len(PLACES)
    return {
        "images": images,
        **{kind: len(cases) for kind, cases in DATA.items()},
        "decoded images": len(STORES),
        "configs": len(CONFIGS) + len(COMMANDS),
        "checkpoints": len(CHECKPOINTS),
        "files of weights": len(WEIGHTS),
        "photographs": len(PHOTOGRAPHS),
        "videos": len(VIDEOS),
    }


def test_the_corpus_is_large_and_its_cases_differ() -> None:
    print(counts())
    contents = [content for content, _ in (*READ.values(), *REFUSED.values())]
    same = len(contents) - len(set(contents))
    assert same <= 2  # orientation 1 and the plain PNG, and the like
    assert sum(counts().values()) - same >= 120
    page = (Path(__file__).parents[1] / "docs/safety.md").read_text()
    for kind, number in counts().items():
        assert f"| {kind} | {number} |" in page, f"docs/safety.md: {kind} are {number} now"
    assert f"{sum(counts().values())} cases" in page
