"""The lessons of the demo model: well formed, without doubles, and asked in enough ways."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from gguforge.distill.demo.data import Talk, ask, batches, mistype, plain
from gguforge.distill.demo.lessons import Course, questions, read_course, readings
from gguforge.distill.demo.tokenizer import Tokenizer, train_tokenizer
from gguforge.quant.errors import InputError


@pytest.fixture(scope="module")
def course() -> Course:
    return read_course()


@pytest.fixture(scope="module")
def talk(course: Course) -> Talk:
    return Talk(course, seed=3)


def test_every_lesson_has_wordings_and_answers(course: Course, talk: Talk) -> None:
    assert len(course.lessons) >= 200
    for lesson in course.lessons:
        assert len(talk.questions[lesson.topic]) >= 6, lesson.topic
        assert 1 <= len(lesson.answers) <= 3, lesson.topic
        assert all(answer[-1] in ".!?" for answer in lesson.answers + lesson.more), lesson.topic
        assert all(len(answer.split()) <= 50 for answer in lesson.answers + lesson.more), lesson.topic


def test_no_topic_and_no_question_comes_twice(course: Course, talk: Talk) -> None:
    assert [topic for topic, count in Counter(lesson.topic for lesson in course.lessons).items() if count > 1] == []
    owners = Counter(
        plain(question) for asked in talk.questions.values() for question in dict.fromkeys(map(plain, asked))
    )
    assert [question for question, count in owners.items() if count > 1] == []


def test_held_out_questions_are_not_trained(course: Course, talk: Talk) -> None:
    trained = {plain(question) for asked in talk.questions.values() for question in asked}
    held_out = [plain(question) for lesson in course.lessons for question in lesson.held_out]
    assert len(held_out) >= 200
    assert [question for question in held_out if question in trained] == []


def test_every_dialogue_begins_with_known_questions(course: Course, talk: Talk) -> None:
    assert len(course.dialogues) >= 10
    for dialogue in course.dialogues:
        assert len(dialogue.questions) >= 2
        assert all(plain(question) in talk.known for question in dialogue.questions[:-1]), dialogue


def test_pattern_with_choices_options_and_lists() -> None:
    pattern = "what is (a|the) <thing> [now]"
    assert list(readings(pattern, {"thing": ["block"]})) == [
        "what is a block now",
        "what is a block",
        "what is the block now",
        "what is the block",
    ]


def test_huge_pattern_is_sampled_the_same_way_each_time(course: Course) -> None:
    foreign = course.lesson("foreign")
    assert 1000 < len(questions(foreign.patterns, course.lists)) < 20_000
    assert questions(foreign.patterns, course.lists) == questions(foreign.patterns, course.lists)


def test_a_line_that_means_nothing_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "lessons.txt"
    path.write_text("[hello]\n? hello\n! Hello!\n%% what\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"lessons.txt:4: line is not understood \(found '%% what'\)"):
        read_course(path)


def test_wording_varies_but_names_with_digits_stay_whole() -> None:
    chance = random.Random(0)
    asked = {ask("how do I make a Q4_K_M file", chance) for _ in range(200)}
    assert len(asked) > 60
    assert all("q4_k_m" in text.lower() for text in asked)
    assert mistype("what is Q4_K_M", random.Random(1)).endswith(" is Q4_K_M")


def test_the_same_seed_gives_the_same_conversations(course: Course) -> None:
    one, two = Talk(course, 5), Talk(course, 5)
    assert [one.conversation() for _ in range(50)] == [two.conversation() for _ in range(50)]
    assert [Talk(course, 6).conversation() for _ in range(5)] != [Talk(course, 5).conversation() for _ in range(5)]


def test_conversations_alternate_and_end_with_an_answer(talk: Talk) -> None:
    for _ in range(300):
        roles = [role for role, _ in talk.conversation() if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(roles) >= 2


def test_batches_pack_whole_conversations_that_do_not_see_each_other(talk: Talk) -> None:
    tokenizer = Tokenizer(train_tokenizer(["What is GGUF? It is a file format."] * 3, 290))
    batch = next(batches(talk, tokenizer, rows=3, length=2048))
    filled = batch.document >= 0
    assert filled.mean() > 0.7
    assert not batch.wanted[~filled].any()
    assert (batch.tokens[batch.document == 0] != 0).all()
    ends = batch.wanted & (batch.tokens == tokenizer.end)
    assert ends.sum() >= 3
    visible = batch.visible()[0, 0]
    row = batch.document[0]
    first, second = sorted(set(row[row >= 0].tolist()))[:2]
    assert not visible[second, first]
    assert visible[second, second]
    assert not visible[first, first + 1]
    assert visible[first + 1, first]
