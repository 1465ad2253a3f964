"""Files of --config: every error is one line that names file and line; only `configs` is found."""

import sys

import pytest

from deepseek_jax import config_file
from deepseek_jax.config import ConfigError

BASE = "from configs import v3_tiny\ndef get_config():\n    config = v3_tiny.get_config()\n"

BROKEN = {
    "layers = = 3": ": line 1: invalid syntax; a config is a Python file with get_config()",
    "root:x:0:0:root:/root:/bin/bash": ": line 1: invalid syntax; a config is a Python file",
    "import no_such_module": ": line 1: ModuleNotFoundError: No module named 'no_such_module'",
    "\n1 / 0": ": line 2: ZeroDivisionError: division by zero",
    "raise SystemExit": ": line 1: SystemExit",
    "import sys\nsys.exit(0)": ": line 2: SystemExit: 0",
    "raise KeyboardInterrupt": ": line 1: KeyboardInterrupt",
    "raise ValueError('two\\nlines')": ": line 1: ValueError: two lines",
    "x = 1": ": no get_config() in it; configs/v3_tiny.py shows one",
    "get_config = 3": ": get_config must be a function without arguments",
    "def get_config(size): pass": ": get_config must be a function without arguments",
    "def get_config(): pass": ": get_config() returned NoneType, and must return the ConfigDict",
    "def get_config(): return {}": ": get_config() returned dict",
    "def get_config(): return 'model'": ": get_config() returned str",
    "def get_config():\n    return get_config()": ": line 2: RecursionError: maximum recursion",
    f"{BASE}    config.model.update(layer=3)": ": line 4: there is no key 'layer'; did you mean",
    f"{BASE}    config.model.layers = 'three'": ": line 4: TypeError: ",
    f"{BASE}    import numpy\n    config.model.layers = numpy.int64(3)": ": line 5: TypeError: ",
    f"{BASE}    import sys; sys.exit(0)": ": line 4: SystemExit: 0",
    "from ml_collections import FrozenConfigDict\ndef get_config(): return FrozenConfigDict()": (
        ": get_config() returned FrozenConfigDict, and must return the ConfigDict"
    ),
    "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E": ": line 3: E",
    f"{BASE}    config.unlock()\n    config[3] = 4\n    return config": ": TypeError: '<' not",
    f"{BASE}    config.seed = config.batch.get_ref('length') // 0\n    return config": (
        ": line 4: ZeroDivisionError: integer division or modulo by zero"
    ),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_cannot_be_used(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        config_file.load(file)
    assert str(error.value).startswith(f"--config={file}{BROKEN[text]}")
    assert "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    (tmp_path / "binary.py").write_bytes(bytes(range(256)))
    (tmp_path / "large.py").write_text("#" * (config_file.LARGEST + 1))
    for name, words in {
        "absent.py": "no such file; this project's configs are in ",
        ".": "is no file",
        "binary.py": "null bytes|line 1",
        "large.py": "has 1,048,577 bytes",
        "large.py/x": "cannot be read|no such file",
    }.items():
        with pytest.raises(ConfigError, match=f"^--config=.*({words})"):
            config_file.load(tmp_path / name)


def test_a_file_runs_once_and_its_neighbours_are_found_as_configs(tmp_path, capsys):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text(
        "from configs import v3_tiny\ndef get_config():\n"
        "    config = v3_tiny.get_config()\n    config.model.layers = 3\n    return config\n"
    )
    for file in (tmp_path / "configs" / "mine.py", tmp_path / "more" / "mine.py"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("print('read')\nfrom configs.base import get_config\n")
        before = {name: module for name, module in sys.modules.items() if "configs" in name}
        assert config_file.load(file).model.layers == 3
        after = {name: module for name, module in sys.modules.items() if "configs" in name}
        assert before == after and capsys.readouterr().out == "read\n"


def test_nothing_else_beside_a_file_is_imported(tmp_path):
    """Neither before nor after: a grain.py there must not replace the package."""
    folder = tmp_path / "some" / "where"
    folder.mkdir(parents=True)
    for place in (folder, tmp_path / "some", tmp_path):
        (place / "beside.py").write_text("raise AssertionError('imported')")
    (folder / "mine.py").write_text(f"import sys\n{BASE}    import beside")
    path = list(sys.path)
    with pytest.raises(ConfigError, match="No module named 'beside'"):
        config_file.load(folder / "mine.py")
    assert sys.path == path
    with pytest.raises(ModuleNotFoundError):
        import beside  # noqa: F401
