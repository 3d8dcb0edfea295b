"""Calls go to replicas that serve the model; a run stays with the weights and dtype that began it."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from grpc import StatusCode

from colaserve.v1 import generation_pb2
from colaserve_services.coordinator import Call
from colaserve_services.coordinator.generation import generate
from colaserve_services.errors import AT_FAULT, StepFailed, Unavailable
from colaserve_services.rpc.local import LocalStub
from colaserve_services.text import Tokenizer
from tests.services.coordinator.conftest import counted, over
from tests.services.coordinator.stage_fakes import SPACE, Fake, FakeDecoder, FakeEncoder, FakePrior
from tests.services.coordinator.test_failover import REQUEST, reported
from tests.waiting import eventually

KINDS = {"encoder": FakeEncoder, "prior": FakePrior, "decoder": FakeDecoder}


@dataclass
class FakeReplica:
    """A replica that can end, come back and be cut off."""

    fake: Fake
    address: str
    serving: bool = True
    lives: int = 0

    @property
    def stub(self) -> Any:
        return LocalStub(self.fake)

    def begin_anew(self, fake: Fake) -> None:
        self.fake, self.lives, self.serving = fake, self.lives + 1, True


class Fleet:
    """Replicas of each stage, and a coordinator over them."""

    def __init__(self, tokenizer: Tokenizer, count: int):
        self.replicas = {
            stage: [FakeReplica(kind(), f"{stage}-{index}") for index in range(count)] for stage, kind in KINDS.items()
        }
        self.coordinator = over(self.replicas, tokenizer, space=SPACE, watch_seconds=0.01)

    async def generate(self) -> list[generation_pb2.GenerateResponse]:
        request = generation_pb2.GenerateRequest(**REQUEST)
        return [response async for [response] in generate(self.coordinator.services, request, Call())]

    def faults(self) -> dict[tuple[str, ...], float]:
        return counted(self.coordinator.services.metrics, "stage_faults_total")

    def calls(self, stage: str) -> list[int]:
        return [len(replica.fake.calls) for replica in self.replicas[stage]]


@pytest.fixture
async def fleet(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Fleet:
    """Connected; `param`: how many replicas each stage has."""
    fleet = Fleet(tokenizer, getattr(request, "param", 2))
    await fleet.coordinator.connect()
    return fleet


of_three = pytest.mark.parametrize("fleet", [3], indirect=True)


async def test_calls_go_round_over_the_replicas_that_serve(fleet: Fleet):
    for _ in range(4):
        await fleet.generate()
    assert [fleet.calls(stage) for stage in KINDS] == [[2, 2]] * 3
    fleet.replicas["prior"][0].serving = False
    for _ in range(4):
        await fleet.generate()
    assert fleet.calls("prior") == [2, 6]


@pytest.mark.parametrize("stage", KINDS)
async def test_another_attempt_goes_to_another_replica(fleet: Fleet, stage: str):
    undisturbed = reported(await fleet.generate())
    fleet.replicas[stage][0].fake.spoils = dict.fromkeys(
        range(100), lambda response: setattr(response.timing, "queue_us", 2**60)
    )
    for _ in range(4):
        assert reported(await fleet.generate()) == undisturbed
    assert fleet.faults() == {(stage, "timing"): 2}  # of the four, those that began there


async def test_a_replica_of_another_checkpoint_is_left_out_and_the_fleet_stays_ready(fleet: Fleet):
    undisturbed, told_ready = reported(await fleet.generate()), list[bool]()
    watching = asyncio.create_task(fleet.coordinator.watch(told_ready.append))
    for replicas in fleet.replicas.values():
        replicas[0].begin_anew(type(replicas[0].fake)(space="f" * 16))
    await eventually(lambda: fleet.faults().keys() == {(stage, "model") for stage in KINDS})
    for _ in range(4):
        assert reported(await fleet.generate()) == undisturbed
    assert fleet.coordinator.ready
    assert told_ready == []
    assert [fleet.calls(stage)[0] for stage in KINDS] == [0] * 3
    assert all(stage.space == SPACE for stage in (await fleet.coordinator.generation_info()).stages)
    watching.cancel()


async def test_a_stage_without_a_replica_of_the_model_makes_the_coordinator_unready(fleet: Fleet):
    watching = asyncio.create_task(fleet.coordinator.watch(lambda ready: None))
    for replica in fleet.replicas["decoder"]:
        replica.begin_anew(FakeDecoder(space="f" * 16))
    await eventually(lambda: not fleet.coordinator.ready)
    with pytest.raises(Unavailable, match="no replica of the decoder is ready"):
        await fleet.generate()
    watching.cancel()


@pytest.mark.parametrize("told_apart", [{"weights": "b" * 16}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("stage", ["prior", "decoder"])
async def test_a_run_stays_with_the_weights_and_dtype_that_began_it(tokenizer, stage: str, told_apart: dict[str, str]):
    fleet = Fleet(tokenizer, count=4)
    for index, replica in enumerate(fleet.replicas[stage]):
        brand = {"weights": "a" * 16, "dtype": "float32"} | (told_apart if index % 2 else {})
        for name, value in brand.items():
            setattr(replica.fake, name, value)
        replica.fake.faults = {0: (1, StatusCode.UNAVAILABLE)}  # each breaks its first run after a block
    await fleet.coordinator.connect()
    await fleet.generate()
    calls = fleet.calls(stage)
    assert sum(calls) == 3  # both of the brand broke it, and one of them went on
    assert {sum(calls[::2]), sum(calls[1::2])} == {0, 3}


async def test_a_run_whose_brand_is_gone_ends_and_new_ones_run_on_the_others(fleet: Fleet):
    for replica in fleet.replicas["prior"]:
        replica.fake.weights = "a" * 16
    await fleet.coordinator.look()
    old = [replica.fake for replica in fleet.replicas["prior"]]
    for fake in old:
        fake.faults = {0: (1, StatusCode.UNAVAILABLE)}
        fake.gate.clear()
    running = asyncio.create_task(fleet.generate())
    await eventually(lambda: sum(fleet.calls("prior")) == 1)
    for replica in fleet.replicas["prior"]:
        replica.begin_anew(FakePrior(weights="b" * 16))
    await fleet.coordinator.look()
    for fake in old:
        fake.gate.set()
    with pytest.raises(Unavailable, match="of the weights and dtype that began this run is ready"):
        await running
    assert await fleet.generate()


async def test_replicas_that_name_no_weights_are_trusted(fleet: Fleet):
    undisturbed = reported(await fleet.generate())
    first, second = fleet.replicas["prior"]
    first.begin_anew(FakePrior(weights="a" * 16, dtype="float32"))
    await fleet.coordinator.look()
    for replica in (first, second):
        replica.fake.faults = {len(replica.fake.calls): (1, StatusCode.UNAVAILABLE)}
    assert reported(await fleet.generate()) == undisturbed


async def test_what_a_replica_said_counts_until_its_connection_changes(fleet: Fleet):
    """Behind the same address there may be another checkpoint by then."""
    await fleet.generate()
    before = fleet.calls("prior")
    fleet.replicas["prior"][0].begin_anew(FakePrior(space="f" * 16))
    await fleet.generate()
    await fleet.generate()
    assert fleet.calls("prior") == [0, before[1] + 2]


@of_three
@pytest.mark.parametrize("ends", [True, False], ids=["processes end", "engines are at fault"])
@pytest.mark.parametrize("stage", KINDS)
async def test_a_run_that_took_two_replicas_with_it_is_not_carried_to_a_third(fleet: Fleet, stage: str, ends: bool):
    for replica in fleet.replicas[stage]:
        if ends:
            ends_with_the_run(replica)
        else:
            replica.fake.faults = {0: (0, Unavailable("the engine is at fault: Broken"))}
            replica.fake.at_fault_after = 1
    with pytest.raises(StepFailed, match=f"two replicas of the {stage} failed or ended"):
        await fleet.generate()
    assert sorted(fleet.calls(stage)) == [0, 1, 1]
    assert [replica.serving for replica in fleet.replicas[stage]].count(False) == (2 if ends else 0)
    assert fleet.coordinator.services.admission.running == 0


@of_three
@pytest.mark.parametrize("stage", KINDS)
async def test_an_engine_that_was_at_fault_before_a_run_came_does_not_make_it_guilty(fleet: Fleet, stage: str):
    undisturbed, answers = reported(await fleet.generate()), ["the engine is at fault: Broken", AT_FAULT]

    async def fail(fault: Any, context: Any) -> None:
        if answers:
            raise Unavailable(answers.pop(0))

    for fake in (replica.fake for replica in fleet.replicas[stage]):
        fake.faults, fake.fail, fake.at_fault_after = {len(fake.calls): (0, True)}, fail, len(fake.calls) + 1
    assert reported(await fleet.generate()) == undisturbed
    assert sum(fleet.calls(stage)) == 4


@of_three
@pytest.mark.parametrize("stage", ["prior", "decoder"])
async def test_a_run_whose_two_replicas_ended_at_different_blocks_continues(fleet: Fleet, stage: str):
    undisturbed = reported(await fleet.generate())
    for replica in fleet.replicas[stage]:
        replica.begin_anew(type(replica.fake)())
    await fleet.coordinator.look()
    for replica, after in zip(fleet.replicas[stage], (1, 1, 99), strict=True):
        ends_with_the_run(replica, after)
    assert reported(await fleet.generate()) == undisturbed


async def test_connections_that_break_do_not_make_a_run_guilty(fleet: Fleet):
    undisturbed = reported(await fleet.generate())
    for replica in fleet.replicas["prior"]:
        replica.fake.faults = dict.fromkeys(range(1, 4), (0, StatusCode.UNAVAILABLE))
    assert reported(await fleet.generate()) == undisturbed


def ends_with_the_run(replica: FakeReplica, after: int = 0) -> None:
    """It ends as a process does that a request kills: its connection is lost, then nobody answers."""
    fake, fail = replica.fake, replica.fake.fail
    fake.faults = {0: (after, StatusCode.UNAVAILABLE)}

    async def end(fault: Any, context: Any) -> None:
        fake.info_fault, replica.serving = Unavailable("failed to connect to all addresses"), False
        await fail(fault, context)

    fake.fail = end
