# SPDX-License-Identifier: Apache-2.0
"""Bad and odd calls: the exception of torch.nn.RNN, its wording first, then perhaps a hint.

nn.RNN's exception is taken when the test runs. Where nn.RNN silently computes nonsense, or only
says which product inside it failed, an error that names the culprit is asked for instead.
"""

import math

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastrnn

BOTH = (fastrnn.RNN, torch.nn.RNN)
X = torch.linspace(-1, 1, 30).view(5, 2, 3)
ROWS = torch.linspace(-1, 1, 15).view(5, 3)


def failure(call, *arguments, **keywords):
    with pytest.raises(Exception) as caught:
        call(*arguments, **keywords)
    return caught.value


def assert_same_failure(ours, theirs):
    """Same type, and nn.RNN's message, with or without its full stop, stands first."""
    assert type(ours) is type(theirs), f"{ours!r}\n{theirs!r}"
    assert str(ours).startswith(str(theirs).rstrip(".")), f"{ours!r}\n{theirs!r}"


# The constructor

CONSTRUCTIONS = {
    "proj_size of zero": ((3, 4), {"proj_size": 0}),
    "proj_size of two": ((3, 4), {"proj_size": 2}),
    "proj_size beside an unknown nonlinearity": ((3, 4, 1, "x"), {"proj_size": 2}),
    "nonlinearity in capitals": ((3, 4), {"nonlinearity": "TANH"}),
    "nonlinearity None": ((3, 4), {"nonlinearity": None}),
    "a function as nonlinearity": ((3, 4), {"nonlinearity": torch.tanh}),
    "bias in the fourth place": ((3, 4, 1, True), {}),
    "unknown nonlinearity beside other mistakes": ((0, 4.0, 1, "x"), {"dropout": 7}),
    "dropout True": ((3, 4, 2), {"dropout": True}),
    "dropout as a numeral in a string": ((3, 4, 2), {"dropout": "0.5"}),
    "dropout as a word": ((3, 4, 2), {"dropout": "x"}),
    "dropout None": ((3, 4, 2), {"dropout": None}),
    "dropout below zero": ((3, 4, 2), {"dropout": -0.1}),
    "dropout above one": ((3, 4, 2), {"dropout": 1.1}),
    "dropout NaN": ((3, 4, 2), {"dropout": math.nan}),
    "dropout as a tensor": ((3, 4, 2), {"dropout": torch.tensor(0.5)}),
    "dropout complex": ((3, 4, 2), {"dropout": 1j}),
    "dropout out of range beside a bad bias": ((3, 4), {"dropout": 2, "bias": 1}),
    "bias as a number": ((3, 4), {"bias": 1}),
    "bias None": ((3, 4), {"bias": None}),
    "batch_first as a number": ((3, 4), {"batch_first": 0}),
    "batch_first as a string": ((3, 4), {"batch_first": "yes"}),
    "bad bias beside bad batch_first and sizes": ((0, 4.0), {"bias": 1, "batch_first": 0}),
    "input_size as a float": ((3.0, 4), {}),
    "input_size as a string": (("3", 4), {}),
    "input_size zero": ((0, 4), {}),
    "input_size negative": ((-1, 4), {}),
    "input_size zero beside hidden_size as a float": ((0, 4.0), {}),
    "hidden_size as a float": ((3, 4.0), {}),
    "hidden_size None": ((3, None), {}),
    "hidden_size zero": ((3, 0), {}),
    "hidden_size negative": ((3, -1), {}),
    "num_layers zero": ((3, 4, 0), {}),
    "num_layers negative": ((3, 4, -1), {}),
    "num_layers as a float": ((3, 4, 1.5), {}),
    "num_layers as a string": ((3, 4, "2"), {}),
    "an integer dtype": ((3, 4), {"dtype": torch.int64}),
    "a dtype that is none": ((3, 4), {"dtype": "x"}),
    "an unknown device": ((3, 4), {"device": "nope"}),
}


