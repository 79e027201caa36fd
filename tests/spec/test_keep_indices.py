from __future__ import annotations

import numpy as np
import pytest

from gap_export.errors import BundleError
from gap_export.spec.keep_indices import check_keep_indices


def check(keep, *, kept=3, ascending=True):
    check_keep_indices(
        np.array(keep),
        num_visual_tokens=9,
        num_kept_tokens=kept,
        ascending=ascending,
        error=BundleError,
        who="pruner mine",
    )


def test_different_tokens_in_order_pass_whatever_the_extra_token_is():
    check([0, 4, 8])
    check([0, 4, 8, 8])
    check([8, 0, 4], ascending=False)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ([0, 4, 9], "0..9; allowed: 3 different tokens of 0..8, ascending"),
        ([-1, 4, 8], "-1..8"),
        ([0, 4, 4], "4 more than once"),
        ([4, 0, 8], "4 before 0"),
        ([0, 4], r"of shape [2]"),
        ([0.0, 4.0, 8.0], "float64 of shape [3]"),
    ],
)
def test_others_are_refused_with_what_is_wrong(keep, says):
    with pytest.raises(BundleError, match="pruner mine does not keep what it should") as caught:
        check(keep)
    assert says in str(caught.value)


def test_repeats_are_refused_in_any_order():
    with pytest.raises(BundleError, match="4 more than once"):
        check([4, 0, 4], ascending=False)
