"""Everything that is measured on a GPU, in one call: ceilings, training steps, waits, several jobs, exact repeats.

Every section runs in a process of its own with a time limit; one that fails or hangs is named and costs the others
nothing. Without a GPU the same code runs on the CPU, to rehearse the call with ``gpu=tiny``.
"""

import contextlib
import json
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fer.benching.device import (
    AS_IT_IS,
    Workload,
    copy_ceiling,
    device,
    matmul_ceiling,
    steps_without_waiting,
    windows_of,
)
from fer.benching.jobs import FORK, repeated, serial_and_at_once
from fer.benching.windows import Bench, Row, alone
from fer.runs import write_json

Record = dict[str, Any]  # figures of a section, plain values
Keep = Callable[[Record], None]
LEAST = 5.0  # seconds left under which no section is begun
GRACE = 2.0  # seconds for what a section has written to be read


def measure(bench: Bench) -> list[Row]:
    """Run all sections and make their rows."""
    o = bench.options
    deadline = time.monotonic() + o["seconds"]
    rows: list[Row] = []
    trouble: list[str] = []

    def section(name: str, function: Callable[..., None], *arguments: Any) -> list[Record]:
        begun = time.monotonic()
        left = min(o["limits"][name.partition(" ")[0]], deadline - begun)
        records, problem = _apart(bench.folder, name, left, function, *arguments)
        if problem:
            trouble.append(f"{name}: {problem}")
        print(f"{name}: {time.monotonic() - begun:.0f} s{'; ' + problem if problem else ''}", flush=True)
        return records

    ceilings = {r["name"]: r["values"] for r in section("ceilings", _ceilings, o)}
    matmul = statistics.median(ceilings["matmul"]) if "matmul" in ceilings else None
    rows += [
        alone(f"{name} ceiling", values, "TFLOP/s" if name == "matmul" else "TB/s") for name, values in ceilings.items()
    ]
    models = {name: o["models"][name] for name in o["measured"]}
    works = {name: _workload(model) for name, model in models.items()}
    for record in section("waits", _waits, bench.folder, next(iter(works.values())), o):
        text = "steps in which a wait for the device would have raised"
        rows.append(alone(text, [record["steps"]], "steps", at_least=o["strict_steps"], note=record["device"]))
    for record in section("repeats", _repeats, bench.folder, _workload(o["job"])):
        for name, text in (("again", "in a second run"), ("killed", "after SIGKILL and resume")):
            rows.append(alone(f"tensors of weights that differ {text}", [record[name]], "tensors", at_most=0))
    for record in section("jobs", _jobs, bench.folder, _workload(o["job"]), o):
        ratio = record["serial"] / record["at_once"]
        row = alone(f"{o['jobs']} folds one by one over all at once, wall clock", [ratio], "x", at_least=2)
        rows.append(row | {"details": record})
    if set(o["modes"]) - set(AS_IT_IS):
        section("compiling", _compile_all, bench.folder, works, o)
    for name, model in models.items():
        records = section(f"model {name}", _model, bench.folder, works[name], model, o)
        rows += _model_rows(name, model, records, matmul)
    note = "; ".join(trouble)
    return [*rows, alone("sections that failed or ran out of time", [len(trouble)], "sections", at_most=0, note=note)]


# -- a section in its own process -------------------------------------------------------------------------------------


def _apart(
    folder: Path, name: str, seconds: float, function: Callable[..., None], *arguments: Any
) -> tuple[list[Record], str]:
    """Records that a function kept, and what went wrong or an empty text; its process group ends with it."""
    if seconds < LEAST:
        return [], "no time was left"
    path = folder / f"{name.replace(' ', '-')}.json"
    process = FORK.Process(target=_child, args=(path, function, *arguments))
    process.start()
    assert process.pid is not None
    process.join(seconds)
    problem = (
        "" if process.exitcode == 0 else f"ended after {seconds:.0f} s" if process.is_alive() else "ended by force"
    )
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join(GRACE)
    content = json.loads(path.read_text()) if path.exists() else {"records": [], "error": None}
    return content["records"], content["error"] or problem


def _child(path: Path, function: Callable[..., None], *arguments: Any) -> None:
    os.setsid()
    content: dict[str, Any] = {"records": [], "error": None}

    def keep(record: Record) -> None:
        content["records"].append(record)
        write_json(path, content)

    try:
        function(keep, *arguments)
    except BaseException as error:
        content["error"] = "".join(traceback.format_exception_only(error)).strip().replace("\n", " ")[:300]
        write_json(path, content)
        traceback.print_exc()


