"""Annotation files in the layouts of the official ones, a few lines each."""

import json
import re

import pytest

from temporal_excite.video import AnnotationError, Record, read_annotations, read_labels


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_tsn_lists(tmp_path):
    file = write(tmp_path / "list.txt", "a b/c 5 9 1\n\nd 1 1 0\n")
    assert read_annotations(file) == (
        [Record(tmp_path / "a b/c", 1, 4, 5), Record(tmp_path / "d", 0, 0, 1)],
        ["0", "1"],
    )
    write(file, "a 12 1\r\nb 7 0\r\n")
    assert read_annotations(file, root=tmp_path / "v", labels=["x", "y"], suffix=".mp4") == (
        [Record(tmp_path / "v/a.mp4", 1, 0, 12), Record(tmp_path / "v/b.mp4", 0, 0, 7)],
        ["x", "y"],
    )
    write(file, "\ufeffa.mp4 3\n")
    assert read_annotations(file) == ([Record(tmp_path / "a.mp4", 3)], ["0", "1", "2", "3"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a 5 0\nb 5\n", "2: expected 'path label', .*with 2 numbers as in the lines before, got 'b 5'"),
        ("a 5 -1\n", "1: label -1 out of range"),
        ("a 5 0\nb 3 9 7\n", "2: label 7 out of range, labels are 0 .. 1"),
        ("a 5 0\n\nb 0 1\n", "3: a video of 0 frames"),
        ("a 0 9 1\n", "1: frames 0 to 9: frames are counted from 1"),
        ("a 9 5 1\n", "1: frames 9 to 5"),
        ("no numbers\n", "1: expected"),
    ],
)
def test_wrong_lines_of_tsn_lists_are_named(text, problem, tmp_path):
    file = write(tmp_path / "list.txt", text)
    with pytest.raises(AnnotationError, match=f"list.txt:{problem}"):
        read_annotations(file, labels=["x", "y"])


@pytest.mark.parametrize("format", ["sthv1", "jester"])
def test_id_and_name(format, tmp_path):
    names = "Stop\nPouring, but missing\nTwisting (wringing) something wet\n"
    write(tmp_path / "some-v1-labels.csv", names)
    file = write(tmp_path / "some-v1-train.csv", "100218;Pouring, but missing\n24413;Stop\n")
    records, labels = read_annotations(file, format, root=tmp_path / "frames")
    assert records == [Record(tmp_path / "frames/100218", 1), Record(tmp_path / "frames/24413", 0)]
    assert labels == names.splitlines()
    for line, problem in (
        ("7;Jumping", "unknown class 'Jumping'; 3 classes are known"),
        ("7", "no label (a test split without labels?)"),
        (";Stop", "expected 'id;label', got ';Stop'"),
    ):
        write(file, f"1;Stop\n{line}\n")
        with pytest.raises(AnnotationError, match=re.escape(f"train.csv:2: {problem}")):
            read_annotations(file, format)


def test_newer_jester_csv(tmp_path):
    header = "video_id,label,frames,label_id,shape,format\n"
    row = '{},{},37,{},"(176, 100)",jpg\n'
    text = header + row.format(9, "Stop", 1) + row.format(4, "Doing other things", 0)
    file = write(tmp_path / "Train.csv", text)
    assert read_annotations(file, "jester", root=tmp_path / "Train") == (
        [Record(tmp_path / "Train/9", 1), Record(tmp_path / "Train/4", 0)],
        ["Doing other things", "Stop"],
    )
    for added, problem in (
        (row.format(5, "Go", 1), "4: label 1 is 'Go' here and 'Stop' elsewhere"),
        (row.format(5, "Stop", "x"), "4: label_id must be a whole number, got 'x'"),
        (row.format(5, "", ""), "4: no value for 'label'"),
        (row.format(5, "Go", -1), "4: label -1 out of range, labels are counted from 0"),
        ('5,"Stop,37,1\n', "4: not valid csv"),
    ):
        write(file, text + added)
        with pytest.raises(AnnotationError, match=f"Train.csv:{problem}"):
            read_annotations(file, "jester")
    write(file, text + row.format(5, "Stop", 2))
    with pytest.raises(ValueError, match=r"Train.csv: the class 'Stop' has two numbers"):
        read_annotations(file, "jester")
    write(file, text.replace("video_id", "id"))
    with pytest.raises(
        AnnotationError, match=r"Train.csv:1: no column 'video_id' in the header \['id', 'label'"
    ):
        read_annotations(file, "jester")
    write(file, text + row.format(5, "Go", 3))
    with pytest.raises(ValueError, match=r"no video has label 2: pass labels=NAMES"):
        read_annotations(file, "jester")
    with pytest.raises(AnnotationError, match=r"4: label 3 out of range, labels are 0 \.\. 1"):
        read_annotations(file, "jester", labels=["Doing other things", "Stop"])


