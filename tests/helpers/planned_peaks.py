"""One rank of a run that measures the peak memory of training priors: python -m helpers.planned_peaks.

It takes the arguments RECIPES STORE FOLDER. RECIPES is a JSON list of whole recipes. The script prints the rank's peak
bytes of each as a JSON list. Adam and PowerSGD's state work on small chunks here, so that PowerSGD's sums and factors
take the most even in small models.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed import error_buffers
from dalle_cli.precision import adam
from dalle_cli.prior.train import train_prior
from dalle_cli.progress import silence
from helpers.peak_memory import peak_bytes

CHUNK = 2**14


def main() -> None:
    recipes, store, folder = sys.argv[1:]
    silence()
    adam.CHUNK = error_buffers.CHUNK = CHUNK
    port, peaks = int(os.environ["MASTER_PORT"]), []
    for i, values in enumerate(json.loads(recipes)):
        os.environ["MASTER_PORT"] = str(port + i)
        recipe, out = Recipe.model_validate(values), Path(folder) / str(i)
        peaks.append(peak_bytes(partial(train_prior, recipe, Path(store), out)))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
