"""The pictures of a recording: what is drawn is what the model computes, at the right time and frequency."""

import json
import math
import shutil

import matplotlib.figure
import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config, tiny_model
from encoded import encode
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from bat_audio import BatAudioProcessor
from bat_audio_tools.cli import app
from bat_audio_tools.folders import PICTURES
from bat_audio_tools.show import (
    OUTLINE_POINTS,
    component_colours,
    draw,
    look,
    outline,
    principal_components,
    show,
)

RATE = 16000
PATCH = 16 * 160  # samples
CHUNK = 4  # time patches of a chunk of the tiny model
CONFIG = tiny_config()


def noise(samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))


def reference_components(tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's, which have other signs in other versions."""
    pca = PCA(n_components=3, svd_solver="full")
    components = pca.fit_transform(tokens.double().numpy())
    largest = np.abs(pca.components_).argmax(axis=1)
    return components * np.sign(pca.components_[range(3), largest]), pca.explained_variance_ratio_


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def sound(tmp_path):
    file = tmp_path / "sound.wav"
    soundfile.write(file, noise(RATE).numpy(), RATE)
    return file


# Within a patch, a chunk, and several; the last ends on a patch, where no further one may begin.
@pytest.mark.parametrize("samples", [600, 3 * PATCH + 7, CHUNK * PATCH, 10 * PATCH])
@pytest.mark.parametrize("block", [1, 2])
def test_view_is_what_the_model_gives(samples, block):
    model, waveform = tiny_model(), noise(samples)
    view = look(model, waveform, block)
    patches = math.ceil(samples / PATCH)
    features = BatAudioProcessor(num_frames=16 * patches)(waveform)
    with torch.inference_mode():
        output = model(features, output_attentions=True)
    assert torch.equal(view.waveform, waveform)
    assert torch.equal(view.log_mel, features[0, 0])

    components, explained = reference_components(output.last_hidden_state[0, 1:])
    np.testing.assert_allclose(view.components.flatten(0, 1), components, atol=1e-3 * np.abs(components).max())
    np.testing.assert_allclose(view.explained, explained, rtol=1e-4)

    weights = output.attentions[block - 1]  # (chunks, H, S, S)
    assert view.attention.shape == (CONFIG.num_attention_heads, patches, 8)
    for time in range(patches):
        chunk, step = divmod(time, CHUNK)
        tokens = 1 + 8 * min(CHUNK, patches - chunk * CHUNK)
        expected = tokens * weights[chunk, :, 0, 1 + 8 * step : 9 + 8 * step]
        torch.testing.assert_close(view.attention[:, time], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "width"), [(8, 32), (200, 32), (4, 3)])
def test_principal_components_are_those_of_scikit_learn(tokens, width):
    torch.manual_seed(0)
    values = torch.randn(tokens, width) * torch.linspace(1, 3, width) + 5
    components, explained = principal_components(values, 3)
    expected, expected_explained = reference_components(values)
    np.testing.assert_allclose(components, expected, atol=1e-5)
    np.testing.assert_allclose(explained, expected_explained, rtol=1e-5)
    assert torch.equal(components, principal_components(values.clone(), 3)[0])


def test_colours_tell_the_components_apart():
    values = 7.0 * torch.cat([torch.zeros(1, 3), torch.eye(3), -torch.eye(3)])
    grey, *colours = component_colours(values)
    assert (grey == 0.5).all()
    plus, minus = np.array(colours[:3]) - grey, np.array(colours[3:]) - grey
    np.testing.assert_allclose(plus, -minus, atol=1e-6)
    assert np.ptp(plus[0]) == 0  # grey
    assert plus[1, 0] == plus[1, 1] > 0 > plus[1, 2]  # yellow and blue
    assert plus[2, 0] > 0 > plus[2, 1]  # red and green
    assert np.array_equal(component_colours(torch.zeros(2, 4, 3)), np.full((2, 4, 3), 0.5))  # nothing to tell apart


