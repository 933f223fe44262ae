"""Marks for parametrized tests."""

import pytest


def mostly_slow(values, every=4):
    """Return the values as parameters of a test, of which all but every few are marked as slow."""
    return [
        value if number % every == 0 else pytest.param(value, marks=pytest.mark.slow)
        for number, value in enumerate(values)
    ]
