"""What may be logged, what is made of it, and that it gets whole to another process."""

import enum
import math
import pickle
import subprocess
import sys
from collections import OrderedDict
from decimal import Decimal
from pathlib import Path

from backbone import values
from backbone.values import as_report, pack, unpack

import ml_dtypes
import numpy as np
import pytest
import wandb
from conftest import ROOT, Log
from wandb.sdk.data_types._private import MEDIA_TMP

# Numbers and samples


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        np.float64(1.5),
        np.float32(1.5),
        np.float16(1.5),
        np.longdouble(1.5),
        np.array(1.5),
        ml_dtypes.bfloat16(1.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_number_of_any_kind_is_a_float(value):
    report = as_report({"a": value})
    assert report == {"a": 1.5}
    assert type(report["a"]) is float


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), Level.HIGH], ids=repr)
def test_an_integer_of_any_kind_is_an_int(value):
    report = as_report({"a": value})
    assert report == {"a": 3}
    assert type(report["a"]) is int


def test_truth_is_a_number_alone_and_an_outcome_among_others():
    report = as_report({"a": True, "b": np.bool_(False), "c": [True, False]})
    assert (report["a"], report["b"], report["c"].dtype) == (1, 0, bool)


def test_numbers_that_are_none_are_kept():
    report = as_report({"a": math.nan, "b": np.float32("inf"), "c": [math.nan]})
    assert math.isnan(report["a"])
    assert report["b"] == math.inf
    assert np.isnan(report["c"]).all()


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**70, np.uint64(2**63)], ids=str)
def test_integers_that_no_column_holds_are_refused(value):
    with pytest.raises(TypeError, match=r"metric 'a' must be below 2\*\*63, not -?\d+: log it as a float"):
        as_report({"a": value})
    assert as_report({"a": float(value), "b": 2**63 - 1, "c": -(2**63)})["a"] == float(value)


@pytest.mark.parametrize(
    "value",
    [[1, 2, 3], (1, 2, 3), range(1, 4), np.array([1, 2, 3]), np.array([1, 2, 3], np.longdouble)]
    + [np.array([1, 2, 3], kind) for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.int4)],
    ids=lambda value: str(getattr(value, "dtype", type(value).__name__)),
)
def test_several_numbers_are_samples_of_a_type_that_any_process_knows(value):
    samples = as_report({"a": value})["a"]
    assert samples.tolist() == [1, 2, 3]
    assert samples.dtype in (np.int64, np.float64)


def test_what_says_how_it_is_an_array_is_one():
    class Column:  # of a data frame
        def __array__(self, dtype=None, copy=None):
            return np.array([1, 2], dtype)

    assert as_report({"a": Column()})["a"].tolist() == [1, 2]


def test_samples_may_have_any_shape_or_be_none():
    report = as_report({"a": np.zeros((2, 3)), "b": []})
    assert (report["a"].shape, report["b"].size) == ((2, 3), 0)


def test_a_later_change_of_an_array_does_not_change_what_was_logged():
    samples = np.array([1.0, 2.0])
    packed = pack(as_report({"a": samples}))
    samples[:] = 0
    assert unpack(packed)["a"].tolist() == [1, 2]


class Tensor:
    """Behaves as torch's does where it is read; torch itself is not among the dependencies."""

    def __init__(self, values, *, device: str = "cpu", gradient: bool = False, bfloat16: bool = False):
        self.values, self.device, self.gradient, self.bfloat16 = np.asarray(values), device, gradient, bfloat16

    def _but(self, **changes) -> "Tensor":
        return Tensor(**{**vars(self), **changes})

    def detach(self) -> "Tensor":
        return self._but(gradient=False)

    def cpu(self) -> "Tensor":
        if self.device == "meta":
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        return self._but(device="cpu")

    def float(self) -> "Tensor":
        return self._but(values=self.values.astype(np.float32), bfloat16=False)

    def numpy(self) -> np.ndarray:
        if self.gradient:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        if self.device != "cpu":
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()")
        if self.bfloat16:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.numpy()


@pytest.mark.parametrize("kind", [{}, {"gradient": True}, {"bfloat16": True}, {"device": "cuda:0"}], ids=str)
def test_tensors_are_numbers_or_samples(kind):
    report = as_report({"a": Tensor(0.5, **kind), "b": Tensor([0.5, 2.0], **kind), "c": Tensor([[1.0]], **kind)})
    assert type(report["a"]) is float
    assert (report["a"], report["b"].tolist(), report["c"].tolist()) == (0.5, [0.5, 2.0], [[1.0]])


def test_tensors_of_integers_and_outcomes_stay_such():
    report = as_report({"a": Tensor(7), "b": Tensor([True])})
    assert (report["a"], report["b"].dtype) == (7, bool)


# What can't be logged


