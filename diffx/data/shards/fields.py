"""What is read of a sample beside its image: a part of its own, or a field of its `json`; and conditions on fields."""

import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffx.utils import DiffxError

_COMPARISON = re.compile(r"^\s*([\w.-]+?)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*$")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
SIZES = ("width", "height")


@dataclass(frozen=True)
class Condition:
    """One comparison of a field with a value.

    Arguments:
        field: a field of the sample's `json` (dots lead into nested ones); `width` and `height`, where the `json` has
            none, are those of the image.
        sign: the comparison, one of `>= <= == != > <`.
        value: a number or text.
    """

    field: str
    sign: str
    value: float | str

    def holds(self, found: Any) -> bool:
        """Whether it holds; never for a value that is missing or of the other kind."""
        if isinstance(self.value, str):
            return isinstance(found, str) and _OPERATORS[self.sign](found, self.value)
        return isinstance(found, int | float) and _OPERATORS[self.sign](found, self.value)


def conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Reads conditions such as `width>=256` and `meta.licence==cc0`.

    Raises:
        DiffxError: if one cannot be read.
    """
    found = []
    for text in texts:
        match = _COMPARISON.match(text)
        if match is None:
            raise DiffxError(
                f"data.filter has '{text}', which is no comparison; write FIELD>=NUMBER, FIELD<NUMBER or FIELD==TEXT"
            )
        field, sign, value = match.groups()
        try:
            found.append(Condition(field, sign, float(value)))
        except ValueError:
            if sign not in ("==", "!="):
                raise DiffxError(f"data.filter has '{text}', but texts are only compared by == and !=") from None
            found.append(Condition(field, sign, value.strip("'\"")))
    return tuple(found)


def field_of(place: str) -> str | None:
    """The field of `json.FIELD`; None for a part of its own, such as `cls` or `txt`."""
    return place.removeprefix("json.") if place.startswith("json.") else None


def look_up(document: Any, field: str) -> Any:
    """The value of a field, dots leading into nested ones; None if it is missing."""
    if isinstance(document, dict) and field in document:
        return document[field]
    for part in field.split("."):
        if not isinstance(document, dict) or part not in document:
            return None
        document = document[part]
    return document


def parse_json(data: bytes, name: object) -> Any:
    """A sample's `json`.

    Raises:
        DiffxError: if it is none, naming it.
    """
    try:
        return json.loads(data)
    except ValueError as error:
        raise DiffxError(f"'{name}' cannot be read as JSON ({error}); write the shard anew") from error


def as_label(value: Any, name: object) -> int:
    """A class from the bytes of a part, or from a field.

    Raises:
        DiffxError: if it is no whole number, naming it.
    """
    try:
        number = int(value.decode()) if isinstance(value, bytes) else value
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    except ValueError:
        pass
    shown = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    raise DiffxError(
        f"'{name}' is {shown!r:.60}, no whole number; set data.label to the part or the json.FIELD that has the class, "
        "or data.num_classes=0"
    )
