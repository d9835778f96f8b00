"""What may be logged, what is made of it, and that it gets whole to another process."""

import enum
import gc
import json
import math
import os
import pickle
import subprocess
import sys
from collections import OrderedDict, UserDict
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType

from backbone import values
from backbone.values import as_step, pack, pack_report, unpack

import ml_dtypes
import numpy as np
import pandas as pd
import PIL.Image
import plotly.graph_objects
import pytest
import rooms
import wandb
from conftest import ROOT, Log, folders
from wandb.sdk.data_types._private import MEDIA_TMP


def as_report(metrics, step: int = 0) -> dict:
    return values.as_report(metrics, step)


class Level(enum.IntEnum):
    HIGH = 3


# Steps


WHOLE = [7, 7.0, Level.HIGH, np.int8(7), np.uint64(7), np.float32(7), np.float64(7), np.array(7), np.array(7.0)]


@pytest.mark.parametrize("number", [*WHOLE, ml_dtypes.bfloat16(7), 0, 2**63 - 1], ids=repr)
def test_a_step_is_any_whole_number(number):
    assert as_step(number) == int(number)
    assert type(as_step(number)) is int


def test_a_step_may_be_a_tensor():
    for kind in ({}, {"gradient": True}, {"bfloat16": True}, {"device": "cuda:0"}):
        assert as_step(Tensor(7, **kind)) == as_step(Tensor(7.0, **kind)) == 7


@pytest.mark.parametrize(
    "step",
    [8.5, np.float32(8.5), math.nan, math.inf, True, np.bool_(True), "8", None, [8], np.array([8]), 8j, np.ma.masked],
    ids=repr,
)
def test_what_is_no_whole_number_is_no_step(step):
    with pytest.raises(TypeError, match="step must be a whole number, not "):
        as_step(step)


@pytest.mark.parametrize("step", [-1, -1.0, np.int64(-1), np.array(-1)], ids=repr)
def test_a_step_below_0_is_refused_with_what_to_do(step):
    with pytest.raises(ValueError, match=r"from 0 to 2\*\*63, not -1: what comes before training.* is step 0"):
        as_step(step)


@pytest.mark.parametrize("step", [2**63, 1e30, np.uint64(2**63)], ids=repr)
def test_a_step_that_no_column_holds_is_refused(step):
    with pytest.raises(ValueError, match=r"from 0 to 2\*\*63, not \d+$"):
        as_step(step)


@pytest.mark.parametrize("step", [8, 8.0, np.int64(8), np.array(8)], ids=repr)
def test_a_report_may_have_its_step_in_it(step):
    for _ in range(2):  # the keys that are known are not looked at again
        assert as_report({"step": step, "loss": 0.5}, 8) == {"loss": 0.5}
    assert as_report({"step": None, "train": {"step": 3}}, 8) == {"train/step": 3}
    assert as_report({Name.STEP: step, "step": {"a": 1}}, 8) == {"step/a": 1}


@pytest.mark.parametrize("step", [7, 7.0, np.int64(9)], ids=repr)
def test_a_report_with_another_step_in_it_is_refused(step):
    with pytest.raises(ValueError, match=r"metric 'step' is .*, but log was called for step 8"):
        as_report({"step": step, "loss": 0.5}, 8)


@pytest.mark.parametrize("step", [8.5, "8", [8], True], ids=repr)
def test_what_is_no_step_is_none_in_a_report_either(step):
    with pytest.raises(TypeError, match="step must be a whole number, not"):
        as_report({"step": step}, 8)


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
def test_integers_that_no_column_holds_are_floats_as_w_b_has_them(value):
    found = as_report({"a": value, "b": 2**63 - 1, "c": 1 - 2**63})
    assert (found["a"], type(found["a"])) == (float(value), float)
    assert (found["b"], found["c"]) == (2**63 - 1, 1 - 2**63)
    with pytest.raises(TypeError, match=r"metric 'a' must be below 2\*\*1023"):
        as_report({"a": int(value) ** 100})


