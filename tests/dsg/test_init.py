import subprocess
import sys

import pytest

import dsg


def test_every_export_resolves():
    assert len(dsg.__all__) == 13
    for name in dsg.__all__:
        assert getattr(dsg, name).__name__ == name
    assert set(dsg.__all__) <= set(dir(dsg))


def test_unknown_names_raise_as_usual():
    with pytest.raises(AttributeError, match="dsg attribute nonsense"):
        _ = dsg.nonsense


def test_import_is_light():
    code = (
        "import sys, dsg; sys.exit(bool({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_a_guard_needs_no_sae_lens():
    code = "import sys; from dsg import Guard; sys.exit('sae_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
