"""The command `python -m bat_tiny FOLDER`, which makes BAT-tiny; see `model`."""

import argparse
from pathlib import Path

from bat_tiny.model import build

parser = argparse.ArgumentParser(
    prog="python -m bat_tiny", description="Make BAT-tiny: its sounds, its training and its results."
)
parser.add_argument("folder", type=Path, help="where all is made; what is there already is kept")
build(parser.parse_args().folder)
