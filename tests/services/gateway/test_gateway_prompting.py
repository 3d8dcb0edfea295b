"""Messages to a prompt."""

import pytest

from colaserve_services.gateway.dialects.chat import Message
from colaserve_services.gateway.dialects.transcript import chat_prompt, turns_of

SEVERAL = [("system", "Be short."), ("user", "Hi"), ("assistant", " Hello."), ("user", "Bye")]


@pytest.mark.parametrize(
    ("messages", "frame", "prompt"),
    [
        ([("user", " as it is\n")], "", " as it is\n"),
        ([("user", "Hi {prompt}")], "Q: {prompt}\nA:", "Q: Hi {prompt}\nA:"),
        ([("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}])], "", "a b"),
        ([("user", "x", "ann")], "not for {prompt}", "User (ann): x\nAssistant:"),
        ([("system", "x")], "", "System: x\nAssistant:"),
        ([("developer", "x")], "", "System: x\nAssistant:"),
        ([("assistant", "x")], "", "Assistant: x\nAssistant:"),
        (SEVERAL, "not for {prompt}", "System: Be short.\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:"),
    ],
)
def test_one_message_of_an_unnamed_user_is_the_prompt_and_others_make_a_transcript(
    messages: list[tuple], frame: str, prompt: str
):
    made = [Message(**dict(zip(("role", "content", "name"), one, strict=False))) for one in messages]
    assert chat_prompt(turns_of(made), frame) == prompt
