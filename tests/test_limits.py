# SPDX-License-Identifier: Apache-2.0
"""The floor is what its formula says, from limits that are measured; tables have it if they can.

No test here looks at how large a measured limit is.
"""

import copy
import json
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import limits
import native
import pytest
import report
import table
import torch
from cases import MODES, BenchmarkCase, by_name, from_spec
from floor import floor, read, work

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
needs_caches = pytest.mark.skipif(
    not limits.caches(), reason="this system does not tell its caches"
)

#: A machine of round numbers: 100 FLOPs, 100 bytes in a nanosecond for each of two threads.
MACHINE = {
    "study": "limits",
    "device": "cpu",
    "complete": True,
    "date": "2026-01-02",
    "machine": {"cpu": "made up", "cores": {"usable": 2}, "capability": {"fastrnn": "default"}},
    "commit": None,
    "threads": [1, 2],
    "limits": {
        "gflops": {"float32": [100.0, 200.0], "float64": [50.0, 100.0]},
        "read_gb_s": {"L1": [100.0, 200.0], "L2": [50.0, 100.0], "DRAM": [10.0, 15.0]},
        "tanh_ns": {"float32": 1.0, "float64": 3.0},
        "step_ns": {
            "float32": {"forward": 20.0, "backward": 2.0},
            "float64": {"forward": 30.0, "backward": 2.0},
        },
        "hand_over_ns": 100.0,
        "caches": [
            {"level": "L1", "bytes": 1000, "instances": 2},
            {"level": "L2", "bytes": 10000, "instances": 1},
        ],
    },
}
SMALL = BenchmarkCase(3, 40, 5, 10, name="", reason="")


def nanoseconds(case, mode="inference", machine=MACHINE):
    return pytest.approx(1e3 * floor(case, mode, machine))


def test_the_floor_of_many_sequences_is_arithmetic():
    products = 2 * 3 * 40 * 10 * 5 + 2 * 2 * 40 * 10 * 10
    inference = products / 200 + 3 * 40 * 10 * 1.0 / 2
    assert nanoseconds(SMALL) == inference
    # Both products of h again, that of x once, and twice a multiply-add for the derivative.
    backward = (products + 2 * 2 * 40 * 10 * 10 + 4 * 3 * 40 * 10) / 200
    assert nanoseconds(SMALL, "training") == inference + backward


def test_relu_is_free():
    relu = replace(SMALL, nonlinearity="relu")
    products = 2 * 3 * 40 * 10 * 5 + 2 * 2 * 40 * 10 * 10
    assert nanoseconds(relu) == products / 200
    assert nanoseconds(relu, "training") == (2 * products + 2 * 2 * 40 * 10 * 10) / 200


def test_the_floor_of_a_long_sequence_is_its_chain():
    case = BenchmarkCase(100, 1, 1, 1, name="", reason="")
    # One thread: sharing adds a hand-over to each step.
    assert nanoseconds(case) == 100 * 20
    assert nanoseconds(case, "training") == 100 * (20 + 2)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"num_layers": 3}, 100 + 2), ({"bidirectional": True}, 100),
     ({"num_layers": 3, "bidirectional": True}, 300)],
)  # fmt: skip
def test_layers_follow_one_another_by_a_step_and_directions_do_not(options, steps):
    case = BenchmarkCase(100, 1, 1, 1, name="", reason="", **options)
    assert nanoseconds(case) == steps * 20


def test_one_sequence_reads_its_weights_in_one_thread_or_shares_them():
    case = BenchmarkCase(11, 1, 1, 100, name="", reason="", nonlinearity="relu")
    # 40000 bytes: from L1, from L2 and from memory.
    alone = 10 * (1000 / 100 + 10000 / 50 + 29000 / 10)
    shared = 10 * (2000 / 200 + 10000 / 100 + 28000 / 15)
    assert nanoseconds(case) == shared < alone
    slow = copy.deepcopy(MACHINE)
    slow["limits"]["hand_over_ns"] = 1e6
    assert nanoseconds(case, machine=slow) == alone
    single = {**MACHINE, "threads": [1]}
    assert nanoseconds(case, machine=single) == alone


