"""One evaluation from a composed config to a run folder that the report reads."""

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fer.at_test import save_confusion, save_predictions
from fer.callbacks import cpu_seconds
from fer.data.manifest import PARTS
from fer.errors import UserError
from fer.evaluation import calibration as scaling
from fer.evaluation.answers import BINS, Answers, mean_answers
from fer.evaluation.coverage import coverage_record, selective_accuracy
from fer.evaluation.orders import orders_record
from fer.evaluation.page import page, print_summary
from fer.evaluation.robustness import robustness_record
from fer.evaluation.subgroups import subgroup_record
from fer.evaluation.subject import Subject, open_subject
from fer.evaluation.timing import time_per_image
from fer.machine import accelerators, machine
from fer.metrics import calibration_bins, sequence_counts, sequence_scores
from fer.reporting.evaluations import calibration_picture, coverage_picture, robustness_picture
from fer.reporting.statistics import effective_images
from fer.runs import RunFolder, code_version, git_commit, read_json, versions, write_json, write_text
from fer.trainer import quieten

VALIDATION: Literal["val"] = "val"


def evaluate(config: DictConfig, paths: Sequence[Path], command: str) -> dict[str, Any]:
    """Evaluate runs and write everything into the output folder.

    Args:
        config: the composed config (``conf/evaluate.yaml``).
        paths: the run folders, more than one for an ensemble.
        command: what starts this evaluation again, for the record.

    Returns:
        What ``results.json`` has.

    Raises:
        UserError: anything the user can mend.
    """
    quieten()
    began = (time.monotonic(), cpu_seconds())
    # Before anything costs time.
    corruptions = instantiate(config.corruptions, _convert_="all") if config.robustness else {}
    folder = RunFolder(_output(config, paths).absolute())
    _claim(folder)
    subject = open_subject(config, paths)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.set_status("running", command=command, code=code_version())
    try:
        print(f"evaluation: {folder.path}")
        started = time.monotonic()
        whole = subject.answers()
        rate = len(whole.label) / (time.monotonic() - started)
        answers = subject.matching.restrict(whole) if subject.matching is not None else whole
        person = subject.data.store.manifest.person[answers.rows]
        parts: dict[str, Any] = {
            "classes": None if subject.matching is None else subject.matching.record(whole),
            "identical_to_own_images": None if subject.matching is None else subject.identical(),
            "effective_images": effective_images(answers.predicted == answers.label, person),
            "coverage": coverage_record(answers.probabilities, answers.label),
            "subgroups": subgroup_record(
                answers, person, subject.data.store.manifest.attributes, config.subgroup_values
            ),
            "calibration": _calibration(subject, answers) if config.calibration else None,
            "seconds_per_image": [
                time_per_image(reader, data, config.timing_repeats)
                for reader, data in zip(subject.readers, subject.datas, strict=True)
                if config.timing_repeats
            ],
            "orders": orders_record(subject.read, subject.datas, subject.views[0], config.orders, config.seed)
            if config.orders
            else None,
            "robustness": robustness_record(
                subject.read, subject.datas, corruptions, config.seed, config.robustness_tta, config.robustness_images
            )
            if config.robustness
            else None,
        }
        seconds = (time.monotonic() - began[0], cpu_seconds() - began[1])
        results = _results(subject, answers, parts, config.protocol_name)
        results |= {"seconds": seconds[0], "cpu_seconds": seconds[1], "command": command}
        results["images_per_second"] = {"train": None, "test": rate}
        _write(folder, subject, answers, results)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        folder.set_status("interrupted" if interrupted else "failed", error=f"{type(error).__name__}: {error}")
        raise
    folder.set_status("done", job_key=results["job_key"])
    print_summary(results)
    return results


def _output(config: DictConfig, paths: Sequence[Path]) -> Path:
    if config.output is not None:
        return Path(config.output)
    first = paths[0].absolute()
    name = f"{first.parent.name}-{first.name}" + (f"-and-{len(paths) - 1}-more" if len(paths) > 1 else "")
    name += f"-on-{config.data_name}" if OmegaConf.select(config, "data._target_") is not None else ""
    name += f"-{config.tta}" if config.tta is not None else ""
    return Path("outputs/evaluations") / name.replace("=", "-")


