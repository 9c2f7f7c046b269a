"""From video files and annotation lists to batches of clips (extra ``video``)."""

from .annotations import FORMATS, AnnotationError, Record, read_annotations, read_labels
from .dataset import VideoDataset
from .decoding import FrameCountError, VideoError, open_frames, read_frames
from .playing import Frame, play
from .sampling import SegmentSampler
from .transforms import flip_pairs, normalisation, test_transform, train_transform

__all__ = [
    "FORMATS",
    "AnnotationError",
    "Frame",
    "FrameCountError",
    "Record",
    "SegmentSampler",
    "VideoDataset",
    "VideoError",
    "flip_pairs",
    "normalisation",
    "open_frames",
    "play",
    "read_annotations",
    "read_frames",
    "read_labels",
    "test_transform",
    "train_transform",
]
