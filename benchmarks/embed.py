"""`bat-audio embed` from files to the table, beside the encoder on features that are ready; and its memory."""

import dataclasses
import itertools
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch

from bat_audio import BatConfig, BatModel
from bat_audio_tools.embed import begun, embed
from bat_audio_tools.embedding.encoder import Encoder
from bat_audio_tools.embedding.stages import Stages
from bat_audio_tools.embedding.table import Table as EmbeddingTable
from bat_audio_tools.embedding.windows import DecodingProcesses, decode_first
from bat_audio_tools.settings import EmbedSettings
from bat_audio_tools.sounds.reading import Input
from benchmarks.harness import (
    Case,
    Section,
    Settings,
    Table,
    in_fresh_process,
    interleave,
    progress,
    ratio,
    timing_rows,
)

SECONDS = 10  # The length of a clip.
# So many clips are different, and the others are copies: making one takes longer than a GPU takes to embed ten.
DISTINCT = 48
FORMATS = {"flac": "FLAC, 44.1 kHz stereo", "mp3": "MP3, 44.1 kHz stereo", "wav": "WAV, 44.1 kHz stereo"}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER, EMBED = "encoder alone", "embed, from files to the table"


def make_clips(folder: Path, number: int):
    """Clips of noise that is coloured like music, in the three formats in turn."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for place, suffix in zip(range(number), itertools.cycle(FORMATS), strict=False):
        file = folder / f"{place:05d}.{suffix}"
        if place >= DISTINCT:
            shutil.copy(folder / f"{place % DISTINCT:05d}.{suffix}", file)
            continue
        spectrum = np.fft.rfft(rng.standard_normal((SECONDS * 44100, 2)), axis=0)
        spectrum[1:] /= np.arange(1, len(spectrum))[:, None] ** 0.5
        samples = np.fft.irfft(spectrum, axis=0)
        soundfile.write(file, 0.3 * samples / np.abs(samples).max(), 44100)


def throughput(settings: Settings, section: Section):
    batch_size = 2 if settings.quick else 16 if settings.device == "cpu" else 64
    clips = batch_size * (6 if settings.quick else 3 if settings.device == "cpu" else 47)
    folder, out = settings.scratch / "clips", settings.scratch / f"table_{settings.device}"
    if not folder.exists() or len(list(folder.iterdir())) != clips:
        shutil.rmtree(folder, ignore_errors=True)
        make_clips(folder, clips)
    options = EmbedSettings(
        inputs=str(folder),
        out=str(out),
        checkpoint=str(settings.folder),
        device=settings.device,
        batch_size=batch_size,
        shard_size=clips,
    )
    with begun(options, EmbeddingTable(options.out), [options.inputs], None):
        stages = Stages(options, None)
    workers = len(os.sched_getaffinity(0))
    with DecodingProcesses(workers) as executor:
        encoder = Encoder(options)
        features = torch.rand(batch_size, 1, 1024, 128, device=settings.device).to(encoder.model.dtype)

        def encode(_: None):
            for _ in range(clips // batch_size):
                encoder.model(features)

        def embed_all(_: None):
            found = (clip for _, clip in stages.windows([0], executor, workers))
            stages.write(0, found, encoder, lambda **_: None)

        def case(call: Callable) -> Callable[[], Case]:
            return lambda: Case(call, lambda: None, clips)

        cases = {ENCODER: case(encode), EMBED: case(embed_all)}
        rounds = min(settings.rounds, 5)
        seconds, left_out = interleave(cases, rounds, settings.device)
        parts, _ = interleave(stage_cases(folder, stages, encoder), rounds, settings.device)
    section.leave_out(left_out)
    share = ratio(seconds[ENCODER], seconds[EMBED])
    section.judge("embed, share of the encoder's own throughput", share.median, at_least=0.95)
    name = f"{clips} clips of {SECONDS} s, {encoder.model.dtype}".replace("torch.", "")
    section.tables.append(Table(f"End to end, {name}", timing_rows(seconds, ENCODER), chart="clips per second"))
    section.tables.append(Table(f"Stages, decoding in one of {workers} processes", timing_rows(parts, ENCODER)))


def stage_cases(folder: Path, stages: Stages, encoder: Encoder) -> dict[str, Callable[[], Case]]:
    """Each stage by itself."""
    files = {suffix: str(min(folder.glob(f"*.{suffix}"))) for suffix in FORMATS}
    item = Input("", files["wav"])
    clip = next(stages.cut.windows(item, decode_first(stages.cut, item, None).stretches[0]))
    batch = encoder.settings.batch_size
    features = torch.rand(batch, 1, 1024, 128, device=encoder.device).to(encoder.model.dtype)

    def decode(suffix: str) -> Callable[[], Case]:
        item = Input("", files[suffix])
        return lambda: Case(lambda _: decode_first(stages.cut, item, None), lambda: None)

    return {
        **{f"decode {name}": decode(suffix) for suffix, name in FORMATS.items()},
        "features": lambda: Case(encoder._features, lambda: [dataclasses.replace(clip) for _ in range(batch)], batch),
        ENCODER: lambda: Case(encoder.model, lambda: features, batch),
    }


def memory(settings: Settings, section: Section):
    """Peak memory of two runs, one with a hundred times as many files, in processes of their own."""
    checkpoint = settings.scratch / "tiny"
    torch.manual_seed(0)
    BatModel(BatConfig(**TINY)).save_pretrained(checkpoint)
    few, many = (20, 200) if settings.quick else (200, 20_000)
    peaks = {}
    for number in (few, many):
        folder = settings.scratch / f"files_{number}"
        samples = 0.1 * np.random.default_rng(0).standard_normal((number, 4000))
        for place in range(number):
            file = folder / f"{place // 1000:03d}" / f"{place:05d}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, samples[place], 8000)
        with progress(f"memory: {number} files"):
            peaks[number] = in_fresh_process(
                peak_of_embedding, folder, settings.scratch / f"out_{number}", checkpoint, settings.device
            )
        shutil.rmtree(folder)
    section.tables.append(
        Table(
            "Peak memory, tiny encoder",
            [{"files": number, **{f"{k} MB": v / 1e6 for k, v in peak.items()}} for number, peak in peaks.items()],
        )
    )
    growth = peaks[many]["main process"] / peaks[few]["main process"]
    section.judge(f"embed, peak memory with {many} files over that with {few}", growth, at_most=1.1)


def peak_of_embedding(folder: str, out: str, checkpoint: str, device: str) -> dict[str, int]:
    """Bytes at the peak of a run, of the main process and of the largest of the others."""
    embed(EmbedSettings(inputs=folder, out=out, checkpoint=checkpoint, device=device, num_frames=16))
    # This file counts only the memory of this process, while getrusage counts what its parent held too.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1])
    others = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"main process": peak, "largest decoding process": others}


def run(settings: Settings) -> Section:
    section = Section("Embedding files" + (" on a GPU" if settings.device == "cuda" else ""))
    throughput(settings, section)
    if settings.device == "cpu":
        memory(settings, section)
    return section
