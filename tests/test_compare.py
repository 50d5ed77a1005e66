# SPDX-License-Identifier: Apache-2.0
"""The studies of run.py: order, ratios, results, tables and figures.

Where no processes are needed, workers are made up. Nothing looks at how large a time is.
"""

import json
import platform
from typing import ClassVar

import cases
import plots
import pytest
import report
import run
import table
import timing
from cases import BUSY, CASES, MODES, SCALING
from peers import PEERS


class FakeWorker:
    """Answers at once, with a time that depends on its peer and threads alone."""

    log: ClassVar = []
    times: ClassVar = {"fastrnn": 2e-6, "nn_rnn": 8e-6}

    def __init__(self, name, threads):
        self.name, self.threads = name, threads

    def ask(self, method, *arguments):
        if method == "load":
            return {"calls": 4}
        if method in ("burst", "mean"):
            self.log.append((self.name, self.threads))
            return self.times.get(self.name, 4e-6) / self.threads
        if method == "peak":
            return 100 if self.name == "fastrnn" else 400
        return None

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    """run.py with workers that measure nothing, and every peer as if installed."""
    monkeypatch.setattr(run, "start", FakeWorker)
    monkeypatch.setattr(FakeWorker, "log", [])
    for peer in PEERS.values():
        monkeypatch.setattr(type(peer), "missing", lambda self: None)
    return FakeWorker


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The results of a quick run of the smallest case, with processes."""
    path = tmp_path_factory.mktemp("results") / "new" / "bench.json"
    options = ["--quick", "--only", "tiny", "--threads", "1", "--output", str(path)]
    assert run.main(["bench", *options]) == 0
    return report.load(path)


def study(tmp_path, *options, name="peers"):
    path = tmp_path / f"{name}.json"
    status = run.main([name, "--seconds", "0", "--output", str(path), *options])
    return status, report.load(path)


def rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_every_worker_has_one_burst_in_each_round_in_a_new_order(fake):
    rounds, failed = run.in_turns({name: FakeWorker(name, 1) for name in PEERS}, seconds=0.0)
    assert {len(of_worker) for of_worker in rounds.values()} == {timing.MIN_ROUNDS}
    orders = [fake.log[i : i + len(PEERS)] for i in range(0, len(fake.log), len(PEERS))]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert orders[0] != orders[1] and not failed


def test_a_worker_that_fails_has_no_further_rounds(fake, monkeypatch, tmp_path):
    def ask(self, method, *arguments):
        if method == "burst" and self.name == "nn_rnn":
            raise ChildProcessError("the process ended")
        return ask_before(self, method, *arguments)

    ask_before = fake.ask
    monkeypatch.setattr(fake, "ask", ask)
    status, found = study(tmp_path, "--only", "tiny", "--peers", "nn_rnn", "--threads", "1")
    mode = found["cases"][0]["modes"]["inference"]
    assert status == 0 and mode["us"] == {"fastrnn@1": 2} and mode["ratio"] == {}
    assert mode["not_run"] == {"nn_rnn@1": "ChildProcessError: the process ended"}


def test_a_time_is_a_median_and_a_ratio_is_of_the_same_rounds():
    rounds = {
        "fastrnn@1": [2e-6, 4e-6, 9e-6],
        "fastrnn@2": [3e-6, 9e-6, 9e-6],
        "nn_rnn@1": [8e-6, 40e-6, 9e-6],
        "onednn@2": [2e-6, 2e-6, 9e-6],
    }
    assert run.summary(rounds) == {
        "rounds": 3,
        "us": {"fastrnn@1": 4, "fastrnn@2": 9, "nn_rnn@1": 9, "onednn@2": 2},
        "fastest": {"fastrnn": "fastrnn@1", "nn_rnn": "nn_rnn@1", "peer": "onednn@2"},
        # 4, 10 and 1; 1, 0.5 and 1.
        "ratio": {"nn_rnn": [4, 2.5, 7], "peer": [1, 0.75, 1]},
    }


def test_what_was_not_run_is_in_the_results_with_its_reason(fake, tmp_path, capsys):
    _, found = study(tmp_path, "--only", "float64", "--threads", "1")
    reasons = found["cases"][0]["modes"]["training"]["not_run"]
    assert reasons["openvino"] == "no training" and reasons["onednn"] == "no float64"
    text = capsys.readouterr().out
    assert "- oneDNN: no float64 (float64 inference, float64 training)" in text


def test_a_peer_that_is_not_installed_is_reported(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(type(PEERS["jax_scan"]), "missing", lambda self: "not installed: jax")
    status, found = study(tmp_path, "--only", "tiny", "--threads", "1")
    assert status == 0
    assert found["not_installed"] == {"jax_scan": "not installed: jax"}
    assert "- JAX scan: not installed: jax" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"), [("peers", "| wrong |"), ("bench", "| wrong results |"), ("busy", "|  |  |")]
)
def test_wrong_results_are_told_not_timed_and_have_an_exit_status(
    name, said, fake, tmp_path, monkeypatch, capsys
):
    def ask(self, method, *arguments):
        wrong = method == "load" and self.name == "nn_rnn"
        return {"wrong": "output: error"} if wrong else ask_before(self, method, *arguments)

    ask_before = fake.ask
    monkeypatch.setattr(fake, "ask", ask)
    options = ["--only", "medium-64", "--peers", "nn_rnn", "--threads", "1"]
    status, found = study(tmp_path, *options, name=name)
    assert status == 1
    assert found["cases"][0]["modes"]["training"]["wrong"] == {"nn_rnn@1": "output: error"}
    assert ("nn_rnn", 1) not in fake.log
    printed = capsys.readouterr()
    assert said in printed.out and "WRONG: nn_rnn@1" in printed.err


def test_results_tell_where_and_how_they_were_measured(measured):
    assert measured["study"] == "bench" and measured["device"] == "cpu"
    assert measured["threads"] == [1] and measured["settings"]["quick"] is True
    assert measured["complete"] is False
    assert measured["machine"]["cpu"] and measured["machine"]["cores"]["usable"] >= 1
    assert measured["machine"]["capability"]["fastrnn"] in ("default", "avx2", "avx512")
    text = json.dumps(measured)
    assert '"/' not in text and json.dumps(platform.node()) not in text


def test_results_have_the_time_and_the_memory_of_both_classes_in_both_modes(measured):
    (case,) = measured["cases"]
    assert cases.from_spec(case["spec"]).T == cases.by_name("tiny").T
    for mode in MODES:
        numbers = case["modes"][mode]
        assert numbers["rounds"] >= timing.MIN_ROUNDS
        for key in ("us", "peak_bytes"):
            assert numbers[key].keys() == {"fastrnn@1", "nn_rnn@1"}
            assert all(value > 0 for value in numbers[key].values())
        middle, lower, upper = numbers["ratio"]["nn_rnn"]
        assert 0 < lower <= middle <= upper
    inference, training = (case["modes"][mode]["peak_bytes"] for mode in MODES)
    assert all(training[who] > inference[who] for who in training)


def test_only_all_peers_and_cases_are_complete(fake, tmp_path):
    status, found = study(tmp_path)
    assert status == 0 and found["complete"] is True
    assert len(found["cases"]) == len(CASES)
    assert study(tmp_path, "--peers", "nn_rnn")[1]["complete"] is False
    assert study(tmp_path, "--only", "tiny")[1]["complete"] is False


def test_a_stop_leaves_the_modes_before_it_and_the_results_of_an_earlier_run(
    fake, tmp_path, monkeypatch
):
    def ask(self, method, *arguments):
        if method == "load" and arguments[1] == "training":
            raise KeyboardInterrupt
        return ask_before(self, method, *arguments)

    _, before = study(tmp_path, "--only", "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["peers.json"]
    ask_before = fake.ask
    monkeypatch.setattr(fake, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, "--only", "tiny")
    left, kept = (report.load(tmp_path / f"peers.{end}") for end in ("unfinished", "json"))
    assert list(left["cases"][0]["modes"]) == ["inference"] and kept == before


def test_an_unknown_peer_or_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["peers", "--peers", "no_such_peer"])
    assert "no peer no_such_peer" in capsys.readouterr().err
    assert run.main(["bench", "--only", "no such case"]) == 2


def test_every_row_of_the_tables_of_peers_has_every_column(fake, tmp_path):
    lines = rows(table.render(study(tmp_path)[1]))
    # Tables of busy cores and of the machine's limits may follow.
    inference, training = (lines[i * (len(CASES) + 2) :][: len(CASES) + 2] for i in (0, 1))
    for of_mode in (inference, training):
        assert len({row.count("|") for row in of_mode}) == 1
    assert "ONNX Runtime" in inference[0] and "ONNX Runtime" not in training[0]


def test_a_cell_has_the_better_number_of_threads():
    mode = {"us": {"onednn@1": 30.0, "onednn@2": 20.0, "nn_rnn@1": 5.0}}
    assert table.cell(mode, "onednn") == "20 µs @2" and table.cell(mode, "openvino") == "–"
    assert table.cell({**mode, "wrong": {"onednn@1": "output"}}, "onednn") == "wrong"


def test_the_summary_counts_losses():
    def case(ratio):
        return {"modes": {"inference": {"ratio": {"nn_rnn": [8.0], "peer": [ratio]}}}}

    text = table.summary([case(0.5), case(8.0)], "inference")
    assert "8.00 against nn.RNN, 2.00 against" in text and "faster in 1 of 2" in text


def test_the_study_of_scaling_varies_one_number():
    assert len({case.name for case in SCALING}) == len(SCALING)
    for case in SCALING:
        found = {name: getattr(case, name) for name in cases.COMMON}
        assert sum(found[name] != cases.COMMON[name] for name in found) == (case.name != "base")
        assert case.I == case.H
    assert all(cases.COMMON[name] in values for name, values in cases.VARIED.items())


def test_the_study_of_scaling_is_read_as_series(fake, tmp_path):
    _, found = study(tmp_path, name="scaling")
    assert found["complete"] is True
    for varied, values in cases.VARIED.items():
        assert [value for value, _ in plots.series(found, varied)] == values


def test_the_study_of_busy_cores_takes_turns_beside_each_number_of_processes_and_after_rests(
    fake, tmp_path
):
    _, found = study(tmp_path, "--threads", "1,2", name="busy")
    assert found["complete"] is True and found["settings"]["busy"] == [0, 1, 2]
    us = found["cases"][0]["modes"]["training"]["us"]
    assert list(us) == ["0", "1", "2", "apart"]
    assert us["1"]["nn_rnn@2"] == 4 and us["apart"]["fastrnn@1"] == 2
    assert len(fake.log) == len(BUSY) * len(MODES) * 4 * run.TURNS * 4
    lines = rows(table.render(found))
    assert len(lines) == 2 + len(BUSY) * len(MODES)
    assert len({line.count("|") for line in lines}) == 1
    assert f"| {', '.join(['8 µs'] * 4)} | {', '.join(['4 µs'] * 4)} |" in lines[2]


def test_busy_processes_are_busy_and_then_gone():
    with run.busy_processes(2) as processes:
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


def test_times_on_busy_cores_are_published_beside_those_of_peers(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    _, found = study(tmp_path, "--threads", "1,2")
    assert "### On busy cores" not in table.render(found)
    study(tmp_path, "--threads", "1,2", name="busy")
    assert "### On busy cores" in table.render(found)
    study(tmp_path, "--quick", "--threads", "1,2", name="busy")
    assert "### On busy cores" not in table.render(found)


def test_figures_are_the_same_bytes_again(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    for name in ("peers", "scaling"):
        study(tmp_path / "results", "--threads", "1,2", name=name)
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert plots.main(["--output", str(folder)]) == 0
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0]) == ["scaling.svg", "speedups.svg"]
    assert all(b"<svg" in figure and b"dc:date" not in figure for figure in drawn[0].values())


def test_without_results_nothing_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert plots.main(["--output", str(tmp_path / "figures")]) == 0
    assert not (tmp_path / "figures").exists()
    assert "no complete results of peers" in capsys.readouterr().err
