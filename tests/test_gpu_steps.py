# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py around its measurements: build, suite, JSON, table, exit status."""

import json
import platform
import re
import time
from pathlib import Path

import gpu
import gpu_cases
import gpu_steps
import gpu_table
import gpu_timing
import pytest
import torch

TINY = gpu_cases.make("fp32", "core", "", T=5, B=3, H=8)
JUNIT = """<testsuites><testsuite tests="5">
<testcase classname="tests.test_a" name="test_good"/>
<testcase classname="tests.test_a" name="test_better"><system-out>x</system-out></testcase>
<testcase classname="tests.test_a" name="test_bad[1]"><failure message="no">x</failure></testcase>
<testcase classname="tests.test_b" name="test_broken"><error message="no">x</error></testcase>
<testcase classname="tests.test_b" name="test_later"><skipped message="why"/></testcase>
</testsuite></testsuites>"""
SUITE = """import time
import pytest

@pytest.mark.gpu
def test_good():
    pass

@pytest.mark.gpu
def test_bad():
    assert 1 + 1 == 3

@pytest.mark.gpu
def test_later():
    pytest.skip("no GPU")

def test_of_the_cpu():
    raise AssertionError
"""
LONG_TEST = """
@pytest.mark.gpu
def test_long():
    time.sleep(60)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a suite of its own: the path of one of its files."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n", encoding="utf-8")
    path = tmp_path / "tests" / "test_first.py"
    path.parent.mkdir()
    path.write_text(SUITE, encoding="utf-8")
    path.with_name("test_second.py").write_text("def test_of_the_cpu(): assert False\n")
    monkeypatch.setattr(gpu_steps, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_steps, "SUITE", ("first", "second"))
    return path


@pytest.fixture
def in_process(monkeypatch):
    """Measure one tiny case, in this process and without numbers."""

    class Worker:
        found = None

        def __init__(self, runner):
            self.runner = getattr(gpu_timing, runner.split(":")[1])()

        def ask(self, method, *arguments, limit):
            perform = method == "perform"
            return (self.found, True) if perform else getattr(self.runner, method)(*arguments)

        def close(self):
            pass

    monkeypatch.setattr(gpu, "CASES", [TINY])
    monkeypatch.setattr(gpu, "Worker", Worker)
    return Worker


def entry(H, B, inference, training, part="grid", gate=None, error=None, name=None):
    """A case as the JSON has it."""
    numbers = {"inference": {"speedup": [inference]}, "training": {"speedup": [training]}}
    return {
        "name": name or f"bf16 T512 B{B} H{H}",
        "part": part,
        "spec": {"H": H, "B": B, "precision": "bf16"},
        "gate": gate,
        "error": error,
        "eager": numbers,
    }


def report_of(*entries):
    return {
        "device": "cuda",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"gpu": {"name": "NVIDIA H200"}},
        "versions": dict.fromkeys(("fastrnn", "torch", "cuda", "cudnn", "driver"), "1.2"),
        "commit": {"hash": "0123456789abcdef", "dirty": False},
        "steps": {
            "build": {"status": "passed", "seconds": 61.2},
            "suite": {"status": "failed", "passed": 7, "failed": 1, "skipped": 2, "seconds": 9.0,
                      "failing": ["tests.test_a::test_b"]},
            "other": {"status": "absent"},
        },
        "cases": list(entries),
        "not_measured": ["bf16 T16 B16 H128 (eager)", "x"],
    }  # fmt: skip


def run_main(tmp_path, *options):
    """The exit status and the report of a run on the CPU."""
    status = gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path), *options])
    (path,) = tmp_path.glob("*")
    return status, json.loads(path.read_text(encoding="utf-8"))


def test_programs_report_their_status_and_the_end_of_their_output():
    found = gpu_steps.execute(["sh", "-c", "seq 100000; echo last >&2"], 60)
    assert (found["status"], found["returncode"]) == ("passed", 0)
    assert len(found["output"]) == gpu_steps.TAIL and found["output"].endswith("100000\nlast\n")
    found = gpu_steps.execute(["sh", "-c", "exit 3"], 60)
    assert (found["status"], found["returncode"]) == ("failed", 3)
    found = gpu_steps.execute(["/no/such/program"], 60)
    assert found["status"] == "failed" and "/no/such" not in found["error"]


def test_a_program_at_its_limit_is_ended_with_those_it_started(tmp_path):
    script = f"echo started; (sleep 3; touch {tmp_path}/alive) & wait"
    found = gpu_steps.execute(["sh", "-c", script], 1.0)
    assert (found["status"], found["output"]) == ("timed out", "started\n")
    assert 1 <= found["seconds"] < 3
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_the_build_is_with_cuda_and_tells_of_errors_however_much_is_printed(checkout, monkeypatch):
    setup = checkout.parents[1] / "setup.py"
    setup.write_text(
        "import os, sys\n"
        "assert sys.argv[1:] == ['build_ext', '--inplace'] and os.environ['FASTRNN_CUDA'] == '1'\n"
        "print('a.cu(7): error: made up')\n"
        "print('x' * 20_000)\n"
        "sys.exit(os.environ['RESULT'] == 'bad')\n"
    )
    monkeypatch.setenv("RESULT", "bad")
    found = gpu_steps.build(60.0)
    assert (found["status"], found["errors"]) == ("failed", ["a.cu(7): error: made up"])
    assert len(found["output"]) == gpu_steps.TAIL
    monkeypatch.setenv("RESULT", "good")
    found = gpu_steps.build(60.0)
    assert found["status"] == "passed" and "errors" not in found and "output" not in found


def test_the_toolkit_is_the_usual_one_unless_another_is_named(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: str(path).startswith("/usr/local/cuda/"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert gpu_steps.toolkit() == {"CUDA_HOME": "/usr/local/cuda"}
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert gpu_steps.toolkit() == {}
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert gpu_steps.toolkit() == {}


def test_junit_is_counted_and_failures_are_named():
    assert gpu_steps.counts(JUNIT) == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "failing": ["tests.test_a::test_bad[1]: no", "tests.test_b::test_broken: no"],
    }


def test_the_suite_runs_the_tests_marked_gpu_and_all_of_them(checkout):
    found = gpu_steps.suite(120.0)
    assert found["status"] == "failed"
    assert [found[key] for key in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert "assert (1 + 1) == 3" in found["files"]["first"]["output"]
    (failure,) = found["failing"]
    assert failure.startswith("tests.test_first::test_bad: ") and "(1 + 1) == 3" in failure
    assert {name: file["status"] for name, file in found["files"].items()} == {
        "first": "failed",
        "second": "absent",
    }
    checkout.write_text(SUITE.replace("gpu", "skipif(False, reason='')"), encoding="utf-8")
    assert gpu_steps.suite(120.0)["status"] == "absent"


def test_a_suite_without_time_for_all_keeps_what_it_found(checkout):
    checkout.write_text(SUITE.replace("3", "2") + LONG_TEST, encoding="utf-8")
    found = gpu_steps.suite(10.0)
    assert found["status"] == "timed out"
    # Two, and the one that was under way.
    assert [found[key] for key in ("passed", "failed", "skipped")] == [3, 0, 1]
    assert found["files"]["second"] == {"status": "timed out", "seconds": 0.0}


def test_the_suite_is_every_file_with_tests_for_a_gpu():
    files = Path(__file__).parent.glob("test_*.py")
    takes_gpu = r"\npytestmark = needs_gpu|def test_\w+\([^)]*\bdevice\b"
    marked = {path.stem for path in files if re.search(takes_gpu, path.read_text("utf-8"))}
    assert marked == {f"test_{name}" for run in gpu_steps.SUITE for name in run.split()}
    assert {*gpu_steps.ALONE} < {*gpu_steps.SUITE}


def test_the_table_has_the_grid_its_means_and_its_losses():
    cases = [
        entry(64, 1, 2.0, 0.5),
        entry(64, 16, 8.0, 2.0, part="core"),
        entry(128, 1, 9.0, 9.0, gate="output: wrong"),
        entry(200, 16, 3.0, 4.0, part="extra", name="bf16 T512 B16 H200"),
    ]
    text = gpu_table.render(report_of(*cases))
    rows = [line.split() for line in text.splitlines()]
    assert ["H", "64", "2.00", "8.00", "0.50", "2.00"] in rows
    assert ["H", "128", "red", "–", "red", "–"] in rows
    assert "inference: geometric mean 4.00x over 2 points, none below 1.0x" in text
    assert "training: geometric mean 1.00x over 2 points, below 1.0x: H64 B1 (0.50)" in text
    assert "bf16 T512 B16 H200 eager: inference 3.00, training 4.00" in text
    assert "bf16 T512 B1 H128: gate: output: wrong" in text and "9.00" not in text
    assert "graph" not in text


def test_the_table_tells_graphs_by_the_gpus_time_and_what_was_not_captured():
    case = entry(64, 1, 2.0, 2.0)
    case["graph"] = {
        "inference": {"speedup": [7.0], "gpu_speedup": [5.0]},
        "training": {"nn_rnn_error": "RuntimeError: no graph", "fastrnn_us": 3.0},
    }
    text = gpu_table.render(report_of(case, entry(64, 16, 2.0, 2.0)))
    assert ["H", "64", "5.00", "–", "–", "–"] in [line.split() for line in text.splitlines()]
    assert "inference: geometric mean 5.00x over 1 points" in text
    assert "training: nothing measured" in text
    assert "nn_rnn not captured, 1 times: RuntimeError: no graph" in text


def test_the_table_tells_the_machine_the_steps_and_what_is_missing(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(report_of(entry(64, 1, 1.0, 1.0))), encoding="utf-8")
    assert gpu.main(["--table", str(path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("NVIDIA H200; fastrnn 1.2") and "commit 0123456789; 2026-01-02" in text
    assert "build: passed (61 s)\nsuite: failed (7 passed, 1 failed, 2 skipped, 9 s)" in text
    assert "  failed: tests.test_a::test_b\nother: absent" in text
    assert "cases: 1, with a red gate or an error: 0" in text
    assert "not measured: 2, from bf16 T16 B16 H128 (eager) on" in text


def test_a_failed_build_is_kept_and_nothing_goes_on(in_process, monkeypatch, tmp_path):
    failed = {"status": "failed", "returncode": 1, "seconds": 2.0, "output": "error: made up"}
    monkeypatch.setattr(gpu_steps, "build", lambda limit: failed)
    monkeypatch.setattr(gpu_steps, "suite", lambda limit: pytest.fail("nothing to test"))
    status, report = run_main(tmp_path)
    assert status == 1
    assert report["steps"]["build"] == failed
    assert report["steps"]["suite"] == {"status": "skipped"}
    assert (report["cases"], report["not_measured"]) == ([], [f"{TINY.name} (eager)"])


@pytest.mark.parametrize(
    ("suite", "found", "status"),
    [
        ("passed", {"gate": None, "eager": {}}, 0),
        ("absent", {"gate": None, "eager": {}}, 0),
        ("failed", {"gate": None, "eager": {}}, 1),
        ("timed out", {"gate": None, "eager": {}}, 1),
        ("passed", {"gate": "output: wrong"}, 1),
        ("passed", {"gate": None, "eager": {}, "error": "eager: made up"}, 1),
    ],
)
def test_the_exit_status_is_that_of_suite_and_gate(
    suite, found, status, in_process, monkeypatch, tmp_path
):
    limits = []
    monkeypatch.setattr(in_process, "found", found)
    monkeypatch.setattr(gpu_steps, "suite", lambda limit: limits.append(limit) or {"status": suite})
    result, report = run_main(tmp_path, "--skip-build")
    assert result == status
    # A quick run has ten minutes, and the suite four tenths of them.
    assert 230 < limits[0] <= 240
    assert report["complete"] is False


def test_without_a_gpu_or_a_case_nothing_is_done(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "no GPU here" in capsys.readouterr().err
    assert gpu.main(["--output", str(tmp_path), "--only", "no such case"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_its_own_process_from_the_start_to_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "CASES", [TINY])
    status, report = run_main(tmp_path, "--skip-build", "--skip-tests")
    (case,) = report["cases"]
    assert (status, case["name"], case["gate"], case["error"]) == (0, TINY.name, None, None)
    for mode in ("inference", "training"):
        numbers = case["eager"][mode]
        assert numbers["nn_rnn_us"] > 0 < numbers["fastrnn_us"] and numbers["speedup"][0] > 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["build"]["torch"]
    assert report["settings"]["quick"] is True
    text = json.dumps(report)
    assert '"/' not in text and json.dumps(platform.node()) not in text
    assert "inference: geometric mean" in capsys.readouterr().out
