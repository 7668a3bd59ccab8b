"""The examples in the docstrings are true."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["config", "model", "tokenizer", "trainer"])
def test_examples(name):
    done = doctest.testmod(importlib.import_module(f"course_lib.llm.{name}"))
    assert done.attempted and not done.failed
