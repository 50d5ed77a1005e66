# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say, and publish nothing that is wrong or out of date.

No test here looks at how large a time or a speed-up is.
"""

import copy
import json
import math
import platform
from pathlib import Path

import cases
import gate
import memory
import pytest
import run
import table
import test_speed
import timing
import torch

import fastrnn

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"

TINY = cases.by_name("tiny")
README = f"# title\n\n{table.BEGIN}\n{table.END}\n\nand more\n"


class WrongWeights(fastrnn.RNN):
    """Works with weights that are off by one part in a thousand."""

    def forward(self, input, hx=None):
        return fastrnn.functional.rnn(input, [w * 1.001 for w in self.parameters()], hx)


class WrongGradient(fastrnn.RNN):
    """Has gradients of the weights that are off by one part in a thousand."""

    def forward(self, input, hx=None):
        weights = [w.clone() for w in self.parameters()]
        for weight in weights if torch.is_grad_enabled() else ():
            weight.register_hook(lambda gradient: gradient * 1.001)
        return fastrnn.functional.rnn(input, weights, hx)


class WrongInference(fastrnn.RNN):
    """Is right only where gradients are recorded."""

    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return (output, h_n) if torch.is_grad_enabled() else (output * 1.001, h_n)


class Broken(fastrnn.RNN):
    def forward(self, input, hx=None):
        raise RuntimeError("made up by the test")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The results of a quick run of the smallest case."""
    path = tmp_path_factory.mktemp("results") / "new" / "results.json"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        # Without a new process: the test of that is below.
        patch.setattr(memory, "peak_in_own_process", memory.peak)
        options = ["--quick", "--only", "tiny", "--threads", "1", "--output", str(path)]
        assert run.main(options) == 0
    torch.set_num_threads(threads)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def results(report, tmp_path, monkeypatch):
    """A folder of results, in place of the committed ones, with one complete report."""
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "HEADLINE", (TINY.name,))
    save({**report, "complete": True}, "first")
    return table.RESULTS


@pytest.fixture
def readme(tmp_path):
    """A README and, beside it, the page of all cases, each with a place for its table."""
    path = tmp_path / "README.md"
    path.write_text(README, encoding="utf-8")
    begin, end = table.ALL_CASES
    path.with_name("performance.md").write_text(f"{begin}\n{end}\n", encoding="utf-8")
    return path


def write_tables(readme, *options):
    performance = readme.with_name("performance.md")
    return table.main([*options, "--readme", str(readme), "--performance", str(performance)])


def save(report, name):
    run.write(table.RESULTS / f"{name}.json", report)


def with_numbers(report, mode, **numbers):
    """A copy of the report in which one case's numbers are these."""
    changed = copy.deepcopy(report)
    changed["cases"][0]["modes"][mode].update(numbers)
    return changed


def test_names_of_cases_are_unique():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)


def test_every_case_has_a_reason():
    assert all(case.reason for case in cases.CASES)


def test_no_two_cases_are_the_same_call():
    calls = {(str(case), case.dtype) for case in cases.CASES}
    assert len(calls) == len(cases.CASES)


@pytest.mark.parametrize("class_name", cases.CLASSES)
def test_a_training_step_computes_all_gradients_and_leaves_none(class_name, monkeypatch):
    seen = []

    def spy(module, set_to_none):
        seen.append({name: p.grad for name, p in module.named_parameters()})
        zero_grad(module, set_to_none)
        seen.append([p.grad for p in module.parameters()])

    zero_grad = torch.nn.Module.zero_grad
    monkeypatch.setattr(torch.nn.Module, "zero_grad", spy)
    TINY.step(class_name, "training")()
    gradients, left = seen
    assert len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert left == [None] * 4


@pytest.mark.parametrize("name", ["tiny", "small", "float16"])
def test_the_gate_lets_right_results_pass(name):
    assert gate.failure(cases.by_name(name)) is None


def test_the_gate_compares_packed_sequences():
    case = cases.BenchmarkCase(0, 0, 3, 5, lengths=(2, 6, 1), name="", reason="")
    assert gate.failure(case) is None
    assert "output" in gate.failure(case, WrongWeights)


@pytest.mark.parametrize("wrong", [WrongWeights, WrongGradient, WrongInference, Broken])
def test_the_gate_stops_wrong_results(wrong):
    assert gate.failure(cases.by_name("small"), wrong)


def test_the_gate_names_what_is_wrong():
    small = cases.by_name("small")
    failure = gate.failure(small, WrongGradient)
    assert "grad_weight_hh_l0: error" in failure and "output" not in failure
    failure = gate.failure(small, WrongInference)
    assert "inference_output: error" in failure and "grad" not in failure
    assert gate.failure(small, Broken) == "RuntimeError: made up by the test"


