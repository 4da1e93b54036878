"""The lens's picture shows the tokens and the numbers that it was given."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from basinscope.report.lens_figures import AT_ONCE, MAX_POSITIONS, lens_heat_map, readable

WORDS = [" the", "\n", "日本", "🙂", "interpretability", "$x_1$", "é", "<|endoftext|>"]
LAYERS, POSITIONS = 3, 4
DIMS = ("layer", "example", "position")


def top(positions: int = POSITIONS) -> xr.Dataset:
    draws = np.random.default_rng(0)
    shape = (LAYERS, 2, positions, 2)
    probability = draws.random(shape)
    return xr.Dataset(
        {
            "token": ((*DIMS, "k"), draws.integers(len(WORDS), size=shape)),
            "logit": ((*DIMS, "k"), 10 * probability - 5),
            "probability": ((*DIMS, "k"), probability),
        },
        coords={"layer": [0, 4, 11], "position": np.arange(positions) + 20},
    )


def measures() -> xr.Dataset:
    names = ("entropy", "kl_to_final", "cross_entropy", "rank")
    values = np.random.default_rng(1).random((4, LAYERS, 2, POSITIONS)) * 300
    values[..., -1] = np.nan
    return xr.Dataset({name: (DIMS, v) for name, v in zip(names, values, strict=True)})


def cells(figure: Figure) -> dict[tuple[float, float], str]:
    return {text.get_position(): text.get_text() for text in figure.axes[0].texts}


def colours(figure: Figure) -> np.ma.MaskedArray:
    (image,) = figure.axes[0].images
    return image.get_array()  # type: ignore[return-value]


def test_every_cell_has_its_token_and_colour() -> None:
    given = top()
    figure = lens_heat_map(given, example=1, words=lambda i: WORDS[i])
    shown = cells(figure)
    assert len(shown) == LAYERS * POSITIONS
    for layer in range(LAYERS):
        for position in range(POSITIONS):
            token = int(given["token"][layer, 1, position, 0])
            assert shown[position, layer] == readable(WORDS[token])
    np.testing.assert_array_equal(colours(figure), given["probability"][:, 1, :, 0])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "4", "11"]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]  # the last layer at the top
    assert figure.axes[1].get_ylabel() == "probability of the top token"
    ids = cells(lens_heat_map(given))
    assert ids[0, 0] == str(int(given["token"][0, 0, 0, 0]))


def test_many_positions_take_several_rows_of_one_scale() -> None:
    count = 2 * AT_ONCE + 5
    given = top(count)
    figure = lens_heat_map(given, input_ids=np.arange(count), colour="logit")
    *rows, bar = figure.axes
    assert bar.get_ylabel() == "logit of the top token"
    assert len(rows) == 3
    assert len({axes.images[0].get_clim() for axes in rows}) == 1
    for row, axes in enumerate(rows):
        part = slice(row * AT_ONCE, (row + 1) * AT_ONCE)
        expected = given["logit"][:, 0, part, 0]
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)
        shown = {text.get_position(): text.get_text() for text in axes.texts}
        assert len(shown) == expected.size
        assert shown[4, 2] == str(int(given["token"][2, 0, part.start + 4, 0]))
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == [f"{n}\n{n + 20}" for n in range(count)[part]]
        assert axes.get_xlim() == (-0.5, AT_ONCE - 0.5)
    width, height = lens_heat_map(top(MAX_POSITIONS)).get_size_inches()
    assert width < 2 * height


@pytest.mark.parametrize("colour", ["logit", "entropy", "kl_to_final", "cross_entropy", "rank"])
def test_other_colours(colour: str) -> None:
    figure = lens_heat_map(top(), colour=colour, measures=measures())
    expected = top()["logit"][..., 0] if colour == "logit" else measures()[colour]
    np.testing.assert_array_equal(colours(figure).filled(np.nan), expected[:, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(BytesIO(), dpi=50)


def test_the_axis_names_the_tokens_that_are_read() -> None:
    given = top()
    given["position"] = [-1, 3, 4, 5]
    figure = lens_heat_map(given, words=lambda i: WORDS[i], input_ids=np.array([-1, 1, 5, 2]))
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["mean", "\\n\n3", "$x_1$\n4", "\\u{65e5}…\n5"]
    given["token"][0, 0, 0, 0] = -1
    assert cells(lens_heat_map(given))[0, 0] == ""


def test_text_is_dark_on_light_and_white_on_dark() -> None:
    given = top()
    given["probability"][:] = 0.01
    given["probability"][0] = 0.99
    texts = lens_heat_map(given).axes[0].texts
    assert {t.get_color() for t in texts if t.get_position()[1] == 0} == {"white"}
    assert {t.get_color() for t in texts if t.get_position()[1] > 0} == {"#333333"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "·the"),
        ("a\n", "a\\n"),
        ("\t\x00", "\\t\\u{0}"),
        ("日本", "\\u{65e5}…"),
        ("🙂", "\\u{1f642}"),
        ("interpretability", "interpre…"),
        ("nine char", "nine·char"),
        ("Übermaß", "Übermaß"),
        ("$x$", "$x$"),
        ("", ""),
    ],
)
def test_tokens_are_made_readable(text: str, shown: str) -> None:
    assert readable(text) == shown
    assert len(shown) <= 9


def test_a_picture_has_no_missing_signs() -> None:
    figure = lens_heat_map(top(), words=lambda i: WORDS[i], input_ids=np.arange(POSITIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of them
        figure.savefig(BytesIO(), dpi=50)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"colour": "loss"}, KeyError, "no 'loss' .* there are probability, logit .and others"),
        ({"colour": "rank"}, KeyError, "no 'rank' .* if measures are given"),
        ({"input_ids": np.arange(3)}, ValueError, r"input_ids have shape \(3,\), not \(4,\)"),
        (
            {"colour": "rank", "measures": measures().isel(position=slice(3))},
            ValueError,
            r"measures have \(layer, position\) \(3, 3\), the top tokens \(3, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lens_heat_map(top(), **options)


def test_too_many_positions_are_refused() -> None:
    lens_heat_map(top(MAX_POSITIONS))
    with pytest.raises(ValueError, match="65 positions are too many to read"):
        lens_heat_map(top(MAX_POSITIONS + 1))
