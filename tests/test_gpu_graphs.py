# SPDX-License-Identifier: Apache-2.0
"""On a GPU: CUDA graphs, by hand and by torch.compile; and the operators under opcheck.

Contract: a replay, or a compiled call, gives what the eager call gives for the same numbers.
"""

import copy

import pytest
import torch
from devices import needs_gpu
from pairs import tensor
from test_gpu_results import DEVICE
from test_gpu_use import USES, Work, every_mode, every_use
from torch._dynamo.utils import counters
from torch.utils._triton import has_triton

import fastrnn
from fastrnn.testing import relative_error

pytestmark = needs_gpu

PADDED = [name for name in USES if not USES[name][0].lengths]


def assert_near(results, expected):
    """Equal but for a few roundings: another kernel of the BLAS may be chosen."""
    for result, right in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (right.shape, right.dtype)
        error = relative_error(result.double(), right.double())
        assert error <= 8 * torch.finfo(right.dtype).eps


def capture(step):
    """A function that replays `step`, and the tensors in which the replay leaves its results.

    Before, `step` runs on a side stream, as PyTorch asks, and once without being captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


class TestCapture:
    @every_mode
    @every_use
    def test_a_replay_reads_new_numbers_from_the_same_memory(self, use, perform):
        work = Work(*use)
        replay, results = capture(lambda: perform(work))
        for seed in range(3):
            work.fill(work.draw(seed))
            with torch.no_grad():
                work.module.weight_hh_l0.mul_(0.9)
            expected = perform(work)
            replay()
            assert_near(results, expected)

    @every_use
    def test_replays_give_the_same_bits_whatever_runs_between(self, use):
        work, other = Work(*use), Work(*USES["large"])
        replay, results = capture(work.train)
        replay()
        first = [t.clone() for t in results]
        for _ in range(5):
            other.train()
            replay()
            other.train()
            assert all(map(torch.equal, results, first))

    @every_use
    def test_a_whole_step_of_training_is_captured(self, use):
        work = Work(*use)
        twin = Work(*use)
        initial = copy.deepcopy(work.module.state_dict())

        def step(work):
            work.module.zero_grad(set_to_none=True)
            results = [tensor(t) for t in work.module(work.input(), work.hx)]
            torch.autograd.backward(results, work.slopes)
            with torch.no_grad():
                for parameter in work.module.parameters():
                    parameter.sub_(parameter.grad, alpha=1e-4)
            return [t.detach() for t in results]

        replay, results = capture(lambda: step(work))
        work.module.load_state_dict(initial)
        for seed in range(4):
            values = twin.draw(seed)
            work.fill(values)
            twin.fill(values)
            expected = step(twin)
            replay()
            assert_near(results, expected)
        assert_near([*work.module.parameters()], [*twin.module.parameters()])

    @pytest.mark.parametrize("name", PADDED)
    def test_make_graphed_callables(self, name):
        work = Work(*USES[name])
        expected = []
        for seed in range(3):
            work.fill(work.draw(seed))
            expected.append([t.detach().clone() for t in work.train()])
        sample = [t.detach().clone().requires_grad_() for t in (work.data, work.hx)]
        work.module = torch.cuda.make_graphed_callables(work.module, tuple(sample))
        for seed, right in enumerate(expected):
            work.fill(work.draw(seed))
            assert_near(work.train(), right)

    def test_dropout_draws_anew_at_every_replay(self):
        module = fastrnn.RNN(5, 64, 2, dropout=0.5, device=DEVICE)
        x = torch.randn(7, 9, 5, device=DEVICE)
        with torch.no_grad():
            replay, results = capture(lambda: list(module(x)))
            drawn = []
            for _ in range(2):
                replay()
                drawn.append(results[0].clone())
        assert not torch.equal(*drawn)
        assert all(t.isfinite().all() for t in drawn)


class Model(torch.nn.Module):
    """Something to fuse before and behind the layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, hx):
        output, h_n = self.layer(x * 2, hx)
        return output.relu() + 1, h_n


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(not has_triton(), reason="no Triton here, which torch.compile needs")
@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    @every_mode
    @pytest.mark.parametrize(
        "name, mode",
        [("large", "default"), ("large", "reduce-overhead"), ("bfloat16", "reduce-overhead")],
    )
    def test_compiled_gives_what_eager_gives(self, name, mode, perform):
        eager, work = (Work(*USES[name]) for _ in range(2))
        eager.module = Model(eager.module)
        work.module = torch.compile(Model(work.module), mode=mode, fullgraph=True)
        for seed in range(4):
            values = work.draw(seed)
            eager.fill(values)
            work.fill(values)
            # What the previous call returned may be overwritten from here on.
            torch.compiler.cudagraph_mark_step_begin()
            assert_near([t.detach().clone() for t in perform(work)], perform(eager))
        if mode == "reduce-overhead":
            assert counters["inductor"]["cudagraph_skips"] == 0


class TestOperators:
    """Schema, aliasing, autograd, fake kernel and tracing, as torch.library judges them."""

    @pytest.mark.parametrize("name", ["double", "small", "packed", "bfloat16"])
    def test_opcheck(self, name):
        work = Work(*USES[name])
        case, packed = work.case, work.case.lengths is not None
        x, batch_sizes = work.data, work.given.batch_sizes if packed else None
        weights = list(work.module.parameters())
        options = (case.nonlinearity, case.bias, case.num_layers, case.bidirectional)
        torch.library.opcheck(
            torch.ops.fastrnn.rnn.default,
            (x, work.hx, weights, batch_sizes, *options, case.batch_first),
        )
        x, hx, *weights = (t.detach() for t in (x, work.hx, *weights))
        x = x.transpose(0, 1) if case.batch_first else x  # which the inner operators do not know
        forward = (x, hx, weights, batch_sizes, *options)
        torch.library.opcheck(torch.ops.fastrnn.rnn_forward.default, (*forward, True))
        output, h_n, kept = torch.ops.fastrnn.rnn_forward(*forward, True)
        torch.library.opcheck(
            torch.ops.fastrnn.rnn_backward.default,
            (torch.ones_like(output), torch.ones_like(h_n), x, hx, weights, batch_sizes, kept,
             *options, [True] * (2 + len(weights))),
        )  # fmt: skip
