"""What each axis of the sweep does: main effects and interactions as plots and tables."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffx.compare.factorial import Effects, Estimate, Observation, effects
from diffx.plots import Chart, Line
from diffx.report.aim import tone
from diffx.report.numbers import count, interval, number
from diffx.report.plot import Control, Plot


@dataclass(frozen=True)
class EffectRow:
    """A line of the table of effects.

    Arguments:
        what: which change.
        difference: what it makes.
        interval: its 95 % interval.
        verdict: whether it can be told from nothing.
    """

    what: str
    difference: str
    interval: str
    verdict: str


@dataclass(frozen=True)
class Factors:
    """What the page says about the axes.

    Arguments:
        plots: a plot of main effects, and one of interactions where there are two axes.
        main: the table of main effects.
        interactions: the table of interactions.
        remarks: what is missing or to be known, one sentence each.
    """

    plots: list[Plot]
    main: list[EffectRow]
    interactions: list[EffectRow]
    remarks: list[str]


def factors(
    observations: Sequence[Observation],
    axes: Sequence[str],
    reference: Mapping[str, str],
    metric: str,
) -> Factors:
    """Main effects of all axes and interactions of all pairs.

    Arguments:
        observations: the measured runs, each with its level of every axis.
        axes: the axes.
        reference: the level of each axis that others are held against.
        metric: its name.
    """
    remarks: list[str] = []
    varied = [axis for axis in axes if len({run.levels[axis] for run in observations}) > 1]
    if len(varied) < len(axes):
        still = [axis for axis in axes if axis not in varied]
        remarks.append(f"{', '.join(still)} has one measured level only, and so no effect to show.")
    single = {axis: effects(observations, [axis], reference) for axis in varied}
    pairs = {pair: effects(observations, pair, reference) for pair in itertools.combinations(varied, 2)}
    for axis, found in single.items():
        if found is None:
            remarks.append(f"No combination of the other axes was measured at every level of {axis}: no main effect.")
    lacking = [" × ".join(pair) for pair, found in pairs.items() if found is None]
    if lacking:
        remarks.append(f"Not every pair of levels was measured of {', '.join(lacking)}: no interaction is shown.")
    remarks += _remarks([found for found in (*single.values(), *pairs.values()) if found is not None])
    alone = {axis: found for axis, found in single.items() if found is not None}
    crossed = {pair: found for pair, found in pairs.items() if found is not None}
    plots = [_main_plot(alone, metric)] if alone else []
    plots += [_interaction_plot(crossed, metric)] if crossed else []
    return Factors(
        plots,
        [row for found in alone.values() for row in _rows(found, metric)],
        [row for found in crossed.values() for row in _rows(found, metric)],
        remarks,
    )


def _remarks(found: Sequence[Effects]) -> list[str]:
    remarks = []
    if any(effect.omitted for effect in found):
        remarks.append(
            "Some combinations lack runs; only those count that are there at every level compared, with the same seeds."
        )
    estimates = [estimate for effect in found for estimate in effect.means]
    seeds = {estimate.seeds for estimate in estimates}
    if seeds and min(seeds) < 2:
        said = (
            "where fewer than two seeds are shared, intervals are from the images alone and say nothing about training"
        )
        remarks.append(f"{said[0].upper()}{said[1:]}.")
    elif 2 in seeds:
        remarks.append("Intervals from two seeds are wide: Student's t is 12.7 with one degree of freedom.")
    return remarks


def _main_plot(found: Mapping[str, Effects], metric: str) -> Plot:
    charts = {
        (axis,): Chart([_line("", effect.means, 0)], axis, f"{metric}, marginal mean", xticks=_names(effect.means, 0))
        for axis, effect in found.items()
    }
    caption = "The mean over all combinations of the other axes, with its 95 % interval over seeds."
    return Plot("main-effects", f"Main effects on {metric}", caption, charts, (Control("axis", tuple(found)),))


def _interaction_plot(found: Mapping[tuple[str, ...], Effects], metric: str) -> Plot:
    charts: dict[tuple[str, ...], Chart] = {}
    for (first, second), effect in found.items():
        for axes, own, other in ((f"{first} × {second}", 0, 1), (f"{second} × {first}", 1, 0)):
            names, lines = _names(effect.means, own), []
            for k, level in enumerate(_names(effect.means, other)):
                line = _line(level, [mean for mean in effect.means if mean.levels[other] == level], k)
                # side by side, so that one interval does not hide the other
                shift = 0.06 * (k - (len(_names(effect.means, other)) - 1) / 2)
                lines.append(Line(line.name, [x + shift for x in line.x], line.y, line.low, line.high, line.style))
            charts[(axes,)] = Chart(lines, (first, second)[own], f"{metric}, mean", xticks=names)
    caption = (
        "Lines that run in parallel are no interaction: then each axis does the same at every level of the other. "
        "Bars are 95 % intervals over seeds."
    )
    control = Control("axes", tuple(axes for (axes,) in charts))
    return Plot("interactions", f"Interactions on {metric}", caption, charts, (control,), list(charts)[::2])


def _names(means: Sequence[Estimate], axis: int) -> list[str]:
    return list(dict.fromkeys(mean.levels[axis] for mean in means))


def _line(name: str, means: Sequence[Estimate], style: int) -> Line:
    low = [None if mean.interval is None else mean.interval[0] for mean in means]
    high = [None if mean.interval is None else mean.interval[1] for mean in means]
    notes = [count(mean.seeds, "seed") for mean in means]
    return Line(name, list(range(len(means))), [mean.value for mean in means], low, high, style, notes=notes)


def _rows(effect: Effects, metric: str) -> list[EffectRow]:
    rows = []
    for contrast in effect.contrasts:
        if len(effect.axes) == 1:
            what = f"{effect.axes[0]}: {effect.reference[0]} → {contrast.levels[0]}"
        else:
            (first, second), (a, b), (a0, b0) = effect.axes, contrast.levels, effect.reference
            what = f"{first}: {a0} → {a}, at {second}={b} instead of {b0}"
        known = contrast.interval is not None
        half = (contrast.interval[1] - contrast.interval[0]) / 2 if contrast.interval is not None else None
        rows.append(
            EffectRow(
                what,
                number(contrast.value, half),
                interval(*contrast.interval) if contrast.interval is not None else "–",
                _verdict(contrast, len(effect.axes) == 1, metric) if known else "no interval",
            )
        )
    return rows


def _verdict(contrast: Estimate, main: bool, metric: str) -> str:
    if not contrast.distinguishable:
        return "not distinguishable from 0"
    if not main:
        return "interaction"
    return tone(metric, contrast.value)
