import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smallcap.captions.vectors import check_dim, unit_vectors
from smallcap.errors import SchemaError

MATRICES = st.sampled_from(["<f2", "<f4", "<f8", ">f4"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5), elements={"allow_nan": True})
)


@given(MATRICES)
def test_vectors_have_unit_length_and_their_direction_or_are_none(matrix: np.ndarray) -> None:
    before = matrix.copy()
    kept = np.float16 if matrix.dtype.itemsize == 2 else np.float32
    with np.errstate(over="ignore"):
        rows = matrix.astype(np.float32).astype(np.float64)
    for row, raw in zip(rows, unit_vectors(matrix), strict=True):
        if np.isfinite(row).all() and row.any():
            assert raw is not None
            unit = np.frombuffer(raw, kept).astype(np.float64)
            assert abs(np.linalg.norm(unit) - 1) < 3e-3
            np.testing.assert_allclose(unit, row / np.linalg.norm(row), atol=1.5e-3)
        else:
            assert raw is None
    np.testing.assert_array_equal(matrix, before)


def test_unit_vectors_are_left_to_the_bit() -> None:
    matrix = np.array([[0.6, 0.8], [0.6004, 0.8], [0.602, 0.8]], np.float32)
    matrix.setflags(write=False)
    raw = unit_vectors(matrix)
    assert raw[:2] == [matrix[0].tobytes(), matrix[1].tobytes()]
    assert raw[2] != matrix[2].tobytes()
    half = matrix.astype(">f2")
    assert unit_vectors(half)[0] == half[0].astype("<f2").tobytes()
    assert unit_vectors(np.empty((0, 4), np.float32)) == []


def test_length() -> None:
    check_dim(4, None, "x")
    check_dim(4, 4, "x")
    for found, dim in ((0, None), (3, 4)):
        with pytest.raises(SchemaError, match="wrong length"):
            check_dim(found, dim, "x")
