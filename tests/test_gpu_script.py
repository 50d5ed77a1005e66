# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py measures what it says, in order, and survives what fails.

All but CUDA itself runs here; the steps before the measurements are in test_gpu_steps.py.
"""

import cases
import gpu
import gpu_cases
import gpu_timing
import pytest
import torch
from worker import Worker

import fastrnn

TINY = gpu_cases.make("tf32", "core", "", T=5, B=3, H=8)
OTHER = gpu_cases.make("fp16", "core", "", T=5, B=3, H=8)
PACKED = gpu_cases.make("tf32", "extra", "", T=6, B=3, H=8, lengths=(2, 6, 1), bidirectional=True)
GOOD = {"gate": None, "eager": {}}


class WrongWeights(fastrnn.RNN):
    """Works with weights that are off by one part in a thousand."""

    def forward(self, input, hx=None):
        return fastrnn.functional.rnn(input, [w * 1.001 for w in self.parameters()], hx)


class WrongWhenLong(fastrnn.RNN):
    """Is wrong from the gate's last step on, and in training only."""

    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        wrong = torch.is_grad_enabled() and len(output) > gpu_cases.GATE_T
        return (output * 1.001 if wrong else output), h_n


class FakeClock:
    now = 1000.0

    def __call__(self):
        return self.now


def kind(case):
    return case.T, case.B, case.H, case.num_layers, case.bidirectional, bool(case.lengths)


def answers(clock, *found, seconds=1.0):
    """A stand-in for the worker: returns or raises these in turn, and keeps what it was asked."""
    rest = list(found)

    def ask(case, way, limit):
        asked.append((case.name, way, limit))
        clock.now += seconds
        answer = rest.pop(0) if rest else {way: {}, **({"gate": None} if way == "eager" else {})}
        if isinstance(answer, BaseException):
            raise answer
        return answer

    asked = ask.asked = []
    return ask


def measured(ask, clock, minutes=None, cases=(TINY, OTHER), save=lambda: None):
    found = {"cases": [], "not_measured": []}
    gpu.measure(found, gpu.plan(list(cases), "cuda"), ask, gpu.Budget(minutes, clock), save)
    return found


def test_the_most_telling_cases_come_first_in_both_ways():
    assert len({case.name for case in gpu_cases.CASES}) == len(gpu_cases.CASES) == 4 * 32
    tasks = gpu.plan(gpu_cases.CASES, "cuda")
    parts = [case.part for case, _ in tasks]
    main, others = ["core"] * 15 + ["grid"] * 57, ["core"] * 5 + ["grid"] * 19 + ["extra"] * 32
    assert parts == main * 2 + others * 2
    ways = [way for _, way in tasks]
    assert ways == ["eager"] * 72 + ["graph"] * 72 + ["eager"] * 56 + ["graph"] * 56
    assert [kind(case)[:3] for case, _ in tasks[:15:3]] == [
        (512, 16, H) for H in (64, 128, 256, 512, 1024)
    ]
    assert [case.precision for case, _ in tasks[:3]] == ["tf32", "fp16", "bf16"]
    assert len(gpu.plan(gpu_cases.CASES, "cpu")) == 128


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("precision", "allowed"), [("tf32", True), ("fp32", False)])
def test_tf32_is_set_for_a_case_and_restored(before, precision, allowed, monkeypatch):
    def failure(case, device):
        seen.append(torch.backends.cudnn.allow_tf32)
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(gpu_timing, "failure", failure)
    with gpu_cases.cudnn_with_tf32(before):
        with pytest.raises(KeyboardInterrupt):
            gpu_timing.perform(gpu_cases.make(precision, "core", ""), "eager", "cpu", 0.0)
        assert (seen, torch.backends.cudnn.allow_tf32) == ([allowed], before)


def test_inputs_fill_more_than_the_cache_unless_they_are_too_large(monkeypatch):
    size = 5 * 3 * 8 * 4
    monkeypatch.setattr(gpu_cases, "CACHE_BYTES", 3 * size)
    assert len(gpu_cases.inputs(TINY, "cpu")) == 4
    monkeypatch.setattr(gpu_cases, "INPUT_BYTES", 4 * size - 1)
    first, second = gpu_cases.inputs(TINY, "cpu")
    assert first.shape == second.shape == (5, 3, 8) and not torch.equal(first, second)


