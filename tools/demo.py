"""`make demo`: embed the sounds in examples/, with an untrained encoder where the weights cannot be had."""

import sys
from pathlib import Path

from bat_audio.load_model import find_weights, main

EXAMPLES = Path(__file__).parent.parent / "examples"


def demo() -> int:
    sounds = sorted(str(file) for file in EXAMPLES.iterdir() if file.suffix in (".flac", ".mp3", ".ogg", ".wav"))
    try:
        find_weights()
    except OSError as error:
        print(f"{error}\n\n*** NO PRETRAINED WEIGHTS: the demo goes on with an untrained encoder. ***\n", flush=True)
        return main(["--untrained", *sounds])
    return main(sounds)


if __name__ == "__main__":
    sys.exit(demo())
