"""`python -m fer.check`: every kind of defect planted in small forms, and what the report says of each."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import fakes
import numpy as np
import PIL.Image
import pytest
from commands import call
from conftest import composed
from hydra.utils import instantiate

from fer import check
from fer.config import CONF
from fer.data import near_duplicates
from fer.data.base import ExpressionDataModule
from fer.data.inspection import inspect
from fer.data.manifest import Array, Manifest
from fer.data.near_duplicates import SIDE, candidates, near_groups, thumbnail
from fer.errors import UserError

DATA_SETS = sorted(path.stem for path in (CONF / "data").glob("[!_]*.yaml"))
DRAWN = {
    "synthetic": ["data.train=40", "data.val=20", "data.test=20", "data.subjects=20"],
    "scenes": ["data.train=12", "data.val=4", "data.test=4", "data.subjects=20", "data.store_size=96"],
}
PARTS = ("train", "val", "test")


def checked(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of the command's function, which writes into ``folder``."""
    path = folder / "reports" / "report.json"
    code = check.run(composed(*words, f"report={path}", command="check"))
    return code, json.loads(path.read_text())


def blobs(seed: int, size: int = 48) -> np.ndarray:
    """A generated grey image that resembles no other: smooth blobs."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (7, 7)).astype(np.float32)
    smooth = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 3, (size, size)), 0, 255).astype(np.uint8)


def same_pixels(paths: list[Path]) -> list[set[Path]]:
    """Groups of pixel-identical image files, by comparing all with all; a second opinion."""
    decoded = {path: np.asarray(PIL.Image.open(path)) for path in paths}
    groups: list[set[Path]] = []
    for path, image in decoded.items():
        mine = [group for group in groups if np.array_equal(decoded[min(group)], image)]
        if mine:
            mine[0].add(path)
        else:
            groups.append({path})
    return [group for group in groups if len(group) > 1]


def keys_of(entries: list[dict[str, str]]) -> dict[str, str]:
    return {entry["item"]: entry["reason"] for entry in entries}


# -- every data set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_is_reported(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data={name}", *DRAWN.get(name, [])]
    expected = None
    if name in fakes.WRITERS:
        expected = fakes.WRITERS[name](tmp_path / "root")
        words.append(f"data.root={tmp_path / 'root'}")
    path = tmp_path / "report.json"
    config = composed(*words, f"report={path}", command="check")
    code = check.run(config)
    report = json.loads(path.read_text())
    assert report["data"] == name
    keys = ("form", "classes", "counts", "official", "skipped", "unreadable", "constant", "duplicates", "conflicts")
    assert not {*keys, "subjects", "warnings", "near_duplicates"} - report.keys()
    assert config.data.class_names in (None, report["classes"])
    if expected is not None:
        wanted = {part: {c: classes[c] for c in report["classes"]} for part, classes in expected.items()}
        assert report["counts"] == wanted
    assert all(list(classes) == report["classes"] for classes in report["counts"].values())
    assert report["unreadable"] == report["constant"] == report["unusual"] == []
    assert report["readable"] == sum(n for classes in report["counts"].values() for n in classes.values())
    assert set(report["duplicates"]["within"]) == set(report["counts"])
    pairs = [list(pair) for pair in combinations([part for part in PARTS if part in report["counts"]], 2)]
    assert [entry["parts"] for entry in report["duplicates"]["across"]] == pairs
    assert report["shared"] == {}
    # The official counts are those of the complete sets, so small copies differ in every class.
    differing = [f"{part}/{c}" for part, classes in report["official"].items() for c in classes]
    assert [line.partition(":")[0] for line in report["count_differences"]] == differing
    assert code == bool(report["findings"])
    assert code == 1 or not report["official"]
    if name in DRAWN:
        assert (code, report["findings"], report["near_duplicates"], report["sha256"]) == (0, [], [], {})
        assert name != "synthetic" or 0 < report["subjects"] <= 20
    elif name == "folder":
        assert code == 0
    told = capsys.readouterr().out
    assert report["form"] in told
    assert all(c in told for c in report["classes"])


# -- planted defects ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of grey 48 px images with every kind of defect, and what must be found."""
    root = tmp_path_factory.mktemp("planted")
    people = {}
    for p, part in enumerate(PARTS):
        for c, name in enumerate(("happy", "sad")):
            for i in range(12):
                path = f"{part}/{name}/{i:02d}.png"
                fakes.save(root / path, blobs(1000 * p + 100 * c + i))
                people[path] = f"{part} {c} {i}"

    def plant(path: str, image: np.ndarray) -> None:
        fakes.save(root / path, image)
        people[path] = path

    def original(path: str) -> np.ndarray:
        return cv2.imread(str(root / path), cv2.IMREAD_GRAYSCALE)

    # Exact copies, once in another file format; of the second the label changes too.
    plant("train/happy/copy.bmp", original("train/happy/00.png"))
    plant("train/sad/copy.png", original("train/sad/01.png"))
    plant("val/sad/copy.png", original("train/sad/01.png"))
    plant("test/happy/copy.png", original("train/sad/01.png"))
    plant("test/sad/copy.png", original("test/sad/02.png"))
    # Nearly the same: brighter, compressed, moved by a pixel.
    plant("test/happy/brighter.png", cv2.convertScaleAbs(original("train/happy/03.png"), alpha=0.8, beta=20))
    plant("val/happy/compressed.jpg", original("val/happy/04.png"))
    plant("test/sad/moved.png", np.roll(original("train/sad/05.png"), 1, axis=1))
    plant("test/sad/moved_copy.png", np.roll(original("train/sad/05.png"), 1, axis=1))
    # Constant, nearly constant, of another size, in colour.
    plant("train/happy/black.png", np.zeros((48, 48), np.uint8))
    plant("val/sad/grey.jpg", np.full((48, 48), 128, np.uint8))
    plant("train/happy/flat.png", (np.arange(48 * 48).reshape(48, 48) % 2 + 90).astype(np.uint8))
    plant("train/happy/large.png", blobs(7777, size=60))
    plant("train/sad/colour.png", np.stack([blobs(8888), blobs(8889), blobs(8890)], axis=-1))
    plant("val/sad/red.png", np.broadcast_to(np.array([200, 0, 0], np.uint8), (48, 48, 3)))
    # Not readable, not there, not read.
    for path in ("train/happy/empty.jpg", "train/happy/half.jpg", "val/sad/text.png", "test/sad/gone.jpg"):
        people[path] = path
    fakes.save(root / "train/happy/half.jpg", blobs(9999))
    whole = (root / "train/happy/half.jpg").read_bytes()
    (root / "train/happy/half.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train/happy/empty.jpg").write_bytes(b"")
    (root / "val/sad/text.png").write_text("<html>not found</html>")
    (root / "test/sad/gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "test/sad/animated.gif").write_bytes(b"GIF89a")
    people["test/happy/07.png"] = people["train/happy/07.png"]
    fakes.write_text(root / "subjects.csv", fakes.table([("path", "subject"), *people.items()]))
    return root, people


@pytest.fixture(scope="module")
def found(planted: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report on it."""
    words = ("data=folder", f"data.root={planted[0]}", "data.class_names=null")
    code, report = checked(tmp_path_factory.mktemp("found"), *words)
    assert code == 1
    return report


def test_every_defect_is_found(planted: tuple[Path, dict[str, Any]], found: dict[str, Any], tmp_path: Path) -> None:
    (root, people), report = planted, found
    assert report["counts"] == {
        "train": {"happiness": 12 + 6, "sadness": 12 + 2},
        "val": {"happiness": 12 + 1, "sadness": 12 + 4},
        "test": {"happiness": 12 + 2, "sadness": 12 + 3},
    }
    assert report["official"] == {}
    skipped, unreadable, unusual = (keys_of(report[key]) for key in ("skipped", "unreadable", "unusual"))
    assert skipped.keys() == {"test/sad/gone.jpg", "test/sad/animated.gif"}
    assert unreadable.keys() == {"train/happy/empty.jpg", "train/happy/half.jpg", "val/sad/text.png"}
    assert "0 bytes" in unreadable["train/happy/empty.jpg"]
    assert "truncated" in unreadable["train/happy/half.jpg"]
    constant = {entry["item"] for entry in report["constant"]}
    assert constant == {"train/happy/black.png", "val/sad/grey.jpg", "val/sad/red.png"}
    assert (report["size"], report["mode"]) == ([48, 48], "grey")
    assert unusual == {
        "train/happy/flat.png": "nearly constant, standard deviation 0.50 grey levels",
        "train/happy/large.png": "60 x 60 pixels, the others 48 x 48",
        "train/sad/colour.png": "colour, the others grey",
        "val/sad/red.png": "colour, the others grey",
    }
    assert report["subjects"] == len(set(people.values())) - (len(people) - sum((root / p).exists() for p in people))
    assert report["shared"] == {"subjects in train and test": 1}
    assert report["sha256"].keys() == {"subjects.csv"}
    assert report["warnings"] == []
    seven = checked(tmp_path, "data=folder", f"data.root={root}")[1]
    assert seven["counts"]["val"]["fear"] == 0
    assert "val has no image of anger, disgust, fear, neutral, surprise" in seven["warnings"]


def test_copies_are_counted(planted: tuple[Path, dict[str, Any]], found: dict[str, Any]) -> None:
    (root, _), report = planted, found
    unreadable = keys_of(report["unreadable"]).keys()
    files = sorted(p for p in root.rglob("*.*") if p.is_file() and p.suffix in (".png", ".jpg", ".bmp"))
    groups = same_pixels([path for path in files if path.relative_to(root).as_posix() not in unreadable])
    named = [{path.relative_to(root).as_posix() for path in group} for group in groups]
    assert len(named) == 4  # the copies planted, the moved one among them
    part = {item: item.partition("/")[0] for group in named for item in group}
    label = {item: item.split("/")[1] for group in named for item in group}
    duplicates = report["duplicates"]
    assert duplicates["groups"] == len(named)
    assert duplicates["excess"] == sum(len(group) - 1 for group in named)
    assert sorted(sorted(group["items"]) for group in duplicates["members"]) == sorted(map(sorted, named))
    for group in duplicates["members"]:
        assert group["parts"] == [part[item] for item in group["items"]]
    inside = {p: sum(max(sum(part[i] == p for i in group) - 1, 0) for group in named) for p in PARTS}
    assert duplicates["within"] == inside == {"train": 2, "val": 0, "test": 2}
    for entry in duplicates["across"]:
        a, b = entry["parts"]
        also = [i for group in named for i in group if part[i] == b and any(part[j] == a for j in group)]
        assert entry["images"] == len(also)
    conflicting = [group for group in named if len({label[item] for item in group}) > 1]
    assert report["conflicts"]["groups"] == len(conflicting) == 1
    assert report["conflicts"]["images"] == sum(map(len, conflicting)) == 4


def test_near_duplicates_are_a_list_of_their_own(found: dict[str, Any]) -> None:
    assert {frozenset(group["items"]) for group in found["near_duplicates"]} == {
        frozenset({"train/happy/03.png", "test/happy/brighter.png"}),
        frozenset({"val/happy/04.png", "val/happy/compressed.jpg"}),
        frozenset({"train/sad/05.png", "test/sad/moved.png", "test/sad/moved_copy.png"}),
    }
    assert [entry["images"] for entry in found["near_across"]] == [0, 3, 0]
    assert not any("near dup" in finding for finding in found["findings"])


def test_rows_of_a_table(tmp_path: Path) -> None:
    """Rows that cannot be read are left out with their reason, copies across parts are counted, the file is hashed."""
    root = tmp_path / "root"
    expected = fakes.write_fer2013(root, defects=True)
    lines = (root / "fer2013.csv").read_text().splitlines()
    black = " ".join(["0"] * 48 * 48)
    first = lines[1].split(",")[1]
    lines += [f"3,{first},PublicTest", f"0,{first},PrivateTest", f"6,{black},Training", f"6,{black},PrivateTest"]
    (root / "fer2013.csv").write_text("\n".join(lines) + "\n")
    code, report = checked(tmp_path, "data=fer2013", f"data.root={root}")
    n = len(fakes.fer2013_rows())
    assert code == 1
    expected["val"]["happiness"] += 1
    expected["test"]["anger"] += 1
    expected["train"]["neutral"] += 1
    expected["test"]["neutral"] += 1
    assert report["counts"] == expected
    assert report["official"]["train"]["disgust"] == 436
    assert "train/disgust: 6, official 436, -430" in report["count_differences"]
    assert list(keys_of(report["skipped"])) == [f"fer2013.csv:{n + i}" for i in range(6)]
    assert report["constant"] == [{"item": f"fer2013.csv:{n + 8}"}, {"item": f"fer2013.csv:{n + 9}"}]
    assert report["duplicates"]["groups"] == 2
    assert report["duplicates"]["within"] == {"train": 0, "val": 0, "test": 0}
    across = {tuple(entry["parts"]): entry["images"] for entry in report["duplicates"]["across"]}
    assert across == {("train", "val"): 1, ("train", "test"): 2, ("val", "test"): 1}
    assert (report["conflicts"]["groups"], report["conflicts"]["images"]) == (1, 3)
    assert len(report["sha256"]["fer2013.csv"]) == 64


def test_missing_and_damaged_files_of_a_list(tmp_path: Path) -> None:
    root = tmp_path / "root"
    expected = fakes.write_rafdb(root)
    aligned = root / "basic/Image/aligned"
    (aligned / "train_00001_aligned.jpg").unlink()
    (aligned / "train_00002_aligned.jpg").write_bytes(b"")
    _, report = checked(tmp_path, "data=rafdb", f"data.root={root}")
    missing, empty = (f"basic/Image/aligned/train_0000{i}_aligned.jpg" for i in (1, 2))
    assert keys_of(report["skipped"]).keys() == {missing}
    assert keys_of(report["unreadable"]).keys() == {empty}
    expected["train"]["surprise"] -= 1  # the empty file is there
    assert report["counts"] == expected
    assert "basic/EmoLabel/list_patition_label.txt" in report["sha256"]
    assert not any("manu_attri" in name for name in report["sha256"])


def test_faces_of_one_photograph_are_no_copies(tmp_path: Path) -> None:
    """Sets that are cut to the face box are compared by what lies in it."""
    root = tmp_path / "root"
    fakes.write_affectnet(root)
    table = root / "Manually_Annotated_file_lists/training.csv"
    name = table.read_text().splitlines()[1].split(",")[0]
    images = root / "Manually_Annotated/Manually_Annotated_Images"
    photograph = np.stack([blobs(seed, size=90) for seed in range(3)], axis=-1)
    for i, x in enumerate((0, 0, 40)):
        fakes.save(images / f"1/copy{i}.png", photograph)
        with table.open("a") as file:
            file.write(f"1/copy{i}.png,{x},10,40,40,,1,0.5,0.5\n")
    whole = checked(tmp_path, "data=affectnet", f"data.root={root}", "data.crop=none")[1]
    cut = checked(tmp_path, "data=affectnet", f"data.root={root}")[1]
    assert name
    assert (whole["duplicates"]["excess"], cut["duplicates"]["excess"]) == (2, 1)


def test_seven_classes_leave_contempt_out(tmp_path: Path) -> None:
    fakes.write_affectnet(tmp_path / "root")
    report = checked(tmp_path, "data=affectnet7", f"data.root={tmp_path / 'root'}")[1]
    assert len(report["classes"]) == 7
    assert "contempt" not in {
        c for counts in (report["counts"], report["official"]) for p in counts.values() for c in p
    }
    assert sum(report["official"]["test"].values()) == 3500
    assert any("contempt: 12 images" in warning for warning in report["warnings"])


def test_people_on_both_sides_of_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.write_ckplus(tmp_path / "root", "ck48")
    words = ["data=ckplus", f"data.root={tmp_path / 'root'}"]
    report = checked(tmp_path, *words)[1]
    assert (report["subjects"], report["folds"], report["shared"]) == (14, 10, {})
    assert report["counts"].keys() == {"all"}
    data = instantiate(composed(*words).data)
    own = data.manifest()
    moved = own.fold.copy()
    moved[own.subject == "S005"] = [0, 1] + [0] * ((own.subject == "S005").sum() - 2)
    monkeypatch.setattr(type(data), "manifest", lambda self: dataclasses.replace(own, fold=moved))
    report = inspect(data)
    assert report["shared"] == {"subjects in several folds": 1, "sequences in several folds": 1}
    assert "subjects in several folds: 1" in report["findings"]


def test_frames_of_one_video_are_not_near_duplicates() -> None:
    frames = np.stack([thumbnail(np.roll(blobs(i // 3), i % 3, axis=1)) for i in range(30)])
    video = np.arange(30) // 3
    assert len(np.unique(near_groups(frames))) == 10
    assert len(np.unique(near_groups(frames, video))) == 30


def test_the_content_hash_tells_pixels_and_not_order(tmp_path: Path) -> None:
    hashes = []
    for i, change in enumerate((None, "label", "pixel")):
        root = tmp_path / str(i)
        fakes.write_folder(root, "classes", classes=("happy", "sad"))
        if change == "label":
            (root / "happy/0.jpg").rename(root / "sad/9.jpg")
        elif change == "pixel":
            fakes.save(root / "happy/0.jpg", blobs(1, size=64))
        hashes.append(checked(tmp_path, "data=folder", f"data.root={root}")[1]["content_sha256"])
    assert len(set(hashes)) == 3
    again = checked(tmp_path, "data=folder", f"data.root={tmp_path / '0'}", "data.class_names=[sadness,happiness]")[1]
    assert again["classes"] == ["sadness", "happiness"]
    assert again["content_sha256"] == hashes[0]


# -- near duplicates ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces() -> list[np.ndarray]:
    """400 drawn faces, none like another."""
    data = instantiate(composed("data=synthetic", "data.train=400", "data.val=0", "data.test=0").data)
    manifest = data.manifest()
    return [image.reshape(48, 48) for image in data.images(manifest, np.arange(len(manifest)))]


def moved(image: np.ndarray) -> np.ndarray:
    return cv2.warpAffine(image, np.float32([[1, 0, 1], [0, 1, 0]]), (48, 48), borderMode=cv2.BORDER_REPLICATE)


CHANGES = {
    "brighter": (lambda image: cv2.convertScaleAbs(image, alpha=0.85, beta=25), 0.98),
    "compressed": (lambda image: cv2.imdecode(cv2.imencode(".jpg", image, [1, 40])[1], cv2.IMREAD_GRAYSCALE), 0.98),
    "resized": (lambda image: cv2.resize(image, (100, 100)), 0.98),
    "moved": (moved, 0.93),
}


def test_no_unrelated_faces_are_near(faces: list[np.ndarray]) -> None:
    """0 of 79,800 pairs: an upper bound of 1 in 26,600 at 95 % confidence (rule of three)."""
    group = near_groups(np.stack([thumbnail(image) for image in faces]))
    assert len(np.unique(group)) == len(faces)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(faces: list[np.ndarray], change: str) -> None:
    apply, share = CHANGES[change]
    copies = [thumbnail(apply(image)) for image in faces[:200]]
    group = near_groups(np.stack([*map(thumbnail, faces), *copies]))
    assert (group[:200] == group[400:]).mean() >= share
    # No copy joined another face.
    assert len(np.unique(group[:400])) == 400


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_few_images(n: int) -> None:
    pictures = [thumbnail(blobs(i)) for i in range(n)]
    assert len(np.unique(near_groups(np.array(pictures, np.uint8).reshape(-1, SIDE, SIDE)))) == n
    if n:
        pair = np.stack([*pictures, thumbnail(moved(blobs(0)))])
        group = near_groups(pair)
        assert group[0] == group[-1]
        assert len(np.unique(group)) == n


def test_candidates_are_all_pairs_of_few_bits_and_no_other() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 63, 500, dtype=np.uint64)
    flips = [rng.choice(64, rng.integers(0, 7), replace=False) for _ in range(100)]
    twins = [int(bits[i]) ^ sum(1 << int(bit) for bit in flipped) for i, flipped in enumerate(flips)]
    bits = np.concatenate([bits, np.array(twins, dtype=np.uint64)])
    found = {tuple(sorted(pair)) for pairs in candidates(bits) for pair in pairs.tolist()}
    assert {(i, 500 + i) for i in range(100)} <= found
    assert all(int(bits[a] ^ bits[b]).bit_count() <= near_duplicates.MAX_BITS for a, b in found)


def test_one_crowded_bucket_costs_no_more_than_its_window() -> None:
    bits = np.zeros(4000, dtype=np.uint64)
    compared = sum(len(pairs) for pairs in candidates(bits))
    assert compared <= 28 * near_duplicates.WINDOW * len(bits)


# -- size ---------------------------------------------------------------------------------------------------------


def test_time_grows_with_the_number_of_images() -> None:
    def seconds(n: int) -> float:
        pictures = np.random.default_rng(n).integers(0, 256, (n, SIDE, SIDE), dtype=np.uint8)
        started = time.process_time()
        assert len(np.unique(near_groups(pictures))) == n
        return time.process_time() - started

    seconds(1000)
    small, large = seconds(10_000), seconds(80_000)
    assert large < 8 * 2 * small + 0.5


class Many(ExpressionDataModule):
    """Generated images without files: a few pixels, repeated every ``different`` images."""

    title, expected_tree, request, on_disk = "many images", "", "", False
    n, different = 300_000, 299_000

    def manifest(self) -> Manifest:
        number = np.arange(self.n)
        return Manifest(
            item=np.char.add("Manually_Annotated/Manually_Annotated_Images/1000/" + "f" * 50, number.astype(str)),
            label=number % 7,
            class_names=fakes.RAFDB,
            split=np.where(number < 0.9 * self.n, "train", "test"),
            form="generated",
            subject=np.char.add("person ", (number // 10).astype(str)),
            landmarks=np.ones((self.n, 68, 2), np.float32),
        )

    def images(self, manifest: Manifest, rows: Array) -> Iterator[Array]:
        for row in rows.tolist():
            bits = np.random.Philox(key=row % self.different).random_raw(8).view(np.uint8)
            yield np.kron(bits.reshape(8, 8), np.ones((3, 3), np.uint8))


BIG = """
import json, resource, time
from conftest import composed
from hydra.utils import instantiate
from test_check import Many
from fer.data.inspection import inspect
config = composed("data=folder").data
own = {key: instantiate(config[key]) if key in ("augment", "protocol") else config[key] for key in config}
data = Many(**{key: own[key] for key in own if key not in ("_target_", "form")})
started = time.process_time()
report = inspect(data)
print(json.dumps({
    "seconds": time.process_time() - started,
    "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "excess": report["duplicates"]["excess"],
    "across": report["duplicates"]["across"],
    "near": len(report["near_duplicates"]),
}))
"""


@pytest.mark.slow
def test_300_000_images_in_2_gigabytes() -> None:
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", BIG], env={**os.environ, "PYTHONPATH": tests}, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["megabytes"] < 2000
    assert found["seconds"] < 180
    assert found["excess"] == 1000
    assert found["across"] == [{"parts": ["train", "test"], "images": 1000}]
    assert found["near"] == 0


# -- the command line ---------------------------------------------------------------------------------------------


def exit_code(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Of ``python -m fer.check WORDS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["fer.check", *words])
    with pytest.raises(SystemExit) as stopped:
        check.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    fakes.write_folder(root)
    words = ("data=folder", f"data.root={root}")
    assert exit_code(monkeypatch, *words) == 0
    assert "clean" in capsys.readouterr().out
    (root / "train/angry/0.jpg").write_bytes(b"")
    assert exit_code(monkeypatch, *words) == 1
    assert "unreadable images: 1" in capsys.readouterr().out
    for mistaken, sentence in {
        (*words, "data.root=nowhere"): "data.root=",
        (*words, "shwon=3"): "shwon",
        ("-m", *words): "one data set at a time",
    }.items():
        assert exit_code(monkeypatch, *mistaken) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("words", [["report=''"], ["report=3"], ["report=/"], ["report=/proc/none/x"], ["shown=-1"]])
def test_mistaken_values_are_named_before_anything_is_read(words: list[str]) -> None:
    with pytest.raises(UserError, match=words[0].partition("=")[0]):
        check.run(composed("data=folder", *words, command="check"))


def test_no_image_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        fakes.write_text(tmp_path / f"root/happy/{i}.jpg", "")
    code, report = checked(tmp_path, "data=folder", f"data.root={tmp_path / 'root'}")
    assert (code, report["readable"], len(report["unreadable"])) == (2, 0, 3)
    assert "unusable" in capsys.readouterr().out


def test_names_that_would_act_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    fakes.write_affectnet(root)
    table = root / "Manually_Annotated_file_lists/training.csv"
    with table.open("ab") as file:
        file.write(b"1/\x1b[31m[bold]\xff.jpg,1,1,9,9,,1,0,0\n")
    code, report = checked(tmp_path, "data=affectnet", f"data.root={root}")
    item = "Manually_Annotated/Manually_Annotated_Images/1/\x1b[31m[bold]\udcff.jpg"
    assert code == 1
    assert keys_of(report["skipped"]).keys() == {item}
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert r"\x1b[31m[bold]\udcff.jpg" in told


def test_the_real_command(planted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    done = call("check", "data=folder", f"data.root={planted[0]}", "report=out/found.json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "out/found.json").read_text())
    assert report["data"] == "folder"
    assert "train/happy/half.jpg" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no store, no run folder


# -- the real files -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("FER_DATA" not in os.environ, reason="FER_DATA names no folder of real data sets")
def test_the_real_fer2013(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "fer.check", "data=fer2013", "report=fer2013.json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1200)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((tmp_path / "fer2013.json").read_text())
    assert done.returncode == 1
    assert report["counts"] == report["official"]
    assert len(report["constant"]) == 12
    assert (report["duplicates"]["excess"], report["duplicates"]["groups"]) == (1853, 1516)
    assert report["duplicates"]["within"] == {"train": 1236, "val": 26, "test": 17}
    across = {tuple(entry["parts"]): entry["images"] for entry in report["duplicates"]["across"]}
    assert (across["train", "val"], across["train", "test"]) == (280, 288)
    assert (report["conflicts"]["groups"], report["conflicts"]["images"]) == (57, 160)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 240
    assert after.ru_maxrss < 2_000_000
