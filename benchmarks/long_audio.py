"""One hour of audio in one call: time per second beside a clip's, and memory by length."""

import statistics

import torch

from bat_audio import BatConfig, load_pretrained_encoder
from benchmarks.encoder import random_features
from benchmarks.harness import Section, Settings, Spread, Table, in_fresh_process, progress, time_calls
from benchmarks.memory import inference_peak, memory_table

FRAMES_PER_MINUTE = 6000
CLIPS = 10  # timed before and after the hour


def run(settings: Settings) -> Section:
    section = Section(f"Long audio ({settings.device})")
    minutes = (1, 2) if settings.quick else (10, 20, 60)
    config = BatConfig.from_pretrained(settings.folder)
    model = load_pretrained_encoder(settings.device, checkpoint=settings.folder)
    lengths = {"clip before": config.input_shape[0], "long": minutes[-1] * FRAMES_PER_MINUTE}
    lengths["clip after"] = lengths["clip before"]
    seconds = {}
    with progress(f"{minutes[-1]} minutes in one call"), torch.inference_mode():
        pass_frames = config.max_chunks_per_pass * config.chunk_time_patches * config.patch_size[0]
        for frames in (lengths["clip before"], pass_frames):  # to warm up
            model(random_features(config, 1, frames, device=settings.device))
        for name, frames in lengths.items():
            calls = 1 if name == "long" else CLIPS
            inputs = [random_features(config, 1, frames, device=settings.device) for _ in range(calls)]
            seconds[name] = [time_calls(model, [item], settings.device) / (frames / 100) for item in inputs]
    clip = seconds["clip before"] + seconds["clip after"]
    per_second = seconds["long"][0] / statistics.median(clip)
    rows = [
        {"case": f"{minutes[-1]} minutes", "time / 10.24 s": per_second, "ms per second": 1000 * seconds["long"][0]},
        {
            "case": "10.24 s",
            "time / 10.24 s": 1.0,
            "ms per second": Spread.of([1000 * s for s in clip]),
        },
    ]
    section.tables.append(Table("Time per second of audio", rows))
    section.notes.append(f"{minutes[-1]} minutes were timed once, the clip {len(clip)} times before and after.")
    section.judge(f"{minutes[-1]} minutes, time per second / 10.24 s", per_second, at_most=1.05)

    # How much freed memory glibc holds back is chance; the second time it maps every large tensor by itself.
    ways = {"": {}, ", without what glibc holds back": {"MALLOC_MMAP_THRESHOLD_": "1048576"}}
    for way, environment in (ways if settings.device == "cpu" else {"": {}}).items():
        sizes = {}
        for length in minutes:
            with progress(f"memory of {length} minutes{way}"):
                arguments = settings.folder, "eager sdpa", 1, length * FRAMES_PER_MINUTE, settings.device
                peak = in_fresh_process(inference_peak, *arguments, **environment)
            tokens = 1 + length * FRAMES_PER_MINUTE // config.patch_size[0] * config.grid_size[1]
            sizes[f"{length} minutes"] = [peak - tokens * config.hidden_size * 4]
        section.tables.append(memory_table(f"Extra peak memory beyond model, input and output{way}", sizes))
        shortest, *_, longest = sizes
        share = sizes[longest][0] / sizes[shortest][0]
        section.judge(f"extra memory, {longest} / {shortest}{way}", share, at_most=1.05)
    return section
