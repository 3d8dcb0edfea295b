"""Messages to a prompt."""

from __future__ import annotations

import pytest

from colaserve_services.gateway.prompting import chat_prompt
from colaserve_services.gateway.schemas import Message


def prompt(*messages: dict, frame: str = "") -> str:
    return chat_prompt([Message.model_validate(message) for message in messages], frame)


def test_one_message_of_a_user_is_the_prompt_itself():
    assert prompt({"role": "user", "content": " as it is\n"}) == " as it is\n"


def test_one_message_of_a_user_goes_into_the_checkpoints_frame():
    assert prompt({"role": "user", "content": "Hi {prompt}"}, frame="Q: {prompt}\nA:") == "Q: Hi {prompt}\nA:"


def test_several_messages_become_a_transcript_that_ends_where_the_answer_begins():
    text = prompt(
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello."},
        {"role": "user", "content": "Bye"},
        frame="not for {prompt}",
    )
    assert text == "System: Be short.\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:"


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_one_message_that_is_no_users_is_tagged(role: str):
    assert prompt({"role": role, "content": "x"}).endswith(": x\nAssistant:")


def test_a_name_tells_speakers_apart():
    assert prompt({"role": "user", "content": "x", "name": "ann"}) == "User (ann): x\nAssistant:"


def test_parts_of_type_text_are_joined_as_they_are():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert prompt({"role": "user", "content": parts}) == "a b"
