"""One module a lesson: the answers to its exercises, as functions that the tests run through the checks."""
