"""The arms of a report: what they are called, what they look like in plots, which runs they have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffx.compare.arms import text
from diffx.experiment import Collection, Member


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing that is asked about.

    Arguments:
        label: a short name, the levels of its axes.
        levels: the level of each axis.
        members: its runs, in the order of their seeds.
        style: the number of its colour, dash and marker in every plot.
    """

    label: str
    levels: dict[str, str]
    members: list[Member]
    style: int

    @property
    def runs(self) -> set[str]:
        """The directories of its runs."""
        return {str(member.run.path) for member in self.members}

    @property
    def anchor(self) -> str:
        """A word for the ids of the page."""
        return f"arm{self.style}"


def arms_of(collection: Collection, by: Sequence[str]) -> list[Arm]:
    """The arms of a collection, in the order of their levels; runs are pooled over axes that are not asked about.

    Arguments:
        collection: the runs.
        by: the axes that tell arms apart.
    """
    groups: dict[tuple[str, ...], list[Member]] = {}
    for member in collection.members:
        groups.setdefault(tuple(text(collection.axes[axis][member.arm]) for axis in by), []).append(member)
    ordered = sorted(groups.items(), key=lambda item: [_order(name) for name in item[0]])
    return [
        Arm(
            label_of(dict(zip(by, names, strict=True))),
            dict(zip(by, names, strict=True)),
            sorted(members, key=lambda member: (member.seed, member.arm, str(member.run.path))),
            k,
        )
        for k, (names, members) in enumerate(ordered)
    ]


def label_of(levels: Mapping[str, str]) -> str:
    """A short name: names of choices speak for themselves, other values need their key."""
    words = [
        name if "." not in axis and not _is_number(name) else f"{axis.rpartition('.')[2]}={name}"
        for axis, name in levels.items()
    ]
    return ", ".join(words) or "the only arm"


def _order(name: str) -> tuple[int, float, str]:
    return (0, float(name), name) if _is_number(name) else (1, 0.0, name)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
