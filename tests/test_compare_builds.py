# SPDX-License-Identifier: Apache-2.0
"""The comparison of two builds: its rule, its order, and that wrong results are not timed.

Workers are made up but in the last test, which compares the build at hand with itself.
"""

import json
from pathlib import Path

import cases
import compare_builds
import gate
import pytest
import torch

import fastrnn


class FakeWorker:
    """Answers at once; `slow` are the times of the new build, by attempt."""

    slow = (1.0,)

    def __init__(self, runner, folder, *, environment):
        assert runner == "compare_builds:Runner" and environment["PYTHONPATH"] == folder
        self.new, self.starts, self.factor = folder.endswith("new"), 0, 1.0

    def ask(self, method, *arguments):
        if method == "load":
            return 1e-3
        if method == "burst":
            slow = self.slow[min(self.starts, len(self.slow) - 1)]
            return 1e-3 * (slow if self.new else 1.0)
        if method == "peak":
            return 1100 if self.new else 1000
        case, _, path = arguments
        results = gate.results(case.module(torch.nn.RNN, case.dtype), case)
        torch.save({name: self.factor * t for name, t in results.items()}, path)
        return None

    def close(self):
        self.starts += 1


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Compare two folders that look like builds, with fake workers."""
    monkeypatch.setattr(compare_builds, "Worker", FakeWorker)
    folders = [tmp_path / name for name in ("old", "new")]
    for folder in folders:
        (folder / "fastrnn").mkdir(parents=True)
        (folder / "fastrnn" / "_C.so").touch()

    def run(*options):
        path = tmp_path / "builds.json"
        options = ["--seconds", "0", "--output", str(path), *options]
        status = compare_builds.main([*map(str, folders), *options])
        return status, json.loads(path.read_text(encoding="utf-8"))

    return run


def test_the_two_builds_take_turns_and_neighbours_make_a_ratio():
    order, times = [], iter([1.0, 2.0, 4.0, 3.0] * 3)

    def burst(build):
        order.append(build)
        return next(times)

    assert compare_builds.pairs(burst, 0.0, 3) == [(1.0, 2.0), (3.0, 4.0)] * 3
    assert order == ["old", "new", "new", "old"] * 3


def test_the_ratio_is_the_median_of_the_ratios_of_pairs():
    found = compare_builds.summary([(1.0, 2.0), (30.0, 10.0), (8.0, 8.0)])
    assert found["ratio"] == [1, 0.75, 2] and found["pairs"] == 3
    assert (found["old_us"], found["new_us"]) == (8e6, 8e6)


def test_a_burst_has_enough_calls():
    assert compare_builds.calls_of_burst(1e-5) == 2500
    assert compare_builds.calls_of_burst(0.2) == compare_builds.MIN_CALLS
    assert compare_builds.calls_of_burst(2.0) == 1


def entry(ratio, name="a", B=2, num_layers=1, memory=1.0, wrong=None):
    times = [{"mode": "inference", "threads": 2, "ratio": [ratio, ratio, ratio]}]
    spec = {"name": name, "T": 3, "B": B, "I": 4, "H": 5, "num_layers": num_layers}
    return {"spec": spec, "times": times, "memory": memory, "gate": wrong}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry(0.99), entry(1.01)], []),
        ([entry(0.91), entry(1.1)], []),
        ([entry(0.97), entry(0.98)], ["geometric mean 0.975, allowed 0.98"]),
        ([entry(0.89), entry(1.2)], ["a inference @2: 0.890, allowed 0.90"]),
        ([entry(0.85, B=1, num_layers=4), entry(1.2)], []),
        ([entry(0.79, B=1, num_layers=4), entry(1.3)], ["0.790, allowed 0.80"]),
        ([entry(0.85, B=1), entry(1.2)], ["0.850, allowed 0.90"]),
        ([entry(1.0, memory=1.05)], []),
        ([entry(1.0, memory=1.06)], ["memory 1.060, allowed 1.05"]),
        ([entry(1.0, wrong="h_n: error")], ["a: h_n: error"]),
    ],
)
def test_the_rule(entries, said):
    found = compare_builds.failures({"cases": entries})
    assert len(found) == len(said)
    assert all(part in whole for part, whole in zip(said, found, strict=True))


def test_what_seems_slower_is_measured_again_in_new_processes(compare, monkeypatch, capsys):
    monkeypatch.setattr(FakeWorker, "slow", (2.0, 1.0))
    options = ("--only", "tiny", "--modes", "training", "--threads", "1", "--no-memory")
    status, report = compare(*options)
    (timed,) = report["cases"][0]["times"]
    assert status == 0 and report["failures"] == []
    assert (timed["ratio"][0], timed["first_ratio"]) == (1, 0.5)
    assert timed["pairs"] == 2 * compare_builds.AGAIN * compare_builds.MIN_ROUNDS
    monkeypatch.setattr(FakeWorker, "slow", (2.0,))
    status, report = compare(*options)
    assert status == 1 and report["cases"][0]["times"][0]["ratio"][0] == 0.5
    assert "tiny training @1: 0.500, allowed 0.90" in capsys.readouterr().out


def test_the_report_has_every_mode_and_number_of_threads_and_the_memory(compare):
    status, report = compare("--only", "tiny", "--threads", "2,1")
    (case,) = report["cases"]
    found = [(t["threads"], t["mode"], t["old_us"]) for t in case["times"]]
    assert found == [(n, mode, 1000) for n in (1, 2) for mode in cases.MODES]
    assert case["memory"] == 1.1 and status == 1
    assert report["failures"] == ["tiny: memory 1.100, allowed 1.05"]
    assert "/" not in json.dumps(report["commits"])


def test_wrong_results_are_not_timed(compare, monkeypatch):
    def start(self, runner, folder, *, environment):
        self.new, self.starts = folder.endswith("new"), 0
        self.factor = 1.001 if self.new else 1.0

    monkeypatch.setattr(FakeWorker, "__init__", start)
    status, report = compare("--only", "tiny")
    assert status == 1 and report["cases"][0]["times"] == []
    assert report["failures"][0].startswith("tiny: new against nn.RNN")


def test_a_shape_of_the_command_line():
    case = cases.parse_shape("20,3,8,16,dtype=bfloat16,num_layers=2,bidirectional=1,lengths=1-9")
    assert (case.T, case.B, case.I, case.H) == (9, 3, 8, 16)
    assert case.lengths == (1, 5, 9) and case.dtype is torch.bfloat16
    assert case.num_layers == 2 and case.bidirectional and not case.batch_first
    assert cases.parse_shape("1,1,1,1,lengths=3:5,nonlinearity=relu").lengths == (3, 5)
    for text in ("1,2,3", "1,2,3,4,size=5"):
        with pytest.raises(ValueError):
            cases.parse_shape(text)


def test_a_build_is_measured_against_itself(tmp_path):
    path = tmp_path / "builds.json"
    options = ["--shapes", "3,2,4,8", "--threads", "1", "--seconds", "0", "--rounds", "1"]
    folder = str(Path(fastrnn.__file__).resolve().parents[1])
    compare_builds.main([folder, folder, *options, "--output", str(path)])
    report = json.loads(path.read_text(encoding="utf-8"))
    (case,) = report["cases"]
    assert case["gate"] is None and case["memory"] == 1 and case["same_bits"]
    assert len(case["times"]) == 2 and all(t["ratio"][0] > 0 for t in case["times"])
    assert report["commits"]["old"] == report["commits"]["new"]
