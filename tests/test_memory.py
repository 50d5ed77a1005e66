# SPDX-License-Identifier: Apache-2.0
"""Where arguments lie: at the end of mapped pages, in memory that was given back, in none, or in
memory that changes during a call.

What a case says is found out in another process, so that a crash is a failure with a message.
"""

import json
import mmap
import os
import signal
import time
from functools import partial

import pytest
import torch
from test_capabilities import run_python
from test_results import at_page_end
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_map_only

import fastrnn

B, H, L = 7, 64, 2
SIZES = [5, 4, 3]


def outcome(call, *arguments):
    """What a call says: nothing, or its exception's type and message."""
    try:
        call(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def report(names):
    for name in names:
        print(json.dumps([name, CASES[name]()]), flush=True)


@pytest.fixture(scope="module")
def outcomes():
    """name -> outcome of every case; a process that ends early is replaced by a new one."""
    found = {}
    while left := [name for name in CASES if name not in found]:
        code = "import sys, test_memory; test_memory.report(sys.argv[1:])"
        process = run_python(code, *left)
        found |= dict(json.loads(line) for line in process.stdout.splitlines())
        assert process.returncode <= 0, process.stderr
        if process.returncode < 0:
            crashed = next(name for name in left if name not in found)
            found[crashed] = ["the process ended", signal.Signals(-process.returncode).name]
    return found


# Arguments at the end of mapped pages: whatever is read behind them ends the process.

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["padded", "batch_first", "unbatched", "packed"]
SHAPES = [(9, 1, 1, 1), (3, 7, 17, 33), (1, 2, 3, 130), (4, 9, 40, 48)]  # T, B, I, H


def arguments_of(layout, shape, dtype):
    T, B, I, H = shape
    generator = torch.Generator().manual_seed(T)
    draw = lambda *sizes: torch.randn(sizes, generator=generator, dtype=dtype)  # noqa: E731
    if layout == "unbatched":
        return draw(T, I), draw(2 * L, H), None
    if layout == "batch_first":
        return draw(B, T, I), draw(2 * L, B, H), None
    if layout == "padded":
        return draw(T, B, I), draw(2 * L, B, H), None
    lengths = [max(T - b, 1) for b in range(B)]
    packed = pack_padded_sequence(draw(T, B, I), lengths)
    return packed.data, draw(2 * L, B, H), packed.batch_sizes


def run_placed(module, place, layout, shape, dtype):
    """Results and gradients with every tensor that the call is given where `place` puts it."""
    data, hx, batch_sizes = arguments_of(layout, shape, dtype)
    for parameter in module.parameters():
        parameter.data = place(parameter.data)
    data, hx = (place(t).requires_grad_() for t in (data, hx))
    x = data if batch_sizes is None else PackedSequence(data, place(batch_sizes))
    with torch.no_grad():
        module(x, hx)
    # What autograd keeps, the layers' outputs among it, comes back at the end of a page, too.
    unpack = lambda t: place(t.detach())  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        output, h_n = module(x, hx)
    output = output.data if isinstance(output, PackedSequence) else output
    slopes = [place(torch.linspace(-1, 1, t.numel()).to(dtype).view_as(t)) for t in (output, h_n)]
    leaves = [data, hx, *module.parameters()]
    return [output, h_n, *torch.autograd.grad([output, h_n], leaves, slopes)]


def at_the_end_of_pages(layout, dtype, nonlinearity):
    for shape in SHAPES:
        results = []
        for cls, place in ((fastrnn.RNN, at_page_end), (torch.nn.RNN, torch.clone)):
            torch.manual_seed(0)
            module = cls(*shape[2:], L, nonlinearity, bidirectional=True, dtype=dtype,
                         batch_first=layout == "batch_first")  # fmt: skip
            results.append(run_placed(module, place, layout, shape, dtype))
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 0.1)
        for ours, theirs in zip(*results, strict=True):
            difference = (ours.double() - theirs.double()).norm()
            assert difference <= tolerance * theirs.double().norm().clamp_min(1), shape


PAGES = {
    f"{layout} {str(dtype)[6:]} {nonlinearity} at the end of pages": partial(
        outcome, at_the_end_of_pages, layout, dtype, nonlinearity
    )
    for layout in LAYOUTS
    for dtype, nonlinearity in [*((dtype, "tanh") for dtype in DTYPES), (torch.float32, "relu")]
}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_behind_an_argument_is_read(outcomes, name):
    assert outcomes[name] is None


# Memory given back, in whole or in part, as sharded training does between the uses of a parameter.


def free(t):
    t.untyped_storage().resize_(0)


def halve(t):
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)


