"""Notes to hide in a text and the questions that ask for them.

Three forms, each note and each question on a line of its own: a pass key, a
hexadecimal table entry, and a variable. The bundled model was trained on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# fmt: off
ADJECTIVES = (
    "amber", "azure", "brave", "bright", "calm", "clever", "copper", "coral", "crimson", "dusty",
    "eager", "emerald", "faint", "gentle", "golden", "hidden", "icy", "ivory", "jolly", "lively",
    "lucky", "misty", "noble", "olive", "pale", "proud", "quiet", "rapid", "royal", "rusty", "scarlet",
    "silent", "silver", "sleepy", "solar", "stormy", "swift", "tidy", "velvet", "violet", "wild",
    "young",
)
# fmt: on
# fmt: off
NOUNS = (
    "anchor", "badger", "beacon", "bridge", "canyon", "castle", "cedar", "comet", "condor", "dragon",
    "falcon", "forest", "garden", "glacier", "harbor", "island", "jaguar", "kettle", "lantern", "lizard",
    "maple", "meadow", "meteor", "monkey", "mountain", "ocean", "orchid", "otter", "panther", "pepper",
    "planet", "rabbit", "raven", "river", "rocket", "saddle", "tiger", "tunnel", "turtle", "valley",
    "walrus", "window",
)
# fmt: on


@dataclass(frozen=True)
class Task:
    """One hidden note, the question that asks for it, and the right answer (all without newline)."""

    note: str
    question: str
    answer: str

    def is_right(self, text: str) -> bool:
        """Tell whether the text generated after the question begins with the answer."""
        return text.strip().removesuffix(";").removesuffix(".") == self.answer


def pass_key(rng: random.Random) -> Task:
    """Make `The pass key for the amber falcon is 482913. Remember it.`."""
    name = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    key = str(rng.randrange(100_000, 1_000_000))
    return Task(
        note=f"The pass key for the {name} is {key}. Remember it.",
        question=f"What is the pass key for the {name}? The pass key for the {name} is",
        answer=key,
    )


def lookup(rng: random.Random) -> Task:
    """Make `key 1a2b3c4d = 9f8e7d6c;`."""
    key, value = f"{rng.getrandbits(32):08x}", f"{rng.getrandbits(32):08x}"
    return Task(note=f"key {key} = {value};", question=f"lookup {key} ->", answer=value)


def variable(rng: random.Random) -> Task:
    """Make `VAR misty_harbor := 12345`."""
    name = f"{rng.choice(ADJECTIVES)}_{rng.choice(NOUNS)}"
    value = str(rng.randrange(10_000, 100_000))
    return Task(note=f"VAR {name} := {value}", question=f"print VAR {name} ->", answer=value)


FORMS: tuple[Callable[[random.Random], Task], ...] = (pass_key, lookup, variable)


def make_tasks(count: int, seed: int = 0) -> list[Task]:
    """Return `count` tasks, the forms in turn, no two with the same question."""
    rng = random.Random(seed)
    tasks: list[Task] = []
    questions: set[str] = set()
    while len(tasks) < count:
        task = FORMS[len(tasks) % len(FORMS)](rng)
        if task.question not in questions:
            questions.add(task.question)
            tasks.append(task)
    return tasks


def hide(notes: Sequence[str], lines: Sequence[str], seed: int = 0) -> str:
    """Return the text of `lines` (each ending in a newline) with the notes between them.

    The notes are spread: one at a random line boundary of each of as many equal parts.
    """
    rng = random.Random(seed)
    pieces: list[str] = []
    done = 0
    for index, note in enumerate(notes):
        first = len(lines) * index // len(notes)
        end = len(lines) * (index + 1) // len(notes)
        position = rng.randint(first, end)
        pieces.extend(lines[done:position])
        pieces.append(note + "\n")
        done = max(done, position)
    pieces.extend(lines[done:])
    return "".join(pieces)
