"""What the lessons are made with: predictions, comparisons, checks, solutions, and the notebooks' rules and store.

>>> from course_lib.lessons import compare, predict
>>> guess = predict("training step / forward pass, in time", 2)
predicted  training step / forward pass, in time: 2
>>> compare(guess, 3.05, closed_form=3.0)
training step / forward pass, in time
  measured         3.05
  your prediction  2     0.656 × measured: off by a factor of 1.52
  closed form      3.00  0.984 × measured: low by 1.6 %
"""

from course_lib.lessons.predict import Prediction, compare, predict

__all__ = ["Prediction", "compare", "predict"]
