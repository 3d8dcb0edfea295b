"""Pictures of latents: heat maps, and paths through the latent space. matplotlib is loaded when one is drawn."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from colaserve_client.arrays import FloatArray
from colaserve_client.errors import invalid
from colaserve_client.latents import Latents, html_table

_LONGEST = 36  # characters of a label
_LABELS = 40  # beside so many points; more would hide each other


class Trajectory:
    """Latents in order, each with a label: points of a walk, blocks of a run, or previews of a block as it forms.

    `steps` are latents, arrays (n, d), or results that have latents: `InterpolationPoint`, `LatentBlock`, `Preview`,
    `GenerationChunk` with latents, `TextEncoding`. `labels`, one for each, stand for their own.

    >>> walk = Trajectory(client.interpolate("aaa", "ccc", points=3, interpolation="lerp"))
    >>> walk.labels, walk.distances().tolist()
    (('aaa', 'bbb', 'ccc'), [0.7071067690849304, 0.7071067690849304])
    >>> coordinates, shares = walk.plane()
    >>> coordinates.shape, float(shares.round(3)[0])
    ((3, 2), 1.0)
    """

    __slots__ = ("_labels", "_points")

    def __init__(self, steps: Iterable[Any], labels: Iterable[str] | None = None) -> None:
        found = list(steps)
        if not found:
            raise invalid("steps", "expected one or more latents, got none")
        values = [getattr(step, "latents", step) for step in found]
        self._points = tuple(Latents.of(value, f"steps[{index}]") for index, value in enumerate(values))
        self._labels = tuple(map(_label, found, range(len(found)))) if labels is None else tuple(labels)
        if len(self._labels) != len(found):
            raise invalid("labels", f"got {len(self._labels)}, expected one for each of {len(found)} latents")
        if len(dims := sorted({point.dim for point in self._points})) > 1:
            raise invalid("steps", f"latents of {dims} channels do not compare")

    @property
    def points(self) -> tuple[Latents, ...]:
        """The latents."""
        return self._points

    @property
    def labels(self) -> tuple[str, ...]:
        """What stands beside each: its text, else its block and step, else its number."""
        return self._labels

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[Latents]:
        return iter(self._points)

    def vectors(self) -> FloatArray:
        """A row for each: all numbers of latents that have one shape, else the mean over positions."""
        same = len({point.shape for point in self._points}) == 1
        return np.array([point.values.ravel() if same else point.values.mean(axis=0) for point in self._points])

    def distances(self) -> FloatArray:
        """The root mean square of what changes from each to the next, (len - 1)."""
        steps: FloatArray = np.sqrt(np.mean(np.diff(self.vectors(), axis=0) ** 2, axis=1))
        return steps

    def plane(self) -> tuple[FloatArray, FloatArray]:
        """The `vectors` in the plane of their first two principal axes, (len, 2), and the share of the variance along
        each axis, (2)."""
        vectors = self.vectors()
        centred = vectors - vectors.mean(axis=0)
        left, scales, _ = np.linalg.svd(centred, full_matrices=False)
        coordinates, shares = np.zeros((len(self), 2), np.float32), np.zeros(2, np.float32)
        count = min(len(scales), 2)
        coordinates[:, :count] = (left * scales)[:, :2]
        shares[:count] = scales[:2] ** 2 / max(float(np.sum(centred**2)), 1e-30)
        return coordinates, shares

    def plot(self, ax: Any = None, *, path: bool = True) -> Any:
        """Draw the `plane`, joined by a line if it is a `path`. Needs matplotlib: `colaserve-client[plot]`.

        ax: matplotlib's axes to draw into; None: new ones of pyplot. They are returned.
        """
        ax = _axes(ax)
        coordinates, shares = self.plane()
        if path:
            ax.plot(*coordinates.T, color="0.7", linewidth=1, zorder=1)
        ax.scatter(*coordinates.T, c=np.arange(len(self)), cmap="viridis", zorder=2)
        for label, at in zip(self.labels[:_LABELS], coordinates, strict=False):
            aside = {"xytext": (-5, 4), "ha": "right"} if at[0] > 0 else {"xytext": (5, 4)}  # towards the middle
            ax.annotate(_short(label), at, textcoords="offset points", fontsize="small", parse_math=False, **aside)
        for axis, share, name in zip((ax.xaxis, ax.yaxis), shares, ("first", "second"), strict=True):
            axis.set_label_text(f"{name} principal axis ({share:.0%} of the variance)")
        return ax

    def _repr_html_(self) -> str:
        moved = ["", *(f"{distance:.4g}" for distance in self.distances())]
        rows = zip(range(len(self)), map(_short, self.labels), moved, strict=True)
        return html_table("Trajectory: number, label, root mean square from the one before", list(rows))


def heat_map(latents: Latents, ax: Any, labels: Sequence[str]) -> Any:
    """See `Latents.plot`."""
    if labels and len(labels) != len(latents):
        raise invalid("labels", f"got {len(labels)}, expected one for each of {len(latents)} positions")
    ax = _axes(ax)
    largest = float(np.abs(latents.values).max(initial=1e-6))
    image = ax.imshow(
        latents.values.T, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest"
    )
    ax.figure.colorbar(image, ax=ax)
    ax.set_xlabel("position")
    ax.set_ylabel("channel")
    if labels:
        ax.set_xticks(range(len(labels)), map(_short, labels), rotation=90, fontsize="small", parse_math=False)
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        install = "pip install 'colaserve-client[plot]'"
        raise ModuleNotFoundError(f"pictures need matplotlib: {install}", name=error.name) from error
    return pyplot.subplots(layout="constrained")[1]


def _label(step: Any, index: int) -> str:
    if text := getattr(step, "text", "") or "".join(getattr(step, "tokens", ())):
        return str(text)
    if not hasattr(step, "step"):
        return str(index)
    return f"block {step.index}, step {step.step}" if getattr(step, "provisional", True) else f"block {step.index}"


def _short(label: str) -> str:
    line = " ".join(label.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
