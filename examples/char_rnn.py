# SPDX-License-Identifier: Apache-2.0
"""A character-level language model: learn a text letter by letter, then write more of it.

    characters [T, B] -> embedding -> fastrnn.RNN (tanh, dropout between layers) -> linear -> logits

The text is the licence of the Python that runs this, which every installation has, or any --text.
It is laid out as B streams that are read side by side, T steps at a time: truncated backpropagation
through time, where the state goes on from window to window and gradients stop at their edges.
The sample is written with one call per character, T = 1, where a call's fixed cost is everything.
A licence is short: the model soon knows it by heart, and the validation loss rises again.

--compare trains torch.nn.RNN too, from the same weights and with the same dropout draws, epoch by
epoch in turn. In float32 the two drift apart with the rounding of every step; their first epochs
must agree.
"""

import argparse
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrnn

EMBEDDING = 32
SHORTEST_TEXT = 1000  # characters
FIRST_EPOCH_TOLERANCE = 1e-4  # relative; float32


def python_licence() -> Path | None:
    """The running Python's licence text: in or above the standard library, as site.py looks."""
    library = Path(sysconfig.get_path("stdlib"))
    for directory in (library, library.parent):
        for name in ("LICENSE.txt", "LICENSE"):
            if (directory / name).is_file():
                return directory / name
    return None


def read_text(path: Path | None) -> str:
    """Text to learn.

    Raises
    ------
    ValueError
        There is none, or too little of it.
    """
    if path is None and (path := python_licence()) is None:
        raise ValueError("this Python has no licence text to learn: name one with --text FILE")
    text = path.read_text(encoding="utf-8", errors="replace")
    if len(text) < SHORTEST_TEXT:
        raise ValueError(
            f"{path} has {len(text)} characters, {SHORTEST_TEXT} are needed: "
            "name a longer text with --text FILE"
        )
    return text


