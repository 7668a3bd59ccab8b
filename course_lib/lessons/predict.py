"""Predict first, measure then, and see three numbers: predicted, measured, ratio.

A prediction is the reader's own. Nothing fails on it, whatever it is, and it may be left out (None).
"""

from dataclasses import dataclass

from course_lib.show.units import quantity

CLOSE = 0.10  # a ratio this near to 1 is told as a deviation, others as a factor
EXACT = 1e-9  # of floats that were added up in another order


@dataclass(frozen=True)
class Prediction:
    """What is predicted, the reader's number or None, and the number's unit (see course_lib.show.units)."""

    what: str
    value: float | None
    unit: str = ""


def predict(what: str, value: float | None, unit: str = "") -> Prediction:
    """Write a prediction down before anything is measured."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        print(f"predicted  {what}: {value!r} is no number; write one, such as 100, or None")
        value = None
    else:
        print(f"predicted  {what}: {'nothing yet; write a number above' if value is None else quantity(value, unit)}")
    return Prediction(what, value, unit)


def compare(prediction: Prediction | str, measured: float, unit: str = "", **others: float) -> None:
    """Print what was measured; beside it the prediction and any `others` (closed_form=…), each with its ratio.

    In place of a prediction a name and a unit will do, where only the others are compared.
    """
    if isinstance(prediction, str):
        prediction = Prediction(prediction, None, unit)
    elif prediction.value is None:
        others = {"your_prediction": None} | others
    if prediction.value is not None:
        others = {"your_prediction": prediction.value} | others
    names = ["measured", *(name.replace("_", " ") for name in others)]
    values = ["none" if v is None else quantity(v, prediction.unit) for v in (measured, *others.values())]
    ratios = ["", *(verdict(value, measured) for value in others.values())]
    wide, long = max(map(len, names)), max(map(len, values))
    print(prediction.what)
    for name, value, ratio in zip(names, values, ratios):
        print(f"  {name:{wide}}  {value:{long}}  {ratio}".rstrip())


def verdict(value: float | None, measured: float) -> str:
    """The ratio to what was measured, and how good that is."""
    if value is None or not measured:
        return ""
    ratio = value / measured
    if abs(ratio - 1) < EXACT:
        return "1 × measured: exact"
    if ratio <= 0:
        return f"{ratio:.2g} × measured"
    if abs(ratio - 1) <= CLOSE:
        percent = 100 * abs(ratio - 1)
        return f"{ratio:.3f} × measured: {'high' if ratio > 1 else 'low'} by {percent:.2g} %"
    return f"{ratio:.3g} × measured: off by a factor of {max(ratio, 1 / ratio):.3g}"