def test_numbers_are_keys_below_others():
    """As of quantiles, or of what `np.unique` counts."""
    counted = dict(zip(*np.unique([3, 5, 5], return_counts=True), strict=True))
    assert as_report({"q": {0.5: 1.0, 1: 2.0}, "n": counted}) == {"q/0.5": 1.0, "q/1": 2.0, "n/3": 1, "n/5": 2}


def test_objects_that_are_numbers_are_samples():
    assert as_report({"a": np.array([1, 0.5], dtype=object)})["a"].tolist() == [1, 0.5]
    with pytest.raises(TypeError, match="metric 'a' must be a number"):
        as_report({"a": np.array([1, "x"], dtype=object)})


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


def test_masked_values_are_left_out_and_a_masked_scalar_is_as_none():
    masked = np.ma.array([1.0, 99.0, 3.0], mask=[False, True, False])
    assert as_report({"a": masked, "b": masked.mean(), "c": np.ma.array(5)}) == {
        "a": pytest.approx([1, 3]),
        "b": 2,
        "c": 5,
    }
    assert as_report({"a": masked[1], "b": np.ma.array(5, mask=True), "c": {"d": np.ma.masked}}) == {}
    assert as_report({"a": np.ma.array([[1, 2], [3, 4]], mask=[[1, 0], [0, 1]])})["a"].tolist() == [2, 3]
    assert as_report({"a": np.ma.array([1, 2], mask=True)})["a"].size == 0
    assert as_report({"a": np.ma.array([True, False], mask=[0, 1])})["a"].tolist() == [True]
    assert {type(value) for value in as_report({"a": masked, "b": np.ma.array([1])}).values()} == {np.ndarray}


@pytest.mark.filterwarnings("error")
def test_masked_values_in_a_list_are_left_out_too():
    masked = np.ma.array([1.0, 99.0], mask=[False, True])
    assert as_report({"a": [1.0, np.ma.masked, masked.sum()]})["a"].tolist() == [1, 1]
    assert as_report({"a": (masked, masked)})["a"].tolist() == [1, 1]


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


def test_a_list_of_tensors_is_samples_of_all_their_values():
    for kind in ({}, {"gradient": True}, {"bfloat16": True}, {"device": "cuda:0"}):
        assert as_report({"a": [Tensor(0.5, **kind), Tensor(2, **kind)]})["a"].tolist() == [0.5, 2]
        assert as_report({"a": (Tensor([0.5, 1], **kind), Tensor([2], **kind), 7)})["a"].tolist() == [0.5, 1, 2, 7]


class Placement:
    def __init__(self, replicated: bool):
        self.replicated = replicated

    def is_replicate(self) -> bool:
        return self.replicated


class DTensor(Tensor):
    """As torch 2.14's, of which each rank has a shard, a summand or a copy: `grad_norm` under FSDP2."""

    def __init__(self, values, replicated: bool, **kind):
        super().__init__(values, **kind)
        self.placements = (Placement(replicated), Placement(True))

    def _but(self, **changes) -> "DTensor":
        return self

    def to_local(self) -> Tensor:
        return Tensor(self.values, device=self.device, gradient=self.gradient)

    def full_tensor(self) -> Tensor:
        raise AssertionError("a collective: all ranks must call it, and log is called by some")

    def numpy(self) -> np.ndarray:
        raise RuntimeError(".numpy() is not supported for tensor subclasses.")


def test_of_a_tensor_that_is_spread_over_ranks_the_error_says_how_to_get_it_whole():
    for value in (DTensor(0.5, replicated=False), [DTensor([0.5, 1.0], replicated=False)]):
        with pytest.raises(TypeError, match=r"metric 'time/grad_norm' .*log its \.full_tensor\(\), which all .*ranks"):
            as_report({"loss": 1.0, "time": {"grad_norm": value}})