@dataclass
class Corpus:
    """A text as numbers: its first nine tenths to train on, the rest to validate."""

    alphabet: str
    training: Tensor  # [N_training]
    validation: Tensor  # [N_validation]

    @classmethod
    def of(cls, text: str) -> "Corpus":
        alphabet = "".join(sorted(set(text)))
        index = {character: i for i, character in enumerate(alphabet)}
        numbers = torch.tensor([index[character] for character in text])
        return cls(alphabet, *numbers.tensor_split([len(text) * 9 // 10]))

    def streams(self, batch: int) -> Tensor:
        """Training text as `batch` consecutive pieces side by side: [steps, batch]."""
        steps = len(self.training) // batch
        return self.training[: steps * batch].view(batch, steps).t().contiguous()


class CharacterModel(nn.Module):
    """Logits of the next character, at every step."""

    def __init__(
        self,
        rnn_class: Callable[..., nn.RNNBase],
        characters: int,
        hidden: int,
        layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        # nn.RNN warns of a dropout that no second layer would see.
        self.rnn = rnn_class(EMBEDDING, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.head = nn.Linear(hidden, characters)

    def forward(self, characters: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Characters [T, B] and a state [L, B, H] to logits [T, B, characters] and a state."""
        states, state = self.rnn(self.embedding(characters), state)
        return self.head(states), state


def bits_per_character(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


@dataclass
class Run:
    """One variant's training."""

    model: CharacterModel
    optimizer: torch.optim.Optimizer
    training: list[float] = field(default_factory=list)  # bits per character, by epoch
    validation: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def epoch(self, streams: Tensor, window: int, clip: float) -> None:
        start, total, state = time.perf_counter(), 0.0, None
        self.model.train()
        # Each character's target is the next one of its stream.
        for x, y in zip(streams[:-1].split(window), streams[1:].split(window), strict=True):
            self.optimizer.zero_grad()
            logits, state = self.model(x, state)
            state = state.detach()
            loss = bits_per_character(logits, y)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            total += loss.item() * len(x)
        self.seconds.append(time.perf_counter() - start)
        self.training.append(total / (len(streams) - 1))

    @torch.inference_mode()
    def validate(self, text: Tensor) -> None:
        self.model.eval()
        logits, _ = self.model(text[:-1, None])
        self.validation.append(bits_per_character(logits, text[1:, None]).item())


def make_runs(args: argparse.Namespace, characters: int) -> dict[str, Run]:
    variants: dict[str, Callable[..., nn.RNNBase]] = {"fastrnn.RNN": fastrnn.RNN}
    if args.compare:
        variants = {"torch.nn.RNN": nn.RNN, **variants}
    runs = {}
    for name, rnn_class in variants.items():
        torch.manual_seed(args.seed)
        model = CharacterModel(rnn_class, characters, args.hidden, args.layers, args.dropout)
        runs[name] = Run(model, torch.optim.Adam(model.parameters(), lr=args.lr))
    return runs


def train(runs: dict[str, Run], corpus: Corpus, args: argparse.Namespace) -> None:
    """Train in turns, an epoch of each variant, so that a busy machine slows both alike."""
    streams = corpus.streams(args.batch)
    width = max(map(len, runs))
    tqdm.write(f"{'epoch':>5}  {'':{width}}  training  validation  (bits per character)")
    for epoch in tqdm(range(args.epochs), desc="epochs", disable=None):
        order = list(runs.items())
        for name, run in order if epoch % 2 == 0 else reversed(order):
            torch.manual_seed(args.seed + epoch)  # the same dropout for each variant
            run.epoch(streams, args.window, args.clip)
            run.validate(corpus.validation)
            if epoch % max(1, args.epochs // 6) == 0 or epoch == args.epochs - 1:
                tqdm.write(
                    f"{epoch + 1:>5}  {name:{width}}  {run.training[-1]:>8.3f}  "
                    f"{run.validation[-1]:>10.3f}"
                )


@torch.inference_mode()
def sample(model: CharacterModel, alphabet: str, args: argparse.Namespace) -> str:
    """Let the model write text from a new line on, one character in each call."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    character = torch.tensor([[max(0, alphabet.find("\n"))]])  # [T = 1, B = 1]
    state, written = None, []
    for _ in range(args.length):
        logits, state = model(character, state)
        probabilities = torch.softmax(logits[0] / args.temperature, dim=-1)
        character = torch.multinomial(probabilities, 1, generator=generator)
        written.append(alphabet[character.item()])
    return "".join(written)


def report_comparison(runs: dict[str, Run]) -> bool:
    """Print each variant's losses and times; whether the first epochs agree."""
    print(f"\n{'':14} {'epoch':>9} {'training':>9} {'validation':>11}")
    for name, run in runs.items():
        print(
            f"{name:14} {statistics.median(run.seconds) * 1e3:>6.1f} ms "
            f"{run.training[-1]:>9.3f} {run.validation[-1]:>11.3f}"
        )
    stock, fast = runs.values()
    ratio = statistics.median(stock.seconds) / statistics.median(fast.seconds)
    print(f"fastrnn.RNN trains an epoch {ratio:.2f}x as fast (medians of whole epochs).")
    difference = abs(fast.training[0] - stock.training[0]) / stock.training[0]
    agree = difference < FIRST_EPOCH_TOLERANCE
    print(
        f"Relative difference of the losses of the first epoch: {difference:.1e} "
        f"({'below' if agree else 'NOT below'} {FIRST_EPOCH_TOLERANCE:.0e})"
    )
    return agree


def positive(text: str) -> int:
    """An option's value: a whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text to learn, instead of Python's licence")
    parser.add_argument("--epochs", type=positive, default=40)
    parser.add_argument("--hidden", type=positive, default=128)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--dropout", type=float, default=0.2, help="between layers")
    parser.add_argument("--window", type=positive, default=50, help="steps between detached states")
    parser.add_argument("--batch", type=positive, default=16, help="streams side by side")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--temperature", type=float, default=0.5, help="above 0; 1: as learned")
    parser.add_argument("--length", type=positive, default=400, help="characters of the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--compare", action="store_true", help="train torch.nn.RNN as well")
    parser.add_argument("--quick", action="store_true", help="3 epochs, a short sample")
    return parser


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if args.temperature <= 0:
        parser.error("--temperature must be above 0")
    if args.quick:
        args.epochs, args.length = min(args.epochs, 3), min(args.length, 100)
    try:
        corpus = Corpus.of(read_text(args.text))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # Each stream needs a character and the next one.
    if args.batch > (most := len(corpus.training) // 2):
        parser.error(f"argument --batch: this text is enough for {most} streams, not {args.batch}")
    torch.set_num_threads(args.threads)
    size = len(corpus.alphabet)
    print(
        f"{len(corpus.training)} characters to train on, {len(corpus.validation)} to validate; "
        f"{size} different ones: a guess costs {math.log2(size):.3f} bits"
    )
    runs = make_runs(args, size)
    train(runs, corpus, args)
    agree = report_comparison(runs) if args.compare else True
    start = time.perf_counter()
    text = sample(runs["fastrnn.RNN"].model, corpus.alphabet, args)
    microseconds = (time.perf_counter() - start) / args.length * 1e6
    print(
        f"\nSample: {args.length} characters at temperature {args.temperature:g}, "
        f"{microseconds:.0f} us each\n{text}"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
