"""The demonstration: notes hidden in the standard library's sources, four of them asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hillinfer.filler import Tokenizer, filler_lines
from hillinfer.tasks import Task, hide, make_tasks

QUESTIONS = 4
NOTES = 8
"""Twice the questions, so that the right note must be told from others of its form."""
LONGEST_ANSWER = 16
"""Tokens; every right answer is shorter."""


@dataclass(frozen=True)
class Demo:
    """A text with notes in it, and the tasks to ask about."""

    context: str
    tasks: tuple[Task, ...]

    @property
    def questions(self) -> Sequence[str]:
        """The questions in the order in which they are asked."""
        return [task.question for task in self.tasks]


def make_demo(tokenizer: Tokenizer, context_tokens: int, seed: int = 0, *, notes: int = NOTES) -> Demo:
    """Return a text of at least `context_tokens` tokens (the notes come on top) and four tasks of all forms.

    The same interpreter, tokeniser and seed give the same demo. Raises InvalidInput
    where the interpreter's sources cannot fill it.
    """
    tasks = make_tasks(notes, seed)
    context = hide([task.note for task in tasks], filler_lines(tokenizer, context_tokens, seed), seed)
    # Every second note, the last first: the questions jump about in the text.
    asked = tasks[::-2][: QUESTIONS if notes == NOTES else notes // 2]
    return Demo(context, tuple(asked))
