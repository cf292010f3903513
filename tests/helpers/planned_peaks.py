"""One of several processes that train priors, for test_plan.py: python planned_peaks.py RECIPES STORE FOLDER.

RECIPES is a JSON list of whole recipes. Prints the most bytes of tensors that this process held in each, as JSON. Adam
and what PowerSGD keeps are worked on in small parts, so that for small models too its sums and factors take the most.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed import error_buffers as kept
from dalle_cli.precision import adam
from dalle_cli.prior.train import train_prior
from dalle_cli.progress import silence
from helpers.peak_memory import peak_bytes

CHUNK = 2**14


def main() -> None:
    told, store, folder = sys.argv[1:]
    silence()
    adam.CHUNK = kept.CHUNK = CHUNK
    port, found = int(os.environ["MASTER_PORT"]), []
    for place, values in enumerate(json.loads(told)):
        os.environ["MASTER_PORT"] = str(port + place)
        recipe, out = Recipe.model_validate(values), Path(folder) / str(place)
        found.append(peak_bytes(partial(train_prior, recipe, Path(store), out)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
