"""Prompts to evaluate with: notes hidden in real text, and questions about them.

The kinds are those of RULER (Hsieh et al., 2024), which finds needles by one key
among none or many, several values of one key, and variables by way of others; the
wording is that of `hillinfer.tasks`, which the bundled model was trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hillinfer.filler import filler_lines
from hillinfer.tasks import ADJECTIVES, FORMS, NOUNS, Task, hide, lookup
from hillinfer_core.errors import InvalidInput

DISTRACTORS = 8
"""Notes of the form asked for that nobody asks about, where a task has any."""
VALUES = 3
"""Values of one key in `multi_value`."""
GO_ON = 128
"""Tokens generated after the first answer of `long`, before the second question."""
CONTINUATION = 512
"""Tokens of the text after the context that a prompt keeps for perplexity, at least."""


@dataclass(frozen=True)
class Question:
    """A question, its answers (all are wanted), and how many tokens are generated on after the answer."""

    text: str
    answers: tuple[str, ...]
    go_on: int = 0

    def score(self, line: str) -> float:
        """Return 1 for the right answer, else 0; where several are wanted, the share that is there."""
        if len(self.answers) == 1:
            return float(Task("", self.text, self.answers[0]).is_right(line))
        return sum(1 for answer in self.answers if answer in line) / len(self.answers)


@dataclass(frozen=True)
class Prompt:
    """A context with notes in it, questions to ask in turn, and how the text goes on without notes."""

    task: str
    context: str
    questions: tuple[Question, ...]
    continuation: str

    @property
    def fingerprint(self) -> str:
        """16 hex digits, the same for the same context and questions."""
        told = "\n".join([self.context, *(question.text for question in self.questions)])
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


Notes = tuple[list[str], list[Question]]


def single(rng: random.Random, turns: int) -> Notes:
    """One note for each question, and no other; their forms in turn."""
    first = rng.randrange(len(FORMS))
    tasks = _different([FORMS[(first + turn) % len(FORMS)] for turn in range(turns)], rng)
    return [task.note for task in tasks], [_asked(task) for task in tasks]


def multi_key(rng: random.Random, turns: int) -> Notes:
    """Notes of one form under many keys; some are asked for."""
    tasks = _different([rng.choice(FORMS)] * (turns + DISTRACTORS), rng)
    return [task.note for task in tasks], [_asked(task) for task in rng.sample(tasks, turns)]


def multi_value(rng: random.Random, turns: int) -> Notes:
    """One key with several values, all of which are wanted."""
    notes, questions = [], []
    for task in _different([lookup] * turns, rng):
        values = [task.answer, *(f"{rng.getrandbits(32):08x}" for _ in range(VALUES - 1))]
        notes += [task.note.replace(task.answer, value) for value in values]
        questions.append(Question(task.question, tuple(values)))
    return notes, questions


def chain(hops: int) -> Callable[[random.Random, int], Notes]:
    """Return the maker of one chain of variables for each question, the value `hops` names away.

    There are no other chains, as is RULER's default: small models tell several apart badly.
    """

    def make(rng: random.Random, turns: int) -> Notes:
        all_names = [f"{adjective}_{noun}" for adjective in ADJECTIVES for noun in NOUNS]
        names = rng.sample(all_names, turns * (hops + 1))
        values = rng.sample(range(10_000, 100_000), turns)
        notes, questions = [], []
        for number, value in enumerate(values):
            links = names[number * (hops + 1) : (number + 1) * (hops + 1)]
            notes += [f"VAR {name} := VAR {other}" for name, other in pairwise(links)]
            notes.append(f"VAR {links[-1]} := {value}")
            questions.append(Question(f"print VAR {links[0]} ->", (str(value),)))
        rng.shuffle(notes)
        return notes, questions

    return make


def long_generation(rng: random.Random, turns: int) -> Notes:
    """As `multi_key`, but generation goes on after the first answer, and another question follows it."""
    notes, questions = multi_key(rng, max(turns, 2))
    return notes, [Question(questions[0].text, questions[0].answers, GO_ON), *questions[1:]]


TASKS: dict[str, Callable[[random.Random, int], Notes]] = {
    "single": single,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "chain1": chain(1),
    "chain2": chain(2),
    "chain3": chain(3),
    "long": long_generation,
}


def make_prompt(task: str, tokenizer: Any, context_tokens: int, turns: int, seed: str) -> Prompt:
    """Return a prompt of about `context_tokens` tokens, the same for the same interpreter and arguments.

    Raises InvalidInput where the notes alone are longer.
    """
    rng = random.Random(seed)
    notes, questions = TASKS[task](rng, turns)
    taken = sum(len(tokenizer(note + "\n", add_special_tokens=False)["input_ids"]) for note in notes)
    filler = context_tokens - taken
    if filler < context_tokens // 4:
        raise InvalidInput(
            f"the notes of {task} take {taken} tokens: {context_tokens} context tokens are too few for them"
        )
    order = rng.getrandbits(32)
    lines = filler_lines(tokenizer, filler, order)
    longer = filler_lines(tokenizer, filler + CONTINUATION, order)
    return Prompt(
        task, hide(notes, lines, rng.getrandbits(32)), tuple(questions), "".join(longer[len(lines) :])
    )


def _different(forms: list[Callable[[random.Random], Task]], rng: random.Random) -> list[Task]:
    tasks: list[Task] = []
    for form in forms:
        task = form(rng)
        while any(task.question == other.question for other in tasks):
            task = form(rng)
        tasks.append(task)
    return tasks


def _asked(task: Task) -> Question:
    return Question(task.question, (task.answer,))
