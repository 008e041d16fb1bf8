"""``python -m fer.export``: a trained run for use elsewhere, as ONNX or as safetensors with a model card.

python -m fer.export run=outputs/.../<run>                                          model.onnx, checked against PyTorch
python -m fer.export run=outputs/.../<run> int8=true                                and in 8 bits, with what that costs
python -m fer.export run=outputs/.../<run> format=safetensors license=cc-by-nc-4.0  for the Hugging Face Hub
python -m fer.export run=outputs zoo=zoo format=safetensors license=cc-by-nc-4.0    the best of each network
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fer.config import count_problems, resolved, start
from fer.errors import UserError

CONFIG = "export"


def run(config: DictConfig) -> None:
    """Export one run, or the best ones under a folder.

    Raises:
        UserError: anything the user can mend.
    """
    plain = resolved(config)
    problems = _problems(plain)
    if problems:
        raise UserError("\n".join(problems))

    try:
        from fer.exporting.files import Options, export_onnx, export_safetensors
        from fer.exporting.zoo import best_runs, write_index
    except ImportError as error:
        raise UserError(f"exports need more packages ({error}): pip install 'fer-bench[export]'") from None
    from fer.trained import open_run

    options = Options(
        answers=plain["answers"],
        int8=plain["int8"],
        licence=plain["license"],
        crops=plain["crops"],
        calibration=plain["calibration"],
        repeats=plain["repeats"],
        seed=plain["seed"],
        root=plain["root"],
    )
    write = export_onnx if plain["format"] == "onnx" else export_safetensors
    best = {} if plain["zoo"] is None else best_runs(Path(plain["run"]))
    chosen = {Path(plain["zoo"]) / name / plain["format"]: path for name, path in best.items()}
    if plain["zoo"] is None:
        chosen[Path(plain["output"] or Path(plain["run"]) / "export" / plain["format"])] = Path(plain["run"])
    for output, path in chosen.items():
        trained = open_run(path)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output={output} cannot be made ({error.strerror}): choose another folder") from None
        for written in write(trained, output, options):
            print(written)
    if best:
        print(write_index(Path(plain["zoo"]), best))


def _problems(plain: dict[str, Any]) -> list[str]:
    problems = []
    if not isinstance(plain["run"], str) or plain["run"] in ("", "???"):
        problems.append("run is missing: set run=outputs/.../<run>, a run folder written by python -m fer.train")
    if plain["zoo"] is not None and (not isinstance(plain["zoo"], str) or not plain["zoo"]):
        problems.append(f"zoo={plain['zoo']}: expected a folder to write to")
    if plain["zoo"] is not None and plain["output"] is not None:
        problems.append("output= is for one run: with zoo= each goes to a folder of its own in there")
    if plain["format"] not in ("onnx", "safetensors"):
        problems.append(f"format={plain['format']} is not one of onnx, safetensors")
    if plain["answers"] not in ("logits", "probabilities"):
        problems.append(f"answers={plain['answers']} is not one of logits, probabilities")
    if not isinstance(plain["int8"], bool):
        problems.append(f"int8={plain['int8']}: expected true or false")
    elif plain["int8"] and plain["format"] != "onnx":
        problems.append("int8=true is for format=onnx: safetensors keeps the trained weights")
    licence = plain["license"]
    if licence is not None and (not isinstance(licence, str) or not licence.strip() or not licence.isprintable()):
        problems.append(f"license={licence!r}: expected the name of the terms of use, such as cc-by-nc-4.0")
    if licence is None and plain["format"] == "safetensors":
        problems.append(
            "license is missing: the model card must say under which terms the weights may be used, such as "
            "license=cc-by-nc-4.0; the data's own terms count too"
        )
    return problems + count_problems(plain, {"crops": 1, "calibration": 1, "repeats": 20, "seed": 0})


def main() -> None:
    """The command."""
    start(CONFIG, run)


if __name__ == "__main__":
    main()
