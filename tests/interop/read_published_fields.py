"""Whether tests/services/gateway/published_fields.json has the fields of the clients' published schemas, against which
the suite holds the gateway. With --write it is written anew."""

import json
import sys
from pathlib import Path
from typing import Any, get_type_hints

import anthropic
import openai
from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import chat, completion_create_params
from openai.types import responses as items
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params, response_input_item_param

RECORD = Path(__file__).parents[1] / "services" / "gateway" / "published_fields.json"
OPENAI, ANTHROPIC = f"openai {openai.__version__}", f"anthropic {anthropic.__version__}"
MESSAGES = (chat.ChatCompletionUserMessageParam, chat.ChatCompletionAssistantMessageParam,
            chat.ChatCompletionSystemMessageParam, chat.ChatCompletionDeveloperMessageParam)  # fmt: skip
INPUT = (items.EasyInputMessageParam, response_input_item_param.Message, items.ResponseOutputMessageParam)
SAID = (anthropic.types.UserMessageParam, anthropic.types.AssistantMessageParam, anthropic.types.SystemMessageParam)
KINDS: dict[str, tuple[str, tuple[Any, ...]]] = {  # of the gateway -> schema, what it stands for there
    "ChatRequest": (OPENAI, (chat_params.CompletionCreateParamsStreaming,)),
    "CompletionRequest": (OPENAI, (completion_create_params.CompletionCreateParamsStreaming,)),
    "Message": (OPENAI, MESSAGES),
    "TextPart": (OPENAI, (chat.ChatCompletionContentPartTextParam,)),
    "StreamOptions": (OPENAI, (chat.ChatCompletionStreamOptionsParam,)),
    "ResponsesRequest": (OPENAI, (response_create_params.ResponseCreateParamsStreaming,)),
    "InputMessage": (OPENAI, INPUT),
    "InputPart": (OPENAI, (items.ResponseInputTextParam, items.ResponseOutputTextParam)),
    "MessagesRequest": (ANTHROPIC, (message_create_params.MessageCreateParamsStreaming,)),
    "CountTokensRequest": (ANTHROPIC, (message_count_tokens_params.MessageCountTokensParams,)),
    "ConversationMessage": (ANTHROPIC, SAID),
    "TextBlock": (ANTHROPIC, (anthropic.types.TextBlockParam,)),
    "Metadata": (ANTHROPIC, (anthropic.types.MetadataParam,)),
}
published = {
    name: {"schema": schema, "fields": sorted({field for kind in kinds for field in get_type_hints(kind)})}
    for name, (schema, kinds) in KINDS.items()
}
if "--write" in sys.argv:
    rows = [f" {json.dumps(name)}: {json.dumps(fields)}" for name, fields in published.items()]
    RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
recorded = json.loads(RECORD.read_text(encoding="utf-8"))
assert recorded == published, {name: published[name] for name in published if recorded.get(name) != published[name]}
