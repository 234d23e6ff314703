"""What may stand where a config or the command line wants a model."""

import pytest

from jaxlab.app import runs
from jaxlab.app.references import model_folder
from jaxlab.config import load
from jaxlab.errors import UserError
from jaxlab.tasks import train


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.py").write_text("x = 1\n" * 100)
    path = tmp_path / "small.yaml"
    path.write_text(f"data: {{path: {tmp_path / 'text.py'}, sequence_length: 8}}\n")
    return path


def test_the_config_of_a_run_that_is_not_done_tells_the_command(config, tmp_path):
    with pytest.raises(UserError, match=rf"run: python run\.py train {config}$"):
        model_folder(str(config), tmp_path / "outputs")


def test_the_config_of_a_finished_run_is_its_model(config, tmp_path):
    loaded = load(train.Config, config)
    folder = tmp_path / "outputs" / "train" / runs.run_name("train", loaded, "small", train.inputs(loaded))
    (folder / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="not trained yet"):  # a run under way has no results
        model_folder(str(config), tmp_path / "outputs")
    (folder / "results.json").write_text("{}")
    assert model_folder(str(config), tmp_path / "outputs") == folder / "model"


def test_folders(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert model_folder(str(tmp_path / "run")) == tmp_path / "run" / "model"
    assert model_folder(str(tmp_path / "run" / "model")) == tmp_path / "run" / "model"
    with pytest.raises(UserError, match="no such model"):
        model_folder(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="cannot be read"):
        model_folder(str(tmp_path / "nothing.yaml"))