@pytest.mark.parametrize(
    ("size", "threads", "time"), [(500, 1, 5), (2000, 1, 10 + 20), (2000, 2, 10), (16000, 1, 710)]
)
def test_weights_are_read_from_the_nearest_caches_that_have_room(size, threads, time):
    assert read(size, threads, MACHINE["limits"]) == pytest.approx(time)


def test_the_work_of_layers_and_directions():
    case = replace(SMALL, num_layers=3, bidirectional=True)
    one, done = work(SMALL), work(case)
    # Upper layers read both directions of the one below.
    upper = 2 * 3 * 40 * 10 * 20 * 4
    assert (one.upper_flops, done.upper_flops) == (0, upper)
    assert done.input_flops == 2 * one.input_flops + upper
    assert done.recurrent_flops == 6 * one.recurrent_flops
    assert (done.tanhs, done.reads) == (6 * one.tanhs, 6 * one.reads)
    assert (one.walks, done.walks) == (40, 80)
    assert nanoseconds(case, "training") == (
        (2 * done.input_flops + upper + 3 * done.recurrent_flops + 4 * done.tanhs) / 200
        + done.tanhs / 2
    )


def test_packed_sequences_count_as_long_as_they_are():
    case = BenchmarkCase(0, 0, 5, 10, lengths=(4, 1, 2), name="", reason="")
    done = work(case)
    assert (done.input_flops, done.recurrent_flops) == (2 * 7 * 5 * 10, 2 * 4 * 10 * 10)
    assert (done.tanhs, done.reads, done.chain, done.walks) == (70, 3, 4, 3)


def test_each_dtype_has_its_peak_and_its_bytes():
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    cases = [replace(SMALL, nonlinearity="relu", dtype=dtype) for dtype in dtypes]
    assert [work(case).weights for case in cases] == [800, 400, 200, 200]
    times = [floor(case, "inference", MACHINE) for case in cases]
    assert times == [pytest.approx(times[1] * ratio) for ratio in (2, 1, 1, 1)]
    machine = copy.deepcopy(MACHINE)
    machine["limits"]["gflops"] |= {"bfloat16": [200.0, 400.0], "float16": None}
    assert floor(cases[3], "inference", machine) == pytest.approx(times[1] / 2)
    assert floor(cases[2], "inference", machine) is None
    assert nanoseconds(replace(SMALL, dtype=torch.float64)) == 2e3 * times[1] + 1200 * 3 / 2


def test_a_source_is_compiled_once(tmp_path, monkeypatch):
    compiled = []

    def compiler(command, **options):
        compiled.append(command)
        Path(command[-1]).write_text("", encoding="utf-8")

    monkeypatch.setattr(native, "BUILD", tmp_path / "build")
    monkeypatch.setattr(native.subprocess, "run", compiler)
    source = tmp_path / "source.cpp"
    source.write_text("one", encoding="utf-8")
    first = native.library(source, "-O2")
    assert native.library(source, "-O2") == first and first.exists() and len(compiled) == 1
    others = {native.library(source, "-O3"), native.library(source, "-O2", key="another")}
    source.write_text("two", encoding="utf-8")
    assert len({first, *others, native.library(source, "-O2")}) == 4


def test_working_sets_lie_in_their_level():
    levels = [("L1", 1000, 4), ("L2", 10000, 4), ("L3", 80000, 1)]
    levels = [dict(zip(("level", "bytes", "instances"), each, strict=True)) for each in levels]
    alone, four = (limits.working_sets(levels, threads) for threads in (1, 4))
    assert alone == {"L1": 750, "L2": 4000, "L3": 40000, "DRAM": 320000}
    # Together too many for all the second levels, and for what there is.
    assert four == {"L1": 750, "L2": 4000, "L3": 20000, "DRAM": 80000}


