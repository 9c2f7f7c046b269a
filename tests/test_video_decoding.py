import pickle

import av
import numpy as np
import pytest
from torch._utils import ExceptionWrapper
from video_clips import (
    decode_all,
    hide_frame,
    number_of,
    picture,
    turn,
    write_folder,
    write_padded_video,
    write_video,
)

from temporal_excite.video import FrameCountError, VideoError, decoding, open_frames, play, read_frames
from temporal_excite.video.decoding import VideoFile

UNEVEN = [sum([1, 4, 9, 2, 30][k % 5] for k in range(i)) for i in range(40)]  # variable frame rate

# name -> how it is written, and whether time stamps suffice (otherwise it is decoded in order)
VIDEOS = {
    "long_gop.mp4": ({"options": {"g": "250"}}, True),
    "short_gop.mp4": ({"options": {"g": "7"}}, True),
    "b_frames.mp4": ({"options": {"g": "24", "bf": "5", "x264-params": "b-adapt=0:scenecut=0"}}, True),
    "open_gop.mkv": ({"options": {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-adapt=0"}}, True),
    "open_gop.mp4": ({"options": {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-adapt=0"}}, True),
    "refresh.mkv": ({"options": {"g": "12", "x264-params": "intra-refresh=1:bframes=0"}}, False),
    "uneven.mp4": ({"times": UNEVEN, "options": {"g": "10"}}, True),
    "uneven.mkv": ({"times": UNEVEN, "options": {"g": "10"}}, True),
    "intra.mp4": ({"options": {"g": "1"}}, True),
    "fragments.mp4": (
        {"options": {"g": "12", "bf": "2"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
        True,
    ),
    "vp9.webm": (
        {"codec": "libvpx-vp9", "options": {"g": "12", "lag-in-frames": "16", "cpu-used": "8"}},
        True,
    ),
    "vp8.webm": (
        {"codec": "libvpx", "options": {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}},
        True,
    ),
    "plain.avi": ({"codec": "mpeg4", "gop": 12, "max_b_frames": 0}, True),
    "b_frames.avi": ({"codec": "mpeg4", "gop": 12, "max_b_frames": 2}, False),
    "motion_jpeg.avi": ({"codec": "mjpeg"}, True),
    "one_frame.mp4": ({"frames": 1}, True),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_sought_frames_are_those_of_a_full_decode(name, tmp_path, monkeypatch):
    options, by_time = VIDEOS[name]
    path = write_video(tmp_path / name, **options)
    frames = decode_all(path)
    assert [number_of(frame) for frame in frames] == list(range(options.get("frames", 40)))
    in_order = []
    plain = VideoFile._read_in_order
    monkeypatch.setattr(VideoFile, "_read_in_order", lambda *a: (in_order.append(1), plain(*a))[1])
    everything = list(range(len(frames)))
    samples = np.random.default_rng(0).integers(0, len(frames), (4, 8)).tolist()
    with open_frames(path) as video:
        assert len(video) == len(frames)
        for indices in [everything, everything[::-1], *samples, *([i] for i in everything)]:
            got = video.read(indices)
            assert got.shape == (len(indices), 3, *frames[0].shape[:2])
            for k, i in enumerate(indices):
                assert np.array_equal(got[k].permute(1, 2, 0).numpy(), frames[i]), (indices, i)
    assert bool(in_order) != by_time


def test_only_frames_near_the_sample_are_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", frames=100, options={"g": "10", "bf": "0"})
    with VideoFile(path) as video:
        converted = []
        plain = decoding.to_rgb
        monkeypatch.setattr(decoding, "to_rgb", lambda f, by: (converted.append(f.pts), plain(f, by))[1])
        fed = []
        demux = video._container.demux

        class Container:
            def __getattr__(self, name):
                return getattr(container, name)

            def demux(self, stream):
                for packet in demux(stream):
                    fed.append(packet.pts)
                    yield packet

        container = video._container
        video._container = Container()
        video.read([55])
    assert len(converted) == 1
    assert len(fed) <= 10  # from key frame 50 on (here one more group at most), not from 0


@pytest.mark.parametrize(
    ("pattern", "first"),
    [("{:05d}.jpg", 1), ("img_{:05d}.jpg", 1), ("frame{:06d}.png", 0), ("{:d}.jpeg", 7)],
)
def test_frame_folders(pattern, first, tmp_path):
    folder = write_folder(tmp_path / "clip", 12, pattern, first)
    (folder / "notes.txt").write_text("not a picture")
    for given in (None, pattern):
        with open_frames(folder, given) as frames:
            assert len(frames) == 12
            got = frames.read([11, 0, 3, 3])
    assert [number_of(g.permute(1, 2, 0).numpy()) for g in got] == [11, 0, 3, 3]


def test_folders_of_two_kinds_need_a_pattern(tmp_path):
    folder = write_folder(tmp_path / "clip", 5, "img_{:05d}.jpg")
    write_folder(tmp_path / "flow", 5, "flow_x_{:05d}.jpg")
    for file in (tmp_path / "flow").iterdir():
        file.rename(folder / file.name)
    with pytest.raises(VideoError, match=r"clip: holds several kinds of pictures, flow_x_\*.jpg \(5\), img_"):
        open_frames(folder)
    assert len(open_frames(folder, "img_{:05d}.jpg")) == 5
    with pytest.raises(VideoError, match=r"holds no pictures named '\{:05d\}.jpg'"):
        open_frames(folder, "{:05d}.jpg")


def test_pictures_as_the_camera_was_held(tmp_path):
    from PIL import Image

    upright = Image.fromarray(picture(0, 24, 32))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    (tmp_path / "a").mkdir()
    turned.save(tmp_path / "a" / "1.png", exif=exif)
    upright.save(tmp_path / "a" / "2.png")
    frames = read_frames(tmp_path / "a", [0, 1])
    assert frames[0].equal(frames[1])


def test_broken_folders_are_named(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty: holds no numbered pictures"):
        open_frames(tmp_path / "empty")
    gap = write_folder(tmp_path / "gap", 6)
    (gap / "00004.jpg").unlink()
    with pytest.raises(VideoError, match="gap: picture number 4 is missing"):
        open_frames(gap)
    for name, content in (("garbage", b"no picture"), ("nothing", b""), ("half", None)):
        folder = write_folder(tmp_path / name, 6)
        file = folder / "00003.jpg"
        file.write_bytes(file.read_bytes()[:600] if content is None else content)
        assert len(read_frames(folder, [0, 1, 3, 4, 5])) == 5
        with pytest.raises(VideoError, match=f"{name}/00003.jpg: not a readable picture"):
            read_frames(folder, [2])
    from PIL import Image

    deep = write_folder(tmp_path / "deep", 3, "{:d}.png")
    Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(deep / "2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    with pytest.raises(VideoError, match="not a readable picture: Image size"):
        open_frames(tmp_path / "deep").read([0])
    monkeypatch.undo()
    with pytest.raises(VideoError, match=r"deep/2\.png: a grey picture of more than 8 bits: convert"):
        read_frames(deep, [1])
    mixed = write_folder(tmp_path / "mixed", 3)
    Image.fromarray(picture(0, 24, 32)).save(mixed / "00002.jpg")
    with pytest.raises(VideoError, match="mixed: frames of different sizes"):
        read_frames(mixed, [0, 1])


def test_broken_files_are_named(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.mp4: no such file or folder"):
        read_frames(tmp_path / "gone.mp4", [0])
    whole = write_video(tmp_path / "whole.mp4").read_bytes()
    for name, content in (
        ("empty.mp4", b""),
        ("text.avi", b"not a video at all"),
        ("no_index.mp4", whole[: len(whole) // 2]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(VideoError, match=f"{name}: "):
            read_frames(path, [0])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"sound\.mp4: holds no video stream"):
        read_frames(tmp_path / "sound.mp4", [0])


def test_a_file_cut_short_gives_its_frames_or_an_error(tmp_path):
    whole = write_video(
        tmp_path / "whole.mp4", 40, options={"g": "10"}, container_options={"movflags": "faststart"}
    )
    reference = decode_all(whole)
    content = whole.read_bytes()
    for part in (0.5, 0.7, 0.9):
        path = tmp_path / f"cut{part}.mp4"
        path.write_bytes(content[: int(len(content) * part)])
        try:
            with open_frames(path) as video:
                length = len(video)
                assert length < 40
                got = video.read(list(range(length)))
        except VideoError as error:
            assert path.name in str(error)
            continue
        # never a frame that is not the video's: the last one may be damaged
        for i in range(length - 1):
            assert np.array_equal(got[i].permute(1, 2, 0).numpy(), reference[i])


def test_names_with_colons_are_no_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_video(tmp_path / "12:30:05.avi", 5, options={"bf": "3"})
    assert len(read_frames(path.name, range(5))) == 5
    with play(path.name) as frames:
        assert len(list(frames)) == 5


def test_index_errors_name_the_range(tmp_path):
    folder = write_folder(tmp_path / "clip", 4)
    for index in (4, -1):
        with pytest.raises(IndexError, match=rf"clip: frame {index} asked for, .* 0 \.\. 3"):
            read_frames(folder, [index])


def test_errors_cross_process_borders(tmp_path):
    for error in (VideoError(tmp_path, "broken"), VideoError("all"), FrameCountError(tmp_path, 5, 3)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
    # as a DataLoader gives a worker's error on
    with pytest.raises(VideoError, match=f"(?s)worker process 0.*{tmp_path}: broken"):
        ExceptionWrapper((VideoError, VideoError(tmp_path, "broken"), None), "in worker process 0").reraise()


@pytest.mark.parametrize("sought", [True, False])
@pytest.mark.parametrize(
    "matrix",
    [
        *((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),  # turned clockwise by 0, 90, 180, 270
        *((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)),  # mirrored too
    ],
)
def test_frames_are_turned_as_the_display_matrix_says(matrix, sought, tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 3)
    plain = decode_all(path)[1]
    a, b, c, d = matrix
    # ISO/IEC 14496-12: the pixel at column x, row y is shown at (a x + c y, b x + d y), moved to start at 0
    shown = {(b * x + d * y, a * x + c * y): plain[y, x] for y in range(48) for x in range(64)}
    top, left = min(y for y, _ in shown), min(x for _, x in shown)
    expected = np.zeros((64, 48, 3) if b else (48, 64, 3), np.uint8)
    for (y, x), pixel in shown.items():
        expected[y - top, x - left] = pixel
    if matrix == (0, 1, -1, 0):
        assert np.array_equal(expected[:, -1], plain[0])  # clockwise: the top row becomes the right column
    if not sought:
        monkeypatch.setattr(VideoFile, "_seek_and_read", VideoFile._read_in_order)
    assert np.array_equal(read_frames(turn(path, matrix), [1])[0].permute(1, 2, 0).numpy(), expected)


def test_packets_without_a_picture(tmp_path):
    path = write_padded_video(tmp_path / "v.avi", 40, [40] * 8)
    reference = decode_all(path)
    count = len(reference)  # FFmpeg may show the last frame once more
    assert count in (40, 41)
    with open_frames(path) as video:
        assert len(video) == 48
        got = video.read([39, 5])
        assert np.array_equal(got[0].permute(1, 2, 0).numpy(), reference[39])
        with pytest.raises(FrameCountError, match=rf"v\.avi: holds {count} frames .* announces 48") as caught:
            video.read([3, count])
        assert (caught.value.num_frames, caught.value.announced) == (count, 48)
        assert np.array_equal(video.read([5])[0].permute(1, 2, 0).numpy(), reference[5])


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv"])
def test_packets_without_a_picture_in_the_middle_count_for_none(suffix, tmp_path):
    path = write_padded_video(tmp_path / f"v.{suffix}", 40, [13, 13, 27])
    reference = decode_all(path)
    with open_frames(path) as video:
        for i in [39, 12, 13, 14, 30]:
            assert np.array_equal(video.read([i])[0].permute(1, 2, 0).numpy(), reference[i])


def test_vp8_frames_that_are_not_shown_count_for_none(tmp_path):
    path = write_video(tmp_path / "v.webm", 40, "libvpx", {"g": "12", "lag-in-frames": "0"})
    path = hide_frame(path, 17)
    reference = decode_all(path)
    assert len(reference) == 39
    with open_frames(path) as video:
        assert len(video) == 39 and video._times is not None
        for i in [38, 11, 16, 17, 18, 25]:
            assert np.array_equal(video.read([i])[0].permute(1, 2, 0).numpy(), reference[i])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.mp4", {"options": {"g": "10", "bf": "0"}}),
        ("v.webm", {"codec": "libvpx-vp9", "options": {"g": "10", "cpu-used": "8"}}),
        ("v.avi", {"codec": "mpeg4", "gop": 10, "max_b_frames": 0}),
        ("motion.avi", {"codec": "mjpeg"}),
    ],
)
@pytest.mark.parametrize("victim", [10, 14])
def test_bit_errors_stay_within_their_group(name, options, victim, tmp_path):
    """A damaged frame gives an error or what FFmpeg makes of it; the frames of other groups are exact."""
    path = write_video(tmp_path / name, 40, **options)
    reference = decode_all(path)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    start, size = packets[victim]
    content[start + size // 4 : start + 3 * size // 4] = bytes(3 * size // 4 - size // 4)
    path.write_bytes(content)
    differing = set()
    with open_frames(path) as video:
        for i in [*range(40), 5]:
            try:
                frame = video.read([i])[0].permute(1, 2, 0).numpy()
            except VideoError as error:
                assert str(error).startswith(f"{path}: ")
                differing.add(i)
                continue
            assert frame.std() > 5  # no blank picture
            if not np.array_equal(frame, reference[i]):
                differing.add(i)
    assert victim in differing and differing <= set(range(10, 20))
