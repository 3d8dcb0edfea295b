import grpc
import pytest
from google.rpc import error_details_pb2
from grpc.aio import AioRpcError, Metadata

from colaserve_services import errors
from colaserve_services.rpc.errors import TABLE, error_from_rpc, grpc_code, http_status, rpc_error, status_proto


def crossed(error):
    """The error after a trip through a gRPC status."""
    return error_from_rpc(rpc_error(error))


RUNTIME = [
    errors.InvalidRequest("canvas.open[3]", "got 1"),
    errors.ModelMismatch("other space"),
    errors.Overloaded("full", 0.25),
    errors.Unavailable("draining"),
    errors.NotAuthenticated("no key"),
    errors.DeadlineExceeded("late"),
    errors.Cancelled("gone"),
    errors.StepFailed("a step of the prior fails with this request"),
]


@pytest.mark.parametrize("error", RUNTIME, ids=lambda e: type(e).__name__)
def test_an_error_crosses_a_service_border_unchanged(error):
    again = crossed(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_the_table_names_every_error_that_a_call_can_end_with():
    at_start_only = {errors.CheckpointError, errors.UsageError}
    kinds = {kind for kind in errors.ColaserveError.__subclasses__() if kind.__module__ == errors.__name__}
    assert set(TABLE) | at_start_only == kinds


@pytest.mark.parametrize("error", [RuntimeError("the password is x"), errors.CheckpointError("/secret/path")])
def test_other_errors_are_internal_and_reveal_nothing(error):
    assert grpc_code(error) == grpc.StatusCode.INTERNAL
    assert http_status(error) == 500
    status = status_proto(error)
    assert "password" not in str(status)
    assert "secret" not in str(status)


def test_only_an_internal_error_that_says_so_is_a_failed_step():
    assert (grpc_code(RUNTIME[-1]), http_status(RUNTIME[-1])) == (grpc.StatusCode.INTERNAL, 500)
    (detail,) = status_proto(RUNTIME[-1]).details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.reason, info.domain) == ("STEP_FAILED", "colaserve")
    assert type(crossed(RuntimeError("a bug"))) is errors.ColaserveError


def test_a_long_message_is_cut_so_that_it_fits_a_header():
    status = status_proto(errors.InvalidRequest("stop[0]" * 100, "x" * 100_000))
    assert len(status.SerializeToString()) < 4000


def test_a_status_of_another_program_is_understood_without_details():
    error = error_from_rpc(AioRpcError(grpc.StatusCode.INVALID_ARGUMENT, Metadata(), Metadata(), "bad", ""))
    assert (type(error), error.field) == (errors.InvalidRequest, "request")
    unknown = error_from_rpc(AioRpcError(grpc.StatusCode.ABORTED, Metadata(), Metadata(), "lost", ""))
    assert type(unknown) is errors.ColaserveError
    assert "ABORTED" in str(unknown)
