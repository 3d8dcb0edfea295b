"""The well-behaved caller: `python -m tests.abuse.bystander ADDRESS KEY`.

Reads how many answers are wanted from now on, a number a line; writes a line an answer; ends with its input.
"""

import sys
import threading
import time

import grpc

from colaserve.v1 import generation_pb2, generation_pb2_grpc

REQUEST = generation_pb2.GenerateRequest(prompt="The capital of France is", max_new_tokens=8, ignore_end=True)


class Wanted:
    """Answers that are still wanted; None: no more ever."""

    def __init__(self) -> None:
        self.left: int | None = 0
        self.changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def take(self) -> bool:
        """Wait until one is wanted; False at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.left is None or self.left > 0)
            if self.left is not None:
                self.left -= 1
            return self.left is not None

    def _read(self) -> None:
        for line in sys.stdin:
            self._set(int(line))
        self._set(None)

    def _set(self, left: int | None) -> None:
        with self.changed:
            self.left = left
            self.changed.notify()


def main(address: str, key: str) -> None:
    wanted = Wanted()
    with grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        while wanted.take():
            print("begun", time.monotonic(), flush=True)
            begun, code = time.monotonic(), "OK"
            try:
                for _ in stub.Generate(REQUEST, timeout=120, metadata=(("authorization", f"Bearer {key}"),)):
                    pass
            except grpc.RpcError as error:
                code = error.code().name
            print(code, time.monotonic() - begun, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
