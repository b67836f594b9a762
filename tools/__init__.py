"""What a Hub snapshot does not need: embedding, pictures, search, training, export and publishing.

It is installed as the package `bat_audio_tools`, beside `bat_audio` (the files at the root of the repository), so that
the command line answers before torch is imported.

The map: every room, from the top floor down. A room imports only rooms below it, and the files of `bat_audio` at the
very bottom; those import no room. `tests/test_rooms.py` keeps the rule.

    cli                         the command line `bat-audio`: options, help, exit status
    embed                       recordings to a table of embeddings: begins or resumes a run, shows its progress
    embedding.cluster           the engine of embed for a Ray cluster
    pretrain                    unlabelled sounds to an encoder
    finetune                    labelled sounds to a model with a head
    embedding.stages            the stages of embed joined: decode, encode, write; the engine for one machine
    similar                     search in a table of embeddings
    training.masked_clips       unlabelled clips and their masks, as a dataset
    export                      a model as one ONNX or torch.export file, checked against PyTorch
    embedding.encoder           windows to rows of embeddings, in buckets and batches
    training.clips              labelled clips as features and targets, with augmentation
    publish                     a model folder as a Hub repository, checked before the upload
    embedding.windows           recordings to windows of samples, in processes of their own
    training.examples           labelled clips of folders, manifests and datasets; what is held out
    sounds.listing              what to embed or pre-train on: files, folders, globs, lists and datasets
    show                        a picture of a recording as the encoder sees it
    convert                     the authors' checkpoints to model folders
    embedding.table             the files of a table, each written whole
    sounds.manifests            the rows of CSV and Parquet files and of datasets that name sounds
    sounds.reading              one recording, whatever its format, to samples
    training.trainer            Trainer's arguments, order and parameter groups; configs of new encoders
    training.folder             the folder of a training: whose run is in it, and where it goes on
    training.card               model cards and their plots
    training.masked_regression  the model of the pre-training: student, teacher and losses
    settings                    the settings of the commands, which are their options
    names                       what users call things: addresses, Hub repositories
    folders                     files and folders that appear whole; one run at a time
    machine                     optional libraries, devices
"""

import sys


def main():
    """The program `bat-audio`, which is installed without the libraries of the extra `train` too."""
    try:
        from bat_audio_tools.cli import run
    except ModuleNotFoundError as error:
        sys.exit(f"error: bat-audio needs more packages ({error}): pip install 'bat-audio[train]'")
    run()
