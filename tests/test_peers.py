# SPDX-License-Identifier: Apache-2.0
"""Peers of the benchmarks: right results, reasons for what is missing, processes of their own.

Peers whose packages are not installed are tested for saying so.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import gate
import pytest
import run
import torch
from cases import CASES, MODES, BenchmarkCase, by_name
from peers import PEERS, Runner
from peers.interface import Loaded, Problem
from peers.torch_peers import NnRnn
from torch.nn.utils.rnn import PackedSequence

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"

TINY = by_name("tiny")


def make(*sizes, **options):
    return BenchmarkCase(*sizes, name="test", reason="test", **options)


GRID = [
    make(5, 3, 4, 7),
    make(5, 3, 4, 7, nonlinearity="relu", batch_first=True),
    make(4, 2, 7, 7, num_layers=3),
    make(4, 3, 5, 6, num_layers=2, bidirectional=True, batch_first=True),
    make(1, 2, 4, 7),
    make(0, 0, 3, 5, num_layers=2, bidirectional=True, lengths=(2, 6, 1)),
    make(5, 3, 9, 8, dtype=torch.float64),
    make(5, 3, 9, 8, dtype=torch.bfloat16),
    make(5, 3, 9, 8, dtype=torch.float16),
]


@pytest.fixture(autouse=True)
def threads():
    """Puts back the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def wrong(peer, case, mode, threads):
    """What the gate says of a peer's results."""
    with torch.inference_mode(mode == "inference"):
        results = peer.load(case, mode, threads).results()
    return gate.wrong(results, case, mode, gate.reference(case), peer.floor_ulps(case.dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_the_results_of_nn_rnn_or_says_why_not(name, mode, threads):
    peer = PEERS[name]
    missing = peer.missing()
    if missing:
        pytest.skip(missing)
    compared = 0
    for case in GRID:
        if peer.unsupported(case, mode) or (name == "compiled_loop" and compared):
            # Each compilation takes seconds.
            continue
        assert wrong(peer, case, mode, threads) is None, case
        compared += 1
    assert compared or mode not in peer.modes


@pytest.mark.parametrize("name", ["fastrnn", "nn_rnn", "script_loop", "compiled_loop"])
def test_peers_of_pytorch_alone_are_here(name):
    assert PEERS[name].missing() is None


@pytest.mark.parametrize("mode", MODES)
def test_nn_rnn_cell_is_measured_in_single_steps(mode, threads):
    cell, case = PEERS["nn_rnn_cell"], make(1, 2, 4, 7, dtype=torch.float64)
    assert cell.unsupported(case, mode) is None
    assert wrong(cell, case, mode, threads) is None


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(NnRnn, "packages", ("torch", "no-such-package"))
    assert PEERS["nn_rnn"].missing() == "not installed: no-such-package"


def test_importing_the_peers_imports_none_of_their_packages():
    code = "import sys, peers; print({'jax', 'onnx', 'onnxruntime', 'openvino'} & {*sys.modules})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "case", "mode", "reason"),
    [
        ("onnx_runtime", GRID[0], "training", "no training"),
        ("openvino", GRID[0], "training", "no training"),
        ("onnx_runtime", make(5, 3, 4, 7, dtype=torch.float64), "inference", "no float64"),
        ("onednn", make(5, 3, 4, 7, dtype=torch.float16), "training", "no float16"),
        ("onednn", make(5, 3, 4, 7, num_layers=2), "inference", "if I = H"),
        ("onednn", make(5, 3, 7, 7, 2, True), "inference", "in one direction"),
        ("jax_scan", make(0, 0, 3, 5, lengths=(2, 1)), "inference", "unequal length"),
        ("script_loop", make(0, 0, 3, 5, lengths=(2, 1)), "training", "unequal length"),
        ("compiled_loop", make(21, 3, 4, 7), "training", "takes minutes"),
        ("nn_rnn_cell", make(2, 3, 4, 7), "inference", "single steps"),
        ("nn_rnn_cell", make(1, 3, 4, 7, 2), "inference", "one layer"),
        ("nn_rnn", make(2, 3, 4, 7, hx=True), "inference", "hx"),
    ],
)
def test_what_a_peer_cannot_do_has_a_reason(name, case, mode, reason):
    assert reason in PEERS[name].unsupported(case, mode)


def test_every_case_runs_in_fastrnn_and_nn_rnn():
    for name in ("fastrnn", "nn_rnn"):
        assert all(PEERS[name].unsupported(case, mode) is None for case in CASES for mode in MODES)


def test_a_problem_is_the_case_time_first():
    case = make(5, 3, 4, 7, num_layers=2, batch_first=True, bidirectional=True)
    problem = Problem(case)
    assert torch.equal(problem.x.transpose(0, 1), case.input())
    assert torch.equal(problem.cotangent().transpose(0, 1), case.cotangent())
    assert [[cell[0].shape for cell in layer] for layer in problem.layers] == [
        [(7, 4)] * 2,
        [(7, 14)] * 2,
    ]


def test_a_problem_pads_packed_sequences():
    case = make(0, 0, 3, 5, lengths=(2, 6, 1))
    problem, packed = Problem(case), case.input()
    assert isinstance(packed, PackedSequence)
    assert problem.x.shape == (6, 3, 3)
    assert torch.equal(problem.output(problem.x), packed.data)


class WrongGradient(NnRnn):
    """Has gradients that are off by one part in a thousand."""

    def load(self, case, mode, threads):
        loaded = super().load(case, mode, threads)

        def results():
            found = loaded.results()
            return {n: t * 1.001 if "grad" in n else t for n, t in found.items()}

        return Loaded(loaded.step, results)


class NoGradient(NnRnn):
    """Computes no gradient."""

    def load(self, case, mode, threads):
        loaded = super().load(case, mode, threads)
        return Loaded(loaded.step, lambda: {"output": loaded.results()["output"]})


class Broken(NnRnn):
    def load(self, case, mode, threads):
        raise RuntimeError(f"made up by the test, in {ROOT}/benchmarks")


@pytest.mark.parametrize(
    ("peer", "answer"),
    [
        (WrongGradient(), {"wrong": "grad_weight_ih_l0: error"}),
        (NoGradient(), {"wrong": "without grad_bias_hh_l0, grad_bias_ih_l0"}),
        (Broken(), {"not_run": "RuntimeError: made up by the test, in benchmarks"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_or_broken_peer_is_not_timed(peer, answer, tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "nn_rnn", peer)
    runner = Runner("nn_rnn", 1)
    runner.reference(GRID[0], tmp_path / "reference")
    found = runner.load(GRID[0], "training", tmp_path / "reference")
    (kind,) = answer
    assert list(found) == [kind]
    assert found[kind].startswith(answer[kind])


def test_a_worker_loads_makes_bursts_and_starts_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    one = run.start("fastrnn", 1)
    try:
        one.ask("reference", TINY, tmp_path / "reference")
        for mode in MODES:
            assert one.ask("load", TINY, mode, tmp_path / "reference")["calls"] > 1
            for question in (("burst",), ("mean", 0.0, 0.0), ("mean", 0.0, 0.001)):
                seconds = one.ask(*question)
                assert math.isfinite(seconds) and seconds > 0
        assert one.ask("peak", TINY, "training") > 0
        assert os.environ["OMP_NUM_THREADS"] == "7"
        environ = Path(f"/proc/{one._process.pid}/environ")
        assert not environ.exists() or b"OMP_NUM_THREADS=1\0" in environ.read_bytes()
        one._process.kill()
        with pytest.raises(ChildProcessError, match="exit code -9"):
            one.ask("burst")
        with pytest.raises(TimeoutError):
            one.ask("load", TINY, mode, tmp_path / "reference", limit=0.0)
        assert one.ask("load", TINY, mode, tmp_path / "reference")["calls"] > 1
    finally:
        process = one._process
        one.close()
    assert process.poll() is not None
