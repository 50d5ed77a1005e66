# SPDX-License-Identifier: Apache-2.0
"""Crosses of parameters: enough rows for every pair of values run always, the rest under `full`.

A fault that needs three values together is rarer than one that needs two: `make test-all` looks for
those.
"""

import itertools

import pytest
import torch


def pairwise(rows):
    """Some of the rows: together they hold each pair of values that two columns of a row take."""
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in map(tuple, rows)}
    wanted = set().union(*pairs.values())
    chosen = []
    while wanted:
        best = max(pairs, key=lambda row: len(pairs[row] & wanted))
        chosen.append(best)
        wanted -= pairs[best]
    return chosen


def name_of(value):
    """What a test's name says of a parameter."""
    if type(value) is tuple:
        return "-".join(map(name_of, value))
    return str(value)[6:] if isinstance(value, torch.dtype) else str(value)


def rest_is_full(values, always, name=name_of):
    """Parameters of a test: `values`, those that are not among `always` with the marker `full`.

    A value is a tuple where the test has several parameters.
    """
    values, always = list(values), set(always)
    assert always <= set(values)
    return [
        pytest.param(
            *(value if type(value) is tuple else (value,)),
            id=name(value),
            marks=() if value in always else pytest.mark.full,
        )
        for value in values
    ]


def crossed(*columns, rest=()):
    """Parameters of a test: all rows of one value from each column, few of them always.

    Rows with a value of `rest` in the last column are all `full`.
    """
    rows = itertools.product(*columns[:-1], [*columns[-1], *rest])
    return rest_is_full(rows, pairwise(itertools.product(*columns)))


def in_turn(rows, values):
    """Parameters of a test: each row with each value; always with one of them, in turn."""
    rows, values = list(rows), list(values)
    always = [(row, values[i % len(values)]) for i, row in enumerate(rows)]
    return rest_is_full(itertools.product(rows, values), always)
