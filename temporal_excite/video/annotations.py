"""Annotation files: which video has which label."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One labelled video: a frame folder or a video file, whole or in part.

    ``num_frames`` frames from the 0-based frame ``start`` on; ``None``: all of them, counted when it is read.
    """

    path: Path
    label: int
    start: int = 0
    num_frames: int | None = None


class AnnotationError(ValueError):
    """A wrong line of an annotation file; the message starts with ``file:line``."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        super().__init__(f"{path}:{line}: {problem}")
        self.path = path
        self.line = line
        self.problem = problem

    def __reduce__(self) -> tuple[type, tuple[Path, int, str]]:
        return type(self), (self.path, self.line, self.problem)


@dataclass(frozen=True)
class _Source:
    """What a format's reader gets: the file and the options of read_annotations."""

    path: Path
    root: Path
    labels: list[str] | None
    subset: str
    split: int
    suffix: str | None

    def error(self, line: int, problem: str) -> AnnotationError:
        return AnnotationError(self.path, line, problem)


_Result = tuple[list[Record], list[str]]
_ITEM = re.compile(r"[\s,]*")  # between two items of a JSON list


def read_annotations(
    path: str | Path,
    format: str = "tsn",
    *,
    root: str | Path | None = None,
    labels: str | Path | Sequence[str] | None = None,
    subset: str = "train",
    split: int = 1,
    suffix: str | None = None,
) -> tuple[list[Record], list[str]]:
    """The records of an annotation file, and the class names: ``labels[record.label]``.

    ========== =================================================================================
    format     what is read
    ========== =================================================================================
    tsn        lines ``path label``, ``path num_frames label`` or ``path start end label`` (first and last
               frame, counted from 1), labels from 0
    sthv1      csv ``id;label`` of Something-Something V1, and its ``*-labels.csv``
    sthv2      json of Something-Something V2, and its ``*labels.json``
    jester     csv ``id;label`` of Jester and its ``*-labels.csv``; or the newer csv with the columns
               ``video_id``, ``label``, ``label_id``
    egogesture the folder ``labels-final-revised1``
    kinetics   csv with the columns ``label, youtube_id, time_start, time_end``
    ucf101     ``trainlist0N.txt`` or ``testlist0N.txt``, and its ``classInd.txt``
    hmdb51     the folder ``testTrainMulti_7030_splits``
    ========== =================================================================================

    Nothing is looked up in ``root`` (except Kinetics' class folders): a missing video is an error only when
    it is read. The layouts are described in docs/data.md.

    Args:
        path: the annotation file (``egogesture`` and ``hmdb51``: their folder).
        format: of the file, see the table.
        root: the folder of the videos; by default the folder of ``path``.
        labels: the class names in order, or the file that lists them; by default found beside ``path``
            (Something-Something, Jester, UCF101), taken from the annotations in alphabetical order (Kinetics,
            HMDB51), or numbers. Pass the training set's names when reading another subset of Kinetics that
            may lack classes.
        subset: "train", "val" or "test" of EgoGesture's official split, "train" or "test" of HMDB51; the
            other formats have a file for each.
        split: 1 to 3, of HMDB51.
        suffix: ending of the videos' names, ``""`` for frame folders: by default ``""`` (Something-Something
            V1, Jester, EgoGesture), ``".webm"`` (V2), ``".mp4"`` (Kinetics); in the other formats the
            annotations give it.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: an unknown format, subset or split, or no videos.
        AnnotationError: a wrong line or a label out of range, naming file and line.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown annotation format {format!r}: use one of {', '.join(FORMATS)}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no annotation file {path}")
    if isinstance(labels, str | Path):
        labels = read_labels(labels)
    folder = path if path.is_dir() else path.parent
    source = _Source(
        path,
        folder if root is None else Path(root),
        None if labels is None else list(labels),
        subset,
        split,
        suffix,
    )
    records, names = FORMATS[format](source)
    if not records:
        raise ValueError(f"{path}: no videos in it" + (f" for subset {subset!r}" if path.is_dir() else ""))
    return records, names


def read_labels(path: str | Path) -> list[str]:
    """The class names in a file: json ``{name: number}``, or one a line (also ``number name``)."""
    path = Path(path)
    if path.suffix == ".json":
        content = _json(path)
        if not isinstance(content, dict):
            raise ValueError(f'{path}: expected {{"class name": number, ..}}, got a {type(content).__name__}')
        try:
            numbers = {int(number): name for name, number in content.items()}
        except (TypeError, ValueError):
            raise ValueError(f"{path}: the classes of {{name: number}} must have whole numbers") from None
        if sorted(numbers) != list(range(len(content))):
            raise ValueError(
                f"{path}: the numbers of the {len(content)} classes are not 0 .. {len(content) - 1}"
            )
        return [numbers[i] for i in range(len(numbers))]
    names = [line for _, line in _lines(path)]
    numbered = [re.fullmatch(r"(\d+)\s+(\S.*)", name) for name in names]
    if names and all(numbered):
        numbers = {int(match[1]): match[2] for match in numbered if match}
        first = min(numbers)
        if sorted(numbers) == list(range(first, first + len(names))):
            names = [numbers[i] for i in sorted(numbers)]
    if not names:
        raise ValueError(f"{path}: lists no class names")
    if (doubled := _doubled(names)) is not None:
        raise ValueError(f"{path}: the class {doubled!r} is listed twice")
    return names


def _doubled(names: Iterable[str]) -> str | None:
    """The first name that comes more than once."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise AnnotationError(path, line, f"not a text file in UTF-8: {error.reason}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, stripped line) of the lines that are not empty."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _json(path: Path) -> object:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise AnnotationError(path, error.lineno, f"not valid JSON: {error.msg}") from error


