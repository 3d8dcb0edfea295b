from tests.services.rpc.conftest import authority

__all__ = ["authority"]
