"""Publishing a model as a Hub repository that loads with `trust_remote_code=True`.

`publish` puts the repository together in a temporary folder, loads it in a fresh process that has nothing but the files
in it, compares what both models compute, and only then uploads, in one commit.
"""

import copy
import fnmatch
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session
from safetensors import SafetensorError

from bat_audio import modeling_bat
from bat_audio.configuration_bat import BatConfig
from bat_audio.modeling_bat import AUTO_MAP, BatModel, BatPreTrainedModel
from bat_audio.processing_bat import BatFeatureExtractor
from bat_audio_tools.names import check_model_folder, check_repository
from bat_audio_tools.training.card import write_card, write_encoder_card

PACKAGE = Path(modeling_bat.__file__).parent
# A repository gets these files of the package beside what `save_pretrained` writes.
PACKAGE_FILES = ("load_model.py", "LICENSE")
PICTURES = ("*.png", "plots/*.png")  # These files are published if the card names them.
# The keys are the names of the model classes, the values the Auto classes that load them.
AUTO_CLASSES = {reference.partition(".")[2]: name for name, reference in AUTO_MAP.items() if name != "AutoConfig"}
# Transformers would read such files beside or instead of those published here, so a repository loses them.
STALE_FILES = (
    "model-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.*",
    "processor_config.json",
)

# This code runs in the fresh process, after the source of `outputs`.
LOAD_AND_RUN = """
import sys
import transformers

auto_class, folder, result, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = getattr(transformers, auto_class).from_pretrained(folder, dtype="auto", trust_remote_code=True)
extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
for part in (model, extractor):
    if not type(part).__module__.startswith("transformers_modules."):
        raise ImportError(f"{type(part)} is not the repository's class")
torch.save(outputs(model, extractor), result)
"""


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    message: str | None = None,
) -> str | None:
    """Upload a model as a complete repository, in one commit, after proving that it loads and computes the same.

    The repository gets the weights in one model.safetensors, in the dtype of config.json, that and the settings of the
    feature extractor, this package's code, the licence and the model card: the folder's README.md with its plots, or
    else one made here. Nothing else in the folder is published. Files that the repository has besides stay, but for
    other weights, adapters and settings that Transformers would read instead (`STALE_FILES`).

    Args:
        folder: what `save_pretrained`, `convert` or `finetune` wrote, or a checkpoint folder of Trainer.
        repo_id: "namespace/name"; created if it does not exist.
        private: make a new repository private; otherwise it is what the namespace makes of new ones, public as a rule.
        revision: the branch to commit to, created from the main branch if it does not exist; None is the main branch.
        dry_run: do everything but the upload, without a connection, and print the files with their sizes in bytes.
        message: of the commit.

    Returns:
        The URL of the commit; None for a dry run.

    Raises:
        OSError: no model in the folder, a malformed `repo_id`, no connection, or no right to write there. Nothing is
            committed then, though a new repository or branch may have been created.
        ValueError: the folder holds no whole BAT model, the assembled repository does not load or computes something
            else, or `private` is asked of a public repository.
        ImportError: a card with plots is to be made here, and matplotlib is missing.
    """
    folder = Path(folder)
    check_repository(repo_id)
    if not dry_run:
        with _hub_errors(repo_id):
            _check_access()
    with tempfile.TemporaryDirectory(prefix="bat-publish-") as scratch:
        repository = Path(scratch) / "bat-repository"
        model, extractor = assemble(folder, repository, name=repo_id.partition("/")[2])
        check(repository, model, extractor)
        files = {file.relative_to(repository).as_posix(): file for file in repository.rglob("*") if file.is_file()}
        if dry_run:
            for name in sorted(files):
                print(f"{files[name].stat().st_size:>13,} {name}")
            return None
        with _hub_errors(repo_id):
            return upload(files, repo_id, private, revision, message or f"Upload {type(model).__name__}")


def assemble(folder: Path, repository: Path, name: str) -> tuple[BatPreTrainedModel, BatFeatureExtractor]:
    """Write the repository of the model in `folder`; returns the model and its feature extractor.

    Args:
        repository: the folder to write, which does not exist.
        name: of the model, for a new card.

    Raises:
        OSError, ValueError: as `publish`.
    """
    model = load_folder(folder)
    has_extractor = (folder / "preprocessor_config.json").is_file()
    if has_extractor:
        BatFeatureExtractor.from_pretrained(folder).save_pretrained(repository)
    model.save_pretrained(repository, max_shard_size="1000GB")
    extractor = BatFeatureExtractor.from_pretrained(folder if has_extractor else repository)
    for file in PACKAGE_FILES:
        shutil.copy(PACKAGE / file, repository)
    _write_card(folder, repository, model, name)
    return model, extractor


