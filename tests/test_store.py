"""Decoded once: what a store is keyed by, and that nobody decodes a second time."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import composed
from fakes import WRITERS
from hydra.utils import instantiate

from fer.data.base import ExpressionDataModule
from fer.data.folder import Folder
from fer.data.store import stat_fingerprint


def opened(*overrides: str) -> ExpressionDataModule:
    data = instantiate(composed(*overrides).data)
    assert isinstance(data, ExpressionDataModule)
    data.open()
    return data


def test_links_neither_hang_nor_hide_a_change(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"1")
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    before = stat_fingerprint(tmp_path)
    assert stat_fingerprint(tmp_path) == before
    (tmp_path / "a" / "x.jpg").write_bytes(b"22")
    assert stat_fingerprint(tmp_path) != before


def test_a_change_of_name_size_or_time_is_seen(tmp_path: Path) -> None:
    seen = set()
    (tmp_path / "x").write_bytes(b"1")
    seen.add(stat_fingerprint(tmp_path))
    os.utime(tmp_path / "x", (1, 1))
    seen.add(stat_fingerprint(tmp_path))
    (tmp_path / "x").rename(tmp_path / "y")
    seen.add(stat_fingerprint(tmp_path))
    (tmp_path / ".hidden").write_bytes(b"1")
    assert stat_fingerprint(tmp_path) in seen
    assert len(seen) == 3


def test_the_second_job_reads_no_label_file_and_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS["folder"](tmp_path)
    words = ["data=folder", f"data.root={tmp_path}", "data.batch_size=4", "data.num_workers=0"]
    first = next(iter(opened(*words).train_dataloader()))

    def refuse(*_: object) -> None:
        raise AssertionError("the store is there already")

    monkeypatch.setattr(Folder, "manifest", refuse)
    monkeypatch.setattr(Folder, "images", refuse)
    again = next(iter(opened(*words).train_dataloader()))
    assert (again["image"] == first["image"]).all()


def _open(words: list[str], cache: str) -> tuple[str, int]:
    os.environ["FER_CACHE"] = cache
    data = opened(*words)
    return str(data.store.path), int(np.asarray(data.store.images, dtype=np.int64).sum())


def test_two_jobs_that_start_together_build_one_store(tmp_path: Path) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    WRITERS["folder"](root)
    words = ["data=folder", f"data.root={root}"]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        one, two = pool.starmap(_open, [(words, str(cache))] * 2)
    assert one == two
    assert [path for path in cache.iterdir() if path.is_dir()] == [Path(one[0])]
