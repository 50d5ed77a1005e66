# SPDX-License-Identifier: Apache-2.0
"""Learn a DC motor's dynamic behaviour from sequences, with torch.nn.RNN and with fastrnn.RNN.

The motor (armature voltage v in, current i and speed w out):

    L di/dt = v - R i - K w
    J dw/dt = K i - b w - c tanh(w / w_s)          (the last term: Coulomb friction, smoothed)

is simulated under several excitation signals, measured with noise, cut into sequences, and learned
by a relu RNN with a linear head: from the last steps of voltage, predict current and speed at the
end. Both variants start from the same weights and see the same batches, so that their loss curves
must agree: in float64, the default here, to rounding. In float32 the first difference in rounding
grows with every step of training, until the curves part by some percent. Writes a plot and prints
a table.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrnn

SAMPLES, QUICK_SAMPLES = 4000, 600  # of each signal
VARIANTS = {"torch.nn.RNN": nn.RNN, "fastrnn.RNN": fastrnn.RNN}
CURVE_EPOCHS, CURVE_TOLERANCE = 50, 1e-4


@dataclass(frozen=True)
class Motor:
    """A small brushed DC motor."""

    R: float = 1.2  # armature resistance, ohm
    L: float = 6e-3  # armature inductance, H
    K: float = 0.05  # torque constant, N m / A, and back-emf constant, V s / rad
    J: float = 2e-4  # inertia of rotor and load, kg m^2
    b: float = 1e-4  # viscous friction, N m s / rad
    c: float = 5e-3  # Coulomb friction, N m
    w_s: float = 2.0  # speed at which the friction's sign turns, rad / s

    def derivative(self, state: np.ndarray, v: float) -> np.ndarray:
        i, w = state
        di = (v - self.R * i - self.K * w) / self.L
        dw = (self.K * i - self.b * w - self.c * np.tanh(w / self.w_s)) / self.J
        return np.array([di, dw])

    def simulate(self, voltage: np.ndarray, dt: float, substeps: int = 4) -> np.ndarray:
        """Current (A) and speed (rad/s) after each sample of the held voltage (V): [T, 2]."""
        state, h = np.zeros(2), dt / substeps
        states = np.empty((len(voltage), 2))
        for t, v in enumerate(voltage):
            for _ in range(substeps):  # classical Runge-Kutta
                k1 = self.derivative(state, v)
                k2 = self.derivative(state + h / 2 * k1, v)
                k3 = self.derivative(state + h / 2 * k2, v)
                k4 = self.derivative(state + h * k3, v)
                state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            states[t] = state
        return states


def excitations(samples: int, dt: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Voltages within +-12 V, each `samples` long."""
    t = np.arange(samples) * dt

    def hold(seconds: float, levels: np.ndarray) -> np.ndarray:
        return np.repeat(levels, max(1, round(seconds / dt)))[:samples]

    count = samples  # more levels than any signal can hold
    chirp_rate = 8.0 / t[-1]  # Hz / s: sweeps up to 8 Hz
    phases = rng.uniform(0, 2 * np.pi, 12)
    multisine = sum(np.sin(2 * np.pi * 0.35 * (k + 1) * t + p) for k, p in enumerate(phases))
    return {
        "steps": hold(0.5, rng.uniform(-12, 12, count)),
        "short steps": hold(0.15, rng.uniform(-12, 12, count)),
        "binary noise": hold(0.1, rng.choice([-9.0, 9.0], count)),
        "chirp": 10 * np.sin(np.pi * chirp_rate * t**2),
        "staircase": hold(0.4, np.resize([0, 3, 6, 9, 12, 9, 6, 3, 0, -3, -6, -9, -12, -6], count)),
        "multisine": 11 * multisine / np.abs(multisine).max(),
    }


# Split by signal: the test signal is of a kind that training never sees.
VALIDATION, TEST = "staircase", "multisine"


@dataclass
class Data:
    """Normalised windows [N, window, 1] of voltage and their targets [N, 2]."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    target_mean: Tensor
    target_std: Tensor
    dt: float

    def training(self) -> tuple[Tensor, Tensor]:
        names = [n for n in self.inputs if n not in (VALIDATION, TEST)]
        return (
            torch.cat([self.inputs[n] for n in names]),
            torch.cat([self.targets[n] for n in names]),
        )


def make_data(samples: int, window: int, stride: int, seed: int, dtype: torch.dtype) -> Data:
    """Simulate, add noise, normalise by the training signals, cut windows with unfold."""
    dt, rng, motor = 5e-3, np.random.default_rng(seed), Motor()
    voltage, measured = {}, {}
    for name, v in excitations(samples, dt, rng).items():
        noise = rng.normal(0, [0.05, 0.5], (samples, 2))  # A, rad/s
        voltage[name] = torch.tensor(v, dtype=dtype)
        measured[name] = torch.tensor(motor.simulate(v, dt) + noise, dtype=dtype)
    seen = torch.cat([m for n, m in measured.items() if n not in (VALIDATION, TEST)])
    mean, std = seen.mean(0), seen.std(0)
    inputs, targets = {}, {}
    for name in voltage:
        step = stride if name not in (VALIDATION, TEST) else 1
        # [samples] -> [N, window]: window n is v[n*step : n*step + window]
        windows = (voltage[name] / 12).unfold(0, window, step)
        inputs[name] = windows.unsqueeze(-1)
        targets[name] = ((measured[name] - mean) / std)[window - 1 :: step]
    return Data(inputs, targets, mean, std, dt)


class MotorModel(nn.Module):
    """relu RNN over a window of voltage; a linear head over all its states."""

    def __init__(self, rnn_class: Callable[..., nn.RNNBase], hidden: int, window: int) -> None:
        super().__init__()
        self.rnn = rnn_class(1, hidden, batch_first=True, nonlinearity="relu")
        self.head = nn.Linear(window * hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.ones(1, x.size(0), self.rnn.hidden_size, dtype=x.dtype)
        states, _ = self.rnn(x, h0)
        return self.head(states.flatten(1))


@dataclass
class Run:
    """One variant's training."""

    model: MotorModel
    optimizer: torch.optim.Optimizer
    losses: list[float]
    seconds: list[float]

    def epoch(self, inputs: Tensor, targets: Tensor, batches: list[Tensor]) -> None:
        start, total = time.perf_counter(), 0.0
        for batch in batches:
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(inputs[batch]), targets[batch])
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(batch)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(total / len(inputs))