@pytest.mark.parametrize("arguments", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_constructor_refuses_in_the_words_of_nn_rnn(arguments):
    positional, keywords = arguments
    assert_same_failure(*(failure(cls, *positional, **keywords) for cls in BOTH))


# Python's own wording names the function, which differs: only type and argument are asked for.
SIGNATURES = {
    "no sizes": ((), {}, "input_size"),
    "no hidden_size": ((3,), {}, "hidden_size"),
    "an unknown keyword": ((3, 4), {"hidden": 4}, "'hidden'"),
    "mode as a keyword": ((3, 4), {"mode": "RNN_TANH"}, "'mode'"),
    "nonlinearity twice": ((3, 4, 1, "relu"), {"nonlinearity": "relu"}, "'nonlinearity'"),
    "input_size twice": ((3, 4), {"input_size": 3}, "'input_size'"),
}


@pytest.mark.parametrize("case", SIGNATURES.values(), ids=SIGNATURES)
def test_constructor_names_the_argument_that_does_not_fit_its_signature(case):
    positional, keywords, name = case
    ours, theirs = (failure(cls, *positional, **keywords) for cls in BOTH)
    assert type(ours) is type(theirs) is TypeError
    assert name in str(theirs)
    assert name in str(ours)


@pytest.mark.parametrize(
    "options",
    [{"bidirectional": "yes"}, {"bidirectional": 1}, {"bidirectional": None}, {"num_layers": True}],
    ids=str,
)
def test_option_that_the_constructor_does_not_check_fails_at_the_call(options):
    modules = [cls(3, 4, **options) for cls in BOTH]
    assert repr(modules[0]) == repr(modules[1])
    ours, theirs = (failure(module, X) for module in modules)
    assert type(ours) is type(theirs) is TypeError


# Calls. `new` is the class with sizes 3 and 4 and two layers filled in.


def packed(rows, batch_sizes, dtype=torch.int64):
    return PackedSequence(rows, torch.tensor(batch_sizes, dtype=dtype))


def with_attribute(module, name, value):
    setattr(module, name, value)
    return module


def with_weight(module, name, value):
    delattr(module, name)
    setattr(module, name, value)
    return module


CALLS = {
    "input of rank zero": lambda new: new()(X[0, 0, 0]),
    "input of rank one": lambda new: new()(X[0, 0]),
    "input of rank four": lambda new: new()(X[None]),
    "too many features": lambda new: new()(X.repeat(1, 1, 2)),
    "too many features in one sequence": lambda new: new()(X[:, 0].repeat(1, 2)),
    "too many features with batch first": lambda new: new(batch_first=True)(X.repeat(1, 1, 2)),
    "integer input": lambda new: new()(X.long()),
    "boolean input": lambda new: new()(X > 0),
    "double input": lambda new: new()(X.double()),
    "half input": lambda new: new()(X.half()),
    "float input to a double module": lambda new: new(dtype=torch.float64)(X),
    "complex input": lambda new: new()(X.to(torch.complex64)),
    "integer input of wrong size": lambda new: new()(X.long().repeat(1, 1, 2)),
    "a list as input": lambda new: new()(X.tolist()),
    "None as input": lambda new: new()(None),
    "a numpy array as input": lambda new: new()(X.numpy()),
    "the parts of a PackedSequence as a tuple": lambda new: new()(
        (ROWS, torch.tensor([3, 2]), None, None)
    ),
    "no input": lambda new: new()(),
    "h0 as a keyword": lambda new: new()(X, h0=None),
    "hx of rank zero for a batch": lambda new: new()(X, torch.tensor(0.0)),
    "hx of rank two for a batch": lambda new: new()(X, torch.zeros(2, 4)),
    "hx of rank four for a batch": lambda new: new()(X, torch.zeros(2, 2, 4, 1)),
    "hx of rank three for one sequence": lambda new: new()(X[:, 0], torch.zeros(2, 1, 4)),
    "hx of rank zero for one sequence": lambda new: new()(X[:, 0], torch.tensor(0.0)),
    "hx of another batch": lambda new: new()(X, torch.zeros(2, 3, 4)),
    "hx of batch one for a batch of two": lambda new: new()(X, torch.zeros(2, 1, 4)),
    "hx of too few layers": lambda new: new()(X, torch.zeros(1, 2, 4)),
    "hx of one direction for two": lambda new: new(bidirectional=True)(X, torch.zeros(2, 2, 4)),
    "hx of too few layers for one sequence": lambda new: new()(X[:, 0], torch.zeros(1, 4)),
    "hx of another hidden size": lambda new: new()(X, torch.zeros(2, 2, 5)),
    "hx with the batch first": lambda new: new(batch_first=True)(X, torch.zeros(5, 2, 4)),
    "double hx": lambda new: new()(X, torch.zeros(2, 2, 4).double()),
    "integer hx": lambda new: new()(X, torch.zeros(2, 2, 4).long()),
    "hx in a list": lambda new: new()(X, [torch.zeros(2, 2, 4)]),
    "hx in a tuple, as an LSTM takes it": lambda new: new()(X, (torch.zeros(2, 2, 4),) * 2),
    "a number as hx": lambda new: new()(X, 0.0),
    "meta input to a module on the CPU": lambda new: new()(X.to("meta")),
    "input on the CPU to a meta module": lambda new: new(device="meta")(X),
    "meta hx": lambda new: new()(X, torch.zeros(2, 2, 4, device="meta")),
    "packed data of rank three": lambda new: new()(packed(X, [3, 2])),
    "packed data of rank one": lambda new: new()(packed(ROWS[:, 0], [3, 2])),
    "too few features in packed data": lambda new: new()(packed(ROWS[:, :2], [3, 2])),
    "integer packed data": lambda new: new()(packed(ROWS.long(), [3, 2])),
    "int32 batch_sizes": lambda new: new()(packed(ROWS, [3, 2], torch.int32)),
    "no batch_sizes": lambda new: new()(packed(ROWS, [])),
    "batch_sizes that need more rows": lambda new: new()(packed(ROWS, [3, 2, 1])),
    "packed with hx of another batch": lambda new: new()(
        packed(ROWS, [3, 2]), torch.zeros(2, 2, 4)
    ),
    "packed with hx of rank zero": lambda new: new()(packed(ROWS, [3, 2]), torch.tensor(0.0)),
    "packed with hx of rank two": lambda new: new()(packed(ROWS, [3, 2]), torch.zeros(2, 4)),
    "packed with hx of too few layers": lambda new: new()(
        packed(ROWS, [3, 2]), torch.zeros(1, 3, 4)
    ),
    "packed with double hx": lambda new: new()(packed(ROWS, [3, 2]), torch.zeros(2, 3, 4).double()),
    "packed unsorted with hx of a smaller batch": lambda new: new()(
        pack_sequence([ROWS[:1], ROWS], enforce_sorted=False), torch.zeros(2, 1, 4)
    ),
    "num_layers raised after construction": lambda new: with_attribute(new(), "num_layers", 3)(X),
    "num_layers lowered after construction": lambda new: with_attribute(new(), "num_layers", 1)(X),
    "bias switched on after construction": lambda new: with_attribute(
        new(bias=False), "bias", True
    )(X),
    "bias switched off after construction": lambda new: with_attribute(new(), "bias", False)(X),
    "dropout lowered below zero": lambda new: with_attribute(new(), "dropout", -0.5)(X),
    "dropout set to NaN": lambda new: with_attribute(new(), "dropout", math.nan)(X),
    "the mode of an LSTM": lambda new: with_attribute(new(), "mode", "LSTM")(X),
    "None as a weight": lambda new: with_weight(new(), "bias_hh_l0", None)(X),
    "no sequence steps": lambda new: new()(X[:0]),
    "no sequence steps with batch first": lambda new: new(batch_first=True)(X[:, :0]),
    "no sequence steps in one sequence": lambda new: new()(X[:0, 0]),
    "neither steps nor batch": lambda new: new()(X[:0, :0]),
}
dropout_or_not = pytest.mark.parametrize("dropout", [0.0, 0.5], ids="dropout {}".format)


@dropout_or_not
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_call_fails_in_the_words_of_nn_rnn(call, dropout):
    attempts = [
        failure(call, lambda cls=cls, **options: cls(3, 4, 2, dropout=dropout, **options))
        for cls in BOTH
    ]
    assert_same_failure(*attempts)


def functional_pair(weights, **options):
    """The exceptions of functional.rnn and of PyTorch's own operator for the same weights."""
    theirs = failure(
        torch._VF.rnn_tanh, X, torch.zeros(2, 2, 4), weights, True, 2, 0.0, False, False, False
    )
    return failure(fastrnn.functional.rnn, X, weights, num_layers=2, **options), theirs


def weights_of_two_layers():
    return list(torch.nn.RNN(3, 4, 2).parameters())


@dropout_or_not
@pytest.mark.parametrize("count", [0, 1, 4, 6, 9], ids="{} weights instead of eight".format)
def test_functional_with_too_few_or_many_weights_fails_in_the_words_of_nn_rnn(count, dropout):
    weights = (weights_of_two_layers() * 2)[:count]
    assert_same_failure(*functional_pair(weights, dropout=dropout, training=True))


@pytest.mark.parametrize("place", [0, 3, 7], ids="at place {}".format)
def test_functional_with_none_as_a_weight_fails_in_the_words_of_nn_rnn(place):
    weights = weights_of_two_layers()
    weights[place] = None
    assert_same_failure(*functional_pair(weights))


@pytest.mark.parametrize("path", ["fused", "meta tensors", "torch.func"])
def test_functional_with_an_unknown_nonlinearity_fails_in_the_words_of_the_constructor(path):
    device = "meta" if path == "meta tensors" else "cpu"
    weights = [w.to(device) for w in weights_of_two_layers()]
    call = lambda x: fastrnn.functional.rnn(x, weights, num_layers=2, nonlinearity="gelu")  # noqa: E731
    ours = failure(torch.vmap(call) if path == "torch.func" else call, X.to(device))
    assert_same_failure(ours, failure(torch.nn.RNN, 3, 4, 2, "gelu"))


# nn.RNN's own words are those of the matrix product that happens to fail first, so they are not
# asked for; the shape that is wrong is.
@pytest.mark.parametrize(
    "place, shape",
    [(0, (5, 3)), (1, (5, 4)), (1, (4, 5)), (2, (5,)), (3, (4, 1)), (4, (4, 3)), (7, (3,))],
    ids=str,
)
def test_weight_of_the_wrong_shape_is_named_with_its_shape(place, shape):
    weights = weights_of_two_layers()
    weights[place] = torch.zeros(shape)
    ours, theirs = functional_pair(weights)
    assert type(ours) is type(theirs) is RuntimeError
    assert f"weight {place}" in str(ours)
    assert str(list(shape)) in str(ours)


def test_weight_of_another_dtype_is_refused_with_both_dtypes():
    double = torch.zeros(4, 4, dtype=torch.float64)
    ours, theirs = (failure(with_weight(cls(3, 4), "weight_hh_l0", double), X) for cls in BOTH)
    assert type(ours) is type(theirs) is RuntimeError
    words = "must have the same dtype, but got Float and Double"
    assert words in str(theirs)
    assert words in str(ours)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "both directions"])
