"""Where the time goes: the operations of the encoder and the front end, one by one."""

import torch

from bat_audio import BatConfig, load_pretrained_encoder
from benchmarks.encoder import SECOND_FRAMES, encoders, picture_cases, random_features
from benchmarks.front_end import front_ends
from benchmarks.harness import Case, Section, Settings, Table, progress

CALLS, MOST_OPERATIONS = 5, 20
CUDA_BATCH, FRONT_END_BATCH = 64, 16
LONGEST_NAME = 100  # Names of kernels are cut to so many characters.


def run_cpu(settings: Settings) -> Section:
    """A clip of 1 s beside one of 10.24 s, and the front end beside torchaudio's chain."""
    config = BatConfig.from_pretrained(settings.folder)
    model = load_pretrained_encoder(checkpoint=settings.folder)
    fronts, batch = front_ends(FRONT_END_BATCH), FRONT_END_BATCH
    cases = {
        "encoder, 1 s": lambda: Case(model, lambda: random_features(config, 1, SECOND_FRAMES)),
        "encoder, 10.24 s": lambda: Case(model, lambda: random_features(config, 1)),
        **{f"{name}, batch {batch} x 10 s": fronts[name] for name in ("BatAudioProcessor", "torchaudio")},
    }
    return _section("Profile on a CPU", cases, "cpu")


def run_cuda(settings: Settings, batch: int = CUDA_BATCH) -> Section:
    """The compiled encoder in bfloat16, and the front end."""
    config, device = BatConfig.from_pretrained(settings.folder), settings.device
    compiled = encoders(settings.folder, device, torch.bfloat16)["compiled"]
    encoder_cases = picture_cases({"compiled": compiled}, config, batch, device=device, dtype=torch.bfloat16)
    cases = {
        f"compiled, bfloat16, batch {batch}": encoder_cases["compiled"],
        f"BatAudioProcessor, batch {batch} x 10 s": front_ends(batch, device)["BatAudioProcessor"],
    }
    return _section("Profile on CUDA", cases, device)


def _section(name: str, cases: dict, device: str) -> Section:
    section = Section(name)
    for title, make_case in cases.items():
        with progress(f"profile of {title}"):
            section.tables.append(Table(title, operations(make_case(), device)))
    return section


@torch.inference_mode()
def operations(case: Case, device: str) -> list[dict]:
    """The operations that take the most time by themselves: a GPU's kernels, else torch's operators on the CPU."""
    is_cuda = torch.device(device).type == "cuda"
    inputs = [case.make_input() for _ in range(3 + CALLS)]
    for item in inputs[:3]:  # These calls compile and warm up.
        case.call(item)
    with torch.profiler.profile() as record:
        for item in inputs[3:]:
            case.call(item)
        if is_cuda:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    found = [event for event in record.key_averages() if event.device_type == kind]
    time_of = {event.key: event.self_device_time_total if is_cuda else event.self_cpu_time_total for event in found}
    total = sum(time_of.values())  # Microseconds.
    return [
        {
            "operation": event.key[:LONGEST_NAME].replace("|", "/"),
            "calls": event.count / CALLS,
            "ms": time_of[event.key] / 1000 / CALLS,
            "share": time_of[event.key] / total,
        }
        for event in sorted(found, key=lambda event: -time_of[event.key])[:MOST_OPERATIONS]
    ]