def test_a_tensor_that_each_rank_has_whole_is_a_number_or_samples():
    norm = DTensor(0.5, replicated=True, device="cuda:0", gradient=True)
    assert as_report({"a": norm, "b": [norm, 2.0]}) == {"a": 0.5, "b": pytest.approx([0.5, 2.0])}


# What else is taken: pandas, matplotlib, plotly


def test_a_series_is_samples_and_what_is_missing_from_one_is_left_out():
    report = as_report({"a": pd.Series([1, 2]), "b": pd.Series([True, False]), "c": pd.Series([1.5, math.nan])})
    assert (report["a"].tolist(), report["b"].dtype) == ([1, 2], bool)
    assert np.isnan(report["c"]).tolist() == [False, True]
    report = as_report({kind: pd.Series([1, None], dtype=kind) for kind in ("Int64", "Float64", "boolean")})
    assert [report[kind].tolist() for kind in report] == [[1], [1.0], [True]]
    assert report["boolean"].dtype == bool


class Frame(pd.DataFrame):
    """As geopandas'."""


@pytest.mark.parametrize("kind", [pd.DataFrame, Frame])
def test_a_data_frame_is_a_table(kind):
    table = as_report({"rollouts": kind({"reward": [0.5, 1.0], "text": ["a", "b"]})})["rollouts"]
    assert (type(table), table.columns) == (wandb.Table, ["reward", "text"])
    assert table.data == [[0.5, "a"], [1.0, "b"]]


def test_a_data_frame_that_wandb_can_t_take_is_refused_with_its_key_and_why():
    frame = pd.DataFrame({("a", "b"): [1.0]})
    with pytest.raises(
        TypeError, match=r"(?s)metric 'frame' must be .*columns argument expects list of strings or ints"
    ):
        as_report({"frame": frame})


def test_pixels_and_cells_that_wandb_makes_nothing_of_are_no_samples():
    class DataFrame:  # of polars
        columns = ("a",)

        def __array__(self, dtype=None, copy=None):
            return np.zeros((2, 1))

    image, frame = PIL.Image.new("L", (2, 2)), DataFrame()
    for value in (image, frame, [image, image], (frame,), [pd.DataFrame({"a": [1.0]})], [1.0, image]):
        with pytest.raises(TypeError, match=r"metric 'a' must be .*log .* a wandb\.Image, wandb\.Table"):
            as_report({"a": value})


FIGURES = pytest.mark.xdist_group("figures")  # so that one of the processes imports pyplot, which takes a second


@pytest.fixture
def pyplot():
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")


@pytest.fixture
def draw(pyplot):

    def draw(kind: str, *arguments):
        figure, axes = pyplot.subplots()
        getattr(axes, kind)(*arguments)
        return figure

    return draw


@FIGURES
def test_a_figure_is_the_plot_or_the_image_that_wandb_makes_of_it(draw):
    line = draw("plot", [1, 2])
    report = as_report(
        {
            "figure": line,
            "axes": line.axes[0],
            "image": draw("imshow", np.zeros((4, 4))),
            "nested": {"figure": line},
            "plotly": plotly.graph_objects.Figure(plotly.graph_objects.Scatter(y=[1, 2])),
            "undrawable": draw("hist", [1, 2, 3]),  # by plotly: wandb.log raises
        }
    )
    kinds = {key: type(value).__name__ for key, value in report.items()}
    assert kinds == {
        **dict.fromkeys(["figure", "axes", "nested/figure", "plotly"], "Plotly"),
        **dict.fromkeys(["image", "undrawable"], "Image"),
    }
    assert all(type(value).__name__ == kinds[key] for key, value in unpack(pack(report)).items())


@FIGURES
def test_pyplot_itself_is_its_figure(draw, pyplot):
    draw("plot", [1, 2])
    assert type(as_report({"chart": pyplot})["chart"]).__name__ == "Plotly"


