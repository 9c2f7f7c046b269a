import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temporal_excite.video import SegmentSampler

counts = st.integers(1, 400)
segments = st.integers(1, 32)
clips = st.integers(1, 10)
seeds = st.integers(0, 2**32)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=100, deadline=None)
@given(counts, segments, clips, seeds, st.sampled_from(["train", "test", "dense", "dense-train"]))
def test_indices_are_in_range_ordered_and_repeatable(num_frames, n_segment, k, seed, mode):
    sampler = SegmentSampler(n_segment, mode, k)
    indices = sampler(num_frames, generator(seed))
    assert indices.shape == (k, n_segment) and indices.dtype == torch.long
    assert indices.min() >= 0 and indices.max() < num_frames
    assert (indices.diff(dim=1) >= 0).all()
    assert torch.equal(indices, sampler(num_frames, generator(seed)))
    if not sampler.random:
        assert torch.equal(indices, sampler(num_frames, generator(seed + 1)))


@settings(max_examples=50, deadline=None)
@given(counts, segments, seeds)
def test_train_takes_one_frame_of_each_segment(num_frames, n_segment, seed):
    indices = SegmentSampler(n_segment, "train", 3)(num_frames, generator(seed))
    length = num_frames // n_segment
    if length:
        assert torch.equal(indices // length, torch.arange(n_segment).expand(3, -1))
    else:
        assert not indices.any()
        spread = SegmentSampler(n_segment, "train", 3, short="spread")(num_frames, generator(seed))
        assert torch.equal(spread, SegmentSampler(n_segment, "test")(num_frames).expand(3, -1))


@settings(max_examples=50, deadline=None)
@given(counts, segments, clips)
def test_test_positions_in_plain_arithmetic(num_frames, n_segment, k):
    from fractions import Fraction

    indices = SegmentSampler(n_segment, "test", k)(num_frames).tolist()
    for clip in range(k):
        for i in range(n_segment):
            position = Fraction(num_frames, n_segment) * (i + Fraction(2 * clip + 1, 2 * k))
            assert indices[clip][i] == position.numerator // position.denominator
            # one per segment: at or after its start, before its end
            assert num_frames * i // n_segment <= indices[clip][i] < num_frames * (i + 1) / n_segment


def test_one_test_clip_is_the_released_rule():
    for num_frames in (1, 5, 8, 37, 250):
        for n_segment in (1, 8, 16):
            tick = num_frames / n_segment
            expected = [int(tick / 2 + tick * i) for i in range(n_segment)]
            assert SegmentSampler(n_segment, "test")(num_frames)[0].tolist() == expected


def test_train_draws_every_frame_of_a_segment():
    sampler = SegmentSampler(4, "train", 200)
    indices = sampler(23, generator(0))
    for i in range(4):
        assert set(indices[:, i].tolist()) == set(range(5 * i, 5 * i + 5))


def test_dense_windows():
    indices = SegmentSampler(8, "dense", 10)(300)
    assert (indices.diff(dim=1) == 8).all()
    assert indices[0, 0] == 0 and indices[-1, 0] == 300 - 64
    assert SegmentSampler(8, "dense")(300)[0, 0] == 118
    starts = SegmentSampler(16, "dense-train", 500)(70, generator(1))[:, 0]
    assert set(starts.tolist()) == set(range(7))
    short = SegmentSampler(8, "dense", 2)(20)
    assert torch.equal(short, SegmentSampler(8, "test")(20).expand(2, -1))


def test_global_generator_when_none_is_given():
    torch.manual_seed(3)
    first = SegmentSampler(8)(100)
    torch.manual_seed(3)
    assert torch.equal(first, SegmentSampler(8)(100))
    assert not torch.equal(first, SegmentSampler(8)(100))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"'middle'.*train, test, dense"):
        SegmentSampler(8, "middle")
    with pytest.raises(ValueError, match="n_segment must be at least 1, got 0"):
        SegmentSampler(0)
    with pytest.raises(ValueError, match="clips must be at least 1, got 0"):
        SegmentSampler(8, clips=0)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        SegmentSampler(8)(0)
    with pytest.raises(ValueError, match="short must be 'first' or 'spread', got 'loop'"):
        SegmentSampler(8, short="loop")


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 32),
    st.integers(1, 10),
    st.integers(1, 100),
    st.sampled_from(["dense", "dense-train"]),
)
def test_any_window(num_frames, n_segment, k, window, mode):
    indices = SegmentSampler(n_segment, mode, k, window=window)(num_frames)
    assert indices.min() >= 0 and indices.max() < num_frames


def test_dense_starts_are_rounded_down():
    assert SegmentSampler(8, "dense")(301)[0, 0] == 118
    assert SegmentSampler(8, "dense", 10)(300)[:, 0].tolist() == [k * 236 // 9 for k in range(10)]
