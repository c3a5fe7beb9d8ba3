"""How the table of a comparison is to be read."""

from scipy.special import stdtrit

from diffx.compare.arms import listed, name_of
from diffx.compare.comparison import Comparison


def legend(comparison: Comparison, best_seed: bool = False) -> list[str]:
    """What the numbers of a table are, one sentence each.

    Arguments:
        comparison: the comparison.
        best_seed: whether the table has the best seeds too.
    """
    return [
        sentence
        for sentence in (
            _means(comparison),
            _one_seed(comparison),
            *_differences(comparison),
            _otherwise(comparison),
            _best_seed(comparison) if best_seed else "",
            _costs(comparison),
            str(comparison.budget),
            _floor(comparison),
        )
        if sentence
    ]


def _means(comparison: Comparison) -> str:
    counts = sorted({len(row.values) for row in comparison.rows if len(row.values) > 1})
    if not counts:
        return ""
    wide = f" (t = {stdtrit(counts[0] - 1, 0.975):.3g} standard errors with {counts[0]} seeds)" if counts[0] < 5 else ""
    return f"mean of {comparison.metric} over training seeds ± half of its 95 % t interval{wide}"


def _one_seed(comparison: Comparison) -> str:
    alone = any(len(row.values) == 1 for row in comparison.rows)
    compared = any(row.effect and row.effect.over == "samples" for row in comparison.rows)
    if not alone and not compared:
        return ""
    return (
        "* one training seed: the 95 % interval is over samples (jackknife), not over training seeds; another seed "
        "may differ by more"
    )


def _differences(comparison: Comparison) -> list[str]:
    if not any(row.effect for row in comparison.rows):
        return []
    other = set(comparison.columns) - set(comparison.baseline)
    own = f", with each row's own {' and '.join(sorted(other))}" if other else ""
    told = [f"difference: from the baseline {name_of(comparison.baseline)}{own}, in brackets a 95 % interval of each"]
    if any(row.effect and row.effect.over == "seeds" for row in comparison.rows):
        told[0] += " by itself (t over the differences between runs of the same seed)"
    if comparison.direction and comparison.tests:
        several = f", corrected for {comparison.tests} differences by Holm's method" if comparison.tests > 1 else ""
        told.append(
            f"verdict: at the 5 % level{several}; p is the corrected one" if several else "verdict: at the 5 % level"
        )
    elif not comparison.direction:
        told.append(f"no verdicts: neither a higher nor a lower {comparison.metric} is known to be better")
    return told


def _otherwise(comparison: Comparison) -> str:
    marked = [f"{row.name}: {'; '.join(row.mismatch)}" for row in comparison.rows if row.mismatch]
    return f"† measured otherwise, and not comparable with the others: {listed(marked)}" if marked else ""


def _best_seed(comparison: Comparison) -> str:
    if not comparison.direction:
        return ""
    return (
        "best of seeds: the best training seed alone, which gets better by chance with every seed added; differences "
        "and verdicts are of means"
    )


def _costs(comparison: Comparison) -> str:
    if all(row.images_per_second is None and row.device_hours is None for row in comparison.rows):
        return ""
    return f"NFE: denoiser calls per sample; images/s and {comparison.device}-hours: of training, the mean over seeds"


def _floor(comparison: Comparison) -> str:
    floors = [row.floor for row in comparison.rows if row.floor is not None]
    if not floors:
        return ""
    low, high = f"{min(floors):.4g}", f"{max(floors):.4g}"
    told = low if low == high else f"{low} … {high}"
    return f"floor: real images in place of samples have {comparison.metric} {told}"