def _json_line(path: Path, index: int) -> int:
    """The line on which item ``index`` of a JSON file that holds a list starts."""
    text = _text(path)
    position = text.index("[") + 1
    for _ in range(index):
        position = json.JSONDecoder().raw_decode(text, _ITEM.match(text, position).end())[1]  # type: ignore[union-attr]
    return text.count("\n", 0, _ITEM.match(text, position).end()) + 1  # type: ignore[union-attr]


def _beside(source: _Source, pattern: str) -> list[str]:
    """The class names given, or those of the one file beside the annotations that fits the pattern."""
    if source.labels is not None:
        return source.labels
    files = sorted(file for file in source.path.parent.glob(pattern) if file != source.path)
    if len(files) != 1:
        found = f"{len(files)} of them there" if files else "none there"
        raise FileNotFoundError(
            f"{source.path}: its class names are expected beside it in {pattern} ({found}): pass labels=FILE"
        )
    return read_labels(files[0])


def _number(names: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


def _class_of(source: _Source, line: int, name: str, numbers: dict[str, int]) -> int:
    if name not in numbers:
        what = f"unknown class {name!r}" if name else "no label (a test split without labels?)"
        raise source.error(line, f"{what}; {len(numbers)} classes are known")
    return numbers[name]


def _int(source: _Source, line: int, text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise source.error(line, f"{what} must be a whole number, got {text!r}") from None


def _tsn(source: _Source) -> _Result:
    records = []
    fields = None  # integers behind the path, as many in every line
    for line, text in _lines(source.path):
        words = text.split()
        found = 0
        while found < min(3, len(words) - 1) and re.fullmatch(r"[+-]?\d+", words[-1 - found]):
            found += 1
        if fields is None:
            fields = found
        if not fields or found < fields:
            raise source.error(
                line,
                f"expected 'path label', 'path num_frames label' or 'path start end label'"
                f"{f', with {fields} numbers as in the lines before' if fields else ''}, got {text!r}",
            )
        path, numbers = text.rsplit(maxsplit=fields)[0], [int(word) for word in words[-fields:]]
        label = numbers[-1]
        if label < 0 or (source.labels is not None and label >= len(source.labels)):
            known = f"0 .. {len(source.labels) - 1}" if source.labels is not None else "counted from 0"
            raise source.error(line, f"label {label} out of range, labels are {known}")
        start, num_frames = 0, None
        if fields == 2:
            num_frames = numbers[0]
            if num_frames < 1:
                raise source.error(line, f"a video of {num_frames} frames")
        elif fields == 3:
            first, end = numbers[:2]
            if not 1 <= first <= end:
                raise source.error(
                    line, f"frames {first} to {end}: frames are counted from 1, the last one included"
                )
            start, num_frames = first - 1, end - first + 1
        records.append(Record(source.root / (path + (source.suffix or "")), label, start, num_frames))
    count = max((record.label for record in records), default=-1) + 1
    return records, source.labels or [str(i) for i in range(count)]


def _id_and_name(source: _Source) -> _Result:
    """``id;name`` lines, or the newer csv with a header."""
    suffix = source.suffix or ""
    lines = list(_lines(source.path))
    if lines and ";" not in lines[0][1] and "," in lines[0][1]:
        return _id_and_number(source)
    names = _beside(source, "*labels.csv")
    numbers = _number(names)
    records = []
    for line, text in lines:
        video, _, name = text.partition(";")
        if not video:
            raise source.error(line, f"expected 'id;label', got {text!r}")
        label = _class_of(source, line, name.strip(), numbers)
        records.append(Record(source.root / (video.strip() + suffix), label))
    return records, names


def _id_and_number(source: _Source) -> _Result:
    names: dict[int, str] = {} if source.labels is None else dict(enumerate(source.labels))
    records = []
    for line, row in _table(source, ("video_id", "label", "label_id")):
        label = _int(source, line, row["label_id"], "label_id")
        if label < 0 or (source.labels is not None and label not in names):
            known = "counted from 0" if source.labels is None else f"0 .. {len(names) - 1}"
            raise source.error(line, f"label {label} out of range, labels are {known}")
        if names.setdefault(label, row["label"]) != row["label"]:
            raise source.error(line, f"label {label} is {row['label']!r} here and {names[label]!r} elsewhere")
        records.append(Record(source.root / (row["video_id"] + (source.suffix or "")), label))
    if (doubled := _doubled(names.values())) is not None:
        raise ValueError(f"{source.path}: the class {doubled!r} has two numbers")
    missing = next((i for i in range(len(names)) if i not in names), None)
    if missing is not None:
        raise ValueError(
            f"{source.path}: no video has label {missing}: pass labels=NAMES to name all classes"
        )
    return records, [names[i] for i in range(len(names))]


def _table(source: _Source, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a csv file with a header, as (line number, row)."""
    reader = csv.DictReader(io.StringIO(_text(source.path)), strict=True)
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise source.error(1, f"no column {missing[0]!r} in the header {reader.fieldnames}")
        for row in reader:
            empty = [column for column in columns if not row[column]]
            if empty:
                raise source.error(reader.line_num, f"no value for {empty[0]!r}")
            yield reader.line_num, row
    except csv.Error as error:
        raise source.error(reader.reader.line_num, f"not valid csv: {error}") from error


def _sthv2(source: _Source) -> _Result:
    suffix = ".webm" if source.suffix is None else source.suffix
    names = _beside(source, "*labels.json")
    numbers = _number(names)
    content = _json(source.path)
    if not isinstance(content, list):
        raise source.error(1, f"expected a list of videos, got a {type(content).__name__}")
    records = []
    for i, item in enumerate(content):
        if not isinstance(item, dict) or item.get("id") is None:
            raise source.error(_json_line(source.path, i), f"a video without 'id': {item!r}")
        # the label is the template without the brackets around its placeholders
        name = str(item.get("template") or "").replace("[", "").replace("]", "")
        if name not in numbers:
            _class_of(source, _json_line(source.path, i), name, numbers)
        records.append(Record(source.root / f"{item['id']}{suffix}", numbers[name]))
    return records, names


# Subjects of the official split (Zhang et al., IEEE Trans. Multimedia 20(5), 2018); the others train.
_EGOGESTURE_VAL = frozenset({1, 7, 12, 13, 24, 29, 33, 34, 35, 37})
_EGOGESTURE_TEST = frozenset({2, 9, 11, 14, 18, 19, 28, 31, 41, 47})


def _egogesture(source: _Source) -> _Result:
    # the official files name the classes by number only
    names = source.labels or [str(i) for i in range(1, 84)]
    if source.subset not in ("train", "val", "test"):
        raise ValueError(f"subset must be 'train', 'val' or 'test', got {source.subset!r}")
    records = []
    for file in sorted(source.path.glob("*/*/*.csv")):
        place = re.fullmatch(r"subject(\d+)/scene(\d+)/group(\d+)\.csv", "/".join(file.parts[-3:]).lower())
        if place is None:
            raise ValueError(f"{file}: expected subjectNN/SceneN/GroupN.csv")
        subject, scene, group = (int(number) for number in place.groups())
        subset = "val" if subject in _EGOGESTURE_VAL else "test" if subject in _EGOGESTURE_TEST else "train"
        if subset != source.subset:
            continue
        folder = source.root / f"Subject{subject:02d}" / f"Scene{scene}" / "Color" / f"rgb{group}"
        folder = folder.with_name(folder.name + (source.suffix or ""))
        for line, text in _lines(file):
            words = [word.strip() for word in text.split(",")]
            if len(words) == 3 and not any(words[1:]):
                continue  # the official files hold some gestures without frame numbers
            try:
                label, start, end = (int(float(word)) for word in words)
            except (ValueError, OverflowError):
                raise AnnotationError(file, line, f"expected 'class, start, end', got {text!r}") from None
            if label != float(words[0]):
                raise AnnotationError(file, line, f"the class must be a whole number, got {words[0]!r}")
            if not 1 <= label <= len(names):
                raise AnnotationError(
                    file, line, f"class {label} out of range, classes are 1 .. {len(names)}"
                )
            if not 1 <= start <= end:
                raise AnnotationError(file, line, f"frames {start} to {end}: frames are counted from 1")
            records.append(Record(folder, label - 1, start - 1, end - start + 1))
    return records, names


def _kinetics(source: _Source) -> _Result:
    suffix = ".mp4" if source.suffix is None else source.suffix
    rows = list(_table(source, ("label", "youtube_id", "time_start", "time_end")))
    names = source.labels or sorted({row["label"] for _, row in rows})
    numbers = _number(names)
    folders: dict[str, Path] = {}
    records = []
    for line, row in rows:
        name = row["label"]
        label = _class_of(source, line, name, numbers)
        if name not in folders:  # root/class/clip, the class with spaces or underscores, or root/clip
            named = (source.root / name, source.root / name.replace(" ", "_"))
            folders[name] = next((folder for folder in named if folder.is_dir()), source.root)
        start, end = (_int(source, line, row[column], column) for column in ("time_start", "time_end"))
        records.append(Record(folders[name] / f"{row['youtube_id']}_{start:06d}_{end:06d}{suffix}", label))
    return records, names


def _ucf101(source: _Source) -> _Result:
    names = _beside(source, "classInd.txt")
    numbers = _number(names)
    records = []
    for line, text in _lines(source.path):
        video, *number = text.split()
        name, slash, _ = video.partition("/")
        if not slash or len(number) > 1:
            raise source.error(line, f"expected 'Class/video.avi' or 'Class/video.avi number', got {text!r}")
        label = _class_of(source, line, name, numbers)
        if number and _int(source, line, number[0], "the class number") != label + 1:
            raise source.error(line, f"class number {number[0]} where {name!r} is number {label + 1}")
        if source.suffix is not None:
            video = video.removesuffix(".avi") + source.suffix
        records.append(Record(source.root / video, label))
    return records, names


def _hmdb51(source: _Source) -> _Result:
    if source.subset not in ("train", "test"):
        raise ValueError(f"subset must be 'train' or 'test', got {source.subset!r}")
    if source.split not in (1, 2, 3):
        raise ValueError(f"split must be 1, 2 or 3, got {source.split!r}")
    ending = f"_test_split{source.split}.txt"
    files = sorted(source.path.glob(f"*{ending}"))
    if not files:
        raise FileNotFoundError(f"no files *{ending} in {source.path}")
    names = source.labels or [file.name.removesuffix(ending) for file in files]
    numbers = _number(names)
    wanted = "1" if source.subset == "train" else "2"
    records = []
    for file in files:
        name = file.name.removesuffix(ending)
        if name not in numbers:
            raise ValueError(f"{file}: unknown class {name!r}")
        for line, text in _lines(file):
            video, _, use = text.rpartition(" ")
            if not video or use not in ("0", "1", "2"):
                raise AnnotationError(file, line, f"expected 'video.avi 0', '.. 1' or '.. 2', got {text!r}")
            if use == wanted:
                video = video.strip()
                if source.suffix is not None:
                    video = video.removesuffix(".avi") + source.suffix
                records.append(Record(source.root / name / video, numbers[name]))
    return records, names


FORMATS: dict[str, Callable[[_Source], _Result]] = {
    "tsn": _tsn,
    "sthv1": _id_and_name,
    "sthv2": _sthv2,
    "jester": _id_and_name,
    "egogesture": _egogesture,
    "kinetics": _kinetics,
    "ucf101": _ucf101,
    "hmdb51": _hmdb51,
}
"""The formats of :func:`read_annotations`, and their readers."""