@pytest.mark.parametrize("sizes", [[2, 3], [2, 1, 2], [3, -2]], ids=str)
def test_batch_sizes_that_cannot_be_are_refused_by_name(sizes, bidirectional):
    ours, theirs = (
        failure(cls(3, 4, 1, bidirectional=bidirectional), packed(ROWS, sizes)) for cls in BOTH
    )
    assert type(ours) is type(theirs) is RuntimeError
    assert "batch_sizes" in str(ours)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "both directions"])
def test_surplus_packed_rows_are_refused_instead_of_shifting_the_result(bidirectional):
    torch.nn.RNN(3, 4, bidirectional=bidirectional)(packed(ROWS, [3]))  # computes nonsense
    error = failure(fastrnn.RNN(3, 4, bidirectional=bidirectional), packed(ROWS, [3]))
    assert type(error) is RuntimeError
    for word in ("batch_sizes", "5", "3"):
        assert word in str(error)


# Hints


def test_integer_input_names_both_dtypes_and_the_remedy():
    error = failure(fastrnn.RNN(1, 1), torch.arange(1, 10).reshape(9, 1))
    for word in ("Long", "Float", ".float()"):
        assert word in str(error)


HINTS = {
    "for a batch": ({}, X, (5, 2, 4), (2, 2, 4)),
    "for batch first": ({"batch_first": True}, X, (5, 2, 4), (2, 5, 4)),
    "for both directions": ({"bidirectional": True}, X, (2, 2, 4), (4, 2, 4)),
    "for one sequence": ({}, X[:, 0], (1, 4), (2, 4)),
    "for packed sequences": ({}, packed(ROWS, [3, 2]), (2, 2, 4), (2, 3, 4)),
    "of rank two for a batch": ({}, X, (2, 4), (2, 2, 4)),
    "of rank two for batch first": ({"batch_first": True}, X, (2, 4), (2, 5, 4)),
    "of rank three for one sequence": ({}, X[:, 0], (2, 1, 4), (2, 4)),
}


