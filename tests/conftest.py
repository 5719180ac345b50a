"""What all tests share. One thread keeps small tensors fast and results repeatable."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)


@pytest.fixture
def refused(capsys):
    """refused(function, *args): the one line on stderr with which the program ends, status 2."""

    def refused(function, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args)
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return refused
