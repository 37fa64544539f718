"""Whether a checkpoint folder holds the model that its config describes, by the headers of its files.

`python -m easyspec.model.layout FOLDER` says what is wrong on its standard output and ends with exit code 1.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from easyspec.errors import ConfigurationError
from easyspec.model.config import load_config
from easyspec.model.decoder import Decoder
from easyspec.model.weight_source import open_weights
from easyspec.ops.reference import ReferenceExecutor


def check_layout(folder: Path) -> None:
    """Build the model without values and without memory for them.

    Raises ConfigurationError where loading it would: for a config that is not understood, a broken file, a tensor that
    is missing, has another shape or type than the config asks for, or is left over.
    """
    open_headers = partial(open_weights, is_whole=True, reads_values=False)
    Decoder(folder, load_config(folder), ReferenceExecutor(torch.device("meta")), open_tensors=open_headers)


if __name__ == "__main__":
    try:
        check_layout(Path(sys.argv[1]))
    except ConfigurationError as error:
        print(error)
        sys.exit(1)