@FIGURES
def test_without_plotly_a_figure_is_an_image(draw, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert isinstance(as_report({"figure": draw("plot", [1, 2])})["figure"], wandb.Image)


def test_a_plotly_object_that_is_no_figure_is_refused_with_its_key_and_why():
    with pytest.raises(TypeError, match=r"(?s)metric 'trace' must be .*Logged plots must be plotly figures"):
        as_report({"trace": plotly.graph_objects.Scatter(y=[1, 2])})


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


def test_what_is_refused_is_left_as_it_was(tmp_path):
    with open(tmp_path / "file", "w+b") as file, pytest.raises(TypeError, match="metric 'a' must be"):
        as_report({"a": file})
    with open(tmp_path / "file", "w+b") as file:
        with pytest.raises(TypeError, match="metric 'a' must be"):
            as_report({"a": [file]})
        file.write(b"goes on")  # a file, too, has a `detach`


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


LONG = [np.full((9, 9), "x"), pd.DataFrame({("a", "b"): ["x"] * 9}), ["x" * 10_000_000], 10**5000, Unspeakable()]


@pytest.mark.parametrize("value", LONG, ids=lambda value: type(value).__name__)
def test_what_is_said_of_a_value_is_one_line_and_not_all_of_it(value):
    with pytest.raises(TypeError) as raised:
        as_report({"a": value})
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    with pytest.raises((TypeError, ValueError)) as raised:
        as_step(value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


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


@pytest.mark.parametrize("key", ["", "_step", "workers", "\\", "a\ud800"])
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
    STEP = "step"


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
        PIL.Image.new("RGB", (4, 4)).save(self.folder / "frame.png")
        return wandb.Image(self.folder / "frame.png")

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


# Tables that grow


def growing(mode: str = "INCREMENTAL") -> wandb.Table:
    return wandb.Table(columns=["reward"], log_mode=mode)


def sent(table: wandb.Table, key: str = "rollouts", is_written: bool = True, **others) -> list | None:
    """The rewards that a report with this table brings to the actor; None without a table."""
    packed, growing = pack_report(as_report({key: table, **others}))
    report = unpack(packed)
    for each in growing if is_written else ():
        each.note()
    return [reward for (reward,) in report[key].data] if key in report else None


def test_of_an_incremental_table_that_grows_each_report_has_the_rows_that_are_new():
    table, found = growing(), []
    for step in range(5):
        for reward in range(step):
            table.add_data(reward)
        found.append(sent(table))
    assert found == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert sent(table) is None
    assert len(table.data) == 10


def test_an_incremental_table_that_is_new_at_each_step_is_sent_whole():
    for reward in range(3):
        table = growing()
        table.add_data(reward)
        assert sent(table) == [reward]


@pytest.mark.parametrize("mode", ["MUTABLE", "IMMUTABLE"])
def test_other_tables_that_grow_are_sent_whole(mode):
    table = growing(mode)
    for step in range(3):
        table.add_data(step)
        assert sent(table) == [*range(step + 1)]


def test_each_key_has_its_own_rows_of_an_incremental_table_and_an_artifact_all():
    table = growing()
    for step in range(3):
        table.add_data(step)
        assert (sent(table), sent(table, "others")) == ([step], [step])
    assert len(unpack(pack({"rollouts": table}, "file"))["rollouts"].data) == 3


def test_what_could_not_be_sent_of_an_incremental_table_comes_with_the_next_report(media):
    table, page = growing(), media.html()
    table.add_data(0)
    forget_files(media.folder)
    for report in ({"z": object()}, {"page": page}, {"page": page, "last": growing()}):
        with pytest.raises(TypeError):
            sent(table, **report)
    table.remember = lambda: None
    with pytest.raises(TypeError, match="metric 'rollouts' can't be sent"):
        sent(table)
    del table.remember
    assert sent(table, is_written=False) == [0]  # such as where the disk is full, or a record is too large
    assert sent(table) == [0]


def test_rows_that_are_added_while_a_report_is_packed_come_with_the_next():
    table = growing()
    table.add_data(0)
    report = as_report({"rollouts": table})
    table.add_data(1)
    packed, [increment] = pack_report(report)
    increment.note()
    assert [unpack(packed)["rollouts"].data, sent(table)] == [[[0]], [1]]


def rewards(log: Log, key: str) -> list[list]:
    """Those in the files of a table, one list for each row."""
    pages = [log.path / "files" / row[f"{key}.path"] for row in log.rows if f"{key}.path" in row]
    return [[row[-1] for row in json.loads(page.read_text())["data"]] for page in pages]


def test_w_b_s_idiom_for_a_growing_table_makes_each_row_once(opened, tmp_path):
    made, increments, versions, ranks = opened(), growing(), growing("MUTABLE"), [growing(), growing()]
    made.join()
    made.join("ranks/", workers=2)
    for step in range(5):
        for table in (increments, versions, *ranks):
            table.add_data(step)
        made.say(step, {"increments": increments, "versions": versions})
        made.bring(*(rooms.report(f"rank {i}", step, {"rollouts": each}, pipeline=1) for i, each in enumerate(ranks)))
    assert made.finish()[""].ok
    log = Log(folders(tmp_path)[0])
    assert rewards(log, "increments") == [[step] for step in range(5)]
    assert [row["increments.increment_num"] for row in log.rows if "increments.path" in row] == [*range(5)]
    assert rewards(log, "versions") == [[*range(step + 1)] for step in range(5)]
    assert rewards(log, "ranks/rollouts") == [[step, step] for step in range(5)]


# The files of media


def in_temporary_folder() -> int:
    return sum(path.is_file() for path in Path(MEDIA_TMP.name).rglob("*"))


@pytest.fixture
def no_files():
    forget_files(Path(MEDIA_TMP.name))


@pytest.mark.parametrize("kind", KINDS)
def test_media_that_were_sent_leave_no_temporary_file_and_may_be_sent_again(media, no_files, kind):
    value = getattr(media, kind)()
    contents, of_user = [Path(path).read_bytes() for path in files_of(value)], [*media.folder.iterdir()]
    table = wandb.Table(columns=["a"], data=[[value]])
    reports = {"a": value}, {"a": [value, value]}, {"a": table}, {"a": value}
    for report in reports:
        packed = pack(as_report(report))
        assert [*media.folder.iterdir()] == of_user
    del value, table, report, reports
    gc.collect()  # wandb's images refer to themselves
    assert in_temporary_folder() == 0
    arrived = unpack(packed)["a"]
    assert [Path(path).read_bytes() for path in files_of(arrived)] == contents


def test_a_worker_that_sends_many_media_has_no_files_of_them(media, no_files):
    for _ in range(50):
        report = {"image": media.image(), "page": media.html(), "table": growing()}
        report["table"].add_data(media.image_with_masks())
        pack(as_report(report))
    del report
    gc.collect()
    assert in_temporary_folder() == 0


def test_a_fork_takes_no_file_of_its_parent_s(media, no_files):
    image = media.image()
    pack(as_report({"image": image}))
    if not (child := os.fork()):
        del image
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert pack(as_report({"image": image}))


@pytest.mark.parametrize("ours_first", [True, False])
def test_an_object_may_be_logged_to_a_run_of_ones_own_as_well(opened, tmp_path, media, ours_first):
    """Before or after: neither takes it away from the other."""
    report = {kind: getattr(media, kind)() for kind in KINDS} | {"list": [media.image(), media.image()]}
    report["table"] = wandb.Table(columns=["page"], data=[[media.html()]])
    report["growing"] = wandb.Table(columns=["a"], data=[[1]], log_mode="INCREMENTAL")
    report["chart"] = wandb.plot.line_series([0, 1], [[0.5, 0.7]], keys=["reward"])
    made = opened()
    made.join()
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    mine = wandb.init(mode="offline", dir=tmp_path / "mine", settings=settings, reinit="create_new", id="mine")
    steps = [lambda: made.say(0, report), lambda: mine.log(report)]
    for step in steps if ours_first else steps[::-1]:
        step()
    mine.finish()
    assert made.finish()[""].ok
    rows = Log(Path(mine.sync_dir)).rows[0], Log(folders(tmp_path)[0]).rows[0]
    theirs, ours = ({key: value for key, value in row.items() if key.endswith("._type")} for row in rows)
    assert ours == theirs
    assert {key.partition("_table")[0].partition(".")[0] for key in ours} == {*report}


def test_a_file_of_the_user_s_in_w_b_s_folder_stays(no_files):
    path = Path(MEDIA_TMP.name, "mine.html")
    path.write_text("mine")
    pack(as_report({"page": wandb.Html(str(path), inject=False)}))
    assert path.exists()


def test_nothing_is_left_of_what_a_run_has(opened, tmp_path, media, no_files):
    made = opened()
    made.join()
    for step in range(3):
        cells = [[media.image_with_masks(), np.zeros((300, 2))]]
        report = {"page": media.html(), "frames": [media.image(), media.image()]}
        report["table"] = wandb.Table(columns=["image", "array"], data=cells)
        made.say(step, report | {"chart": wandb.plot.bar(wandb.Table(["page", "n"], [[media.html(), 1]]), "n", "n")})
        del cells, report
        gc.collect()
        assert in_temporary_folder() == 0
    assert made.finish()[""].ok
    log = Log(folders(tmp_path)[0])
    assert all((log.path / "files" / row["table.path"]).is_file() for row in log.rows)
    entries = [entry for artifact in log.of("artifact") for entry in artifact["manifest"]["contents"]]
    assert entries
    assert all(Path(entry["local_path"]).is_file() for entry in entries)


@pytest.mark.parametrize("order", [("image", "table"), ("table", "image")], ids=str)
def test_one_image_may_be_alone_and_in_a_table_of_the_same_row(opened, tmp_path, media, no_files, order):
    image = media.image()
    values = {"image": image, "table": wandb.Table(columns=["image"], data=[[image]])}
    made = opened()
    made.join()
    made.say(0, {key: values[key] for key in order})
    del image, values
    gc.collect()
    assert in_temporary_folder() == 0
    assert made.finish()[""].ok
    log = Log(folders(tmp_path)[0])
    assert (log.path / "files" / log.rows[0]["image.path"]).is_file()
    [artifact] = log.of("artifact")
    assert len(artifact["manifest"]["contents"]) == 2


def test_a_reference_stays_one(media):
    video = media.video()
    video._path = "s3://bucket/episode.mp4"
    assert unpack(pack({"video": video}))["video"]._path == "s3://bucket/episode.mp4"


def test_reports_of_numbers_need_no_wandb():
    """A worker that logs numbers is spared the second that wandb takes to import."""
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import matplotlib, numpy, pandas, plotly
from backbone.values import as_report, pack
report = {{"a": 1.5, "b": [1, 2], "c": "text", "d": pandas.Series([1, 2]), "e": numpy.ma.array([1, 2]), "f": {{}}}}
sys.stdout.buffer.write(pack(as_report(report, 0)))
assert "wandb" not in sys.modules
"""
    packed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    numbers = pytest.approx([1, 2])
    assert pickle.loads(packed) == {"a": 1.5, "b": numbers, "c": "text", "d": numbers, "e": numbers}


@pytest.mark.parametrize("make", [type("Mine", (dict,), {}), MappingProxyType, UserDict, OrderedDict])
def test_a_mapping_is_sent_as_a_plain_dict_each_time(make):
    for _ in range(2):  # the second time its keys are known
        assert type(values.as_report(make({"plain/a": 1.0, "plain/b": 2.0}), 0)) is dict
