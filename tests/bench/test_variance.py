"""The table of standard deviations, on losses whose parts are known."""

import numpy as np
import pytest

from bench.variance import BASE, rows_of


def test_pairs_and_other_seeds():
    """A seed's own part is in both runs of a pair: it leaves the differences within pairs alone."""
    drawn = np.random.default_rng(0)
    seeds, noise = drawn.normal(size=400) * 0.03, drawn.normal(size=(2, 400)) * 0.004
    losses = {
        BASE: [{"way": 2 + s + n} for s, n in zip(seeds, noise[0])],
        "one": [{"way": 1.9 + s + n} for s, n in zip(seeds, noise[1])],
    }
    (row,) = rows_of(losses)
    assert (row["treatment"], row["loss"]) == ("one", "way")
    assert row["effect"] == pytest.approx(-0.1, abs=0.001)
    assert row["sd between seeds"] == pytest.approx(0.03, rel=0.1)
    assert row["sd within pairs"] == pytest.approx(0.004 * 2**0.5, rel=0.1)
    assert row["sd of other seeds"] == pytest.approx(0.03 * 2**0.5, rel=0.1)
