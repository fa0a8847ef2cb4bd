"""Features files: what goes in comes out, and what does not fit together is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipseed.data.stamps import FileStamp
from clipseed.errors import StoreError
from clipseed.store.cams import open_cams
from clipseed.store.feature_records import Feature, feature_format
from clipseed.store.features import FeatureSet
from clipseed.store.units import Unit
from clipseed.store.writer import RecordWriter

MANIFEST = {"kind": "features", "options": {}, "model": {}, "dataset": {}}


def record(key: str, length: int = 5) -> Feature:
    rng = np.random.default_rng(len(key) + length)
    stamp = FileStamp(7, 8, bytes(range(16)))
    return Feature(key, rng.normal(size=length).astype(np.float32), (48, 64), (3, 4), stamp)


def write(path: Path, units: list[list[Feature]], manifest: dict[str, object] | None = None) -> Path:
    with RecordWriter(path, manifest or MANIFEST, feature_format(), 2) as writer:
        for index, records in enumerate(units):
            writer.write(Unit(index), records)
        writer.finish([found.id for records in units for found in records])
    return path


@pytest.mark.parametrize("name", ["f.h5", "f"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    units = [[record("a"), record("b/é")], [record("ccc")]]
    with FeatureSet(write(tmp_path / name, units), verify=True) as stored:
        assert list(stored) == ["a", "b/é", "ccc"]
        for wanted in (found for unit in units for found in unit):
            found = stored[wanted.id]
            np.testing.assert_array_equal(found.values, wanted.values)
            assert found.values.dtype == np.float32
            assert (found.size, found.grid, found.stamp) == (wanted.size, wanted.grid, wanted.stamp)


def test_what_is_none(tmp_path: Path) -> None:
    with FeatureSet(write(tmp_path / "none.h5", [])) as stored:
        assert len(stored) == 0
    with pytest.raises(StoreError, match="its offsets do not fit its data"):
        FeatureSet(write(tmp_path / "ragged.h5", [[record("a"), record("b", 6)]]))
    with pytest.raises(StoreError, match=r"its features have the lengths \[5, 6\]"):
        FeatureSet(write(tmp_path / "ragged", [[record("a")], [record("b", 6)]]))
    with pytest.raises(StoreError, match="its manifest has no 'model'"):
        FeatureSet(write(tmp_path / "other.h5", [[record("a")]], {**MANIFEST, "model": 3}))
    with pytest.raises(StoreError, match="no such features file; clipseed prompts --features makes one"):
        FeatureSet(tmp_path / "nothing.h5")
    with pytest.raises(StoreError, match="a clipseed-features file, but not a clipseed CAM file"):
        open_cams(tmp_path / "none.h5")
