# SPDX-License-Identifier: Apache-2.0
"""The comparison with other runtimes: order, ratios, results, tables and figures.

Where no processes are needed, workers are made up. Nothing looks at how large a time is.
"""

import json
import platform
from pathlib import Path
from typing import ClassVar

import busy
import busy_table
import compare
import peers_table
import plots
import pytest
import run
import scaling
import table
from cases import CASES, MODES
from peers import PEERS

ROOT = Path(__file__).resolve().parents[1]


class FakeWorker:
    """Answers at once, with a time that depends on its peer and threads alone."""

    log: ClassVar = []
    times: ClassVar = {"fastrnn": 2e-6, "nn_rnn": 8e-6}

    def __init__(self, name, threads):
        self.name, self.threads = name, threads

    def ask(self, method, *arguments):
        if method == "load":
            case, mode, _ = arguments
            reason = PEERS[self.name].unsupported(case, mode)
            return {"not_run": reason} if reason else {"calls": 4}
        if method in ("burst", "mean"):
            self.log.append((self.name, self.threads))
            return {"seconds": self.times.get(self.name, 4e-6) / self.threads}
        return None

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    """compare.py with workers that measure nothing, and every peer as if installed."""
    monkeypatch.setattr(compare, "Worker", FakeWorker)
    monkeypatch.setattr(busy, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "log", [])
    for peer in PEERS.values():
        monkeypatch.setattr(type(peer), "missing", lambda self: None)
    return FakeWorker


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The results of a quick run of the smallest case, with processes."""
    path = tmp_path_factory.mktemp("results") / "new" / "peers.json"
    options = ["--quick", "--only", "tiny", "--peers", "nn_rnn", "--threads", "1"]
    assert compare.main([*options, "--output", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def study(tmp_path, *options, main=compare.main, name="peers"):
    path = tmp_path / f"{name}.json"
    status = main(["--seconds", "0", "--output", str(path), *options])
    return status, json.loads(path.read_text(encoding="utf-8"))


def test_every_worker_has_one_burst_in_each_round_in_a_new_order(fake):
    workers = [(FakeWorker(name, 1), {}) for name in PEERS]
    rounds = compare.in_turns(workers, seconds=0.0)
    assert {len(of_worker) for of_worker in rounds} == {compare.MIN_ROUNDS}
    orders = [fake.log[i : i + len(PEERS)] for i in range(0, len(fake.log), len(PEERS))]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert orders[0] != orders[1]


def test_a_worker_that_fails_has_no_further_rounds(fake, monkeypatch, tmp_path):
    def ask(self, method, *arguments):
        if method == "burst" and self.name == "nn_rnn":
            raise ChildProcessError("the process ended")
        return ask_before(self, method, *arguments)

    ask_before = fake.ask
    monkeypatch.setattr(fake, "ask", ask)
    status, report = study(tmp_path, "--only", "tiny", "--peers", "nn_rnn", "--threads", "1")
    ours, theirs = report["cases"][0]["modes"]["inference"]["results"]
    assert status == 0 and ours["us"] == 2
    assert theirs["not_run"] == "ChildProcessError: the process ended" and "us" not in theirs


def test_ratios_are_of_the_same_round_and_number_of_threads(fake, tmp_path):
    _, report = study(tmp_path, "--only", "tiny", "--peers", "nn_rnn,onednn", "--threads", "2,1")
    assert report["threads"] == [1, 2]
    mode = report["cases"][0]["modes"]["inference"]
    found = {(r["peer"], r["threads"]): r for r in mode["results"]}
    assert found["fastrnn", 2]["us"] == 1 and "ratio" not in found["fastrnn", 2]
    assert (found["nn_rnn", 1]["us"], found["nn_rnn", 1]["ratio"]) == (8, 4)
    assert found["onednn", 2]["ratio_quartiles"] == [2, 2]
    best = mode["best"]
    assert best["fastrnn"] == {"threads": 2, "us": 1}
    assert (best["nn_rnn"]["ratio"], best["nn_rnn"]["threads"]) == (4, 2)
    assert (best["peer"]["name"], best["peer"]["ratio"]) == ("onednn", 2)


def test_what_was_not_run_is_in_the_results_with_its_reason(fake, tmp_path, capsys):
    _, report = study(tmp_path, "--only", "float64", "--threads", "1")
    mode = report["cases"][0]["modes"]["training"]
    reasons = {r["peer"]: r["not_run"] for r in mode["results"] if "not_run" in r}
    assert reasons["openvino"] == "no training" and reasons["onednn"] == "no float64"
    text = capsys.readouterr().out
    assert "- oneDNN: no float64 (float64 inference, float64 training)" in text


def test_a_peer_that_is_not_installed_is_reported(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(type(PEERS["jax_scan"]), "missing", lambda self: "not installed: jax")
    status, report = study(tmp_path, "--only", "tiny", "--threads", "1")
    assert status == 0
    assert report["not_installed"] == {"jax_scan": "not installed: jax"}
    assert "- JAX scan: not installed: jax" in capsys.readouterr().out


def test_wrong_results_are_told_and_have_an_exit_status(fake, tmp_path, monkeypatch, capsys):
    def ask(self, method, *arguments):
        wrong = method == "load" and self.name == "nn_rnn"
        return {"wrong": "output: error"} if wrong else ask_before(self, method, *arguments)

    ask_before = fake.ask
    monkeypatch.setattr(fake, "ask", ask)
    status, report = study(tmp_path, "--only", "tiny", "--peers", "nn_rnn")
    assert status == 1
    assert "peer" not in report["cases"][0]["modes"]["training"]["best"]
    printed = capsys.readouterr()
    assert "| wrong |" in printed.out and "WRONG: nn_rnn@1" in printed.err


def test_results_tell_where_and_how_they_were_measured(measured):
    assert measured["study"] == "peers" and measured["device"] == "cpu"
    assert measured["threads"] == [1]
    assert measured["settings"]["peers"] == ["fastrnn", "nn_rnn"]
    assert measured["complete"] is False
    text = json.dumps(measured)
    assert '"/' not in text and json.dumps(platform.node()) not in text
    for mode in MODES:
        numbers = measured["cases"][0]["modes"][mode]
        assert numbers["rounds"] >= compare.MIN_ROUNDS
        assert all(r["us"] > 0 and len(r["us_quartiles"]) == 2 for r in numbers["results"])


def test_only_all_peers_and_cases_are_complete(fake, tmp_path):
    status, report = study(tmp_path)
    assert status == 0 and report["complete"] is True
    assert len(report["cases"]) == len(CASES)
    assert study(tmp_path, "--peers", "nn_rnn")[1]["complete"] is False


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
    left, kept = (
        json.loads((tmp_path / f"peers.{end}").read_text(encoding="utf-8"))
        for end in ("unfinished", "json")
    )
    assert list(left["cases"][0]["modes"]) == ["inference"] and kept == before


def test_results_have_a_file_for_the_machine_the_threads_and_the_day(monkeypatch):
    args = compare.parse([], list(PEERS), [1, 2])
    report = compare.describe(args, "peers")
    name = compare.default_path(report, args).name
    assert name.startswith("peers-") and f"-1-2-threads-{report['date'][:10]}.json" in name
    part = compare.parse(["--quick"], list(PEERS), [1, 2])
    assert compare.default_path(report, part).name == name.replace(".json", "-part.json")


def test_an_unknown_peer_or_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--peers", "no_such_peer"])
    assert "no peer no_such_peer" in capsys.readouterr().err
    assert compare.main(["--only", "no such case"]) == 2


def test_every_row_of_the_table_has_every_column(fake, tmp_path):
    text = peers_table.render(study(tmp_path)[1])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    # A third table, of the machine's limits, may follow.
    inference, training = (lines[i * (len(CASES) + 2) :][: len(CASES) + 2] for i in (0, 1))
    for rows in (inference, training):
        assert len(rows) == len(CASES) + 2
        assert len({row.count("|") for row in rows}) == 1
    assert "ONNX Runtime" in inference[0] and "ONNX Runtime" not in training[0]


def test_the_readme_has_no_table_of_peers(fake, tmp_path, monkeypatch):
    study(tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert table.newest() is None
    assert table.newest("peers")["study"] == "peers"


def test_the_table_of_the_page_is_that_of_the_newest_committed_results():
    assert peers_table.main(["--check"]) == 0


def test_the_summary_counts_losses():
    def case(ratio):
        best = {"nn_rnn": {"ratio": 8.0}, "peer": {"ratio": ratio}}
        return {"modes": {"inference": {"best": best}}}

    text = peers_table.summary([case(0.5), case(8.0)], "inference")
    assert "8.00 against nn.RNN, 2.00 against" in text and "faster in 1 of 2" in text


def test_the_study_of_scaling_varies_one_number():
    cases = scaling.cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        found = {name: getattr(case, name) for name in scaling.BASE}
        assert sum(found[name] != scaling.BASE[name] for name in found) == (case.name != "base")
        assert case.I == case.H
    assert all(scaling.BASE[name] in values for name, values in scaling.VALUES.items())


def test_the_study_of_scaling_is_read_as_series(fake, tmp_path):
    _, report = study(tmp_path, main=scaling.main, name="scaling")
    assert report["study"] == "scaling" and report["complete"] is True
    for varied, values in scaling.VALUES.items():
        assert [value for value, _ in scaling.series(report, varied)] == values


def test_the_study_of_busy_cores_takes_turns_beside_each_number_of_processes_and_after_rests(
    fake, tmp_path
):
    path = tmp_path / "busy.json"
    assert busy.main(["--threads", "2", "--output", str(path)]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["study"] == "busy" and report["complete"] is True
    assert report["threads"] == [1, 2] and report["busy"] == [0, 1, 2]
    assert len(report["cases"]) == len(busy.CASES)
    mode = report["cases"][0]["modes"]["training"]
    found = {(r["busy"], r["pause"], r["peer"], r["threads"]): r["us"] for r in mode}
    assert len(found) == len(mode) == 4 * 2 * 2
    assert found[1, 0, "nn_rnn", 2] == 4 and found[0, busy.PAUSE, "fastrnn", 1] == 2
    assert len(fake.log) == len(busy.CASES) * len(MODES) * 4 * busy.TURNS * 4
    lines = [line for line in busy_table.render(report).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(busy.CASES) * len(MODES)
    assert len({line.count("|") for line in lines}) == 1
    assert f"| {', '.join(['8 µs'] * 4)} | {', '.join(['4 µs'] * 4)} |" in lines[2]


def test_busy_processes_are_busy_and_then_gone():
    with busy.busy_processes(2) as processes:
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


def test_times_on_busy_cores_are_published_beside_those_of_peers(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    _, report = study(tmp_path, "--threads", "1,2")
    assert "### On busy cores" not in peers_table.render(report)
    assert busy.main(["--threads", "2", "--output", str(tmp_path / "busy.json")]) == 0
    assert "### On busy cores" in peers_table.render(report)
    assert busy.main(["--quick", "--threads", "2", "--output", str(tmp_path / "busy.json")]) == 0
    assert "### On busy cores" not in peers_table.render(report)


def test_wrong_results_are_not_timed_on_busy_cores(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "ask", lambda self, *_: {"wrong": "output: error"})
    with pytest.raises(ValueError, match="medium-64, inference"):
        busy.main(["--quick", "--output", str(tmp_path / "busy.json")])
    assert not (tmp_path / "busy.json").exists()


def test_figures_are_the_same_bytes_again(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    for main, name in ((compare.main, "peers"), (scaling.main, "scaling")):
        _, report = study(tmp_path, "--threads", "1,2", main=main, name=name)
        run.write(table.RESULTS / f"{name}.json", report)
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert plots.main(["--output", str(folder)]) == 0
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0]) == ["scaling.svg", "speedups.svg"]
    assert all(b"<svg" in figure and b"dc:date" not in figure for figure in drawn[0].values())


def test_without_results_nothing_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert plots.main(["--output", str(tmp_path / "figures")]) == 0
    assert not (tmp_path / "figures").exists()
    assert "no complete results of peers" in capsys.readouterr().err
