import pytest

from tests.lightning_modules.toy import save_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder with the tiny `model` and `sae`; nobody may write to it."""
    return save_toy(tmp_path_factory.mktemp("toy"))
