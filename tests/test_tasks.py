"""Tasks: lines and records to the text a model sees, symbols, and one line out."""

from __future__ import annotations

from typing import Any

import pytest

from encdec_cli.errors import DataError, UsageError
from encdec_cli.registry import tasks
from encdec_cli.tasks.dialogue import Dialogue
from encdec_cli.tasks.summarization import Summarization
from encdec_cli.tasks.task import Task
from encdec_cli.tasks.translation import Translation
from encdec_cli.text.example import Example


@pytest.mark.parametrize("name", ["translation", "summarization", "dialogue"])
def test_every_task_passes_plain_text_and_records_through(name: str) -> None:
    task = tasks.get(name)()
    assert task.source(task.read("hello there")) == "hello there"
    example = task.from_record({"source": "hello", "target": "hallo", "id": 7})
    assert (task.source(example), task.target(example), example.record["id"]) == ("hello", "hallo", 7)
    assert task.write(example, "two lines") == "two lines"


@pytest.mark.parametrize("record", [{}, {"text": "x"}, {"source": 3}, {"source": None}, {"source": "x", "target": []}])
def test_a_record_without_its_fields_is_a_data_error(record: dict[str, Any]) -> None:
    for task in (Task(), Translation(), Summarization(), Dialogue()):
        with pytest.raises(DataError, match="field"):
            task.from_record(record)


def test_translation_tags() -> None:
    task = Translation(target_language="de", tag=True, languages=["fr"])
    assert task.symbols() == ("<2de>", "<2fr>")
    assert task.source(Example("hi")) == "<2de> hi"
    assert task.source(Example("<2fr> hi")) == "<2fr> hi"
    assert task.source(Example("hi", record={"target_language": "fr"})) == "<2fr> hi"
    with pytest.raises(DataError, match="it"):
        task.source(Example("hi", record={"target_language": "it"}))
    assert Translation(target_language="de").symbols() == ()
    assert Translation(target_language="de").source(Example("hi")) == "hi"


@pytest.mark.parametrize("fields", [{"tag": True}, {"target_language": "d e"}, {"languages": ["<x>"]}])
def test_wrong_languages(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"tag: needs target_language|target_language: 'd e'|languages: '<x>'"):
        Translation(**fields)


def test_summarization_reads_the_first_words() -> None:
    assert Summarization(max_words=3).source(Example(" one two\nthree  four")) == "one two three"
    assert Summarization(max_words=0).source(Example("w " * 1000)).count("w") == 1000
    example = Summarization().from_record({"document": "long", "summary": "short"})
    assert (example.source, example.target) == ("long", "short")
    with pytest.raises(UsageError, match="max_words"):
        Summarization(max_words=-1)


def test_dialogue_keeps_the_last_turns() -> None:
    task = Dialogue(turns=2)
    assert task.symbols() == ("<turn>",)
    assert task.source(task.read("one\ttwo\tthree")) == "two <turn> three"
    assert task.source(task.read("one <turn> two <turn> three")) == "two <turn> three"
    assert task.source(task.from_record({"turns": ["one", "two", "th\nree"]})) == "two <turn> th ree"


def test_dialogue_speakers_count_back_from_the_answer() -> None:
    task = Dialogue(turns=3, speakers=["user", "system"])
    assert task.symbols() == ("<turn>", "<user>", "<system>")
    assert task.source(task.read("a\tb\tc")) == "<user> a <turn> <system> b <turn> <user> c"
    turns = [{"text": "a", "speaker": "user"}, {"text": "b", "speaker": "user"}]
    assert task.source(task.from_record({"turns": turns})) == "<user> a <turn> <user> b"
    with pytest.raises(DataError, match="nobody"):
        task.source(task.from_record({"turns": [{"text": "a", "speaker": "nobody"}]}))


@pytest.mark.parametrize("turns", [[], "text", [3], [{"speaker": "user"}], [None]])
def test_wrong_turns(turns: Any) -> None:
    with pytest.raises(DataError):
        Dialogue().from_record({"turns": turns})


@pytest.mark.parametrize("fields", [{"turns": 0}, {"speakers": ["a b"]}, {"speakers": [""]}])
def test_wrong_dialogue_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"turns|speakers"):
        Dialogue(**fields)