def sthv2(tmp_path, items):
    write(tmp_path / "labels/labels.json", json.dumps({"Holding something": "1", "Closing something": "0"}))
    return write(
        tmp_path / "labels/train.json", items if isinstance(items, str) else json.dumps(items, indent=1)
    )


def test_sthv2(tmp_path):
    item = {
        "id": "78687",
        "label": "holding potato",
        "template": "Holding [something]",
        "placeholders": ["potato"],
    }
    other = {"id": "3", "label": "closing box", "template": "Closing [something]", "placeholders": ["box"]}
    file = sthv2(tmp_path, [item, other])
    assert read_annotations(file, "sthv2", root=tmp_path / "v") == (
        [Record(tmp_path / "v/78687.webm", 1), Record(tmp_path / "v/3.webm", 0)],
        ["Closing something", "Holding something"],
    )
    assert read_annotations(file, "sthv2", suffix="")[0][1].path == tmp_path / "labels/3"
    one = json.dumps(item)
    for text, problem in (
        (
            f"[{one},\n{one},\n\n" + '{"id": "5", "template": "Eating [something]"}]',
            "4: unknown class 'Eating something'",
        ),
        (f"[{one}, {one},\n" + '{"id": "5"}]', r"2: no label \(a test split without labels\?\)"),
        (f'[{one},\n{{"id": null, "template": "Holding [something]"}}]', "2: a video without 'id'"),
        (f"[\n{one},\n7]", "3: a video without 'id': 7"),
        (f"[\n{one},\n{one}", "3: not valid JSON: Expecting ',' delimiter"),
        ('{"id": 5}', "1: expected a list of videos, got a dict"),
    ):
        with pytest.raises(AnnotationError, match=f"train.json:{problem}"):
            read_annotations(sthv2(tmp_path, text), "sthv2")


def test_egogesture(tmp_path):
    folder = tmp_path / "labels-final-revised1"
    train = write(folder / "subject03/Scene1/Group1.csv", "83,12,45\n7,,\n1,60,60\n")
    write(folder / "Subject01/Scene2/group10.csv", "2,1,30\n")
    write(folder / "subject47/Scene6/Group2.csv", "5,3.0,9.0\n")
    root = tmp_path / "images"
    records, names = read_annotations(folder, "egogesture", root=root)
    assert records == [  # the line without frame numbers is left out
        Record(root / "Subject03/Scene1/Color/rgb1", 82, 11, 34),
        Record(root / "Subject03/Scene1/Color/rgb1", 0, 59, 1),
    ]
    assert names == [str(i) for i in range(1, 84)]
    val = [Record(root / "Subject01/Scene2/Color/rgb10", 1, 0, 30)]
    assert read_annotations(folder, "egogesture", root=root, subset="val")[0] == val
    test = [Record(root / "Subject47/Scene6/Color/rgb2.avi", 4, 2, 7)]
    assert read_annotations(folder, "egogesture", root=root, subset="test", suffix=".avi")[0] == test
    for text, problem in (
        ("3,1,9\n84,1,9\n", r"2: class 84 out of range, classes are 1 \.\. 83"),
        ("0,1,9\n", "1: class 0 out of range"),
        ("3,9,1\n", "1: frames 9 to 1"),
        ("3,1\n", "1: expected 'class, start, end', got '3,1'"),
        ("3,1,nan\n", "1: expected 'class, start, end'"),
        ("3,1,inf\n", "1: expected 'class, start, end'"),
        ("3.5,1,9\n", "1: the class must be a whole number, got '3.5'"),
    ):
        write(train, text)
        with pytest.raises(AnnotationError, match=f"Group1.csv:{problem}"):
            read_annotations(folder, "egogesture")
    with pytest.raises(ValueError, match="subset must be 'train', 'val' or 'test', got 'trainval'"):
        read_annotations(folder, "egogesture", subset="trainval")
    train.rename(train.with_name("notes.csv"))
    with pytest.raises(ValueError, match=r"notes.csv: expected subjectNN/SceneN/GroupN.csv"):
        read_annotations(folder, "egogesture")


