# SPDX-License-Identifier: Apache-2.0
"""fastrnn.RNN against torch.nn.RNN over shapes and settings that nobody chose.

Contract: in float64, results and all gradients equal nn.RNN's to 1e-12 of their norm, and what
nn.RNN refuses is refused in its words. Derandomised: every run draws the same cases.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import Setting, draw, pair, same, weighted
from torch.nn.utils.rnn import PackedSequence, pack_sequence

SETTINGS = st.builds(
    Setting,
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
)
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=9)
HIDDEN = st.integers(1, 40)


class Case(NamedTuple):
    setting: Setting
    lengths: list[int]
    input_size: int
    hidden_size: int
    has_hx: bool
    training: bool
    reads: str

    @property
    def sizes(self):
        return self.input_size, self.hidden_size

    def hx(self, *batch):
        directions = self.setting.num_layers * (1 + self.setting.bidirectional)
        return [draw(directions, *batch, self.hidden_size, seed=2)] if self.has_hx else []


CASES = st.builds(
    Case,
    setting=SETTINGS,
    lengths=LENGTHS,
    input_size=st.integers(1, 20),
    hidden_size=HIDDEN,
    has_hx=st.booleans(),
    training=st.booleans(),
    reads=st.sampled_from(["both", "output", "h_n"]),
)
often = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def answers(case, inputs, hx, assemble):
    """For each module its results and the gradients of every leaf; inputs are assembled anew."""
    for module in pair(case.setting, sizes=case.sizes):
        output, h_n = module.train(case.training)(assemble(inputs), *hx)
        data = output.data if isinstance(output, PackedSequence) else output
        loss = {
            "both": lambda y, h: weighted(y) + weighted(h),
            "output": lambda y, h: weighted(y),
            "h_n": lambda y, h: weighted(h),
        }[case.reads](data, h_n)
        leaves = [*inputs, *hx, *module.parameters()]
        yield [data, h_n, *torch.autograd.grad(loss, leaves)]


@often
@given(CASES, st.integers(1, 12))
def test_a_padded_batch_equals_nn_rnns(case, steps):
    batch = len(case.lengths)
    leading = (batch, steps) if case.setting.batch_first else (steps, batch)
    x = draw(*leading, case.input_size, seed=1)
    same(*answers(case, [x], case.hx(batch), lambda xs: xs[0]))


@settings(often, max_examples=15)
@given(CASES, st.integers(1, 6), st.integers(1, 40), st.integers(100, 300))
def test_a_large_padded_batch_equals_nn_rnns(case, steps, batch, hidden):
    case = case._replace(hidden_size=hidden)
    leading = (batch, steps) if case.setting.batch_first else (steps, batch)
    x = draw(*leading, case.input_size, seed=1)
    same(*answers(case, [x], case.hx(batch), lambda xs: xs[0]))


@often
@given(CASES, st.integers(1, 12))
def test_an_unbatched_sequence_equals_nn_rnns(case, steps):
    x = draw(steps, case.input_size, seed=1)
    same(*answers(case, [x], case.hx(), lambda xs: xs[0]))


@often
@given(CASES)
def test_a_packed_batch_in_any_order_equals_nn_rnns(case):
    xs = [draw(n, case.input_size, seed=n) for n in case.lengths]
    hx = case.hx(len(xs))
    same(*answers(case, xs, hx, lambda xs: pack_sequence(xs, enforce_sorted=False)))


@often
@given(CASES)
def test_a_sorted_packed_batch_equals_nn_rnns(case):
    xs = [draw(n, case.input_size, seed=n) for n in sorted(case.lengths, reverse=True)]
    same(*answers(case, xs, case.hx(len(xs)), pack_sequence))


@often
@given(CASES)
def test_a_call_continued_from_h_n_equals_one_call(case):
    """Of one direction only: the state that leaves one chunk is all that the next one needs."""
    one_way = case._replace(setting=case.setting._replace(bidirectional=False, batch_first=False))
    module = pair(one_way.setting, sizes=case.sizes)[0]
    x = draw(sum(case.lengths), 2, case.input_size, seed=1)
    whole, last = module(x, *one_way.hx(2))
    state, parts = (one_way.hx(2) or [None])[0], []
    for chunk in x.split(case.lengths):
        part, state = module(chunk, state)
        parts.append(part)
    same([torch.cat(parts), state], [whole, last])


@often
@given(CASES)
def test_no_row_of_a_batch_depends_on_another(case):
    module = pair(case.setting._replace(batch_first=False), sizes=case.sizes)[0]
    batch = len(case.lengths)
    x = draw(4, batch, case.input_size, seed=1)
    output, h_n = module(x, *case.hx(batch))
    for row in range(batch):
        alone = module(x[:, row], *(hx[:, row] for hx in case.hx(batch)))
        same(alone, [output[:, row], h_n[:, row]])


@often
@given(CASES)
def test_an_empty_sequence_is_refused_in_nn_rnns_words(case):
    leading = (2, 0) if case.setting.batch_first else (0, 2)
    messages = []
    for module in pair(case.setting, sizes=case.sizes):
        with pytest.raises(RuntimeError) as error:
            module(draw(*leading, case.input_size), *case.hx(2))
        messages.append(str(error.value))
    assert messages[0].startswith(messages[1])
