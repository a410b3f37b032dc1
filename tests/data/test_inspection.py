"""The page that shows a cache."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pycdgkd.cli import main
from pycdgkd.report.inspection import write_inspection


def test_the_page_shows_every_subject(cache_folder: Path, tmp_path: Path) -> None:
    text = write_inspection(cache_folder, tmp_path / "page.html").read_text()
    assert "deap: 16 samples of 8 trials" in text
    assert text.count('<img src="data:image/jpeg;base64,') == 16
    assert "missed" in text.split("</style>")[0]
    assert 'class="missed"' not in text
    for name in ("s01", "s02", "valence", "liking", "recorded", "filtered"):
        assert f">{name}" in text
    assert "<p>Nothing.</p>" in text
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/\S+", "", text)
    assert not (cache_folder / "inspect.html").exists()


def test_misses_are_framed_and_names_escaped(cache_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cache_folder, folder)
    found = np.load(folder / "face_found.npy")
    found[3, 2] = found[5] = False
    np.save(folder / "face_found.npy", found)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["subjects"] = {"1": "<script>alert(1)</script>"}
    manifest["skipped"] = [[2, 3, "no face in <b>frames</b>"], [3, None, "no recording s03.bdf"]]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(folder)]) == 0
    text = (folder / "inspect.html").read_text()
    assert text.count('class="missed"') == 3
    assert text.count(": no face found, box of the nearest frame") == 2 * 3
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<li>trial 3: no face in &lt;b&gt;frames&lt;/b&gt;</li>" in text
    assert "<li>all: no recording s03.bdf</li>" in text


def test_not_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is not a cache" in capsys.readouterr().err
