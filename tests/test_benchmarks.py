# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say, and publish nothing that is wrong or out of date.

No test here looks at how large a time or a speed-up is.
"""

import copy
import json
import platform

import cases
import gate
import pytest
import report
import table
import timing
import torch

import fastrnn

TINY = cases.by_name("tiny")
SMALL = cases.BenchmarkCase(5, 3, 4, 7, name="small", reason="")
PACKED = cases.BenchmarkCase(0, 0, 3, 5, lengths=(2, 6, 1), name="packed", reason="")
HALF = cases.BenchmarkCase(5, 3, 4, 7, dtype=torch.float16, name="half", reason="")
PAGE = "# title\n\n<!-- {0}:begin -->\n<!-- {0}:end -->\n\nand more\n"
#: Results of two cases.
BENCH = {
    "study": "bench",
    "device": "cpu",
    "complete": True,
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cpu": "made up", "cores": {"usable": 1}, "capability": {"fastrnn": "avx2"}},
    "versions": {"python": "3", "torch": "2", "fastrnn": "1"},
    "commit": {"hash": "0123456789abcdef", "dirty": True},
    "threads": [1],
    "cases": [
        {
            "spec": cases.by_name(name).spec(),
            "modes": {
                mode: {
                    "us": {"nn_rnn@1": 1500.4, "fastrnn@1": 2000.0},
                    "ratio": {"nn_rnn": [0.7512, 0.7, 0.8]},
                    "peak_bytes": {"nn_rnn@1": 400, "fastrnn@1": 100},
                }
                for mode in cases.MODES
            },
        }
        for name in ("tiny", "packed")
    ],
}


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


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A folder of results with one complete report; a README and the page of all cases."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "HEADLINE", (TINY.name,))
    save("first")
    readme, performance = (tmp_path / name for name in ("README.md", "performance.md"))
    readme.write_text(PAGE.format("benchmark"), encoding="utf-8")
    both = PAGE.format("nn-rnn") + PAGE.format("benchmark")
    performance.write_text(both, encoding="utf-8")
    return readme, performance


def save(name, **changes):
    report.write(report.RESULTS / f"{name}.json", {**BENCH, **changes})


def write_tables(pages, *options):
    readme, performance = map(str, pages)
    return table.main([*options, "--readme", readme, "--performance", performance])


def text_of(pages):
    return [page.read_text(encoding="utf-8") for page in pages]


def differences(module, case):
    """What the gate says of everything that a module computes."""
    theirs, exact = (
        gate.results(case.module(torch.nn.RNN, case.dtype).to(dtype), case)
        for dtype in (case.dtype, torch.float64)
    )
    try:
        gate.assert_right(gate.results(module, case), theirs, exact, case)
    except AssertionError as error:
        return str(error)
    return ""


def test_no_two_cases_are_the_same_call_or_have_one_name():
    assert len({(str(case), case.dtype) for case in cases.CASES}) == len(cases.CASES)
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    assert all(case.reason for case in cases.CASES)


def test_a_case_is_read_from_what_is_written_of_it():
    for case in [*cases.CASES, *cases.SCALING]:
        read = cases.from_spec(json.loads(json.dumps(case.spec())))
        assert (str(read), read.dtype, read.name) == (str(case), case.dtype, case.name)
    assert TINY.spec() == {"name": "tiny", "T": 9, "B": 1, "I": 1, "H": 1}


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


@pytest.mark.parametrize("case", [TINY, SMALL, PACKED, HALF], ids=str)
def test_the_gate_lets_right_results_pass(case):
    assert not differences(case.module(fastrnn.RNN, case.dtype), case)


@pytest.mark.parametrize(
    ("cls", "said", "not_said"),
    [
        (WrongWeights, "output: error", "nothing"),
        (WrongGradient, "grad_weight_hh_l0: error", "output"),
        (WrongInference, "inference_output: error", "grad"),
    ],
)
def test_the_gate_names_what_is_wrong(cls, said, not_said):
    found = differences(SMALL.module(cls, SMALL.dtype), SMALL)
    assert said in found and not_said not in found


def test_the_gate_compares_packed_sequences():
    assert "output" in differences(PACKED.module(WrongWeights, PACKED.dtype), PACKED)


def test_gradients_of_many_relus_have_room_for_the_kink():
    case = cases.parse_shape("10,100,2,1000,nonlinearity=relu")
    exact = {"output": torch.ones(100), "grad_weight_ih_l0": torch.ones(100)}

    def off(name, error):
        return {**exact, name: exact[name] + error}

    gate.assert_right(off("grad_weight_ih_l0", 1e-3), exact, exact, case)
    for name, error in (("grad_weight_ih_l0", 1e-2), ("output", 1e-3)):
        with pytest.raises(AssertionError, match=name):
            gate.assert_right(off(name, error), exact, exact, case)
    with pytest.raises(AssertionError, match="grad_weight_ih_l0"):
        tanh = cases.parse_shape("10,100,2,1000")
        gate.assert_right(off("grad_weight_ih_l0", 1e-3), exact, exact, tanh)


def test_a_median_stands_before_its_quartiles():
    assert timing.median([4.0, 1.0, 2.0, 3.0, 5.0]) == [3, 2, 4]
    assert timing.ratios([4.0, 9.0], [2.0, 3.0]) == [2, 3]


def test_a_round_has_enough_calls_and_a_burst_is_warm(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "round_of", lambda step, calls: 1e-3)
    assert timing.calls_of_round(lambda: None) == 16
    monkeypatch.undo()
    assert timing.burst(lambda: calls.append(1), 3, warm_up=False) > 0 and len(calls) == 3
    timing.burst(lambda: calls.append(1), 3)
    assert len(calls) > 3 + 3


def test_peak_memory_counts_the_output_and_not_what_was_there_before():
    case = cases.BenchmarkCase(50, 8, 16, 32, name="", reason="")
    output = 50 * 8 * 32 * 4
    for class_name in cases.CLASSES:
        # nn.RNN also holds the input's product and every step by itself: as much again, twice.
        assert output <= timing.peak(case, class_name, "inference") < 4 * output


def test_peak_memory_is_the_same_again():
    first = timing.peak(TINY, "fastrnn", "training")
    assert timing.peak(TINY, "fastrnn", "training") == first


def test_json_has_a_line_for_what_fits_into_one():
    value = {"a": [1, {"b": None}], "c": {"µ": "x" * report.WIDTH}, "d": [{}, []]}
    text = report.dumps(value)
    assert json.loads(text) == value
    assert text.splitlines()[:2] == ["{", ' "a": [1, {"b": null}],'] and len(text.splitlines()) == 7


def test_results_have_one_file_for_each_study_and_machine():
    found = report.describe("bench", [1], {})
    found["machine"] |= {"cpu": "A (R) CPU", "cores": {"usable": 2}}
    assert report.default_path(found, False).name == "bench-a-r-cpu-2-cores.json"
    assert report.default_path(found, True).name == "bench-a-r-cpu-2-cores-part.json"


def test_committed_results_are_small_and_name_neither_path_nor_host():
    paths = [*report.RESULTS.glob("*.json")]
    assert sum(path.stat().st_size for path in paths) < 200_000
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert '"/' not in text and json.dumps(platform.node()) not in text
        assert report.dumps(json.loads(text)) + "\n" == text


def test_texts_for_the_json_name_neither_folders_nor_the_host():
    text = f"{report.ROOT}/csrc/a.cpp: -I/opt/x/include /usr/bin/nvcc, on {platform.node()}."
    assert report.without_paths({"a": [text, 1]}) == {
        "a": ["csrc/a.cpp: -I…/include …/nvcc, on <host>.", 1]
    }
    harmless = "tests/test_a.py::test_b 1/2 a / b // c"
    assert report.without_paths(harmless) == harmless


def test_the_table_has_every_column_tells_losses_and_memory_as_a_ratio():
    lines = [line for line in table.render(BENCH).splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2] == ("| (9, 1, 1, 1) |  | 1.5 ms | 2 ms | 0.75 | 1.5 ms | 2 ms | 0.75 | 0.25 |")
    assert "| packed, lengths 10 to 100 |" in lines[3]


def test_the_table_tells_what_is_special_in_a_case():
    case = cases.parse_shape("1,2,3,4,dtype=bfloat16,num_layers=2,lengths=3:1,batch_first=1")
    assert table.extras(case) == "bfloat16, 2 layers, batch_first, packed, lengths 1 to 3"


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0.5, "0.5 µs"), (12.345, "12.3 µs"), (999.4, "999 µs"), (999.6, "1 ms"), (2.5e6, "2.5 s")],
)
def test_durations_have_three_digits_and_a_unit(microseconds, text):
    assert table.duration(microseconds) == text


def test_tables_are_written_between_the_marks_and_then_found_up_to_date(pages):
    assert write_tables(pages, "--check") == 1
    assert text_of(pages)[0] == PAGE.format("benchmark")
    assert write_tables(pages) == 0 == write_tables(pages, "--check")
    readme, performance = text_of(pages)
    assert readme.startswith("# title\n\n") and readme.endswith("\n\nand more\n")
    # The README has the case of the headline alone.
    assert readme.count("\n| (") == 2 and performance.count("\n| (") == 3
    assert "commit 0123456789 with changes; 2026-01-02" in readme


def test_a_table_edited_by_hand_is_out_of_date(pages):
    write_tables(pages)
    for page, text in zip(pages, text_of(pages), strict=True):
        page.write_text(text.replace("ms", "s"), encoding="utf-8")
        assert write_tables(pages, "--check") == 1
        page.write_text(text, encoding="utf-8")
    assert write_tables(pages, "--check") == 0


def test_a_table_of_older_results_is_out_of_date(pages):
    write_tables(pages)
    changed = copy.deepcopy(BENCH["cases"])
    changed[0]["modes"]["training"]["us"]["fastrnn@1"] = 77.0
    save("a name before", date="2999-01-01", cases=changed)
    assert write_tables(pages, "--check") == 1
    write_tables(pages)
    assert all("77 µs" in text for text in text_of(pages))


def test_incomplete_results_are_published_only_if_named(pages):
    save("incomplete", date="2999-01-01", complete=False)
    write_tables(pages)
    assert "2999" not in "".join(text_of(pages))
    write_tables(pages, "--json", str(report.RESULTS / "incomplete.json"))
    assert all("2999" in text for text in text_of(pages))


def test_without_results_pages_have_no_table(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "none")
    assert write_tables(pages, "--check") == 0


def test_a_page_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="one line <!-- benchmark:begin -->"):
        table.updated("# title\n", "benchmark", None)


def test_the_readme_has_some_of_the_cases():
    assert set(table.HEADLINE) < {case.name for case in cases.CASES}


def test_the_tables_of_the_pages_are_those_of_the_newest_committed_results():
    assert table.main(["--check"]) == 0