def packed(sizes, data=None):
    return PackedSequence(torch.ones(12, 3) if data is None else data, sizes)


def spoilt_call(spoil, which, train, cls):
    """A call after `spoil` was done to the argument called `which`."""
    module = cls(3, H, L).requires_grad_(train)
    x, hx = torch.randn(50, B, 3), torch.zeros(L, B, H)
    data, sizes = torch.ones(12, 3), torch.tensor(SIZES)
    tensors = {"input": x, "hx": hx, "data": data, "sizes": sizes}
    spoil((tensors | dict(module.named_parameters()))[which])
    if which in ("data", "sizes"):
        return module(packed(sizes, data))
    return module(x, hx)


def spoilt_backward(spoil, which, cls):
    """Backward after `spoil` was done to what it reads."""
    module = cls(3, H, L)
    x = torch.randn(50, B, 3, requires_grad=True)
    hx = torch.zeros(L, B, H, requires_grad=True)
    tensors = {"input": x, "hx": hx, **dict(module.named_parameters())}
    results = module(x, hx)
    slopes = [torch.ones_like(t) for t in results]
    spoil((tensors | dict(zip(("output's slope", "h_n's slope"), slopes, strict=True)))[which])
    if which.endswith("slope"):  # alone: autograd reads both before it adds them
        i = which == "h_n's slope"
        results, slopes = results[i], slopes[i]
    torch.autograd.grad(results, [*tensors.values()], slopes)


def spoilt_saved(spoil):
    """Backward when a hook gives back what was saved without its memory."""

    def unpack(t):
        t = t.detach().clone()
        spoil(t)
        return t

    module = fastrnn.RNN(3, H, L)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        output, _ = module(torch.randn(50, B, 3))
    output.sum().backward()