@pytest.mark.parametrize(
    "value",
    [
        *(object(), 1j, b"bytes", {1}, [[1], [1, 2]], ["x"], [1, None], [wandb.Html("x"), 1], print, wandb.Html),
        *(Decimal("1.5"), np.datetime64("2026"), np.zeros(2, [("x", float)]), Tensor(1.0, device="meta")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_can_not_be_logged_is_refused_with_its_key_and_what_to_do(value):
    with pytest.raises(TypeError, match=r"metric 'time/a' must be a number.*\): log a number of it, its str\(\), or a"):
        as_report({"loss": 1.0, "time": {"a": value}})


@pytest.mark.parametrize("metrics", [None, [("a", 1)], 1.0, "a"])
def test_metrics_that_are_no_mapping_are_refused(metrics):
    with pytest.raises(TypeError, match="metrics must be a mapping from key to value, not "):
        as_report(metrics)


@pytest.mark.parametrize("key", [1, None, ("a", "b"), b"a"])
@pytest.mark.parametrize("value", [1.0, {"x": 1.0}], ids=["number", "nested"])
def test_a_key_that_is_no_string_is_refused(key, value):
    with pytest.raises(TypeError, match="must be a string, not"):
        as_report({key: value})
    with pytest.raises(TypeError, match="must be a string, not"):
        as_report({"a": {(1, 2): 1.0}})


@pytest.mark.parametrize("key", ["", "_step", "step", "workers", "a\ud800"])
def test_a_key_that_would_be_lost_or_is_taken_is_refused(key):
    for _ in range(2):  # the keys that are known are not looked at again
        with pytest.raises(ValueError, match="metric key"):
            as_report({key: 1.0})


def test_known_keys_are_remembered_with_a_bound(monkeypatch):
    monkeypatch.setattr(values, "_KNOWN_KEYS", set())
    for i in range(20_000):
        as_report({f"key{i}": 1.0})
    assert 0 < len(values._KNOWN_KEYS) <= 10_000
    with pytest.raises(ValueError, match="metric key"):
        as_report({"_step": 1.0})


# Nested mappings


def test_nested_mappings_become_paths_and_none_is_left_out():
    """As RLlib's result: nested, with None and with numbers as keys."""
    result = {
        "env_runners": {"episode_return_mean": 21.5, "num_episodes": np.int64(3), "module": {"p0": {"r": None}}},
        "learners": OrderedDict(default_policy={"total_loss": Tensor(0.25, gradient=True)}),
        "counters": {0: 1, "done": False},
        "config": None,
        "empty": {},
    }
    assert as_report(result) == {
        "env_runners/episode_return_mean": 21.5,
        "env_runners/num_episodes": 3,
        "learners/default_policy/total_loss": 0.25,
        "counters/0": 1,
        "counters/done": 0,
    }


@pytest.mark.parametrize(
    "metrics",
    [{"a": {"b": 1.0}, "a/b": 2.0}, {"a/b": 2.0, "a": {"b": 1.0}}, {"a": {1: 1.0, "1": 2.0}}],
    ids=["nested first", "path first", "number and text"],
)
def test_a_key_that_is_there_twice_is_refused(metrics):
    as_report({"a/b": 1.0})  # known keys take another way
    with pytest.raises(ValueError, match=r"'a/[b1]' is there twice"):
        as_report(metrics)


class Name(str, enum.Enum):  # noqa: UP042 - the kind that has no plain format
    LOSS = "loss"


def test_names_of_an_enum_of_the_user_s_arrive_where_that_is_not_known():
    for value in (0.5, 0.5):  # the second time the key is known
        report = as_report({Name.LOSS: value, "policy": {Name.LOSS: {Name.LOSS: Name.LOSS}}})
        assert report == {"loss": 0.5, "policy/loss/loss": "loss"}
        assert {type(text) for text in (*report, report["policy/loss/loss"])} == {str}


# Media


class Media:
    """One of each kind that can be made here, by name; files are in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def file(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def html(self):
        return wandb.Html("<b>a rollout</b>")

    def html_of_a_file(self):
        return wandb.Html(self.file("page.html", b"<i>a page</i>"))

    def image(self):
        return wandb.Image(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), caption="a frame")

    def image_of_a_file(self):
        return wandb.Image(self.file("frame.png", Path(self.image()._path).read_bytes()))

    def image_with_masks(self):
        masks = {"truth": {"mask_data": np.ones((4, 4), int), "class_labels": {1: "goal"}}}
        return wandb.Image(np.zeros((4, 4, 3), np.uint8), masks=masks)

    def video(self):
        return wandb.Video(self.file("episode.mp4", b"\0\0\0\x18ftypmp42"), format="mp4")

    def audio(self):
        return wandb.Audio(self.file("speech.wav", b"RIFF"))

    def point_cloud(self):
        return wandb.Object3D(np.zeros((3, 3)))

    def molecule(self):
        return wandb.Molecule(self.file("protein.pdb", b"ATOM"))


KINDS = [name for name in vars(Media) if name[0] != "_" and name != "file"]


@pytest.fixture
def media(tmp_path):
    return Media(tmp_path)


def forget_files(folder: Path) -> None:
    """As where the process that made them has ended."""
    for place in (folder, Path(MEDIA_TMP.name)):
        for path in place.rglob("*"):
            if path.is_file():
                path.unlink()


def files_of(value) -> list[str]:
    masks = (getattr(value, "_masks", None) or {}).values()
    return [value._path, *(mask._path for mask in masks)]


@pytest.mark.parametrize("kind", KINDS)
def test_media_carry_their_bytes(media, kind):
    value = getattr(media, kind)()
    contents, packed = [Path(path).read_bytes() for path in files_of(value)], pack(as_report({"a": value}))
    forget_files(media.folder)
    for _ in range(2):  # the second time for a restarted actor, of what the first one has packed
        arrived = unpack(packed)["a"]
        assert type(arrived) is type(value)
        assert [Path(path).read_bytes() for path in files_of(arrived)] == contents
        assert Path(arrived._path).suffix == Path(value._path).suffix
        packed = pack({"a": arrived})
        forget_files(media.folder)


def test_media_that_nobody_keeps_leave_no_file(media):
    """Such as those of seven of eight workers."""
    arrived = unpack(pack({"a": media.image()}))["a"]
    path = Path(arrived._path)
    assert path.exists()
    del arrived
    assert not path.exists()


def test_media_of_a_process_that_has_ended_are_in_the_run_s_folder(media):
    """Alone, in a list, in a table, and twice: a restart logs them again."""
    report = {kind: getattr(media, kind)() for kind in KINDS}
    report["list"] = [wandb.Html("first"), wandb.Html("second")]
    report["frames"] = [media.image(), media.image()]
    report["table"] = wandb.Table(columns=["reward", "page"], data=[[0.5, wandb.Html("in a table")]])
    report["chart"] = wandb.plot.line_series([0, 1], [[0.5, 0.7]], keys=["reward"])
    report["curve"] = wandb.plot.confusion_matrix(y_true=[0, 1], preds=[0, 1])
    packed = pack(as_report(report))
    forget_files(media.folder)
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    run = wandb.init(mode="offline", dir=media.folder, settings=settings, reinit="create_new")
    folder = Path(run.sync_dir)
    for _ in range(2):
        run.log(unpack(packed))
    run.finish()
    left = [path.read_bytes() for path in Path(MEDIA_TMP.name).rglob("*") if path.is_file()]
    assert not [content for content in left if b"in a table" not in content]  # which wandb copies
    first, second = Log(folder).rows
    kinds = {key.removesuffix("._type"): value for key, value in first.items() if key.endswith("._type")}
    assert kinds == {
        **dict.fromkeys(["html", "html_of_a_file"], "html-file"),
        **dict.fromkeys(["image", "image_of_a_file", "image_with_masks"], "image-file"),
        "image_with_masks.masks.truth": "mask",
        **dict(video="video-file", audio="audio-file", point_cloud="object3D-file", molecule="molecule-file"),
        **{"list": "html", "frames": "images/separated"},
        **dict(table="table-file", chart_table="table-file", curve_table="table-file"),
    }
    assert all((folder / "files" / first[f"{kind}.path"]).is_file() for kind in KINDS)
    assert [(folder / "files" / page["path"]).is_file() for page in first["list.html"]] == [True, True]
    assert [(folder / "files" / name).is_file() for name in first["frames.filenames"]] == [True, True]
    assert all(second[key] == first[key] for key in first if key.endswith(".sha256") and "table" not in key)


def test_a_file_that_is_gone_is_told_at_the_caller_with_its_key(media):
    page = wandb.Html("gone")
    forget_files(media.folder)
    with pytest.raises(TypeError, match=r"metric 'page' can't be sent: .*No such file"):
        pack(as_report({"loss": 1.0, "page": page}))


def test_what_can_not_be_pickled_is_told_at_the_caller_with_its_key():
    table = wandb.Table(columns=["a"])
    table.remember = lambda: None
    with pytest.raises(TypeError, match="metric 'table' can't be sent: "):
        pack(as_report({"loss": 1.0, "table": table}))


def test_a_reference_stays_one(media):
    video = media.video()
    video._path = "s3://bucket/episode.mp4"
    assert unpack(pack({"video": video}))["video"]._path == "s3://bucket/episode.mp4"


def test_reports_of_numbers_need_no_wandb():
    """A worker that logs numbers is spared the second that wandb takes to import."""
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from backbone.values import as_report, pack
sys.stdout.buffer.write(pack(as_report({{"a": 1.5, "b": [1, 2], "c": "text"}})))
assert "wandb" not in sys.modules
"""
    packed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert pickle.loads(packed) == {"a": 1.5, "b": pytest.approx([1, 2]), "c": "text"}
