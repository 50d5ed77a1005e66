# SPDX-License-Identifier: Apache-2.0
"""On a GPU: misplaced and wrong arguments, and a GPU that is not the current one.

Contract: torch.nn.RNN in the same place raises the same type of exception, or returns the same.
"""

import pytest
import torch
from devices import needs_gpu
from pairs import pair, same, tensor, weighted
from test_gpu_module import SIZES, both, every_form, given, near
from torch.autograd import grad

pytestmark = needs_gpu

#: Where a misplaced tensor is.
ELSEWHERE = torch.device("cpu")


def outcome(call):
    """Shapes and numbers of what a call returns, or type and text of what it raises."""
    try:
        results = call()
    except Exception as error:
        return type(error), str(error)
    return [tensor(r).shape for r in results], [tensor(r).detach().cpu() for r in results]


def refusal(theirs):
    """What ours has to raise, also where nn.RNN does not notice and computes nonsense."""
    return theirs[0] if isinstance(theirs[0], type) else RuntimeError


def away(module, name):
    """The module with one parameter elsewhere."""
    setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().to(ELSEWHERE)))
    return module


PLACES = {
    "input": lambda m, x, hx: m(x.to(ELSEWHERE), hx),
    "input and hx": lambda m, x, hx: m(x.to(ELSEWHERE), hx.to(ELSEWHERE)),
    "input, with no hx": lambda m, x, hx: m(x.to(ELSEWHERE)),
    "hx": lambda m, x, hx: m(x, hx.to(ELSEWHERE)),
    "every weight": lambda m, x, hx: m.to(ELSEWHERE)(x, hx),
    "weight_ih_l0": lambda m, x, hx: away(m, "weight_ih_l0")(x, hx),
    "weight_hh_l1": lambda m, x, hx: away(m, "weight_hh_l1")(x, hx),
    "bias_hh_l0_reverse": lambda m, x, hx: away(m, "bias_hh_l0_reverse")(x, hx),
}


@pytest.mark.parametrize("form", ["padded", "packed", "packed unsorted"])
@pytest.mark.parametrize("call", PLACES.values(), ids=PLACES)
def test_what_is_elsewhere_is_refused_as_nn_rnn_refuses_it(call, form):
    _, x, hx = given(form)
    ours, theirs = (outcome(lambda m=m: call(m, x, hx)) for m in both())
    assert ours[0] is refusal(theirs), f"{ours[0]}, nn.RNN {theirs[0]}"
    _, x, hx = given("padded")
    near(*(module(x, hx) for module in both()))  # and the GPU still works


@pytest.mark.parametrize(
    "change",
    [
        lambda x, hx: (x.float(), hx),
        lambda x, hx: (x, hx.float()),
        lambda x, hx: (x[..., :5], hx),
        lambda x, hx: (x, hx[:, :2]),
        lambda x, hx: (x, hx[:3]),
        lambda x, hx: (x[None], hx),
        lambda x, hx: (x.long(), hx),
    ],
    ids=["input float", "hx float", "5 features", "hx of 2", "hx of 3 rows", "4-D", "integers"],
)
def test_wrong_shapes_and_dtypes_are_refused_as_nn_rnn_refuses_them(change):
    _, x, hx = given("padded")
    ours, theirs = (outcome(lambda m=m: m(*change(x, hx))) for m in both())
    assert ours[0] is refusal(theirs), f"{ours[0]}, nn.RNN {theirs[0]}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs here")
@every_form
def test_a_module_on_the_second_gpu_works_while_the_first_is_current(form):
    setting, x, hx = given(form, device="cuda:1")
    _, x_cpu, hx_cpu = given(form, device="cpu")
    ours, theirs = pair(setting, sizes=SIZES)
    answers = []
    for module, *args in ((ours.to("cuda:1"), x, hx), (theirs, x_cpu, hx_cpu)):
        output, h_n = (tensor(t) for t in module(*args))
        slopes = grad(weighted(output) + weighted(h_n), [args[1], *module.parameters()])
        answers.append([t.cpu() for t in (output, h_n, *slopes)])
    assert torch.cuda.current_device() == 0
    same(*answers)
