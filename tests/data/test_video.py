from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from pycdgkd.data.video import read_frames, read_frames_at, sample_frames, video_fps
from pycdgkd.errors import InputError

BITS = 10


def barcode(number: int) -> npt.NDArray[np.uint8]:
    """A picture that says its own number: ten vertical bars, black for 0 and white for 1."""
    bits = [(number >> k) & 1 for k in range(BITS)]
    return np.repeat(np.repeat(np.array(bits, np.uint8)[None] * 255, 48, 0), 16, 1)[
        ..., None
    ].repeat(3, 2)


def number_of(frame: npt.NDArray[np.uint8]) -> int:
    bars = frame.reshape(48, BITS, 16, 3).mean(axis=(0, 2, 3)) > 127
    return int(sum(1 << k for k in range(BITS) if bars[k]))


def write_barcodes(
    path: Path, codec: str, count: int, options: dict[str, str], *, tag: str = ""
) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=50, options=options)
        stream.width, stream.height, stream.pix_fmt = 16 * BITS, 48, "yuv420p"
        if tag:
            stream.codec_context.codec_tag = tag
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(barcode(number), "rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module", params=["mpeg4.avi", "xvid.avi", "h264.mp4", "h264.avi"])
def barcodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """230 numbered frames: MPEG-4 plain and as XviD writes it, and H.264, both with B-frames."""
    path = tmp_path_factory.mktemp("video") / request.param
    if "h264" in request.param:
        write_barcodes(path, "libx264", 230, {"bf": "3", "preset": "veryfast"})
    elif "xvid" in request.param:
        write_barcodes(path, "mpeg4", 230, {"bf": "2"}, tag="XVID")
    else:
        write_barcodes(path, "mpeg4", 230, {})
    return path


def test_every_40th_frame_is_the_right_one(barcodes: Path) -> None:
    frames = list(sample_frames(barcodes, stride=40))
    assert [number_of(frame) for frame in frames] == [0, 40, 80, 120, 160, 200]
    assert [number_of(f) for f in sample_frames(barcodes, stride=7, max_frames=3)] == [0, 7, 14]


def test_wanted_frames_in_any_order_and_past_the_end(barcodes: Path) -> None:
    frames, numbers = read_frames(barcodes, [[200, 3], [229, 230], [3, 900]])
    assert numbers.tolist() == [3, 200, 229]
    assert [number_of(frame) for frame in frames] == [3, 200, 229]
    frames, numbers = read_frames(barcodes, [500])
    assert frames.shape == (0, 0, 0, 3)
    assert numbers.size == 0


def test_frames_nearest_to_a_time(barcodes: Path) -> None:
    wanted = [0.0, 0.011, 0.0201, 1.0, 4.58, 4.59, 5.5]
    frames, got = read_frames_at(barcodes, wanted, 0.03)
    assert got.tolist() == [True] * 6 + [False]
    assert [number_of(frame) for frame in frames] == [0, 1, 1, 50, 229, 229]
    frames, got = read_frames_at(barcodes, [], 0.03)
    assert (frames.shape, got.shape) == ((0, 0, 0, 3), (0,))


def test_claimed_rate(barcodes: Path) -> None:
    assert video_fps(barcodes) == pytest.approx(50)


def test_frames_are_counted_not_believed(real: Path) -> None:
    """A real clip whose header promises 98 frames and holds 95."""
    with av.open(str(real / "no_face.mp4")) as container:
        promised = container.streams.video[0].frames
    assert promised == 98
    assert sum(1 for _ in sample_frames(real / "no_face.mp4", stride=1)) == 95


def test_a_truncated_video_gives_what_it_has(tmp_path: Path) -> None:
    whole = tmp_path / "whole.avi"
    write_barcodes(whole, "mpeg4", 230, {})
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    frames, numbers = read_frames(cut, range(0, 230, 40))
    assert 0 < len(numbers) < 6
    assert [number_of(frame) for frame in frames] == numbers.tolist()


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.avi").write_bytes(b"")
    (tmp_path / "text.avi").write_bytes(b"no video at all\n" * 100)
    with av.open(str(tmp_path / "sound.avi"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for name, words in (
        ("none.avi", "no video at .*none.avi"),
        ("empty.avi", "empty.avi is empty"),
        ("text.avi", "cannot open video .*text.avi"),
        ("sound.avi", "sound.avi has no video stream"),
    ):
        with pytest.raises(InputError, match=words):
            read_frames(tmp_path / name, [0])


def test_a_video_leads_to_no_other_file(tmp_path: Path) -> None:
    write_barcodes(tmp_path / "a.mp4", "libx264", 30, {})
    (tmp_path / "b.avi").write_text("ffconcat version 1.0\nfile a.mp4\n")
    with av.open(str(tmp_path / "b.avi")) as container:  # opened carelessly, it does
        assert container.format.name == "concat"
    with pytest.raises(InputError, match=r"cannot open video .*b.avi"):
        read_frames(tmp_path / "b.avi", [0])


def test_damage_in_the_middle_is_an_error(study: Path, tmp_path: Path) -> None:
    content = bytearray((study / "face_video/s01/s01_trial01.avi").read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.integers(6000, len(content) - 10000, 200):
        content[place : place + 50] = bytes(50)
    (tmp_path / "bad.avi").write_bytes(content)
    with pytest.raises(InputError, match=r"bad.avi is damaged after frame \d+"):
        read_frames(tmp_path / "bad.avi", range(0, 400, 40))


def test_a_stride_below_one() -> None:
    with pytest.raises(InputError, match="stride must be at least 1; got 0"):
        next(iter(sample_frames("x.avi", stride=0)))
