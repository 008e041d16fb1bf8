"""The model card of an exported run: what it was trained on, how, what it reaches, and what it is not for."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fer.errors import UserError
from fer.metrics import confusion_counts
from fer.reporting.collect import Answers, read_answers
from fer.reporting.statistics import RESAMPLES, bootstrap_scores, effective_images, wilson
from fer.reporting.tables import inert
from fer.trained import TrainedRun

TEMPLATE = Path(__file__).with_name("card.md")
LIMITS = [
    "It names an expression as annotators would, and annotators disagree with each other; labels are noisy.",
    "It was tested on one data set. Other cameras, alignments, ages and cultures were not tested here; expect less.",
    "It always names one of its classes, also where there is no face, several expressions, or none of them.",
    "No check of differences between groups of people is part of this card.",
]


def model_card(run: TrainedRun, preprocessing: dict[str, Any], temperature: float | None, licence: str) -> ModelCard:
    """The card, filled from ``results.json`` and ``predictions.csv``.

    Args:
        run: the run.
        preprocessing: as in `fer.hub.ExportedModel`.
        temperature: likewise.
        licence: name of the terms of use, such as ``cc-by-nc-4.0``.

    Raises:
        UserError: the predictions are missing or of other images than the results.
    """
    results, facts = run.results, run.results["data_facts"]
    answers = tested(run)
    metrics = metric_rows(answers, results["classes"], results["metrics"]["test"], results["seed"])
    title = f"{results['model']} for facial expressions, {facts['data']}"
    worst = min(
        (row for row in metrics if row["name"].startswith("accuracy of ")),
        key=lambda row: float(row["value"].split()[0]),
    )
    limits = [*LIMITS, f"Its weakest class: {worst['name'].removeprefix('accuracy of ')}, {worst['value']} right."]
    data = ModelCardData(
        license=licence,
        library_name="fer",
        pipeline_tag="image-classification",
        tags=["facial-expression-recognition", "model_hub_mixin", "pytorch_model_hub_mixin"],
        metrics=["accuracy", "f1"],
        model_name=results["name"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=results["data"],
                dataset_name=f"{facts['data']}, test part",
                metric_type=kind,
                metric_value=round(results["metrics"]["test"][key], 6),
                metric_name=name,
            )
            for kind, key, name in (
                ("accuracy", "acc", "accuracy"),
                ("recall", "mean_acc", "mean class accuracy"),
                ("f1", "macro_f1", "macro F1"),
            )
        ],
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(),
        title=title,
        limits=limits,
        metrics=metrics,
        resamples=RESAMPLES,
        temperature=temperature,
        license=licence,
        crop=round(preprocessing["store_size"] * preprocessing["crop_pct"]),
        data=facts["data"],
        form=facts["form"],
        split=facts["split"],
        copies="; ".join(f"{number:,} {what}" for what, number in facts["copies"].items() if number) or "none",
        counts=facts["counts"],
        **{key: preprocessing[key] for key in ("store_size", "channels", "image_size", "mean", "std")},
        **{
            key: results[key]
            for key in (
                *("model", "classes", "stamps", "n", "selected_on", "best_epoch", "epochs", "tta", "weights", "seed"),
                *("split_fingerprint", "code_version", "git_commit", "versions", "parameters"),
            )
        },
    )
    return card


def tested(run: TrainedRun) -> Answers:
    """What ``predictions.csv`` says.

    Raises:
        UserError: it is missing, or not of the results beside it.
    """
    path = run.folder.predictions
    try:
        answers = read_answers(path, run.results["classes"])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): the card needs the test's predictions") from None
    if len(answers.label) != run.results["n"]["test"]:
        raise UserError(f"{path} is not of the test in {run.folder.results}: take a whole run folder")
    return answers


def metric_rows(answers: Answers, classes: list[str], scores: dict[str, float], seed: int) -> list[dict[str, str]]:
    """Name, value, 95 % interval and n of each metric.

    Images of one person count for what they tell together, see `fer.reporting.statistics.effective_images`.

    Args:
        answers: to the test part.
        classes: K names.
        scores: the test's metrics.
        seed: of the bootstrap.
    """

    def percent(low: float, high: float) -> str:
        return f"{100 * low:.2f} to {100 * high:.2f} %"

    counts = confusion_counts(answers.label, answers.predicted, len(classes))
    n, effective = len(answers.label), answers.effective_images
    mean_acc, macro_f1 = bootstrap_scores(counts, seed, effective)
    rows = [
        ("accuracy", f"{100 * scores['acc']:.2f} %", percent(*wilson(scores["acc"], effective)), n),
        ("mean class accuracy", f"{100 * scores['mean_acc']:.2f} %", percent(*mean_acc), n),
        ("macro F1", f"{100 * scores['macro_f1']:.2f} %", percent(*macro_f1), n),
        ("expected calibration error", f"{100 * scores['ece']:.2f} %", "", n),
        ("negative log-likelihood", f"{scores['nll']:.4f}", "", n),
    ]
    for place, name in enumerate(classes):
        own = answers.label == place
        if own.any():
            share = answers.right[own].mean()
            ci = percent(*wilson(share, effective_images(answers.right[own], answers.person[own])))
            rows.append((f"accuracy of {inert(name)}", f"{100 * share:.2f} %", ci, int(own.sum())))
    return [{"name": name, "value": value, "interval": ci, "n": f"{m:,}"} for name, value, ci, m in rows]
