"""What all tests share. One thread keeps small tensors fast and results repeatable."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)


@pytest.fixture
def refused(capsys):
    """refused(function, *args): what is on stderr when the program ends with `status`."""

    def refused(function, *args, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args)
        error = capsys.readouterr().err
        assert stop.value.code == status and error.strip(), error
        return error

    return refused