@pytest.mark.parametrize("samples", [600, 10 * PATCH])
def test_silence_has_no_components(samples):
    """Without any sound the tokens differ by their places alone, which is nothing to look at."""
    view = look(tiny_model(), torch.zeros(samples), 2)
    assert not view.components.any()
    assert not view.explained.any()
    figure = draw(view, CONFIG, name="silence", block=2)
    (colours,) = (axis.images[0].get_array() for name, axis in panels_of(figure).items() if name == "Patch")
    assert (colours == 0.5).all()


@pytest.mark.parametrize("dimensions", [0, 1, 2])
def test_errors_of_rounding_are_no_components(dimensions):
    torch.manual_seed(0)
    tokens = 5 + torch.randn(200, dimensions) @ torch.randn(dimensions, 32)
    noisy = tokens + 1e-6 * torch.randn(200, 32)
    components, explained = principal_components(noisy, 3)
    assert components.any(dim=0).tolist() == [number < dimensions for number in range(3)]
    assert explained.sum().item() == pytest.approx(float(dimensions > 0), abs=1e-6)
    assert (component_colours(components)[:, :] == 0.5).all() == (dimensions == 0)


def test_a_missing_file_is_told_before_weights_are_loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("bat_audio_tools.show.load_pretrained_encoder", None)
    with pytest.raises(FileNotFoundError, match=r"nothing\.wav: no such file"):
        show(tmp_path / "nothing.wav", tmp_path / "picture.png", checkpoint=checkpoint)


@pytest.mark.parametrize("samples", [1, 4000, 4001, 12345])
def test_outline_holds_the_extremes_of_every_stretch(samples):
    waveform = noise(samples)
    places, values = outline(waveform)
    step = math.ceil(samples / OUTLINE_POINTS)
    parts = waveform.split(step)
    assert places.tolist() == [step * i for i in range(len(parts)) for _ in range(2)]
    assert values.tolist() == [value.item() for part in parts for value in (part.min(), part.max())]


def panels_of(figure):
    """The left axes by the first word of their titles."""
    return {axis.get_title().split()[0]: axis for axis in figure.axes if axis.get_title()}


@pytest.mark.parametrize("heads", [None, [2], [2, 1]])
def test_drawn_arrays(heads):
    view = look(tiny_model(), noise(6 * PATCH), 2)
    figure = draw(view, CONFIG, name="a.wav", block=2, heads=heads)
    images = [axis.images[0].get_array() for axis in figure.axes if axis.get_ylabel().startswith("Freq")]
    chosen = [view.attention.mean(dim=0)] if heads is None else [view.attention[head - 1] for head in heads]
    expected = [view.log_mel, component_colours(view.components), *chosen]
    assert len(images) == len(expected)
    for image, values in zip(images, expected, strict=True):
        np.testing.assert_allclose(image, np.asarray(values).swapaxes(0, 1), rtol=1e-6)
    titles = [axis.get_title() for axis in figure.axes if "Attention" in axis.get_title()]
    assert [title.split(", ")[1] for title in titles] == (
        ["mean of 2 heads"] if heads is None else [f"head {head}" for head in heads]
    )
    line = panels_of(figure)["Waveform"].lines[0]
    places, samples = outline(view.waveform)
    np.testing.assert_allclose(line.get_xdata(), places / RATE)
    assert np.array_equal(line.get_ydata(), samples)
    percents = [f"{part:.0%}" for part in view.explained.tolist()]
    assert ", ".join(percents) in panels_of(figure)["Patch"].get_title()


@pytest.mark.parametrize("frequency", [500, 1000, 2000, 4000])
def test_a_tone_lies_at_its_frequency(frequency):
    """The row of the tone is within one mel band of the tick that has its name."""
    waveform = torch.sin(2 * math.pi * frequency * torch.arange(RATE) / RATE)
    figure = draw(look(tiny_model(), waveform, 1), CONFIG, name="tone", block=1)
    axis = panels_of(figure)["Log-mel"]
    image = axis.images[0]
    *_, low, high = image.get_extent()
    levels = image.get_array()[:, 40]
    band = (high - low) / len(levels)
    row = low + (levels.argmax() + 0.5) * band
    labels = [label.get_text() for label in axis.get_yticklabels()]
    tick = axis.get_yticks()[labels.index(f"{frequency:,}")]
    assert abs(row - tick) <= band


