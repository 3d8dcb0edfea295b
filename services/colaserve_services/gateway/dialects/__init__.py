"""The APIs that the gateway speaks, a module each."""

from typing import Any, Final

from colaserve_services.gateway.dialects.base import Dialect
from colaserve_services.gateway.dialects.chat import Chat
from colaserve_services.gateway.dialects.completions import Completions
from colaserve_services.gateway.dialects.messages import Messages
from colaserve_services.gateway.dialects.responses import Responses

DIALECTS: Final[tuple[type[Dialect[Any]], ...]] = (Chat, Completions, Responses, Messages)