@pytest.mark.parametrize("mode", cases.MODES)
def test_times_are_finite_and_positive(mode):
    timed = timing.measure(TINY, mode, seconds=0.0)
    lower, upper = timed.speedup_quartiles
    times = [timed.nn_rnn, timed.fastrnn, lower, timed.speedup, upper]
    assert all(math.isfinite(time) and time > 0 for time in times)
    assert lower <= timed.speedup <= upper
    assert timed.pairs == timing.MIN_PAIRS


def test_rounds_of_the_classes_take_turns(monkeypatch):
    turns = []

    def step(case, class_name, mode):
        return lambda: turns.append(class_name)

    monkeypatch.setattr(cases.BenchmarkCase, "step", step)
    monkeypatch.setattr(timing, "calls_of_round", lambda step: 2)
    timing.measure(TINY, "training", seconds=0.0)
    assert turns == (["nn_rnn"] * 2 + ["fastrnn"] * 2) * timing.MIN_PAIRS


def test_peak_memory_counts_the_output_and_not_what_was_there_before():
    case = cases.BenchmarkCase(50, 8, 16, 32, name="", reason="")
    output = 50 * 8 * 32 * 4
    for class_name in cases.CLASSES:
        # nn.RNN also holds the input's product and every step by itself: as much again, twice.
        assert output <= memory.peak(case, class_name, "inference") < 4 * output


def test_peak_memory_of_training_is_more_than_of_inference(report):
    inference, training = (report["cases"][0]["modes"][mode] for mode in cases.MODES)
    for class_name in cases.CLASSES:
        name = f"{class_name}_peak_bytes"
        assert training[name] > inference[name]


def test_peak_memory_is_the_same_again_and_in_a_process_of_its_own():
    first = memory.peak(TINY, "fastrnn", "training")
    assert memory.peak(TINY, "fastrnn", "training") == first
    assert memory.peak_in_own_process(TINY, "fastrnn", "training") == first


def test_results_tell_the_machine_the_versions_and_the_settings(report):
    assert report["machine"]["cpu"]
    assert report["machine"]["capability"]["fastrnn"] in ("default", "avx2", "avx512")
    assert report["machine"]["cores"]["usable"] >= 1
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["fastrnn"] == fastrnn.__version__
    assert report["threads"] == 1
    assert report["settings"]["quick"] is True


def test_results_name_neither_path_nor_host(report):
    text = json.dumps(report)
    assert '"/' not in text
    assert json.dumps(platform.node()) not in text


def test_results_hold_the_numbers_of_both_classes_in_both_modes(report):
    (case,) = report["cases"]
    assert case["spec"]["name"] == "tiny"
    assert case["gate"] is None
    for mode in cases.MODES:
        numbers = case["modes"][mode]
        names = ["nn_rnn_us", "fastrnn_us", "speedup", "nn_rnn_peak_bytes", "fastrnn_peak_bytes"]
        assert all(numbers[name] > 0 for name in names)
        assert len(numbers["speedup_quartiles"]) == 2


def test_results_of_some_cases_are_not_complete(report):
    assert report["complete"] is False


def test_results_of_some_cases_have_a_file_of_their_own(report):
    whole, part = (run.default_path(report, run.parse(o)).name for o in ([], ["--only", "tiny"]))
    assert f"-1-threads-{report['date'][:10]}.json" in whole
    assert part == whole.replace(".json", "-part.json")


def test_wrong_results_get_no_speed_up_and_an_exit_status(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gate, "failure", lambda case: "output: wrong")
    path = tmp_path / "results.json"
    threads = str(torch.get_num_threads())
    assert run.main(["--only", "tiny", "--threads", threads, "--output", str(path)]) == 1
    (case,) = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert (case["gate"], case["modes"]) == ("output: wrong", {})
    assert "wrong results" in capsys.readouterr().out


@pytest.fixture
def two_cases(monkeypatch):
    """Names of two cases, in place of all, and a function that measures nothing."""
    measured = cases.CASES[:2]
    monkeypatch.setattr(run, "CASES", measured)
    monkeypatch.setattr(
        run, "measure", lambda case, seconds: {"spec": case.spec(), "gate": "made up"}
    )
    return [case.name for case in measured]


def run_all(path):
    run.main(["--threads", str(torch.get_num_threads()), "--output", str(path)])


def names_in(path):
    return [case["spec"]["name"] for case in json.loads(path.read_text(encoding="utf-8"))["cases"]]


def test_a_stop_leaves_the_cases_before_it_and_the_results_of_an_earlier_run(
    two_cases, results, monkeypatch
):
    def measure(case, seconds):
        if case.name == two_cases[1]:
            raise KeyboardInterrupt
        return measure_all(case, seconds)

    measure_all = run.measure
    monkeypatch.setattr(run, "measure", measure)
    path, before = results / "first.json", table.newest()
    with pytest.raises(KeyboardInterrupt):
        run_all(path)
    assert names_in(results / "first.unfinished") == two_cases[:1]
    assert json.loads(path.read_text(encoding="utf-8")) == before == table.newest()


