# SPDX-License-Identifier: Apache-2.0
"""The examples run to their end as users start them, and print what they promise.

Each is run once; the tests read its output.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastrnn

ROOT = Path(__file__).resolve().parents[1]
FLOAT32_EPSILON = 2.0**-23
BOTH = pytest.mark.parametrize("variant", ["torch.nn.RNN", "fastrnn.RNN"])


def run_example(name, *options):
    # The examples must import the fastrnn that is under test, installed or not.
    paths = [str(Path(fastrnn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # One thread: work this small gains little from two, and loses much on a busy machine.
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, options)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def output_of(name, *options):
    process = run_example(name, *options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def by_hand():
    return output_of("by_hand.py")


@pytest.fixture(scope="module")
def by_hand_rows(by_hand):
    """(t, x, by hand, torch.nn.RNN, fastrnn.RNN) of each step."""
    lines = [line.split() for line in by_hand.splitlines() if re.match(r" *\d+ +\d+ ", line)]
    return [(int(t), int(x), *map(float, states)) for t, x, *states in lines]


@pytest.fixture(scope="module")
def recurrence():
    states, h = [], 0.0
    for x in range(1, 10):
        h = math.tanh(2 * x + 4 + 3 * h + 5)
        states.append(h)
    return states


def test_by_hand_steps_through_the_inputs_1_to_9(by_hand_rows):
    assert [row[:2] for row in by_hand_rows] == [(n, n) for n in range(1, 10)]


def test_by_hand_prints_the_recurrence_to_all_its_digits(by_hand_rows, recurrence):
    for row, h in zip(by_hand_rows, recurrence, strict=True):
        assert abs(row[2] - h) < 1e-15


@pytest.mark.parametrize("column", [3, 4], ids=["torch.nn.RNN", "fastrnn.RNN"])
def test_by_hand_prints_module_states_right_to_float32(by_hand_rows, recurrence, column):
    for row, h in zip(by_hand_rows, recurrence, strict=True):
        assert abs(row[column] - h) <= FLOAT32_EPSILON


def test_by_hand_shows_the_error_of_integer_input_and_what_to_change(by_hand):
    error = next(line for line in by_hand.splitlines() if "ValueError:" in line)
    assert "Long" in error
    assert "input.float()" in error


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    return tmp_path_factory.mktemp("dc_motor")


@pytest.fixture(scope="module")
def dc_motor(plots):
    return output_of("dc_motor.py", "--quick", "--output", plots)


@BOTH
def test_dc_motor_prints_a_row_of_its_table_for_each_variant(dc_motor, variant):
    assert re.search(rf"^{re.escape(variant)} +[\d.]+ ms +[\d.]+ ", dc_motor, re.MULTILINE)


def test_dc_motor_finds_equal_loss_curves(dc_motor):
    assert "(below 1e-04)" in dc_motor


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_dc_motor_writes_its_plot_where_asked(dc_motor, plots, suffix, start):
    assert f"Plot: {plots}" in dc_motor
    assert (plots / f"dc_motor.{suffix}").read_bytes().startswith(start)


@pytest.fixture(scope="module")
def char_rnn():
    return output_of("char_rnn.py", "--quick", "--compare", "--length", 60)


@BOTH
def test_char_rnn_learns_to_do_better_than_guessing(char_rnn, variant):
    guess = float(re.search(r"a guess costs ([\d.]+) bits", char_rnn)[1])
    row = rf"^ +(\d+) +{re.escape(variant)} +([\d.]+) +([\d.]+)$"
    rows = re.findall(row, char_rnn, re.MULTILINE)
    assert [epoch for epoch, *_ in rows] == ["1", "2", "3"]
    training = [float(loss) for _, loss, _ in rows]
    assert training == sorted(training, reverse=True)
    validation = float(rows[-1][2])
    assert max(training[-1], validation) < guess - 1


def test_char_rnn_finds_equal_losses_in_the_first_epoch(char_rnn):
    assert re.search(r"first epoch: [\d.e+-]+ \(below 1e-04\)", char_rnn)


def test_char_rnn_prints_the_time_per_epoch_of_each_variant(char_rnn):
    row = r"^(\S+) +[\d.]+ ms +[\d.]+ +[\d.]+$"
    assert re.findall(row, char_rnn, re.MULTILINE) == ["torch.nn.RNN", "fastrnn.RNN"]


def test_char_rnn_writes_a_sample_of_the_length_asked_for(char_rnn):
    text = re.search(r"\nSample: 60 characters .* us each\n(.*)\n$", char_rnn, re.DOTALL)[1]
    assert len(text) == 60


def test_char_rnn_learns_any_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcab" * 400, encoding="utf-8")
    output = output_of("char_rnn.py", "--quick", "--text", text)
    assert "1800 characters to train on, 200 to validate; 3 different ones" in output
    assert re.fullmatch("[abc]{100}", output.splitlines()[-1])


def test_char_rnn_asks_for_a_longer_text_where_there_is_too_little(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too little", encoding="utf-8")
    process = run_example("char_rnn.py", "--text", text)
    assert process.returncode == 2
    assert "10 characters, 1000 are needed: name a longer text with --text" in process.stderr


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dc_motor.py", ["--epochs", 0], "argument --epochs: 0 is not above 0"),
        ("dc_motor.py", ["--batch", 0], "argument --batch: 0 is not above 0"),
        ("dc_motor.py", ["--quick", "--window", 600], "--window: 600 is not below the 600 steps"),
        ("char_rnn.py", ["--length", 0], "argument --length: 0 is not above 0"),
        ("char_rnn.py", ["--epochs", 0, "--compare"], "argument --epochs: 0 is not above 0"),
        ("char_rnn.py", ["--window", 0], "argument --window: 0 is not above 0"),
        ("char_rnn.py", ["--batch", 100000], "--batch: this text is enough for "),
    ],
)
def test_an_option_out_of_range_ends_in_a_message_that_names_it(name, options, message):
    process = run_example(name, *options)
    assert process.returncode == 2
    assert message in process.stderr.splitlines()[-1]


def test_the_readme_names_every_example():
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python examples/(\w+\.py)", readme))
    assert named == {path.name for path in (ROOT / "examples").glob("*.py")}
