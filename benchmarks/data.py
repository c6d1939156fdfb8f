"""How fast a text becomes tokens, how much memory that takes, and whether training minds how large the text is.

python benchmarks/data.py make text.txt --megabytes 2000     # a text that nobody wrote, the same for the same seed
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

WORDS = 200_000


def vocabulary(random: np.random.Generator) -> list[str]:
    """Words of one to five syllables, in the order of their frequency; the frequent ones are short, as in language."""
    onsets = "b br c ch cl d dr f fl g gr h j k l m n p pl qu r s sh sl st t th tr v w y z".split()  # noqa: SIM905
    vowels = "a ai e ea ee i ie o oa oo ou u".split()  # noqa: SIM905
    codas = ["", "", "", "", *"ck d ght l ll m n nd ng nt p r rd rk rn s ss st t th".split()]  # noqa: SIM905
    words: dict[str, None] = {}
    while len(words) < WORDS:
        longest = 1 + min(4, len(words) * 5 // WORDS + (len(words) > 200))
        syllables = random.integers(1, longest + 1)
        word = "".join(random.choice(onsets) + random.choice(vowels) + random.choice(codas) for _ in range(syllables))
        words.setdefault(word)
    return list(words)


def make(path: Path, megabytes: int, seed: int) -> None:
    """Writes a text: word frequencies by Zipf's law with Mandelbrot's shift, sentences and paragraphs of varying length."""
    random = np.random.default_rng(seed)
    words = vocabulary(random)
    cumulative = np.cumsum(1 / (np.arange(WORDS) + 2.7))
    cumulative /= cumulative[-1]
    behind = [" ", ", ", ". ", "? ", ".\n"]
    odds = np.cumsum([0.86, 0.06, 0.05, 0.01, 0.02])
    table = np.array([word + after for after in behind for word in words], dtype=object)
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        while written < megabytes * 1_000_000:
            word = np.searchsorted(cumulative, random.random(200_000))
            after = np.searchsorted(odds, random.random(200_000))
            written += file.write("".join(table[after * WORDS + word].tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a text")
    making.add_argument("path", type=Path)
    making.add_argument("--megabytes", type=int, default=2000)
    making.add_argument("--seed", type=int, default=1337)
    options = parser.parse_args()
    make(options.path, options.megabytes, options.seed)


if __name__ == "__main__":
    main()