def test_without_a_compiler_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert limits.main([]) == 2
    assert "this needs g++" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The results of a quick run."""
    path = tmp_path_factory.mktemp("results") / "new" / "limits.json"
    assert limits.main(["--quick", "--threads", "2", "--output", str(path)]) == 0
    return report.load(path)


@needs_gpp
@needs_caches
def test_every_limit_is_measured(measured):
    assert measured["study"] == "limits" and measured["threads"] == [1, 2]
    assert measured["complete"] is False
    found = measured["limits"]
    rates = [*found["gflops"].values(), *found["read_gb_s"].values()]
    assert all(rate > 0 for pair in rates if pair for rate in pair)
    assert list(found["read_gb_s"]) == [*(level["level"] for level in found["caches"]), "DRAM"]
    times = [
        found["hand_over_ns"],
        *(t for ways in found["step_ns"].values() for t in ways.values()),
    ]
    assert all(time > 0 for time in times)
    assert set(found["tanh_ns"]) == {"float32", "float64"}
    text = json.dumps(measured)
    assert '"/' not in text and json.dumps(platform.node()) not in text


@needs_gpp
@needs_caches
def test_one_thread_hands_nothing_over(tmp_path):
    path = tmp_path / "limits.json"
    assert limits.main(["--quick", "--threads", "1", "--output", str(path)]) == 0
    found = report.load(path)
    assert found["limits"]["hand_over_ns"] is None
    text = table.render(found)
    assert "| 1 thread |" in text and "hand-over" not in text
    assert floor(by_name("row-128"), "training", found) > 0


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """A comparison on the made up machine, in place of the committed results."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")

    def mode(us):
        return {"us": {"fastrnn@1": us}, "fastest": {"fastrnn": "fastrnn@1"}, "ratio": {}}

    entries = []
    for case in (SMALL, by_name("medium-128")):
        modes = {name: mode(3 * floor(case, name, MACHINE)) for name in MODES}
        entries.append({"spec": case.spec(), "modes": modes})
    return {**MACHINE, "study": "peers", "versions": {}, "not_installed": {}, "cases": entries}


def save(limits):
    report.write(report.RESULTS / "limits.json", limits)


def test_tables_have_a_floor_if_the_limits_are_known(peers):
    assert "floor" not in table.render(peers)
    save(MACHINE)
    text = table.render(peers)
    assert text.count("| fastrnn | floor | × floor | × nn.RNN |") == len(MODES)
    bound = table.duration(floor(SMALL, "inference", MACHINE))
    assert f"| {bound} | 3.00 |" in text
    assert "Geometric mean of × floor: 3.00, over the 1 cases with B ≥ 16 and H ≥ 128." in text
    assert "| multiply-adds, float32 | 100 GFLOP/s | 200 GFLOP/s |" in text
    assert "| hand-over between threads |  | 100 ns |" in text
    for rows in text.split("###")[1:]:
        assert len({row.count("|") for row in rows.splitlines() if row.startswith("|")}) == 1


def test_where_no_peak_is_known_there_is_no_floor(peers):
    machine = copy.deepcopy(MACHINE)
    machine["limits"]["gflops"]["float32"] = None
    save(machine)
    assert "| – | – |" in table.render(peers)


@pytest.mark.parametrize("other", [{"machine": {"cpu": "other", "cores": 1}}, {"threads": [1]}])
def test_limits_of_another_machine_are_not_taken(peers, other):
    save({**MACHINE, **other})
    assert "floor" not in table.render(peers)


def test_nothing_that_was_committed_is_faster_than_its_floor():
    for study in ("peers", "scaling"):
        found = report.newest(study)
        known = report.newest("limits", like=found)
        assert known
        for entry in found["cases"]:
            case = from_spec(entry["spec"])
            for mode, numbers in entry["modes"].items():
                bound = floor(case, mode, known) or 0.0
                assert all(us >= bound for us in numbers["us"].values()), case
