"""Notes, questions and the text they hide in."""

import re

import pytest
from transformers import AutoTokenizer

from hillinfer.demo import make_demo
from hillinfer.filler import filler_lines
from hillinfer.model_directory import bundled_model
from hillinfer.tasks import Task, hide, make_tasks
from hillinfer_core.errors import InvalidInput


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model(), local_files_only=True)


def test_every_form_is_worded_as_the_model_was_trained():
    pass_key, lookup, variable = make_tasks(3, seed=5)
    note = re.fullmatch(r"The pass key for the (\w+ \w+) is (\d{6})\. Remember it\.", pass_key.note)
    assert note is not None
    name, key = note.groups()
    assert pass_key.question == f"What is the pass key for the {name}? The pass key for the {name} is"
    assert pass_key.answer == key
    note = re.fullmatch(r"key ([0-9a-f]{8}) = ([0-9a-f]{8});", lookup.note)
    assert note is not None
    assert (lookup.question, lookup.answer) == (f"lookup {note[1]} ->", note[2])
    note = re.fullmatch(r"VAR (\w+_\w+) := (\d{5})", variable.note)
    assert note is not None
    assert (variable.question, variable.answer) == (f"print VAR {note[1]} ->", note[2])


def test_the_same_seed_gives_the_same_tasks_and_another_seed_others():
    assert make_tasks(12, seed=1) == make_tasks(12, seed=1)
    assert make_tasks(12, seed=1) != make_tasks(12, seed=2)


def test_no_question_is_asked_twice():
    questions = [task.question for task in make_tasks(600)]
    assert len(set(questions)) == 600


@pytest.mark.parametrize("text", ["482913", " 482913.\n", "482913. "])
def test_the_whole_answer_is_right(text):
    assert Task("", "", "482913").is_right(text)


@pytest.mark.parametrize("text", ["", "48291", "4829130", "482914", "482913 482914"])
def test_anything_else_is_wrong(text):
    assert not Task("", "", "482913").is_right(text)


@pytest.mark.parametrize("lines", [0, 1, 3, 100])
def test_notes_stand_on_lines_of_their_own_and_nothing_is_lost(lines):
    text = [f"line {number}\n" for number in range(lines)]
    notes = [task.note for task in make_tasks(9)]
    hidden = hide(notes, text, seed=3).splitlines(keepends=True)
    assert [line for line in hidden if line in text] == text
    assert [line.rstrip("\n") for line in hidden if line not in text] == notes


@pytest.mark.parametrize("tokens", [1, 500, 4096])
def test_filler_has_the_tokens_asked_for_and_at_most_one_line_more(tokenizer, tokens):
    lines = filler_lines(tokenizer, tokens)
    assert len(tokenizer("".join(lines)).input_ids) >= tokens
    assert len(tokenizer("".join(lines[:-1])).input_ids) < tokens


def test_filler_too_long_for_the_sources_says_so(tokenizer):
    with pytest.raises(InvalidInput, match="ask for fewer"):
        filler_lines(tokenizer, 100_000_000)


def test_the_demo_asks_for_all_forms_about_notes_in_its_text(tokenizer):
    demo = make_demo(tokenizer, 2000)
    lines = demo.context.splitlines()
    assert all(task.note in lines for task in demo.tasks)
    assert {task.question.split()[0] for task in demo.tasks} == {"What", "lookup", "print"}
    assert len(demo.questions) == 4
