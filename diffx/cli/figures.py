"""The pictures that commands leave in a run directory."""

from pathlib import Path

from diffx.data import DataSource
from diffx.evaluation import Evaluation
from diffx.experiment import Run
from diffx.generate import Generator
from diffx.metrics import ImageMetrics
from diffx.metrics.nearest import NearestDistance
from diffx.pictures import save_animation, save_pairs
from diffx.plots import Curve, decades, plot_curves, plot_strip
from diffx.training.loggers import CSVLogger


def progress_pictures(run: Run) -> dict[str, Path]:
    """What training looked like: the grids as a strip and as an animation, and each metric over the steps.

    Returns:
        The PNG files by what to log them as.
    """
    grids = {path.stem.removeprefix("step="): path for path in sorted(run.samples.glob("step=*.png"))}
    final = run.samples / "final.png"
    pictures = {f"step {int(step)}": path for step, path in grids.items()}
    if final.is_file():
        pictures["final"] = final
    found: dict[str, Path] = {}
    if len(pictures) > 1:
        names = list(pictures)
        kept = sorted({round(i * (len(names) - 1) / 7) for i in range(8)}) if len(names) > 8 else range(len(names))
        found["progress"] = run.samples / "progress.png"
        plot_strip({names[i]: pictures[names[i]] for i in kept}, found["progress"])
        save_animation(list(pictures.values()), run.samples / "progress.gif")
    rows = CSVLogger(run.path / "metrics.csv").rows()
    metrics = sorted({key for row in rows for key in row if key.startswith("eval/") and key != "eval/seconds"})
    # a metric at several points (eval/<point>/<metric>) is one picture with a line for each
    for metric in sorted({key.rpartition("/")[2] for key in metrics}):
        curves = {
            key.removeprefix("eval/").rpartition("/")[0] or "default": _over_steps(rows, key)
            for key in metrics
            if key.rpartition("/")[2] == metric
        }
        if any(len(curve.x) > 1 for curve in curves.values()):
            found[f"{metric} over steps"] = run.samples / f"{metric}-over-steps.png"
            plot_curves(curves, found[f"{metric} over steps"], "training step", metric)
    return found


def nfe_pictures(evaluations: list[tuple[Evaluation, float]], names: list[str], directory: Path) -> list[Path]:
    """Each metric over the number of function evaluations, with a line for each way to sample.

    Arguments:
        evaluations: what was measured, with the NFE of each.
        names: what each was called, without what makes the NFE.
        directory: where the pictures go.

    Returns:
        The files; none where all have the same NFE.
    """
    if len({nfe for _, nfe in evaluations}) < 2:
        return []
    found = []
    for metric in (name for name in evaluations[0][0].values if name != "nfe"):
        curves: dict[str, list[tuple[float, float, float | None]]] = {}
        for name, (evaluation, nfe) in zip(names, evaluations, strict=True):
            if metric in evaluation.values and "_floor" not in metric and "_noise" not in metric:
                value = evaluation.values[metric]
                curves.setdefault(name, []).append((nfe, value.value, value.stderr))
        if curves:
            found.append(directory / f"{metric}-over-nfe.png")
            lines = {name: Curve(*zip(*sorted(points), strict=True)) for name, points in curves.items()}
            log_y = decades([y for curve in lines.values() for y in curve.y]) > 0.7
            plot_curves(lines, found[-1], "NFE", metric, log_x=True, log_y=log_y)
    return found


def nearest_picture(metrics: ImageMetrics, generator: Generator, source: DataSource, path: Path, rank: int) -> None:
    """The samples nearest to training images, with these below; all ranks call it, the first one draws."""
    for metric in metrics.modules():
        if isinstance(metric, NearestDistance):
            index, training, _ = metric.closest()
            if rank == 0 and len(index):
                device = next(generator.denoiser.parameters()).device
                images = generator(index.to(device)).images
                save_pairs(images, source.split("train").get(training.cpu())["x"], path)


def _over_steps(rows: list[dict[str, str]], key: str) -> Curve:
    points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
    return Curve([step for step, _ in points], [value for _, value in points], [None] * len(points))