def train(data: Data, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Run]:
    """Train both from the same weights. Their epochs alternate, so noise slows both alike."""
    inputs, targets = data.training()
    runs: dict[str, Run] = {}
    for name, rnn_class in VARIANTS.items():
        torch.manual_seed(args.seed)
        model = MotorModel(rnn_class, args.hidden, args.window).to(dtype)
        runs[name] = Run(model, torch.optim.Adam(model.parameters(), lr=args.lr), [], [])
    generator = torch.Generator().manual_seed(args.seed)
    for epoch in tqdm(range(args.epochs), desc="epochs", disable=None):
        batches = list(torch.randperm(len(inputs), generator=generator).split(args.batch))
        order = list(runs.values())
        for run in order if epoch % 2 == 0 else reversed(order):
            run.epoch(inputs, targets, batches)
    return runs


@torch.inference_mode()
def predict(model: MotorModel, data: Data, signal: str) -> tuple[Tensor, Tensor]:
    """Predicted and measured current and speed, in A and rad/s: [N, 2] each."""
    scale = lambda y: y * data.target_std + data.target_mean  # noqa: E731
    return scale(model(data.inputs[signal])), scale(data.targets[signal])


def largest_difference(runs: dict[str, Run]) -> float:
    a, b = (run.losses[:CURVE_EPOCHS] for run in runs.values())
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def print_table(runs: dict[str, Run], data: Data) -> None:
    print(
        f"\n{'':14} {'epoch':>9} {'final loss':>12} {'validation':>11} "
        f"{'test current':>13} {'test speed':>12} {'test error':>11}"
    )
    for name, run in runs.items():
        predicted, measured = predict(run.model, data, TEST)
        rmse = (predicted - measured).square().mean(0).sqrt()
        relative = (rmse / measured.std(0)).mean()
        p, m = predict(run.model, data, VALIDATION)
        validation = ((p - m).square().mean(0).sqrt() / m.std(0)).mean()
        print(
            f"{name:14} {statistics.median(run.seconds) * 1e3:>6.1f} ms {run.losses[-1]:>12.6f} "
            f"{validation:>10.1%} {rmse[0]:>11.3f} A {rmse[1]:>6.2f} rad/s {relative:>10.1%}"
        )
    slow, fast = (statistics.median(run.seconds) for run in runs.values())
    print(f"\nfastrnn.RNN trains an epoch {slow / fast:.2f}x as fast (medians of whole epochs).")


def plot(runs: dict[str, Run], data: Data, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    predicted, measured = predict(runs["fastrnn.RNN"].model, data, TEST)
    t = torch.arange(len(measured)) * data.dt
    figure, axes = plt.subplots(3, 1, figsize=(9, 8), layout="constrained")
    for axis, column, label in ((axes[0], 1, "speed, rad/s"), (axes[1], 0, "current, A")):
        axis.plot(t, measured[:, column], color="0.6", linewidth=1, label="measured")
        axis.plot(t, predicted[:, column], color="C0", linewidth=1.2, label="predicted")
        axis.set(xlabel="time, s", ylabel=label)
        axis.legend(loc="upper right")
    axes[0].set_title(f"Held-out signal: {TEST}")
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        axes[2].semilogy(run.losses, style, label=name)
    axes[2].set(xlabel="epoch", ylabel="training loss (normalised)")
    axes[2].legend(loc="upper right")
    for suffix in ("svg", "png"):
        path = directory / f"dc_motor.{suffix}"
        figure.savefig(path, dpi=120)
    return path


def positive(text: str) -> int:
    """An option's value: a whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=60)
    parser.add_argument("--hidden", type=positive, default=32)
    parser.add_argument("--window", type=positive, default=50, help="steps per sequence")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--quick", action="store_true", help="little data, 3 epochs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    if args.quick:
        args.epochs = min(args.epochs, 3)
    args.samples = QUICK_SAMPLES if args.quick else SAMPLES
    if args.window >= args.samples:  # at least two windows, for a deviation
        parser.error(
            f"argument --window: {args.window} is not below the {args.samples} steps of a signal"
        )
    return args


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    data = make_data(args.samples, args.window, 4, args.seed, dtype)
    inputs, _ = data.training()
    print(f"{len(inputs)} training sequences of {args.window} steps, {args.epochs} epochs")
    runs = train(data, args, dtype)
    print_table(runs, data)
    difference = largest_difference(runs)
    agree = difference < CURVE_TOLERANCE
    print(
        f"Largest relative difference of the loss curves over the first "
        f"{min(CURVE_EPOCHS, args.epochs)} epochs: {difference:.1e} "
        f"({'below' if agree else 'NOT below'} {CURVE_TOLERANCE:.0e})"
    )
    print(f"Plot: {plot(runs, data, args.output)}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
