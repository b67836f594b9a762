"""One hour of audio in one call: time per second beside a clip's, and memory by length."""

import torch

from bat_audio import BatConfig, BatModel, load_pretrained_encoder
from benchmarks.encoder import random_features
from benchmarks.harness import Section, Settings, Spread, Table, in_fresh_process, progress, ratio, time_calls
from benchmarks.memory import inference_peak, memory_table

FRAMES_PER_MINUTE = 6000
ROUNDS, CLIPS = 3, 10  # The hour is timed so often, with so many clips before it and after it.


@torch.inference_mode()
def seconds_per_second(model: BatModel, frames: int, calls: int, device: str) -> float:
    """What a second of audio takes in calls with so many frames each."""
    inputs = [random_features(model.config, 1, frames, device=device) for _ in range(calls)]
    return time_calls(model, inputs, device) / (frames / 100)


def run(settings: Settings) -> Section:
    section = Section(f"Long audio ({settings.device})")
    minutes, rounds = ((1, 2), 2) if settings.quick else ((10, 20, 60), ROUNDS)
    config = BatConfig.from_pretrained(settings.folder)
    model = load_pretrained_encoder(settings.device, checkpoint=settings.folder)
    clip_frames, long_frames, longest = config.input_shape[0], minutes[-1] * FRAMES_PER_MINUTE, f"{minutes[-1]} minutes"
    clip, long = [], []
    seconds_per_second(model, 2 * clip_frames, 1, settings.device)  # This call warms up.
    for number in range(rounds):
        with progress(f"{longest} in one call, round {number + 1} of {rounds}"):
            before = seconds_per_second(model, clip_frames, CLIPS, settings.device)
            long.append(seconds_per_second(model, long_frames, 1, settings.device))
            clip.append((before + seconds_per_second(model, clip_frames, CLIPS, settings.device)) / 2)
    rows = [
        {
            "case": case,
            "time / 10.24 s": ratio(seconds, clip),
            "ms per second": Spread.of([1000 * value for value in seconds]),
        }
        for case, seconds in ((longest, long), ("10.24 s", clip))
    ]
    section.tables.append(Table("Time per second of audio", rows))
    section.notes.append(f"{longest} were timed {rounds} times, each between twice {CLIPS} clips of 10.24 s.")
    section.judge(f"{longest}, time per second / 10.24 s", ratio(long, clip).median, at_most=1.05)

    # How much freed memory glibc holds back is up to chance. With the second setting it gets memory for every large
    # tensor from the system and returns it at once.
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
        if not way:
            shortest = f"{minutes[0]} minutes"
            growth = sizes[longest][0] / sizes[shortest][0]
            section.judge(f"extra memory, {longest} / {shortest}", growth, at_most=1.05)
    return section