def _claim(folder: RunFolder) -> None:
    """Refuse to write over anything but an older evaluation."""
    foreign = folder.best.exists() or (folder.results.exists() and "evaluation" not in read_json(folder.results))
    if foreign:
        raise UserError(f"output={folder.path} holds a training run; choose another folder")
    for old in ("robustness.json", "robustness.png", "calibration.json", "results.json"):
        (folder.path / old).unlink(missing_ok=True)


def _calibration(subject: Subject, answers: Answers) -> dict[str, Any]:
    """The temperature and what it does to the test part; or why there is none."""
    try:
        fitted = _fit(subject)
    except UserError as error:
        return {"temperature": None, "reason": str(error).splitlines()[0]}
    return {**dataclasses.asdict(fitted), "reason": None, "test": scaling.on_test(answers, fitted)}


def _fit(subject: Subject) -> scaling.Calibration:
    runs = subject.runs
    if not all(scaling.can_be_calibrated(run) for run in runs):
        raise UserError("no validation part to fit it on: the epoch was chosen on the test part")
    if len(runs) == 1:
        own = subject.views[0] == str(runs[0].results["tta"])
        found = scaling.calibration_of(runs[0]) if own else scaling.fit_temperature(runs[0], subject.views[0])
        assert found is not None
        return found
    if len({run.results["split_fingerprint"] for run in runs}) > 1:
        raise UserError("the runs have different splits, so one's validation images may have trained another")
    found_answers = []
    for run, reader, views in zip(runs, subject.readers, subject.views, strict=True):
        data = run.data()
        data.open()
        found_answers.append(reader.read(data, VALIDATION, views))
    marks = "".join(scaling.checkpoint_fingerprint(run) for run in runs)
    mark = hashlib.sha256(marks.encode()).hexdigest()[:16]
    return scaling.calibrate(mean_answers(found_answers), _views(subject), mark)


def _views(subject: Subject) -> str:
    return ", ".join(dict.fromkeys(subject.views))


def _facts(subject: Subject) -> dict[str, Any]:
    """The data's facts; of another data set nothing but the test part was used."""
    facts = subject.data.facts()
    if subject.matching is None:
        return facts
    names = subject.matching.shared
    counts = {part: {name: facts["counts"][part][name] if part == "test" else 0 for name in names} for part in PARTS}
    return {
        **facts,
        "counts": counts,
        "n": {part: facts["n"][part] if part == "test" else 0 for part in PARTS},
        "selected_on": subject.first.results["selected_on"],
        "stamps": subject.stamps(),
        "copies_before_drop_leaks": {},
        "copies": {},
        "warnings": [*facts["warnings"], *subject.matching.sentences()],
    }


def _config(subject: Subject, answers: Answers, protocol_name: str) -> dict[str, Any]:
    """The first run's config with what was evaluated in the place of what it was trained on."""
    plain: dict[str, Any] = OmegaConf.to_container(subject.first.config, resolve=True)  # type: ignore[assignment]
    data = subject.data
    if subject.matching is not None:
        plain |= {"data": copy.deepcopy(subject.node), "protocol": subject.node["protocol"]}
        plain["protocol_name"] = protocol_name
        plain["data"] |= {"root": str(Path(data.root).absolute()) if data.root else ""}
        plain["data"] |= {"cache": str(data.cache.absolute()), "class_names": answers.class_names}
    plain["data"]["tta"] = _views(subject)
    plain |= {"data_name": subject.data_name, "model_name": subject.model}
    plain["name"] = f"{subject.data_name}-{subject.model}"
    # What two evaluations must share to be averaged; where a run lies is no part of it.
    plain["evaluation"] = {
        "part": "own test part" if subject.matching is None else "another data set",
        "networks": [
            {"model": run.results["model"], "data": run.results["data"], "trained_fold": run.results["fold"]}
            | ({"trained_seed": run.results["seed"]} if len(subject.runs) > 1 else {})
            for run in subject.runs
        ],
    }
    return plain