# -- what the sections do ---------------------------------------------------------------------------------------------


def _workload(model: dict[str, Any]) -> Workload:
    fixed = {key: model[key] for key in ("images", "side", "channels")}
    return Workload(words=tuple(model["words"]), batch=model["batches"][0], **fixed)


def _ceilings(keep: Keep, o: dict[str, Any]) -> None:
    keep({"name": "matmul", "values": matmul_ceiling(o["matmul"], o["windows"], 10)})
    keep({"name": "copy", "values": copy_ceiling(o["copy_megabytes"], o["windows"], 10)})


def _variants(model: dict[str, Any], work: Workload, modes: list[str]) -> list[Workload]:
    """Every batch size as it is, then every way to compile at the last one."""
    plain = [replace(work, batch=batch) for batch in model["batches"]]
    return [*plain, *(replace(plain[-1], mode=mode) for mode in modes if mode != "eager")]


def _compile_all(keep: Keep, folder: Path, works: dict[str, Workload], o: dict[str, Any]) -> None:
    """All networks at once, into the compiler's cache on disk, which the measurements then find full.

    The first way to compile alone, since all of them at once do not fit in the device's memory; the others make the
    same kernels.
    """
    mode = next(mode for mode in o["modes"] if mode not in AS_IT_IS)
    variants = [_variants(o["models"][name], work, [mode])[-1] for name, work in works.items()]
    processes = [FORK.Process(target=windows_of, args=(work, folder, 1, 1, 1)) for work in variants]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    keep({"exit_codes": [process.exitcode for process in processes]})


def _model(keep: Keep, folder: Path, work: Workload, model: dict[str, Any], o: dict[str, Any]) -> None:
    problems = []
    for variant in _variants(model, work, o["modes"]):
        try:
            figures = windows_of(variant, folder, o["windows"], o["steps"], o["warm_up"])
        except Exception as error:  # another batch size, or another way to compile, may work
            problems.append(f"batch {variant.batch}, {variant.mode}: {str(error).strip().partition(chr(10))[0][:120]}")
            continue
        keep({"batch": variant.batch, "mode": variant.mode, **figures})
    if problems:
        raise RuntimeError("; ".join(problems))


def _model_rows(name: str, model: dict[str, Any], records: list[Record], matmul: float | None) -> list[Row]:
    """Images/s of every variant, and of the fastest the goals, the wait for data and the share of the ceiling."""
    rows: list[Row] = []
    for record in records:
        rate = statistics.median(record["rates"])
        row = alone(f"{name}, batch {record['batch']}, {record['mode']}", record["rates"], "images/s")
        mfu = record["flops"] * rate / (matmul * 1e12) if matmul else None
        row["note"] = f"{100 * mfu:.1f} % of the matmul ceiling" if mfu else ""
        keep = {"milliseconds": 1e3 * record["batch"] / rate, "mfu": mfu, "gigabytes": record["gigabytes"]}
        row["details"] = keep | {"training_gflops": record["flops"] / 1e9}
        rows.append(row)
    if not records:
        return rows
    best = max(records, key=lambda record: statistics.median(record["rates"]))
    which = f"batch {best['batch']}, {best['mode']}"
    if "epoch_images" in model:
        seconds = [model["epoch_images"] / rate for rate in best["rates"]]
        text = f"{name}, an epoch of {model['epoch_images']:,} images"
        rows.append(alone(text, seconds, "s", at_most=model["at_most_seconds"], note=which))
    else:
        rows.append(alone(f"{name}, fastest", best["rates"], "images/s", at_least=model["at_least"], note=which))
    share = [100 * x for x in best["data_share"]]
    rows.append(alone(f"{name}, making batches, of a step's time", share, "%", at_most=1, note=which))
    return rows


def _waits(keep: Keep, folder: Path, work: Workload, o: dict[str, Any]) -> None:
    taken = steps_without_waiting(work, folder, o["warm_up"], o["strict_steps"])
    keep({"steps": taken, "device": str(device())})


def _jobs(keep: Keep, folder: Path, work: Workload, o: dict[str, Any]) -> None:
    serial, at_once = serial_and_at_once(work, folder, o["jobs"])
    keep({"serial": serial, "at_once": at_once})


def _repeats(keep: Keep, folder: Path, work: Workload) -> None:
    keep(dict(repeated(work, folder)))
