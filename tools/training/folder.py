"""The folder OUT.training of a run that trains: whose run is in it, and which checkpoint it can go on from."""

import json
import zipfile
from pathlib import Path

from bat_audio_tools.folders import whole
from bat_audio_tools.settings import FinetuneSettings, PretrainSettings

# These settings have no influence on the result, so that they may change when a run goes on.
WITHOUT_INFLUENCE = ("num_workers", "report_to", "gradient_checkpointing")


def training_folder(out: Path) -> Path:
    """Where the checkpoints and logs of a run lie; a FileExistsError says that its result would overwrite something."""
    work = out.with_name(f"{out.name}.training")
    if out.exists():
        is_result = (out / "config.json").is_file() and last_whole_checkpoint(work)
        finished = ", the result of a training that is finished" if is_result else ""
        raise FileExistsError(f"{out} exists already{finished}; name another folder (--out), or remove it.")
    return work


def claim(work: Path, settings: FinetuneSettings | PretrainSettings, clips: str):
    """Note settings and clips in the training folder, or refuse a folder with checkpoints of others."""
    facts = {name: getattr(value, "_fingerprint", value) for name, value in vars(settings).items()}
    facts = json.loads(json.dumps({**facts, "clips": clips}, default=str))
    notes = work / "settings.json"
    if last_whole_checkpoint(work):
        begun = json.loads(notes.read_text())
        others = [
            f"{name}={begun.get(name)!r}, now {facts[name]!r}"
            for name in facts
            if name not in WITHOUT_INFLUENCE and begun.get(name) != facts[name]
        ]
        if others:
            raise ValueError(
                f"{work} holds a run with other settings or data ({'; '.join(others)}). Go on with the same, or remove "
                "that folder to begin anew."
            )
    with whole(notes) as partial:
        partial.write_text(json.dumps(facts, indent=2))


def last_whole_checkpoint(work: Path) -> str | None:
    """The checkpoint to go on from, of those that all processes wrote to the end."""
    notes = work / "settings.json"
    if not notes.is_file():
        return None
    begun = json.loads(notes.read_text())
    clips_at_once = begun["batch_size"] // begun["gradient_accumulation"]
    checkpoints = {
        int(folder.name.rpartition("-")[2]): folder
        for folder in work.glob("checkpoint-*")
        if _is_whole(folder, clips_at_once)
    }
    return str(checkpoints[max(checkpoints)]) if checkpoints else None


def _is_whole(checkpoint: Path, clips_at_once: int) -> bool:
    """Whether a checkpoint was not cut off by a kill or a full disk.

    `clips_at_once` are the clips that all of its processes handled together in one forward pass.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    processes = clips_at_once // state["train_batch_size"]  # So many processes wrote it; now they may be more or fewer.
    states = [f"rng_state_{index}.pth" for index in range(processes)] if processes > 1 else ["rng_state.pth"]
    # torch.save writes zip files, which end with their list of contents, so one that was cut off is no zip file.
    return all(zipfile.is_zipfile(checkpoint / file) for file in ("optimizer.pt", *states))