def test_the_last_case_replaces_the_results_of_an_earlier_run(two_cases, results):
    path = results / "first.json"
    run_all(path)
    assert names_in(path) == two_cases and table.newest()["complete"] is True
    assert list(results.iterdir()) == [path]


def test_an_unknown_case_is_refused(capsys):
    assert run.main(["--only", "no such case"]) == 2
    assert "no case has 'no such case' in its name" in capsys.readouterr().err


def test_texts_for_the_json_name_neither_folders_nor_the_host():
    text = f"{run.ROOT}/csrc/a.cpp: -I/opt/x/include /usr/bin/nvcc, on {platform.node()}."
    assert run.without_paths({"a": [text, 1]}) == {
        "a": ["csrc/a.cpp: -I…/include …/nvcc, on <host>.", 1]
    }
    harmless = "tests/test_a.py::test_b 1/2 a / b // c"
    assert run.without_paths(harmless) == harmless


def test_every_row_of_the_table_has_every_column(report):
    text = table.render(with_numbers(report, "training"))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert {line.count("|") for line in lines} == {len(table.COLUMNS) + 1}


def test_the_table_tells_losses(report):
    changed = with_numbers(report, "inference", nn_rnn_us=1500.4, fastrnn_us=2000, speedup=0.7512)
    assert "| (9, 1, 1, 1) |  | 1.5 ms | 2 ms | 0.75 |" in table.render(changed)


def test_the_table_tells_memory_as_a_ratio(report):
    changed = with_numbers(report, "training", nn_rnn_peak_bytes=400, fastrnn_peak_bytes=100)
    assert table.render(changed).endswith("| 0.25 |")


def test_the_table_tells_what_is_special_in_a_case(report):
    changed = copy.deepcopy(report)
    changed["cases"][0]["spec"].update(dtype="bfloat16", num_layers=2, lengths=[3, 1])
    assert "| bfloat16, 2 layers, packed, lengths 1 to 3 |" in table.render(changed)


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0.5, "0.5 µs"), (12.345, "12.3 µs"), (999.4, "999 µs"), (999.6, "1 ms"), (2.5e6, "2.5 s")],
)
def test_durations_have_three_digits_and_a_unit(microseconds, text):
    assert table.duration(microseconds) == text


def test_the_table_is_written_between_the_marks_and_then_found_up_to_date(results, readme):
    assert write_tables(readme, "--check") == 1
    assert readme.read_text(encoding="utf-8") == README
    assert write_tables(readme) == 0
    text = readme.read_text(encoding="utf-8")
    assert "| (9, 1, 1, 1) |" in text
    assert text.startswith("# title\n\n") and text.endswith("\n\nand more\n")
    assert write_tables(readme, "--check") == 0


def test_a_table_out_of_date_on_either_page_is_seen(results, readme):
    performance = readme.with_name("performance.md")
    write_tables(readme)
    assert "| (9, 1, 1, 1) |" in performance.read_text(encoding="utf-8")
    for page in (readme, performance):
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace("µs", "ns"), encoding="utf-8")
        assert write_tables(readme, "--check") == 1
        page.write_text(text, encoding="utf-8")
    assert write_tables(readme, "--check") == 0


def test_the_readme_has_some_cases_alone():
    assert set(table.HEADLINE) < {case.name for case in cases.CASES}
    report = table.newest()
    lines = {names: table.render(report, names).splitlines() for names in (None, table.HEADLINE)}
    without = len(report["cases"]) - len(table.HEADLINE)
    assert len(lines[None]) - len(lines[table.HEADLINE]) == without
    assert set(lines[table.HEADLINE]) < set(lines[None])


def test_a_table_of_older_results_is_out_of_date(results, readme, report):
    write_tables(readme)
    save({**report, "complete": True, "date": "2999-01-01", "threads": 77}, "a name before")
    assert write_tables(readme, "--check") == 1
    write_tables(readme)
    assert "77 threads" in readme.read_text(encoding="utf-8")


def test_incomplete_results_are_published_only_if_named(results, readme, report):
    save({**report, "date": "2999-01-01", "threads": 77}, "incomplete")
    assert table.newest()["threads"] == 1
    write_tables(readme, str(results / "incomplete.json"))
    assert "77 threads" in readme.read_text(encoding="utf-8")


def test_without_results_the_readme_has_no_table(tmp_path, readme, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert write_tables(readme, "--check") == 0


def test_a_readme_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="one line <!-- benchmark:begin -->"):
        table.updated("# title\n", None)


def test_the_tables_are_those_of_the_newest_committed_results():
    assert table.main(["--check"]) == 0


@pytest.mark.parametrize("class_name", cases.CLASSES)
def test_the_benchmarks_of_pytest_are_grouped_by_case_and_mode(class_name):
    groups = []
    for mode in cases.MODES:

        def benchmark(step):
            step()
            groups.append(benchmark.group)

        test_speed.test_speed(benchmark, TINY, mode, class_name)
    assert groups == ["tiny inference", "tiny training"]
