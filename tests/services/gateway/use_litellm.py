"""litellm against a running gateway: whole, streamed, asynchronous, and an error. Usage: use_litellm.py URL MODEL"""

import asyncio
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched
import litellm


def main(url: str, model: str) -> None:
    litellm.telemetry = False
    common = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 8, "timeout": 60,
              "num_retries": 0}  # fmt: skip
    messages = [{"role": "user", "content": "Hello"}]
    whole = litellm.completion(messages=messages, temperature=0, seed=1, **common)
    assert whole.usage.completion_tokens == 8, whole
    assert whole.choices[0].finish_reason == "length", whole
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(messages=messages, temperature=0, seed=1, **options, **common))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    again = asyncio.run(litellm.acompletion(messages=messages, temperature=0, seed=1, **common))
    assert again.choices[0].message.content == text, again
    plain = litellm.text_completion(prompt="Hello", **{**common, "model": f"text-completion-openai/{model}"})
    assert plain.choices[0].text, plain
    refused = refusal_of(messages=messages, logit_bias={"5": 1}, **common)
    assert "logit_bias" in refused, refused


def refusal_of(**asked: Any) -> str:
    try:
        litellm.completion(**asked)
    except litellm.BadRequestError as error:
        return str(error)
    raise AssertionError("nothing was refused")


main(*sys.argv[1:])