def test_egogesture_subjects():
    from temporal_excite.video.annotations import _EGOGESTURE_TEST, _EGOGESTURE_VAL

    assert len(_EGOGESTURE_VAL) == len(_EGOGESTURE_TEST) == 10  # 30 train
    assert not _EGOGESTURE_VAL & _EGOGESTURE_TEST
    assert (_EGOGESTURE_VAL | _EGOGESTURE_TEST).issubset(range(1, 51))


def test_kinetics(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    text = header + "zumba,---QUuC4vJs,84,94,train\n" + '"eating spaghetti",--3ouPhoy2A,20,30,train\n'
    file = write(tmp_path / "train.csv", text)
    names = ["eating spaghetti", "zumba"]
    (tmp_path / "eating_spaghetti").mkdir()
    records, labels = read_annotations(file, "kinetics")
    assert labels == names
    assert records == [  # without a class folder, and with underscores in its name
        Record(tmp_path / "---QUuC4vJs_000084_000094.mp4", 1),
        Record(tmp_path / "eating_spaghetti/--3ouPhoy2A_000020_000030.mp4", 0),
    ]
    (tmp_path / "zumba").mkdir()
    records, _ = read_annotations(file, "kinetics", labels=["zumba", *names[:1]], suffix=".mkv")
    assert records[0] == Record(tmp_path / "zumba/---QUuC4vJs_000084_000094.mkv", 0)
    with pytest.raises(AnnotationError, match=r"train.csv:2: unknown class 'zumba'; 1 classes are known"):
        read_annotations(file, "kinetics", labels=names[:1])
    for added, problem in (
        ("zumba,x,ten,20,train\n", "4: time_start must be a whole number, got 'ten'"),
        ("zumba,x\n", "4: no value for 'time_start'"),
        ('"zumba"s,x,1,2,train\n', "4: not valid csv"),
    ):
        write(file, text + added)
        with pytest.raises(AnnotationError, match=f"train.csv:{problem}"):
            read_annotations(file, "kinetics")
    write(file, "youtube_id,time_start,time_end,split\nx,1,2,test\n")
    with pytest.raises(AnnotationError, match=r"train.csv:1: no column 'label' in the header"):
        read_annotations(file, "kinetics")


def test_ucf101(tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 ApplyEyeMakeup\n2 ApplyLipstick\n")
    train = write(lists / "trainlist01.txt", "ApplyLipstick/v_ApplyLipstick_g08_c01.avi 2\n")
    test = write(lists / "testlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n")
    root = tmp_path / "UCF-101"
    names = ["ApplyEyeMakeup", "ApplyLipstick"]
    video = root / "ApplyLipstick/v_ApplyLipstick_g08_c01.avi"
    assert read_annotations(train, "ucf101", root=root) == ([Record(video, 1)], names)
    video = root / "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01"
    assert read_annotations(test, "ucf101", root=root, suffix="") == ([Record(video, 0)], names)
    for text, problem in (
        ("ApplyLipstick/a.avi 1\n", "1: class number 1 where 'ApplyLipstick' is number 2"),
        ("ApplyLipstick/a.avi 2\nArchery/a.avi 3\n", "2: unknown class 'Archery'"),
        ("a.avi 2\n", "1: expected 'Class/video.avi'"),
        ("ApplyLipstick/a.avi two\n", "1: the class number must be a whole number, got 'two'"),
    ):
        write(train, text)
        with pytest.raises(AnnotationError, match=f"trainlist01.txt:{problem}"):
            read_annotations(train, "ucf101")
    (lists / "classInd.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected beside it in classInd.txt \(none there\): pass labels="
    ):
        read_annotations(train, "ucf101")


def test_hmdb51(tmp_path):
    folder = tmp_path / "testTrainMulti_7030_splits"
    write(folder / "wave_test_split1.txt", "w0.avi 0 \nw1.avi 1 \nw2.avi 2 \n")
    brush = write(folder / "brush_hair_test_split1.txt", "b1.avi 1 \nb2.avi 2 \n")
    write(folder / "brush_hair_test_split3.txt", "b3.avi 1 \n")
    root = tmp_path / "v"
    names = ["brush_hair", "wave"]
    assert read_annotations(folder, "hmdb51", root=root) == (
        [Record(root / "brush_hair/b1.avi", 0), Record(root / "wave/w1.avi", 1)],
        names,
    )
    test, _ = read_annotations(folder, "hmdb51", root=root, subset="test", suffix=".mp4")
    assert test == [Record(root / "brush_hair/b2.mp4", 0), Record(root / "wave/w2.mp4", 1)]
    assert read_annotations(folder, "hmdb51", split=3, labels=names)[0] == [
        Record(folder / "brush_hair/b3.avi", 0)
    ]
    with pytest.raises(FileNotFoundError, match=r"no files \*_test_split2.txt in"):
        read_annotations(folder, "hmdb51", split=2)
    with pytest.raises(ValueError, match=r"wave_test_split1.txt: unknown class 'wave'"):
        read_annotations(folder, "hmdb51", labels=names[:1])
    with pytest.raises(ValueError, match="subset must be 'train' or 'test', got 'val'"):
        read_annotations(folder, "hmdb51", subset="val")
    with pytest.raises(ValueError, match="split must be 1, 2 or 3, got 4"):
        read_annotations(folder, "hmdb51", split=4)
    write(brush, "b1.avi 1\nb2.avi 3\n")
    with pytest.raises(AnnotationError, match=r"brush_hair_test_split1.txt:2: expected 'video.avi 0'"):
        read_annotations(folder, "hmdb51")


def test_label_files(tmp_path):
    assert read_labels(write(tmp_path / "a.txt", "x y\n\nz\n")) == ["x y", "z"]
    assert read_labels(write(tmp_path / "a.txt", "2 z\n1 x y\n")) == ["x y", "z"]
    assert read_labels(write(tmp_path / "a.txt", "1 x\n3 z\n")) == [
        "1 x",
        "3 z",
    ]  # names that begin with digits
    assert read_labels(write(tmp_path / "a.json", '{"b": 1, "a": "0"}')) == ["a", "b"]
    for name, text, problem in (
        ("a.txt", "\n", "a.txt: lists no class names"),
        ("a.txt", "x\ny\nx\n", "a.txt: the class 'x' is listed twice"),
        ("a.json", '["x"]', r'a.json: expected \{"class name": number, ..\}, got a list'),
        ("a.json", '{"x": 0, "y": 2}', r"the numbers of the 2 classes are not 0 \.\. 1"),
        ("a.json", '{"x": "first"}', "must have whole numbers"),
        ("a.json", '{\n"x": 0,\n}', "a.json:3: not valid JSON"),
    ):
        with pytest.raises(ValueError, match=problem):
            read_labels(write(tmp_path / name, text))


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*gone.txt"):
        read_annotations(tmp_path / "gone.txt")
    file = write(tmp_path / "list.txt", "")
    with pytest.raises(ValueError, match=r"list.txt: no videos in it"):
        read_annotations(file)
    with pytest.raises(ValueError, match="unknown annotation format 'coco': use one of tsn, sthv1"):
        read_annotations(file, "coco")
    file.write_bytes(b"a 1\nb \xff 1\n")
    for format in ("tsn", "kinetics"):
        with pytest.raises(AnnotationError, match=r"list.txt:2: not a text file in UTF-8"):
            read_annotations(file, format)
    with pytest.raises(AnnotationError, match=r"list.txt:2: not a text file"):
        read_annotations(file, "sthv2", labels=["x"])
