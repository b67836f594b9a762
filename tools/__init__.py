"""What a Hub snapshot does not need: embedding, pictures, search, training, export and publishing; see `cli`."""

import sys


def main():
    """The program `bat-audio`, which is installed without the libraries of the extra `train` too."""
    try:
        from bat_audio.tools.cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"error: bat-audio needs more packages ({error}): pip install 'bat-audio[train]'")
    app(prog_name="bat-audio")
