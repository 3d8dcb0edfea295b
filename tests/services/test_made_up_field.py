"""A field that is added to the table of request settings, and to the proto, arrives everywhere without another line."""

import json
import runpy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import click
import pytest
from click.testing import CliRunner
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from pydantic import BaseModel, ValidationError

from colaserve.v1 import types_pb2
from colaserve_client import InvalidRequest, messages
from colaserve_client.cli import batch, options
from colaserve_client.fields import Field, Range, documented, fields_of, flat_fields
from colaserve_client.settings import Sampler
from colaserve_services import bounds
from colaserve_services.errors import CheckpointError
from colaserve_services.errors import InvalidRequest as Refused
from colaserve_services.gateway.dialects.fields import with_settings
from colaserve_services.model.generation_config import read_generation_config


@documented
@dataclass(frozen=True)
class Extended(Sampler):
    """How latents are written."""

    made_up: Annotated[int | None, Field("Stirs the noise.", Range(0, 9), 4)] = None


TABLE = fields_of(Extended)


@pytest.fixture(scope="module")
def message() -> Any:
    """types.proto's Sampler with the field."""
    file = descriptor_pb2.FileDescriptorProto()
    types_pb2.DESCRIPTOR.CopyToProto(file)
    file.name, file.package = "made_up.proto", "made.up"
    for found in file.message_type:
        for field in found.field:
            if field.type_name:
                field.type_name = field.type_name.replace(".colaserve.v1.", ".made.up.")
    sampler = next(found for found in file.message_type if found.name == "Sampler")
    sampler.oneof_decl.add(name="_made_up")
    sampler.field.add(name="made_up", number=99, type="TYPE_UINT32", label="LABEL_OPTIONAL", proto3_optional=True,
                      oneof_index=len(sampler.oneof_decl) - 1)  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("made.up.Sampler"))


def test_it_is_documented_where_it_is_used() -> None:
    assert "made_up: [4] Stirs the noise (0 to 9)." in (Extended.__doc__ or "")
    rows = runpy.run_path(str(Path(__file__).parents[2] / "scripts/generate-config-docs"))["settings_of_requests"]
    assert "| `made_up` | 4 | Stirs the noise (0 to 9). |" in list(rows(flat_fields(Extended)))


def test_the_client_sends_it_and_reads_it_back_and_checks_its_range(message: Any) -> None:
    sent = messages.settings_message(message, Extended(steps=3, made_up=7), "sampler.")
    assert (sent.steps, sent.made_up) == (3, 7)
    assert messages.read(Extended, sent) == Extended(steps=3, made_up=7)
    with pytest.raises(InvalidRequest, match=r"sampler\.made_up: got 10, expected 0 to 9"):
        messages.settings_message(message, Extended(made_up=10), "sampler.")


def test_the_command_line_and_a_batch_take_it() -> None:
    taken: list[Extended] = []

    @click.command()
    @options.grouped("sampler", options.field_options(Extended), partial(options.taken, Extended))
    def verb(sampler: Extended) -> None:
        taken.append(sampler)

    assert CliRunner().invoke(verb, ["--made-up", "5"]).exit_code == 0
    assert "Stirs the noise (0 to 9)." in CliRunner().invoke(verb, ["--help"]).output
    assert taken == [Extended(made_up=5)]
    assert batch.chosen({"prompt": "a", "made_up": 6}, Extended) == {"made_up": 6}


def test_http_requests_take_it_within_its_range() -> None:
    @with_settings(Extended)
    class Request(BaseModel):
        """A request."""

    assert getattr(Request(made_up=9), "made_up", None) == 9
    with pytest.raises(ValidationError, match="less than or equal to 9"):
        Request(made_up=10)
    assert "made_up" in Request.model_json_schema()["properties"]


def test_the_servers_default_check_and_pass_it_on(message: Any, tmp_path: Path) -> None:
    values = bounds.defaults(TABLE) | bounds.given(message(steps=3), TABLE, "sampler.")
    assert (values["steps"], values["made_up"]) == (3, 4)
    assert message(**bounds.wire(TABLE, values)).made_up == 4
    with pytest.raises(Refused, match=r"sampler\.made_up: got 10"):
        bounds.check_all(TABLE, "sampler.", values | {"made_up": 10})
    file = tmp_path / "defaults.json"
    file.write_text(json.dumps({"made_up": 8}))
    assert read_generation_config(file, TABLE).requests == {"made_up": 8}
    file.write_text(json.dumps({"made_up": 10}))
    with pytest.raises(CheckpointError, match="made_up: got 10, expected 0 to 9"):
        read_generation_config(file, TABLE)