def test_packed_inputs_have_the_lengths_of_the_case_in_its_order():
    first, second = gpu_cases.inputs(PACKED, "cpu")[:2]
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(first)
    assert lengths.tolist() == [2, 6, 1] and padded.shape == (6, 3, 8)
    assert not torch.equal(first.data, second.data)


@pytest.mark.parametrize("class_name", cases.CLASSES)
@pytest.mark.parametrize("mode", cases.MODES)
def test_a_step_takes_the_next_input_in_its_mode_and_leaves_no_gradient(class_name, mode):
    bench = gpu_cases.Bench(TINY, "cpu")
    bench.inputs = bench.inputs[:2]
    module, seen, gradients = bench.modules[class_name], [], []
    module.register_forward_pre_hook(lambda m, args: seen.append((args[0], m.training)))
    for weight in module.parameters():
        weight.register_hook(lambda gradient: gradients.append(gradient.abs().sum().item()))
    step = bench.step(class_name, mode)
    for _ in range(3):
        step()
    assert [x.data_ptr() for x, _ in seen] == [bench.inputs[i].data_ptr() for i in (0, 1, 0)]
    assert [training for _, training in seen] == [mode == "training"] * 3
    assert len(gradients) == (12 if mode == "training" else 0) and all(gradients)
    assert all(weight.grad is None for weight in module.parameters())


@pytest.mark.parametrize("case", [TINY, OTHER, PACKED], ids=str)
def test_the_gate_lets_right_results_pass(case):
    assert gpu_cases.failure(case, "cpu") is None


def test_the_gate_stops_wrong_results(monkeypatch):
    monkeypatch.setitem(cases.CLASSES, "fastrnn", WrongWeights)
    assert gpu_cases.failure(TINY, "cpu").startswith("AssertionError: output: error")
    monkeypatch.setitem(cases.CLASSES, "fastrnn", WrongWhenLong)
    verdict = gpu_cases.failure(gpu_cases.make("fp32", "core", "", T=70, B=2, H=8), "cpu")
    assert verdict.startswith("at full size: output: error") and "inference" not in verdict
    monkeypatch.setitem(cases.CLASSES, "fastrnn", lambda *sizes, **options: 1 / 0)
    assert gpu_cases.failure(TINY, "cpu") == "ZeroDivisionError: division by zero"


def test_the_gates_run_on_the_cpu_has_few_steps_but_the_whole_batch():
    def short(**sizes):
        return kind(gpu_cases.shortened(gpu_cases.make("fp32", "core", "", **sizes)))[:3]

    assert short(B=256, H=128) == (64, 256, 128)
    assert short(B=256, H=2048) == (16, 256, 2048)
    assert short(T=16) == (16, 16, 128)
    packed = gpu_cases.make("fp32", "core", "", T=512, B=3, lengths=(1, 512, 256))
    assert gpu_cases.shortened(packed).lengths == (1, 64, 32)


def test_a_red_gate_gets_no_numbers(monkeypatch):
    monkeypatch.setitem(cases.CLASSES, "fastrnn", WrongWeights)
    monkeypatch.setattr(gpu_timing, "in_turns", lambda *_: pytest.fail("measured"))
    assert gpu_timing.perform(TINY, "eager", "cpu", 0.0).keys() == {"gate"}


def test_what_raises_behind_the_gate_is_an_error_of_the_case(monkeypatch):
    monkeypatch.setattr(gpu_timing, "in_turns", lambda *_: {}[0])
    found = gpu_timing.perform(TINY, "eager", "cpu", 0.0)
    assert found == {"gate": None, "eager": {}, "error": "eager: KeyError: 0"}


