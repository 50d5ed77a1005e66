# SPDX-License-Identifier: Apache-2.0
"""Crosses of parameters: a part that holds every pair runs always, the rest under `full`.

A fault that needs three values together is rarer than one that needs two: `make test-all` looks for
those.
"""

import itertools

import pytest


def pairwise(rows):
    """Some of the rows: together they hold each pair of values that two columns of a row take."""
    rows = list(rows)
    wanted = set().union(*map(pairs_of, rows))
    chosen = []
    while wanted:
        best = max(rows, key=lambda row: len(pairs_of(row) & wanted))
        chosen.append(best)
        wanted -= pairs_of(best)
    return chosen


def pairs_of(row):
    return set(itertools.combinations(enumerate(row), 2))


def rest_is_full(values, always, ids=str):
    """Parameters of a test: `values`, those that are not among `always` with the marker `full`.

    A value is a tuple where the test has several parameters.
    """
    values, always = list(values), list(always)
    assert all(value in values for value in always)
    return [
        pytest.param(
            *(value if type(value) is tuple else (value,)),
            id=ids(value),
            marks=() if value in always else pytest.mark.full,
        )
        for value in values
    ]