def load_folder(folder: Path) -> BatPreTrainedModel:
    """The model in a folder by its own class, in the dtype of its weights."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds a PEFT adapter. Merge it first (merge_and_unload) and save the merged model.")
    check_model_folder(folder)
    settings, _ = BatConfig.get_config_dict(folder)
    architecture = (settings.get("architectures") or ["BatModel"])[0]
    if settings.get("model_type") != BatConfig.model_type or architecture not in AUTO_CLASSES:
        raise ValueError(
            f"{folder / 'config.json'} describes {settings.get('model_type')!r} with architectures {architecture!r}; "
            f"expected {BatConfig.model_type!r} with one of {', '.join(AUTO_CLASSES)}."
        )
    model_class = getattr(modeling_bat, architecture)
    try:
        model, info = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except SafetensorError as error:
        raise OSError(f"{folder} holds damaged weights ({error}). Copy or save them again.") from error
    # from_pretrained raises no error for a head that the checkpoint lacks altogether: it would be published untrained.
    problems = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(problems.values()):
        listing = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{folder} does not hold exactly the weights of a {architecture}. {listing}.")
    return model


def _write_card(folder: Path, repository: Path, model: BatPreTrainedModel, name: str):
    """README.md with the metadata that the Hub needs, and the plots beside it."""
    readme = repository / "README.md"
    if (folder / "README.md").is_file():
        shutil.copy(folder / "README.md", readme)
        text = readme.read_text(encoding="utf-8")
        for picture in (file for pattern in PICTURES for file in folder.glob(pattern)):
            target = repository / picture.relative_to(folder)
            if picture.relative_to(folder).as_posix() in text:
                target.parent.mkdir(exist_ok=True)
                shutil.copy(picture, target)
    elif isinstance(model, BatModel):
        write_encoder_card(repository, model, name)
    else:
        write_card(repository, model, name=name)

    try:
        card = ModelCard.load(readme)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The metadata at the top of {folder / 'README.md'} is not valid: {error}") from error
    tasks = {"BatModel": "feature-extraction", "BatForAudioClassification": "audio-classification"}
    task = tasks.get(type(model).__name__)  # Models that classify frames have no pipeline.
    for key, value in {"library_name": "transformers", "license": "mit", "pipeline_tag": task}.items():
        if value is not None and card.data.get(key) is None:
            card.data[key] = value
    tags = card.data.get("tags") or []
    card.data["tags"] = tags if "custom_code" in tags else [*tags, "custom_code"]
    card.save(readme)


def outputs(model: torch.nn.Module, extractor) -> dict[str, torch.Tensor]:
    """What two copies of a model are compared by: features of a fixed waveform and all that the model makes of them."""
    # The model is copied, because products with weights of a mapped file depend on where in memory they happen to lie.
    model = copy.deepcopy(model)
    noise = torch.rand(2 * extractor.sampling_rate, generator=torch.Generator().manual_seed(0)) * 2 - 1
    waveform = noise * torch.logspace(0, -6, len(noise))  # It fades by 120 dB, more than the features keep.
    features = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
    with torch.inference_mode():
        output = model(input_features=features, output_hidden_states=True, return_dict=True)
    tensors = {"input_features": features}
    for name, value in output.items():
        layers = value if isinstance(value, tuple) else (value,)
        tensors.update({f"{name}[{i}]" if isinstance(value, tuple) else name: layer for i, layer in enumerate(layers)})
    return tensors


def check(repository: Path, model: BatPreTrainedModel, extractor: BatFeatureExtractor):
    """Load the repository by its Auto class in a fresh process without this package, and compare bit for bit.

    Raises:
        ValueError: it does not load, or an output differs; the message names it.
    """
    expected = outputs(model, extractor)
    code = f"import copy\nimport torch\n\n{inspect.getsource(outputs)}\n{LOAD_AND_RUN}"
    with tempfile.TemporaryDirectory(prefix="bat-check-") as scratch:
        result = Path(scratch) / "outputs.pt"
        arguments = (AUTO_CLASSES[type(model).__name__], repository.absolute(), result, torch.get_num_threads())
        process = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=scratch,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "bat-modules")},
            capture_output=True,
            text=True,
        )
        if process.returncode != 0:
            reason = (process.stderr.strip() or f"exit status {process.returncode}").splitlines()[-1]
            raise ValueError(f"The assembled repository does not load and run in a fresh process: {reason}")
        found = torch.load(result, weights_only=True)
    differing = [name for name in {**expected, **found} if not _is_equal(expected.get(name), found.get(name))]
    if differing:
        raise ValueError(
            "The assembled repository computes something else than the model it was made from; not the same: "
            f"{', '.join(differing)}."
        )


def _is_equal(expected: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    return expected is not None and found is not None and expected.dtype == found.dtype and torch.equal(expected, found)


def upload(files: dict[str, Path], repo_id: str, private: bool, revision: str | None, message: str) -> str:
    """Commit the files by their names in the repository; returns the URL of the commit."""
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    present = api.model_info(repo_id)
    if private and not present.private:
        raise ValueError(f"private=True, but {repo_id} exists and is public; make it private in its settings first.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.model_info(repo_id, revision=revision)
    stale = [
        file.rfilename
        for file in present.siblings
        if any(fnmatch.fnmatchcase(file.rfilename, pattern) for pattern in STALE_FILES)
    ]
    operations = [
        *(CommitOperationDelete(name) for name in stale),
        *(CommitOperationAdd(name, file) for name, file in sorted(files.items())),
    ]
    # upload_folder might make several commits, this makes one. With parent_commit it fails where somebody else has made
    # a commit meanwhile, instead of overwriting it.
    commit = api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, parent_commit=present.sha
    )
    return commit.commit_url


def _check_access():
    """Raise an error at once if the Hub cannot be reached or does not know the token."""
    if get_token() is None:
        raise OSError("there is no token on this machine")
    get_session().head(constants.ENDPOINT, timeout=5)
    HfApi().whoami()


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub's client into one OSError."""
    try:
        yield
    except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError wraps errors of large files.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise OSError(
            f"{repo_id} was not published to {constants.ENDPOINT}: {reason.rstrip('.')}. Publishing needs a connection "
            "and a token that may write there (hf auth login, or HF_TOKEN)."
        ) from error