def _results(subject: Subject, answers: Answers, parts: dict[str, Any], protocol_name: str) -> dict[str, Any]:
    """``results.json`` without what only the clock and the command line know."""
    runs, first = subject.runs, subject.first.results
    data, facts, stamps = subject.data, _facts(subject), subject.stamps()
    plain = _config(subject, answers, protocol_name)
    marks = [scaling.checkpoint_fingerprint(run) for run in runs]
    text = json.dumps([marks, plain], sort_keys=True, default=str) + data.fingerprint() + code_version()
    results: dict[str, Any] = {
        "name": plain["name"],
        "model": subject.model,
        "data": subject.data_name,
        "protocol": plain["protocol"],
        "protocol_name": plain.get("protocol_name"),
        "fold": facts["fold"],
        "seed": plain["seed"],
        "classes": answers.class_names,
        "n": facts["n"],
        "selected_on": "test" if any(run.results["selected_on"] == "test" for run in runs) else "val",
        "monitor": subject.first.module.monitor.removeprefix("val/"),
        "best_epoch": first["best_epoch"],
        "epochs": None,
        "metrics": {"val": first["metrics"]["val"] if subject.matching is None and len(runs) == 1 else {}},
        "confusion": {"test": answers.confusion.tolist()},
        "tta": _views(subject),
        "stamps": stamps,
        "weights": ", ".join(dict.fromkeys(run.results["weights"] for run in runs)),
        "data_facts": facts,
        "split_fingerprint": facts["fingerprint"],
        "job_key": hashlib.sha256(text.encode()).hexdigest()[:16],
        "code_version": code_version(),
        "git_commit": git_commit(),
        "versions": versions(),
        "parameters": sum(run.results["parameters"] for run in runs),
        "forward_flops": sum(run.results["forward_flops"] for run in runs),
        "detection_seconds_per_image": None,
        "device": str(subject.first.device),
        "devices": 1,
        "machine": machine() | {"accelerators": accelerators(subject.first.device)},
        "precision": first["precision"],
        "threads": first["threads"],
        "resident": data.is_resident(),
        "resumed_from_step": None,
        "steps": None,
        "skipped_steps": None,
        "micro_batch": None,
    }
    results["metrics"]["test"] = answers.scores()
    if data.store.manifest.sequence is not None:
        videos = sequence_counts(data.store.manifest.sequence[answers.rows], answers.label, answers.probabilities)
        results["metrics"]["test"] |= sequence_scores(videos, answers.class_names)
        results["confusion"]["test_sequences"] = videos.tolist()
    networks = ("model", "data", "protocol_name", "fold", "seed", "best_epoch", "selected_on", "tta", "precision")
    results["evaluation"] = {
        "networks": [
            {
                "run": str(run.folder.path),
                **{key: run.results.get(key) for key in (*networks, "code_version", "split_fingerprint", "job_key")},
                "checkpoint": mark,
            }
            for run, mark in zip(runs, marks, strict=True)
        ],
        **parts,
    }
    return results


def _write(folder: RunFolder, subject: Subject, answers: Answers, results: dict[str, Any]) -> None:
    """Everything but ``results.json`` first: with it the folder is a finished run's."""
    data, stamps, parts = subject.data, results["stamps"], results["evaluation"]
    plain = _config(subject, answers, results["protocol_name"])
    temperature = (parts["calibration"] or {}).get("temperature")
    write_text(folder.config, "# The config of the run evaluated here.\n" + OmegaConf.to_yaml(OmegaConf.create(plain)))
    save_predictions(
        folder, data.store.manifest, answers.class_names, answers.rows, answers.label, answers.probabilities
    )
    accuracy = 100 * results["metrics"]["test"]["acc"]
    title = f"test: accuracy {accuracy:.2f} %, n = {len(answers.label)}"
    save_confusion(folder, "test", answers.confusion, answers.class_names, title, stamps)
    bins = calibration_bins(answers.probabilities, answers.label, BINS)
    after = None
    if temperature is not None:
        write_json(folder.path / scaling.FILE, parts["calibration"])
        scaled = scaling.tempered(answers.probabilities, temperature)
        after = calibration_bins(scaled, answers.label, BINS)
    calibration_picture(folder.path / "reliability.png", bins, after, temperature or 1.0, stamps)
    write_json(folder.path / "coverage.json", parts["coverage"])
    curve = selective_accuracy(answers.probabilities, answers.label)
    coverage_picture(folder.path / "coverage.png", np.asarray(curve), parts["coverage"], stamps)
    write_json(folder.path / "subgroups.json", parts["subgroups"])
    if parts["robustness"] is not None:
        write_json(folder.path / "robustness.json", parts["robustness"])
        robustness_picture(folder.path / "robustness.png", parts["robustness"], stamps)
    write_text(folder.path / "evaluation.md", page(results))
    write_json(folder.results, results)
