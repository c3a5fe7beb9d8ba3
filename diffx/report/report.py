"""From runs to a page: what goes where."""

import re
import tempfile
from pathlib import Path
from typing import Any

from diffx import __version__
from diffx.compare.factorial import Observation
from diffx.experiment import Collection
from diffx.plots import COLORS, plot_chart
from diffx.report import provenance, wording
from diffx.report.compared import Verdicts
from diffx.report.cost import pareto_plot, points
from diffx.report.factors import Factors, factors
from diffx.report.learning import learning_curves, logs_of, noise_levels
from diffx.report.page import picture, render
from diffx.report.pictures import gallery
from diffx.report.plot import Plot
from diffx.report.verdicts import answer, forest
from diffx.utils import write_text

_SECTIONS = (
    ("answer", "The answer"),
    ("comparison", "Comparison"),
    ("samples", "Samples"),
    ("learning", "Learning curves"),
    ("noise", "Loss by noise level"),
    ("cost", "Quality and cost"),
    ("effects", "What each axis does"),
    ("run", "What was run"),
    ("repeat", "How to repeat"),
    ("words", "Words"),
)


def write_report(
    collection: Collection,
    verdicts: Verdicts,
    out: Path,
    command: str,
    title: str = "",
    question: str = "",
    figures: Path | None = None,
) -> list[Path]:
    """Writes the page, and its plots as PDF and SVG.

    Arguments:
        collection: the runs.
        verdicts: the comparison of their arms.
        out: the HTML file.
        command: what makes this page again.
        title: its title; the experiments' names by default.
        question: what is asked; from the axes by default.
        figures: the folder of the plots; none are written without.

    Returns:
        The files.
    """
    names = sorted({str(member.config["name"]) for member in collection.members})
    asked = wording.question_of(collection, verdicts.levels, verdicts.metric)
    content = _content(collection, verdicts)
    content |= {
        "title": title or f"{', '.join(names)}: {' × '.join(verdicts.levels) or verdicts.metric}",
        "question": question or asked,
        "command": command,
        "figures": "" if figures is None else str(figures),
    }
    plots = _plots(content)
    written = [out]
    with tempfile.TemporaryDirectory() as folder:
        for plot in plots:
            plot_chart(plot.first, Path(folder) / f"{plot.key}.svg", letters=True)
        content["static"] = {plot.key: picture((Path(folder) / f"{plot.key}.svg").read_bytes()) for plot in plots}
    if figures is not None:
        written += [file for plot in plots for file in _on_paper(plot, figures)]
    write_text(out, render(content))
    return written


def _content(collection: Collection, verdicts: Verdicts) -> dict[str, Any]:
    arms, metric, axes = verdicts.arms, verdicts.metric, verdicts.axes
    logs = logs_of(collection.history)
    sampled, said = points(collection, arms, metric)
    shared, different = provenance.protocols(collection, metric)
    return {
        "version": __version__,
        "contents": _SECTIONS,
        "metric": metric,
        "axes": verdicts.columns,
        "colors": [COLORS[k % len(COLORS)] for k in range(len(arms))],
        "answer": answer(verdicts.rows, metric, verdicts.baseline),
        "problems": provenance.broken(collection, arms, metric),
        "rows": verdicts.rows,
        "nothing": f"No run has a value of {metric} yet: diffx evaluate run='FOLDER/*/seed*' measures them.",
        "several_nfe": len({row.nfe for row in verdicts.rows}) > 1,
        "table_caption": verdicts.caption,
        "comparison_remarks": verdicts.remarks,
        "forest": forest(verdicts.rows, metric),
        "gallery": gallery(arms),
        "learning": learning_curves(logs, arms, metric),
        "incomparable": wording.incomparable_losses(axes) if logs else "",
        "noise": noise_levels(logs, arms),
        "cost": pareto_plot(sampled, metric),
        "cost_remarks": said + wording.cost_remarks(sampled, metric),
        "factors": _factors(verdicts),
        "runs_caption": wording.runs_caption(collection, arms),
        "root": provenance.root_of(collection),
        "run_rows": provenance.run_rows(arms, provenance.root_of(collection)),
        "environments": provenance.environments(collection),
        "protocol_shared": shared,
        "protocol_different": different,
        "differs": wording.differences(collection.axes),
        "shared_config": provenance.shared_config(collection),
        "trainings": provenance.trainings(arms),
        "repeats": provenance.repeats(arms, metric),
        "words": wording.words_of(metric),
    }


def _factors(verdicts: Verdicts) -> Factors | None:
    observations = [
        Observation(row.levels, seed, value, stderr) for row in verdicts.rows for seed, value, stderr in row.by_seed
    ]
    if not observations or not verdicts.columns:
        return None
    return factors(observations, verdicts.columns, verdicts.reference, verdicts.metric)


def _plots(content: dict[str, Any]) -> list[Plot]:
    """All plots of the page."""
    found = [content[name] for name in ("forest", "learning", "noise", "cost")]
    return [plot for plot in found if plot is not None] + (content["factors"].plots if content["factors"] else [])


def _on_paper(plot: Plot, folder: Path) -> list[Path]:
    """The charts of a plot as PDF and SVG."""
    written = []
    for chosen in plot.paper or plot.charts:
        words = re.sub(r"[^A-Za-z0-9_.×-]+", "-", "-".join([plot.key, *chosen[:1]])).replace("×", "by")
        for suffix in (".pdf", ".svg"):
            written.append(folder / f"{words}{suffix}")
            plot_chart(plot.charts[chosen], written[-1])
    return written
