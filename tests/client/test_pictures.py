"""Latents and results as pictures and tables."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from colaserve_client import Client, InvalidRequest, Latents, Preview, TokenLogprobs, TopToken, Trajectory, save_latents
from colaserve_client.cli.main import main

LINE = [Latents(np.full((2, 3), step) + np.array([9, 0, 0])) for step in (0, 1, 3)]


def test_a_heat_map_shows_every_number_around_zero() -> None:
    values = np.array([[1, -4], [2, 3], [0, 0.5]], np.float32)
    axes = Latents(values).plot(Figure().subplots(), labels=["a", "$\\b$", " c\n"])
    image = axes.images[0]
    assert np.array_equal(image.get_array(), values.T)
    assert image.get_clim() == (-4, 4)
    assert [each.get_text() for each in axes.get_xticklabels()] == ["a", "$\\b$", "c"]
    axes.figure.draw_without_rendering()  # a label is no formula
    with pytest.raises(InvalidRequest, match="labels: got 1, expected one for each of 3 positions"):
        Latents(values).plot(labels=["a"])


def test_a_trajectory_is_drawn_in_the_plane_where_it_moves() -> None:
    line = Trajectory(LINE)
    coordinates, shares = line.plane()
    apart = np.diff(np.abs(coordinates[:, 0] - coordinates[0, 0]))
    assert np.allclose(apart, np.sqrt(6) * line.distances())
    assert np.allclose(line.distances(), [1, 2])
    assert np.allclose(shares, [1, 0])
    assert np.allclose(coordinates[:, 1], 0, atol=1e-5)
    axes = line.plot(Figure().subplots())
    assert "(100% of the variance)" in axes.get_xlabel()
    assert [each.get_text() for each in axes.texts] == ["0", "1", "2"]
    assert len(line.plot(Figure().subplots(), path=False).lines) == 0


def test_steps_of_several_lengths_are_compared_by_their_means() -> None:
    mixed = Trajectory([LINE[0], LINE[2][:1]], labels=["a", "b"])
    assert mixed.vectors().tolist() == [[9, 0, 0], [12, 3, 3]]
    assert mixed.labels == ("a", "b")
    assert Trajectory(LINE[:1]).plane()[0].tolist() == [[0, 0]]


def test_labels_come_of_the_results(client: Client) -> None:
    assert Trajectory(client.encode_text(["fox", "hen"])).labels == ("fox", "hen")
    assert Trajectory(client.sample_latents(max_blocks=2, seed=7)).labels == ("block 0", "block 1")
    assert Trajectory([Preview(1, 4, "", LINE[0])]).labels == ("block 1, step 4",)


@pytest.mark.parametrize(
    ("steps", "labels", "said"),
    [
        ([], None, "steps: expected one or more latents"),
        ([[[1, 2]], [1, 2]], None, r"steps\[1\]: expected an array of shape"),
        ([[[1, 2]], [[1]]], None, r"steps: latents of \[1, 2\] channels"),
        (LINE, ["a"], "labels: got 1, expected one for each of 3"),
    ],
)
def test_what_is_no_trajectory_is_refused(steps: list[object], labels: list[str] | None, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        Trajectory(steps, labels)


def test_a_notebook_shows_text_as_text(client: Client) -> None:
    result = client.generate("<b>", max_new_tokens=4, top_logprobs=1)
    evil = TokenLogprobs(1, -0.7, "<script>", (TopToken(2, -0.7, '"><img>'),))
    shown = type(result)(**{**vars(result), "text": "<i>", "logprobs": (evil,)})._repr_html_()
    assert not [tag for tag in ("<script", "<img", "<i>") if tag in shown]
    assert "&lt;script&gt;</span>" in shown
    assert "49.7%" in shown
    assert "<td>completion_tokens</td><td>4</td>" in result.usage._repr_html_()
    assert "&lt;i&gt;" in Trajectory(LINE[:1], ["<i>"])._repr_html_()


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "npy"])
@pytest.mark.parametrize("map_", [[], ["--map"]])
def test_the_command_line_draws_a_file(tmp_path: Path, suffix: str, map_: list[str]) -> None:
    source, drawn = tmp_path / f"some.{suffix}", tmp_path / "some.png"
    if suffix == "safetensors":
        save_latents(source, {"a": LINE[0], "b": LINE[1], "$c": LINE[2]})
    elif suffix == "npz":
        np.savez(source, a=LINE[0], b=LINE[1])
    else:
        np.save(source, LINE[1].values)
    assert main(["plot", str(source), "-o", str(drawn), *map_]) == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, ["-o", "some.gif"], "--output: got some.gif, expected a name that ends with .png, .svg, .pdf"),
        (None, ["-o", "some.png", "--name", "z"], "has no 'z'; it has a"),
        (b"PK", ["-o", "some.png"], "has no arrays of numbers"),
        (np.array([{}]), ["-o", "some.png"], "has no arrays of numbers"),
        (np.ones(3), ["-o", "some.png"], "a: expected an array of shape (n, d), got shape (3,)"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, capsys, content, arguments, said):
    source = tmp_path / "some.npz"
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        np.savez(source, a=LINE[0] if content is None else content)
    assert main(["plot", str(source), *arguments]) == 2
    assert said in capsys.readouterr().err