@dropout_or_not
@pytest.mark.parametrize("case", HINTS.values(), ids=HINTS)
def test_wrong_hx_is_answered_with_the_layout_in_names_and_numbers(case, dropout):
    options, x, given, needed = case
    arguments = (x, torch.zeros(given))
    ours, theirs = (failure(cls(3, 4, 2, dropout=dropout, **options), *arguments) for cls in BOTH)
    assert_same_failure(ours, theirs)
    hint = str(ours)[len(str(theirs)) :]
    names = ["num_layers", "num_directions", "batch", "hidden_size"]
    for word in [*(names if len(needed) == 3 else names[:2] + names[3:]), str(needed)]:
        assert word in hint


@dropout_or_not
def test_input_of_rank_four_is_answered_with_the_layout_of_batch_first(dropout):
    error = failure(fastrnn.RNN(3, 4, 2, batch_first=True, dropout=dropout), X[None])
    assert "(B, T, I) for a batch" in str(error)


@pytest.mark.parametrize(
    "place, weight",
    [
        (4, torch.zeros(4, 5)),
        (5, torch.zeros(5, 4)),
        (7, torch.zeros(3)),
        (1, torch.zeros(4)),
        (5, torch.zeros(4, 4).double()),
        (4, torch.zeros(4, 4, device="meta")),
    ],
    ids=["w_ih", "w_hh", "b_hh", "w_hh of rank one", "dtype", "device"],
)
def test_a_weight_that_does_not_fit_is_named_with_dropout_too(place, weight):
    weights = weights_of_two_layers()
    weights[place] = weight
    with_and_without = [
        failure(fastrnn.functional.rnn, X, weights, num_layers=2, dropout=p, training=True)
        for p in (0.5, 0.0)
    ]
    assert_same_failure(*with_and_without)