def test_speed_ups_are_medians_over_pairs_of_rounds_that_take_turns(monkeypatch):
    def round_of(step, calls, device):
        turns.append((step, calls))
        wall = 10e-6 * (1 + len(turns) // 2) if step == "theirs" else 5e-6
        return wall, 8e-6 if step == "theirs" else 2e-6

    turns = []
    monkeypatch.setattr(gpu_timing, "round_of", round_of)
    monkeypatch.setattr(gpu_timing, "calls_of_round", lambda step, device: len(step))
    found = gpu_timing.in_turns({"nn_rnn": "theirs", "fastrnn": "ours"}, "cuda", 0.0)
    assert turns == [("theirs", 6), ("ours", 4)] * 5
    assert found == {
        "pairs": 5,
        "nn_rnn_us": 30.0,
        "fastrnn_us": 5.0,
        "speedup": [6.0, 4.0, 8.0],
        "nn_rnn_gpu_us": 8.0,
        "fastrnn_gpu_us": 2.0,
        "gpu_speedup": [4.0, 4.0, 4.0],
    }


def test_a_round_on_a_gpu_lies_between_events_and_synchronisations(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 6.0  # Milliseconds.

    done = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    wall, on_gpu = gpu_timing.round_of(lambda: done.append("call"), 3, "cuda")
    assert done == ["wait", "event", *["call"] * 3, "event", "wait"]
    assert on_gpu == pytest.approx(2e-3) and 0 < wall < 1


def test_a_class_that_cannot_be_captured_leaves_the_other(monkeypatch):
    def captured(step):
        made.append(step)
        if len(made) % 2:
            raise RuntimeError("no graph\nand a page of advice")
        return step

    made = []
    monkeypatch.setattr(gpu_timing, "captured", captured)
    found = gpu_timing.perform(TINY, "graph", "cpu", 0.0)
    for mode in cases.MODES:
        assert found["graph"][mode].keys() == {"nn_rnn_error", "fastrnn_us"}
        assert found["graph"][mode]["nn_rnn_error"] == "RuntimeError: no graph"
    monkeypatch.setattr(gpu_timing, "captured", lambda step: step)
    both = gpu_timing.perform(TINY, "graph", "cpu", 0.0)
    assert both["graph"]["training"]["speedup"][0] > 0 and "gate" not in both
    assert gpu_timing.healthy(both) and not gpu_timing.healthy(found)


def test_a_process_that_dies_hangs_or_is_not_healthy_is_replaced(monkeypatch):
    worker = Worker("gpu_timing:Runner")
    args = gpu.parse(["--quick", "--device", "cpu"])
    try:
        first = worker.ask("machine", "cpu")
        assert first["gpu"] is None and first["build"]["torch"]
        # A graph cannot be captured without a GPU: both classes fail, and the process is not kept.
        found = gpu.ask(worker, args, TINY, "graph", 120)
        assert "nn_rnn_error" in found["graph"]["training"] and worker._process is None
        with pytest.raises(TimeoutError):
            worker.ask("perform", TINY, "eager", "cpu", 600.0, limit=0.2)
        assert worker._process is None
        found = gpu.ask(worker, args, TINY, "eager", 120)
        assert found["eager"]["training"]["speedup"][0] > 0 and worker._process is not None
        worker._process.kill()
        with pytest.raises(ChildProcessError, match="exit code -9"):
            worker.ask("machine", "cpu")
    finally:
        worker.close()


def test_the_budget_ends_the_measurements_and_tells_what_is_missing():
    clock = FakeClock()
    ask = answers(clock, seconds=25)
    found = measured(ask, clock, minutes=1)
    assert [limit for *_, limit in ask.asked] == [60, 35, 10]
    assert [case["name"] for case in found["cases"]] == [TINY.name, OTHER.name]
    assert found["not_measured"] == [f"{OTHER.name} (graph)"]
    assert measured(answers(clock), clock)["not_measured"] == []
    nothing = measured(answers(clock), clock, minutes=0)
    assert (nothing["cases"], len(nothing["not_measured"])) == ([], 4)


def test_a_task_that_hangs_is_an_error_but_one_cut_by_the_budget_is_not():
    clock = FakeClock()
    found = measured(answers(clock, TimeoutError("no answer")), clock, minutes=60)
    assert [case["error"] for case in found["cases"]] == ["eager: no answer", None]
    found = measured(answers(clock, GOOD, TimeoutError("no answer")), clock, minutes=1)
    assert [case["name"] for case in found["cases"]] == [TINY.name]
    assert len(found["not_measured"]) == 3


def test_a_case_that_went_wrong_has_no_graph_and_the_others_go_on():
    clock = FakeClock()
    ask = answers(clock, {"gate": "output: wrong"}, ChildProcessError("exit code -11"), GOOD)
    found = measured(ask, clock, cases=(TINY, OTHER, PACKED))
    assert [(name, way) for name, way, _ in ask.asked] == [
        (TINY.name, "eager"), (OTHER.name, "eager"), (PACKED.name, "eager"), (PACKED.name, "graph")
    ]  # fmt: skip
    gates = [(case["gate"], case["error"]) for case in found["cases"]]
    assert gates == [("output: wrong", None), ("not run", "eager: exit code -11"), (None, None)]