@pytest.mark.parametrize(("start", "click"), [(0.0, 0.3), (12.5, 0.95)])
def test_a_click_lies_at_its_time(start, click):
    waveform = torch.zeros(RATE)
    waveform[int(click * RATE)] = 1.0
    figure = draw(look(tiny_model(), waveform, 1), CONFIG, name="click", block=1, start=start)
    panels = panels_of(figure)
    line = panels["Waveform"].lines[0]
    assert line.get_xdata()[np.argmax(line.get_ydata())] == pytest.approx(start + click, abs=4 / RATE)
    image = panels["Log-mel"].images[0]
    left, right, *_ = image.get_extent()
    levels = image.get_array().sum(axis=0)
    time = left + (levels.argmax() + 0.5) * (right - left) / len(levels)
    assert time == pytest.approx(start + click, abs=0.0051)
    for axis in panels.values():
        assert axis.get_xlim() == pytest.approx((start, start + 1))
    for name in ("Patch", "Attention"):  # over whole patches, the last of which is partly behind the end
        assert panels[name].images[0].get_extent() == image.get_extent()


@pytest.mark.parametrize("suffix", [*PICTURES, ".PNG"])
def test_files(checkpoint, sound, tmp_path, suffix):
    out = tmp_path / f"picture{suffix}"
    out.write_text("old")
    view = show(sound, out, checkpoint=checkpoint, heads=[1, 2], start=0.25, duration=0.5)
    assert len(view.waveform) == RATE // 2
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix.lower()]
    assert out.read_bytes().startswith(start)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([out.name, "sound.wav"])


def test_what_libsndfile_does_not_read(checkpoint, sound, tmp_path):
    samples, rate = soundfile.read(sound, dtype="float32", always_2d=True)
    (tmp_path / "sound.m4a").write_bytes(encode(samples.mean(axis=1), "mp4", "aac", rate))
    view = show(tmp_path / "sound.m4a", tmp_path / "picture.png", checkpoint=checkpoint)
    assert len(view.waveform) / RATE == pytest.approx(soundfile.info(sound).duration, abs=0.1)


def test_a_name_is_no_formula(checkpoint, sound, tmp_path):
    shutil.copy(sound, tmp_path / r"a$x_{b$.wav")
    show(tmp_path / r"a$x_{b$.wav", tmp_path / "picture.png", checkpoint=checkpoint)
    assert (tmp_path / "picture.png").is_file()


def test_a_failed_picture_leaves_the_old_one(checkpoint, sound, tmp_path, monkeypatch):
    def break_off(self, file, **kwargs):
        file.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", break_off)
    out = tmp_path / "picture.png"
    out.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        show(sound, out, checkpoint=checkpoint)
    assert out.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["picture.png", "sound.wav"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": "picture.jpg"}, r"picture\.jpg.*expected one of \.png, \.pdf, \.svg"),
        ({"out": "nowhere/picture.png"}, "there is no folder nowhere"),
        ({"block": 3}, "block=3: the model has the blocks 1 to 2"),
        ({"block": 0}, "block=0"),
        ({"heads": [1, 3]}, r"heads=\[3\]: each block has the heads 1 to 2"),
        ({"source": "nothing.wav"}, "nothing.wav: no such file"),
        ({"start": 2.0}, "hold nothing from 2.0 s on"),
        ({"device": "cuda:99"}, "device='cuda:99' is not there"),
    ],
)
def test_errors(checkpoint, sound, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        show(**{"source": sound, "out": "picture.png", "checkpoint": checkpoint, **arguments})
    assert [file.name for file in tmp_path.iterdir()] == ["sound.wav"]


def test_command(checkpoint, sound, tmp_path):
    arguments = ["show", str(sound), "-o", str(tmp_path / "a.svg"), "--checkpoint", str(checkpoint)]
    result = CliRunner().invoke(app, [*arguments, "--heads", "2,1", "--block", "1"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1]) == {"picture": str(tmp_path / "a.svg")}
    assert CliRunner().invoke(app, [*arguments, "--heads", "1;2"]).exit_code == 2
    assert CliRunner().invoke(app, [*arguments, "--block", "9"]).exit_code == 2