def test_functional_without_hidden_features_fails_in_the_words_of_the_constructor():
    weights = [torch.zeros(0, 3), torch.zeros(0, 0), torch.zeros(0), torch.zeros(0)]
    ours = failure(fastrnn.functional.rnn, X, weights)
    assert_same_failure(ours, failure(torch.nn.RNN, 3, 0))


@dropout_or_not
def test_functional_takes_weights_as_a_tuple(dropout):
    results = []
    for weights in (weights_of_two_layers, lambda: tuple(weights_of_two_layers())):
        torch.manual_seed(0)
        results.append(
            fastrnn.functional.rnn(X, weights(), num_layers=2, dropout=dropout, training=True)
        )
    torch.testing.assert_close(*results)


# NaN and infinity


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 40, 99])
def test_an_infinite_gradient_of_a_bias_stays_infinite(value, step):
    gradients = []
    for cls in BOTH:
        module = cls(3, 4, nonlinearity="relu")
        for weight in module.parameters():
            torch.nn.init.constant_(weight, 0.1)
        output, _ = module(torch.ones(100, 2, 3))
        cotangent = torch.zeros_like(output)
        cotangent[step] = value
        gradients.append(torch.autograd.grad(output, module.bias_ih_l0, cotangent)[0])
    assert torch.equal(*gradients)
    assert gradients[0].isinf().all()


def poisoned_run(module, value, place, sizes):
    """Results and gradients with one element of the argument called `place` set to value."""
    T, B, I, H = sizes
    dtype = module.weight_hh_l0.dtype
    generator = torch.Generator().manual_seed(1)
    shapes = {"input": (T, B, I), "hx": (2, B, H), "cotangent": (T, B, H)}
    tensors = {
        name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in shapes.items()
    }
    tensors |= {name: p.detach() for name, p in module.named_parameters()}
    tensors[place].view(-1)[tensors[place].numel() // 2] = value
    x, hx = tensors["input"].requires_grad_(), tensors["hx"].requires_grad_()
    output, h_n = module(x, hx)
    leaves = [x, hx, *module.parameters()]
    return [output, h_n, *torch.autograd.grad(output, leaves, tensors["cotangent"])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
@pytest.mark.parametrize("sizes", [(5, 3, 3, 4), (4, 2, 7, 33), (3, 9, 40, 130)], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["input", "hx", "cotangent", "weight_hh_l0", "bias_ih_l1"])
def test_nan_and_infinity_travel_as_in_nn_rnn(dtype, sizes, nonlinearity, value, place):
    outcomes = []
    for cls in BOTH:
        torch.manual_seed(0)
        module = cls(*sizes[2:], 2, nonlinearity, dtype=dtype)
        outcomes.append(poisoned_run(module, value, place, sizes))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(*outcomes, rtol=tolerance, atol=tolerance / 10, equal_nan=True)
