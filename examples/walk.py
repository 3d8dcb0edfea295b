"""Walk through the latent space from one sentence to another, and look at the way.

colaserve up &
python examples/walk.py             # the points as text
python examples/walk.py walk.png    # and as a picture: pip install 'colaserve-client[plot]'
"""

import os
import sys

from colaserve_client import Client, Trajectory

START, END = "The capital of France is Paris.", "The capital of Japan is Tokyo."


def main() -> None:
    """Decode nine points of the great circle."""
    with Client(os.environ.get("COLASERVE_TARGET", "127.0.0.1:50051")) as client:
        points = client.interpolate(START, END, points=9)
        walk = Trajectory(points)
        for point, distance in zip(points, [0.0, *walk.distances()], strict=True):
            print(f"{point.weight:.3f}  {point.text}  (moved by {distance:.3f})")
    if len(sys.argv) > 1:
        walk.plot().figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