ARGUMENTS = ["hx", "weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "bias_ih_l0", "bias_hh_l1"]
READ_BY_BACKWARD = ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1", "output's slope", "h_n's slope"]
# name -> the call, of either class. Of half an input nn.RNN reads on, behind the end.
SPOILT = {
    f"{spoil.__name__} {which}, {'training' if train else 'inference'}": partial(
        spoilt_call, spoil, which, train
    )
    for spoil, arguments in ((free, ["input", "data", "sizes", *ARGUMENTS]), (halve, ARGUMENTS))
    for which in arguments
    for train in (False, True)
} | {
    f"{spoil.__name__} {which} before backward": partial(spoilt_backward, spoil, which)
    for spoil, read in ((free, ["input", "hx", *READ_BY_BACKWARD]), (halve, READ_BY_BACKWARD))
    for which in read
}


def of_both(call):
    return [outcome(call, cls) for cls in (fastrnn.RNN, torch.nn.RNN)]


def first_words(message):
    """Which call it was, and what is wrong with it; not the view's sizes, which are others."""
    return message.split(":")[0] if message.startswith("setStorage") else message.split(" yet")[0]


@pytest.mark.parametrize("name", SPOILT)
def test_memory_that_was_given_back_is_missed_in_the_words_of_nn_rnn(outcomes, name):
    (kind, message), (their_kind, their_message) = outcomes[name]
    assert kind == their_kind == "RuntimeError"
    if name != "free hx before backward":  # which it reads in the way that it reads an input
        assert first_words(message) == first_words(their_message)
    assert "its storage was resized" in message


ALONE = {  # where nn.RNN crashes or reads foreign memory
    "halve input": partial(spoilt_call, halve, "input", False, fastrnn.RNN),
    "halve input, training": partial(spoilt_call, halve, "input", True, fastrnn.RNN),
    "halve data": partial(spoilt_call, halve, "data", False, fastrnn.RNN),
    "halve sizes": partial(spoilt_call, halve, "sizes", False, fastrnn.RNN),
    "free an expanded input": lambda: fastrnn.RNN(3, H)(freed_expanded()),
    "free what was saved": partial(spoilt_saved, free),
    "halve what was saved": partial(spoilt_saved, halve),
}


def freed_expanded():
    x = torch.ones(1, 1, 3).expand(50, B, 3)
    free(x)
    return x


@pytest.mark.parametrize("name", ALONE)
def test_memory_that_was_given_back_is_missed_where_nn_rnn_reads_on(outcomes, name):
    kind, message = outcomes[name]
    assert kind == "RuntimeError"
    assert "its storage was resized" in message


def unread(frozen):
    """Gradients though what backward does not read is gone by then: biases, and more if frozen."""
    gradients = []
    for cls, spoil in ((fastrnn.RNN, free), (torch.nn.RNN, lambda t: None)):
        torch.manual_seed(0)
        module = cls(3, H, L)
        x = torch.randn(50, B, 3, requires_grad=not frozen)
        gone = [module.bias_ih_l0, module.bias_hh_l1]
        if frozen:
            for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
                gone.append(getattr(module, name).requires_grad_(False))
            gone.append(x)
        wanted = [p for p in (x, *module.parameters()) if p.requires_grad]
        output, h_n = module(x)
        for t in gone:
            spoil(t)
        gradients.append(torch.autograd.grad(output.sum() + h_n.sum(), wanted))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


UNREAD = {
    "backward without biases": partial(outcome, unread, False),
    "backward without a frozen layer": partial(outcome, unread, True),
}


@pytest.mark.parametrize("name", UNREAD)
def test_backward_does_not_miss_memory_that_it_does_not_read(outcomes, name):
    assert outcomes[name] is None


# Tensors of other kinds


class Wrapper(torch.Tensor):
    """Holds its numbers in another tensor, and has no memory."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        inner = tree_map_only(cls, lambda t: t.inner, (arguments, keywords or {}))
        return function(*inner[0], **inner[1])


class Watcher(torch.Tensor):
    """Has memory, and every operator asks it first; it lets the operator see itself."""

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        with torch._C._DisableTorchDispatch():
            return function(*arguments, **(keywords or {}))


def weights_with(place=0, change=lambda w: w):
    weights = [p.detach() for p in torch.nn.RNN(3, H, L).parameters()]
    weights[place] = change(weights[place])
    return weights


def operator(name, x, batch_sizes=None, weights=None, hx=None):
    call = getattr(torch.ops.fastrnn, name)
    call(x, hx, weights or weights_with(), batch_sizes, "tanh", True, L, False, False)


def without_dispatch(*arguments, **keywords):
    """A call whose tensors' own __torch_dispatch__ is not asked."""
    with torch._C._DisableTorchDispatch():
        operator("rnn_forward", *arguments, **keywords)


def to_meta(t):
    return t.to("meta")


X, DATA, GROW = torch.ones(5, 2, 3), torch.ones(12, 3), torch.tensor([4, 500000, 7])
WATCHED, WRAPPED = GROW.as_subclass(Watcher), Wrapper(GROW)
META, SPARSE = to_meta(torch.tensor(SIZES)), torch.tensor(SIZES).to_sparse()
NO_MEMORY = torch._efficientzerotensor(3, dtype=torch.int64)
GREW, NOT_CPU = "got 500000 at step 1", "batch_sizes must be a 1-D CPU tensor"
ELSEWHERE, NOT_ORDINARY = "not at the same device", "is not an ordinary tensor"
FOREIGN = {  # name -> words of the exception, and the call
    "watched batch_sizes that grow": (GREW, lambda: fastrnn.RNN(3, H, L)(packed(WATCHED))),
    "wrapped batch_sizes that grow": (GREW, lambda: fastrnn.RNN(3, H, L)(packed(WRAPPED))),
    "the same in rnn": (GREW, partial(operator, "rnn", DATA, WATCHED)),
    "the same in rnn_forward": (GREW, partial(operator, "rnn_forward", DATA, WATCHED)),
    "meta batch_sizes in rnn": (NOT_CPU, partial(operator, "rnn", DATA, META)),
    "meta batch_sizes in rnn_forward": (NOT_CPU, partial(operator, "rnn_forward", DATA, META)),
    "zeros as batch_sizes": ("batch_sizes add up to 0", partial(operator, "rnn", DATA, NO_MEMORY)),
    "sparse batch_sizes": ("Sparse", partial(operator, "rnn", DATA, SPARSE)),
    "a sparse weight": (
        "Sparse", lambda: operator("rnn", X, None, weights_with(1, torch.Tensor.to_sparse))),
    "a meta weight": (ELSEWHERE, lambda: operator("rnn", X, None, weights_with(1, to_meta))),
    "a meta bias": (ELSEWHERE, lambda: operator("rnn", X, None, weights_with(3, to_meta))),
    "a meta hx": (ELSEWHERE, lambda: operator("rnn", X, hx=torch.ones(L, 2, H, device="meta"))),
    "a meta input": (ELSEWHERE, lambda: operator("rnn", to_meta(X))),
    "an empty wrapped weight": (
        NOT_ORDINARY, lambda: without_dispatch(X, None, weights_with(1, Wrapper))),
    "an empty wrapped input": (NOT_ORDINARY, lambda: without_dispatch(Wrapper(X))),
    "empty wrapped batch_sizes": (NOT_ORDINARY, lambda: without_dispatch(DATA, WRAPPED)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_tensor_without_numbers_or_with_wrong_ones_is_refused(outcomes, name):
    kind, message = outcomes[name]
    assert kind in ("RuntimeError", "NotImplementedError")
    assert FOREIGN[name][0] in message


def zeros(t):
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def negated(t):
    return torch._neg_view(t.neg())


def imaginary(t):
    return torch.conj(torch.complex(t, t.neg())).imag


HELD = {  # argument -> other ways to hold numbers
    "input": [zeros, negated, imaginary, torch._lazy_clone],
    "hx": [zeros, negated, imaginary, torch._lazy_clone],
    "weight": [zeros, negated, imaginary, torch._lazy_clone, lambda t: t[:1, :1].expand(t.shape)],
    "bias": [zeros, negated, torch._lazy_clone, lambda t: t[:1].expand(t.shape)],
    "sizes": [
        lambda t: torch.stack([t, t - 9], 1)[:, 0],
        lambda t: t[2:].expand(3),
        Wrapper,
        lambda t: t.as_subclass(Watcher),
        negated,
    ],
}


def alike(which, change):
    """The results and gradients for the numbers that `change` holds, however it holds them."""
    results = []
    for hold in (change, lambda t: plain(change(t))):
        torch.manual_seed(0)
        module = fastrnn.RNN(3, H, L)
        weight, bias = module.weight_hh_l0.detach(), module.bias_ih_l1.detach()
        x, hx, sizes = torch.randn(12, 3), torch.randn(L, 5, H), torch.tensor(SIZES)
        tensors = {"input": x, "hx": hx, "weight": weight, "bias": bias, "sizes": sizes}
        tensors[which] = hold(tensors[which])
        for name, key in (("weight_hh_l0", "weight"), ("bias_ih_l1", "bias")):
            if key == which:
                delattr(module, name)
                setattr(module, name, tensors[key])
        rows = int(plain(tensors["sizes"]).sum())
        B = int(plain(tensors["sizes"])[0])
        given = PackedSequence(tensors["input"][:rows], tensors["sizes"])
        output, h_n = module(given, tensors["hx"][:, :B])
        leaves = list(module.parameters())
        gradients = torch.autograd.grad(output.data.sum() + h_n.sum(), leaves)
        results.append([output.data, h_n, *gradients])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def plain(t):
    """An ordinary tensor of the same numbers."""
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype)
    t = t.inner if isinstance(t, Wrapper) else t.as_subclass(torch.Tensor)
    return torch.tensor(t.tolist(), dtype=t.dtype)


KINDS = {
    f"{which} held in way {number}": partial(outcome, alike, which, change)
    for which, changes in HELD.items()
    for number, change in enumerate(changes)
}


@pytest.mark.parametrize("name", KINDS)
def test_how_a_tensor_holds_its_numbers_changes_nothing(outcomes, name):
    assert outcomes[name] is None


# Memory that changes


def write_in_turn(memory, numbers, end):
    """Another process that writes each of the numbers to `memory`, again and again until `end`."""
    process = os.fork()
    if process == 0:
        first = memoryview(memory).cast("q")
        while time.monotonic() < end:
            for number in numbers * 1000:
                first[0] = number
        os._exit(0)
    return process


def changing(train):
    """For a second, the first of the batch_sizes is too large now and then."""
    steps = 20000
    module = fastrnn.RNN(1, 1).requires_grad_(train)
    data, memory = torch.randn(steps, 1), mmap.mmap(-1, steps * 8)
    sizes = torch.frombuffer(memory, dtype=torch.int64).fill_(1)
    expected = module(PackedSequence(data, sizes.clone()))[0].data.detach()
    seen, end = set(), time.monotonic() + 1
    writer = write_in_turn(memory, [10**7, 1], end)
    try:
        while time.monotonic() < end:
            try:
                output, _ = module(PackedSequence(data, sizes))
                if train:
                    output.data.sum().backward()
            except RuntimeError as error:
                assert "batch_sizes" in str(error), error
                seen.add("refused")
            else:
                assert torch.equal(output.data, expected)
                seen.add("computed")
    finally:
        os.waitpid(writer, 0)
    assert seen == {"refused", "computed"}


CHANGING = {
    "changing batch_sizes, inference": partial(outcome, changing, False),
    "changing batch_sizes, training": partial(outcome, changing, True),
}


@pytest.mark.parametrize("name", CHANGING)
def test_batch_sizes_that_change_during_a_call_are_refused_or_were_right(outcomes, name):
    assert outcomes[name] is None


CASES = {
    **PAGES,
    **{name: partial(of_both, call) for name, call in SPOILT.items()},
    **{name: partial(outcome, call) for name, call in ALONE.items()},
    **UNREAD,
    **{name: partial(outcome, call) for name, (_, call) in FOREIGN.items()},
    **KINDS,
    **CHANGING,
}
